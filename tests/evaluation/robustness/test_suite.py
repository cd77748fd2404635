"""The robustness suite against a plain loop over images, and what it does when it is killed."""

import io
import itertools
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ns.config.schema import EvaluationConfig
from ns.core.errors import DataError
from ns.data.loading.decode import decode_image
from ns.data.loading.shard_reader import ImageSource
from ns.evaluation.result import Robustness, read_mistakes
from ns.evaluation.robustness import suite
from ns.evaluation.robustness.attacks import AttackPlan, attack_images
from ns.evaluation.robustness.perturbations import crop_center, render_sequence
from ns.evaluation.robustness.render import DistortionTask, distort_images, pack_images, render_base, unpack_images
from ns.evaluation.robustness.suite import RobustnessSuite, count_passes, list_units, measurement_inputs
from ns.modeling.predictor import Predictor
from ns.storage import LocalStore

SMALL = EvaluationConfig(
    suites=("corruptions", "perturbations", "attacks"),
    corruptions=("gaussian_noise", "contrast"),
    severities=(1, 5),
    perturbations=("translate", "brightness"),
    perturbation_frames=3,
    fgsm_epsilons=(4,),
    pgd_steps=(2,),
)


@pytest.fixture
def run(model, tmp_path):
    """Function: measures into a folder of `tmp_path` of its own."""
    predictors = {batch: Predictor(model, batch=batch) for batch in (4, 16)}

    def measure(data, name="a", config=SMALL, made=None, batch=16, predictor=None):
        out = LocalStore(tmp_path / name)
        result = RobustnessSuite(predictor or predictors[batch], *data, config, out.at("units"), made).run_suite(out)
        assert Robustness.load(out) == result
        return result

    return measure


def test_run_suite_matches_plain_loop(run, model, tmp_path, make_labeled_images):
    folder, data = make_labeled_images(tmp_path / "d")
    result = run((folder, data))
    predictor = Predictor(model, batch=1)
    source = ImageSource(folder, data)
    wrong = {kind: [0, 0] for kind in SMALL.corruptions}
    turned = dict.fromkeys(SMALL.perturbations, 0.0)
    clean = fgsm = images = 0
    for shard in range(len(data.shards)):
        for key, label, image in zip(
            source.read_index(shard).keys,
            source.read_class_ids(shard, 5).tolist(),
            source.read_encoded(shard),
            strict=True,
        ):
            if key == "image-002":
                continue
            pixels = decode_image(image)
            images += 1
            clean += int(predictor.predict_groups([[pixels]]).__next__().argmax()) == label
            for kind in SMALL.corruptions:
                for place, severity in enumerate(SMALL.severities):
                    (made,) = distort_images(DistortionTask([pixels], [key], kind, (severity,), 1, 0, True))
                    wrong[kind][place] += int(next(predictor.predict_groups([[made]])).argmax()) != label
            for kind in SMALL.perturbations:
                frames = render_sequence(pixels, kind, 3, np.random.default_rng(0))  # no chance in these
                answers = [int(next(predictor.predict_groups([[frame]])).argmax()) for frame in frames]
                turned[kind] += sum(one != other for one, other in itertools.pairwise(answers)) / 2
            seen = predictor.decode_pixels([image])
            labels = torch.tensor([label])
            changed = attack_images(predictor.compute_logits, seen, labels, AttackPlan.fgsm(4), [key], 0)
            fgsm += int(predictor.compute_logits(changed).argmax()) == label
    assert (result.images, result.unreadable) == (images, 1)
    assert result.top1 == clean / images
    assert result.corruptions == {kind: tuple(count / images for count in counts) for kind, counts in wrong.items()}
    assert result.attacks[0].top1 == pytest.approx(fgsm / images, abs=1.01 / images)
    assert [(one.name, one.steps, one.step_size) for one in result.attacks] == [("fgsm", 1, 4), ("pgd", 2, 20)]
    flips = {kind: one.flip_probability for kind, one in result.perturbations.items()}
    assert flips == pytest.approx({kind: count / images for kind, count in turned.items()})
    assert max(flips.values()) > 0
    mistakes = read_mistakes(LocalStore(tmp_path / "a"), result)
    assert len(mistakes.keys) == images
    assert "image-002" not in mistakes.keys
    assert {kind: counts.sum() for kind, counts in mistakes.corruptions.items()} == {k: sum(c) for k, c in wrong.items()}
    assert {kind: counts.sum() for kind, counts in mistakes.perturbations.items()} == {k: 2 * c for k, c in turned.items()}
    assert {attack: 1 - counts.mean() for attack, counts in mistakes.attacks.items()} == pytest.approx(
        {str(attack): attack.top1 for attack in result.attacks}
    )


@pytest.mark.integration
def test_run_suite_is_independent_of_shards_batches_processes(run, tmp_path, make_labeled_images, monkeypatch):
    first = run(make_labeled_images(tmp_path / "d"))
    monkeypatch.setattr(suite, "BLOCK_IMAGES", 7)
    monkeypatch.setattr(suite, "PROCESSES_FROM_SECONDS", 0)
    monkeypatch.setattr(suite, "count_cores", lambda: 2)
    other = run(make_labeled_images(tmp_path / "e", per_shard=4), "b", batch=4)
    for field in ("images", "top1", "corruptions", "perturbations", "attacks"):
        assert getattr(other, field) == getattr(first, field), field


def test_distort_images_depends_on_seed_and_key():
    image = np.full((8, 8, 3), 100, np.uint8)
    one, same, other = (
        distort_images(DistortionTask([image], ["k"], "gaussian_noise", (3,), 1, seed, True))[0] for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    twin = distort_images(DistortionTask([image], ["l"], "gaussian_noise", (3,), 1, 0, True))[0]
    assert not np.array_equal(one, twin)


def test_run_suite_reuses_distorted_images(run, make_model, tmp_path, make_labeled_images, monkeypatch):
    data = make_labeled_images(tmp_path / "d", size=80)
    config = SMALL.model_copy(update={"suites": ("corruptions",)})
    second = Predictor(make_model(tmp_path / "m", seed=1), batch=16)
    alone = run(data, "alone", config, predictor=second)
    made = LocalStore(tmp_path / "made")
    run(data, "first", config, made)
    assert len(list(made.list())) == 6
    costs = []
    real = RobustnessSuite._estimate_cost
    monkeypatch.setattr(
        RobustnessSuite, "_estimate_cost", lambda self, *pending: costs.append(real(self, *pending)) or costs[-1]
    )
    monkeypatch.setattr(
        RobustnessSuite, "_build_task", lambda self, unit, images, part: part == slice(0, 1) or pytest.fail("made again")
    )
    monkeypatch.setattr(suite, "distort_images", lambda task: [])
    assert run(data, "second", config, made, predictor=second).hashed_fields() == alone.hashed_fields()
    assert (costs[0].distort_seconds, costs[0].kept_bytes) == (0, 0)
    assert costs[0].passes == 24 * (1 + 2 * 2)


def test_run_suite_keeps_at_most_keep_gib(run, tmp_path, make_labeled_images):
    made = LocalStore(tmp_path / "made")
    run(make_labeled_images(tmp_path / "d"), config=SMALL.model_copy(update={"keep_gib": 1e-6}), made=made)
    assert list(made.list()) == []


def test_unpack_images_inverts_pack_images():
    small = [np.random.default_rng(n).integers(0, 256, (4 + n, 5, 3), np.uint8) for n in range(3)]
    assert all(
        np.array_equal(one, other)
        for one, other in zip(unpack_images(pack_images(small), "a", keep_size=True), small, strict=True)
    )
    photographs = distort_images(DistortionTask([np.zeros((256, 300, 3), np.uint8)], ["k"], "contrast", (1, 2), 1, 0, False))
    assert unpack_images(pack_images(photographs), "a", keep_size=False) == photographs


def test_render_base_resizes_photographs_only(picture):
    assert render_base(picture(0, "JPEG", 64), keep_size=True).shape == (64, 64, 3)
    assert render_base(picture(0, "JPEG", 64), keep_size=False).shape == (256, 256, 3)


def test_crop_center_matches_torchvision():
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, Resize

    pixels = np.random.default_rng(0).integers(0, 256, (300, 417, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    published = Compose([Resize(256), CenterCrop(224)])(Image.fromarray(pixels))
    assert np.array_equal(crop_center(render_base(sink.getvalue(), keep_size=False)), np.asarray(published))


def test_run_suite_adds_units_to_finished_ones(run, tmp_path, make_labeled_images, monkeypatch):
    data = make_labeled_images(tmp_path / "d")
    less = SMALL.model_copy(update={"suites": ("corruptions",)})
    run(data, config=less)
    done = []
    real = RobustnessSuite._write_unit
    monkeypatch.setattr(
        RobustnessSuite,
        "_write_unit",
        lambda self, block, unit, table: (done.append(unit.kind), real(self, block, unit, table)),
    )
    whole = run(data)
    assert set(done) == {"translate", "brightness", "fgsm-4", "pgd-16-2x20"}
    done.clear()
    assert run(data).digest == whole.digest
    assert done == []
    assert measurement_inputs(less) != measurement_inputs(SMALL)


def test_run_suite_logs_cost_first(run, tmp_path, make_labeled_images, capsys):
    run(make_labeled_images(tmp_path / "d"))
    lines = capsys.readouterr().err.splitlines()
    cost = next(place for place, line in enumerate(lines) if "cost" in line)
    assert "forward_passes" in lines[cost]
    assert cost < next(place for place, line in enumerate(lines) if "progress" in line)


def test_count_passes():
    plain = EvaluationConfig(suites=("corruptions", "perturbations", "attacks"))
    assert count_passes(plain) == 1 + 15 * 5 + 10 * 31 + 4 * 4 + (10 * 3 + 1) + (50 * 3 + 1)
    assert count_passes(EvaluationConfig()) == 1
    assert len(list_units(EvaluationConfig(suites=("corruptions",), extra_corruptions=True))) == 20


def test_run_suite_keeps_rows_of_every_image(run, tmp_path, make_labeled_images):
    result = run(make_labeled_images(tmp_path / "d"))
    table = pq.read_table(io.BytesIO((tmp_path / "a/units/shard-00000-00000/gaussian_noise-15.parquet").read_bytes()))
    assert table["key"].to_pylist()[:4] == ["image-000", "image-000", "image-001", "image-001"]
    assert table["severity"].to_pylist()[:4] == [1, 5, 1, 5]
    assert len(table) == 2 * 9
    frames = pq.read_table(io.BytesIO((tmp_path / "a/units/shard-00000-00000/translate-x3.parquet").read_bytes()))
    assert len(frames) == 3 * 9
    assert len(frames["top"][0]) == 5
    assert result.frames == 3


def test_run_suite_halves_attack_batches_without_memory(run, tmp_path, make_labeled_images, monkeypatch):
    data = make_labeled_images(tmp_path / "d")
    config = SMALL.model_copy(update={"suites": ("attacks",)})
    plenty = run(data, "plenty", config)
    real = suite.attack_images

    def little(logits, images, *rest):
        if len(images) > 3:
            raise torch.OutOfMemoryError
        return real(logits, images, *rest)

    monkeypatch.setattr(suite, "attack_images", little)
    assert run(data, "little", config).attacks == plenty.attacks
    monkeypatch.setattr(suite, "attack_images", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        run(data, "none", config)


def test_run_suite_refuses_set_without_readable_image(run, tmp_path, make_labeled_images):
    with pytest.raises(DataError, match="no readable image"):
        run(make_labeled_images(tmp_path / "d", count=3, damaged=(0, 1, 2)))


@pytest.mark.integration
def test_run_suite_continues_after_kills(run, model, tmp_path, make_labeled_images, monkeypatch):
    """SIGKILL all over the work: the units that were done stay, and what comes of it is the same."""
    data = make_labeled_images(tmp_path / "d", count=60)
    calm = run(data, "calm")
    total = len(list(LocalStore(tmp_path / "calm").list("units/")))
    out = LocalStore(tmp_path / "killed")
    rng = np.random.default_rng(0)
    real = RobustnessSuite._write_unit

    def count_done() -> int:
        return len(list(out.list("units/")))

    def start_killed(target: int, seconds: float) -> int:
        """A forked process that dies `seconds` after `target` units are done, and has written at most three more by then."""
        process = os.fork()
        if process:
            return process

        def write(self, block, unit, table):
            if count_done() >= target + 3:
                signal.pause()
            real(self, block, unit, table)
            if count_done() == target:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

        try:
            monkeypatch.setattr(RobustnessSuite, "_write_unit", write)
            made = LocalStore(tmp_path / "made")
            RobustnessSuite(Predictor(model, batch=16), *data, SMALL, out.at("units"), made).run_suite(out)
        finally:
            os._exit(1)

    done = 0
    while (target := done + int(rng.integers(1, 8))) + 3 < total:
        process = start_killed(target, float(rng.uniform(0, 0.05)))
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        assert target <= count_done() <= target + 3, "a unit that was done is gone"
        done = count_done()
    assert not out.exists(Robustness.filename)
    assert done > total / 2
    assert run(data, "killed", made=LocalStore(tmp_path / "made")).digest == calm.digest


DISTORT = """
from contextlib import ExitStack
import numpy as np
from ns.evaluation.robustness import suite
from ns.evaluation.robustness.render import DistortionTask, distort_images

suite.count_cores = lambda: 2
with ExitStack() as stack:
    executor = suite._make_executor(stack, suite.PROCESSES_FROM_SECONDS)
    task = DistortionTask([np.zeros((8, 8, 3), np.uint8)], ["a"], "contrast", (1,), 1, 0, keep_size=True)
    print(len(executor.submit(distort_images, task).result()))
    print(executor.submit(eval, "'torch' in __import__('sys').modules").result())
"""


@pytest.mark.integration
def test_helper_processes_do_not_import_torch():
    # In a process of its own: all pools of a process have one parent, which has what the first of them needed.
    done = subprocess.run([sys.executable, "-c", DISTORT], capture_output=True, text=True, check=True)
    assert done.stdout == "1\nFalse\n"
