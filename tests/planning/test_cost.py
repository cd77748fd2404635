import io
import json
import re

import numpy as np
import pytest
import torch
from rich.console import Console

from ns.cli.plan import format_plan_remarks, make_plan_tables
from ns.config.loader import parse_experiment
from ns.config.schema import Experiment
from ns.core.errors import ConfigError, DataError
from ns.data.augment.transforms import TrainTransform
from ns.data.loading import shared_memory
from ns.labeling.predict import pack_label_rows
from ns.modeling import factory as models
from ns.modeling.predictor import ShardPredictions
from ns.planning.cost import PlanRequest, RunPlan, WorkEstimate, estimate_checkpoint_bytes, estimate_run
from ns.planning.data_stats import KnownCounts
from ns.storage import LocalStore
from ns.training.checkpoint import CheckpointWriter, TrainingState
from ns.training.ema import Ema
from ns.training.optim import make_optimizer

IMAGENET = KnownCounts({"labeled": 1_281_167, "pool": 130_000_000, "heldout": 50_000}, image_bytes=110_000)
NOWHERE = {"labeled": "./nowhere", "pool": "s3://nobody/nothing", "heldout": "./nowhere-else"}


def make_experiment(**fields) -> Experiment:
    return parse_experiment({"name": "planned", "data": NOWHERE, **fields}, "test")


@pytest.fixture(scope="module")
def paper():
    """B7 teaches L2, on 256 devices."""
    config = make_experiment(teacher={"preset": "b7"}, students=[{"preset": "l2"}], generations=1, labeling={"tasks": 8})
    return estimate_run(config, PlanRequest(IMAGENET, devices=256, multiply_adds_per_second=10e12, price=2.0))


def find_work(run_plan: RunPlan, task: str, generation: int) -> WorkEstimate:
    (work,) = [work for work in run_plan.work if (work.task, work.generation) == (task, generation)]
    return work


def test_plan_matches_the_papers_steps_and_images(paper):
    # arXiv:1911.04252 §3.1: 350 epochs in batches of 2048 + 14 × 2048, 6.3 · 10⁹ pseudo-labeled images.
    student = find_work(paper, "train", 1)
    assert student.steps == 218_950
    assert student.images == 218_950 * 2048 * 15
    assert student.images - student.steps * student.labeled_batch == pytest.approx(6.3e9, rel=0.01)
    # GMACs of timm's table.
    assert student.multiply_adds == pytest.approx(172.1e9, rel=0.01)
    assert student.parameters == pytest.approx(480e6, rel=0.01)


def test_time_is_images_times_passes_over_device_speed(paper):
    student, teacher, labeling = find_work(paper, "train", 1), find_work(paper, "train", 0), find_work(paper, "label", 1)
    assert student.device_hours == pytest.approx(student.images * 3 * student.multiply_adds / 10e12 / 3600)
    assert student.seconds == pytest.approx(student.device_hours * 3600 / 256)
    assert labeling.device_hours == pytest.approx(130e6 * teacher.multiply_adds / 10e12 / 3600)
    assert labeling.devices == 8
    assert paper.device_hours == pytest.approx(sum(work.device_hours for work in paper.work))
    assert paper.hours == pytest.approx(sum(work.seconds for work in paper.work) / 3600)
    assert paper.cost == pytest.approx(2 * paper.device_hours)


def test_reading_and_network_bytes_follow_images_and_weights(paper):
    student, labeling = find_work(paper, "train", 1), find_work(paper, "label", 1)
    assert student.read_bytes_per_second == pytest.approx(student.images_per_second * 110_000)
    assert labeling.read_bytes_per_second == pytest.approx(labeling.images_per_second * 110_000)
    assert student.network_bytes_per_step == pytest.approx(2 * 255 / 256 * 4 * student.parameters, rel=1e-9)
    assert labeling.network_bytes_per_step == 0


def test_plan_counts_what_is_set_apart_and_labeled_with_all_views():
    config = make_experiment(
        selection={"precision": 0.9}, data={**NOWHERE, "calibration_share": 0.2}, labeling={"views": "ten"}
    )
    run_plan = estimate_run(config, PlanRequest(IMAGENET, multiply_adds_per_second=1e12))
    assert (run_plan.heldout, run_plan.calibration) == (40_000, 10_000)
    assert find_work(run_plan, "evaluate", 0).images == 40_000 + 10 * 10_000


def test_plan_counts_views_and_models_of_the_labeler():
    request = PlanRequest(IMAGENET, multiply_adds_per_second=1e12)
    labeling = {"views": "five", "ensemble": ["a", "b"]}
    plain, costly = (estimate_run(make_experiment(labeling=options), request) for options in ({}, labeling))
    assert find_work(costly, "label", 1).seconds == pytest.approx(15 * find_work(plain, "label", 1).seconds)
    assert find_work(costly, "label", 1).images == find_work(plain, "label", 1).images
    fitted = estimate_run(make_experiment(labeling=labeling | {"temperature": "fitted"}), request)
    # Once for the temperature, once for confidences at this temperature.
    assert find_work(fitted, "evaluate", 0).images - fitted.heldout == 2 * 15 * fitted.calibration


@pytest.mark.parametrize(("kind", "compared"), [("distance", 20_000), ("energy", 0)])
def test_plan_counts_what_foreign_scores_take(kind, compared):
    data = {**NOWHERE, "calibration_share": 0.2}
    request = PlanRequest(IMAGENET, multiply_adds_per_second=1e12)
    plain = estimate_run(make_experiment(data=data), request)
    scored = estimate_run(make_experiment(data=data, labeling={"views": "flip", "foreign_score": kind}), request)
    # The calibration images are seen twice, in both views: by the labeler, and for their scores.
    assert find_work(scored, "evaluate", 0).images == 40_000 + 2 * 2 * 10_000 + compared
    assert scored.label_set_bytes - plain.label_set_bytes == 4 * scored.pool


def test_plan_says_what_counts_mean_for_the_selection():
    pool = KnownCounts({"labeled": 400, "pool": 15_000, "heldout": 1_000}, image_bytes=1000, classes=10)

    def list_remarks(**selection) -> str:
        run_plan = estimate_run(make_experiment(selection=selection), PlanRequest(pool, multiply_adds_per_second=1e12))
        return "\n".join(line for line in format_plan_remarks(run_plan) if line.startswith("selection."))

    assert list_remarks() == ""
    assert list_remarks(per_class=2000, precision=0.9) == ""
    assert "the pool has 1,500 images per class: the student sees each at least 86 times" in list_remarks(per_class=130_000)
    assert "needs 59 calibration images for a threshold of its own, and has about 50" in list_remarks(precision=0.95)


def test_single_device_sends_nothing():
    config = make_experiment(teacher={"preset": "b0"}, students=[{"preset": "b0"}], generations=1)
    run_plan = estimate_run(config, PlanRequest(IMAGENET, multiply_adds_per_second=1e12))
    assert {work.network_bytes_per_step for work in run_plan.work} == {0}
    assert run_plan.cost is None
    assert not any("of 1 devices" in line for line in format_plan_remarks(run_plan))


@pytest.mark.parametrize("optimizer", [{"name": "rmsprop"}, {"name": "sgd", "momentum": 0}, {"name": "sgd"}, {"name": "adamw"}])
def test_checkpoint_bytes_match_a_written_checkpoint(tmp_path, optimizer):
    role = make_experiment(
        teacher={"model": {"arch": "test_efficientnet", "resolution": 32}, "train": {"optimizer": optimizer}}
    ).teacher
    network = models.build_model(role.model, role.noise, 10)
    trained = make_optimizer(network, role.train.optimizer, 0.1)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trained.step()
    with CheckpointWriter(LocalStore(tmp_path), 2) as writer:
        writer.save(TrainingState(network, Ema(network, 0.9), trained))
    (written,) = tmp_path.iterdir()
    state = sum(value.numel() for value in network.state_dict().values())
    planned = estimate_checkpoint_bytes(models.count_parameters(network), state, role.train.optimizer)
    # The rest is the header: names, shapes, and JSON; it does not grow with the network's width.
    assert planned < written.stat().st_size < planned + 200_000


def test_label_set_bytes_bound_a_written_label_set(paper):
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(5000, 1000)).astype(np.float32)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(1, keepdims=True)

    class Index:
        keys = tuple(f"photos/{row // 100:04d}/{rng.bytes(16).hex()}" for row in range(5000))

        def __len__(self):
            return 5000

    written = len(pack_label_rows(ShardPredictions(Index(), probabilities, {}), 10)[0]) / 5000
    planned = paper.label_set_bytes / 130e6
    assert 0.8 * planned < written <= 1.05 * planned


def test_plan_includes_finetuning():
    student = {"preset": "b0", "train": {"finetune": {"resolution": 320, "labeled_batch": 100}}}
    config = make_experiment(students=[student], teacher={"preset": "b0"}, generations=1)
    run_plan = estimate_run(config, PlanRequest(IMAGENET, multiply_adds_per_second=1e12))
    tuning = find_work(run_plan, "finetune", 1)
    assert tuning.resolution == 320
    assert tuning.images == 100 * -(-1.5 * 1_281_167 // 100)
    assert [work.task for work in run_plan.work if work.generation == 1] == [
        "label",
        "train",
        "evaluate",
        "finetune",
        "evaluate",
    ]


def test_plan_remarks_name_a_slow_loader(monkeypatch, tmp_path):
    config = parse_experiment(
        {
            "name": "slow",
            "data": {part: f"digits:{part}" for part in NOWHERE},
            "teacher": {"model": {"arch": "test_efficientnet", "resolution": 64}, "train": {"loader_workers": 2}},
            "students": [{"model": {"arch": "test_efficientnet", "resolution": 64}}],
            "generations": 1,
        },
        "test",
    )
    monkeypatch.setattr("ns.planning.cost.measure_noise_seconds", lambda *_: 0.5)
    run_plan = estimate_run(config, PlanRequest(seconds=0.1, multiply_adds_per_second=1e12))
    teacher = find_work(run_plan, "train", 0)
    assert teacher.limited_by == "loader"
    assert teacher.images_per_second == pytest.approx(4)  # two cores, half a second an image
    cores = 0.5 * 1e12 / 3 / teacher.multiply_adds
    assert teacher.loader_cores == pytest.approx(cores)
    (line,) = [line for line in format_plan_remarks(run_plan) if line.startswith("teacher: waits")]
    assert f"set teacher.train.loader_workers to {int(np.ceil(cores))} or more" in line


def test_labeling_on_a_cpu_decodes_on_all_cores(monkeypatch):
    role = {"model": {"arch": "test_efficientnet", "resolution": 64}}
    data = {part: f"digits:{part}" for part in NOWHERE}
    config = make_experiment(data=data, teacher=role, students=[role], generations=1)
    monkeypatch.setattr("ns.planning.cost.measure_decode_seconds", lambda *_: 1.0)
    monkeypatch.setattr("ns.planning.cost.get_best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("ns.planning.cost.count_cores", lambda: 16)
    labeling = find_work(estimate_run(config, PlanRequest(seconds=0.1)), "label", 1)
    assert labeling.limited_by == "network"
    assert 14 < labeling.images_per_second < 16  # a second of a core an image, and the network's time


def test_plan_names_the_shared_memory_of_each_devices_loaders(paper):
    student, teacher = find_work(paper, "train", 1), find_work(paper, "train", 0)
    # 8 + 112 images of 475 px per device and step, in parts: 2 steps ahead, and what is in use.
    assert 2 * 120 * 475**2 * 3 < student.shared_memory_bytes < 2 * 120 * 475**2 * 3 + 4 * shared_memory.PART_BYTES
    assert teacher.shared_memory_bytes < student.shared_memory_bytes
    assert find_work(paper, "label", 1).shared_memory_bytes == 0
    (line,) = [line for line in format_plan_remarks(paper) if line.startswith("shared memory: ")]
    assert "223.3 MB per device, part of the memory (students.0)" in line


def test_images_of_a_quiet_pool_take_less_time_to_make(monkeypatch):
    role = {"model": {"arch": "test_efficientnet", "resolution": 64}}
    config = make_experiment(
        data={part: f"digits:{part}" for part in NOWHERE},
        teacher=role,
        students=[{**role, "noise": {"pool": "none"}, "train": {"unlabeled_ratio": 3}}],
        generations=1,
    )
    monkeypatch.setattr(
        "ns.planning.cost.measure_noise_seconds", lambda transform, *_: 0.5 if type(transform) is TrainTransform else 0.1
    )
    run_plan = estimate_run(config, PlanRequest(seconds=0.1, multiply_adds_per_second=1e15))
    teacher, student = (find_work(run_plan, "train", generation) for generation in (0, 1))
    assert teacher.images_per_second == pytest.approx(1 / 0.5)
    assert student.images_per_second == pytest.approx(1 / (0.5 / 4 + 0.1 * 3 / 4))


def test_unreadable_data_is_named():
    with pytest.raises(DataError, match=r"data\.labeled: .*nowhere.*or give the number of images: --labeled N"):
        estimate_run(make_experiment(), PlanRequest(KnownCounts({"pool": 3})))


def test_plan_checks_networks_first():
    with pytest.raises(ConfigError, match="its teacher"):
        estimate_run(
            make_experiment(teacher={"preset": "b7"}, students=[{"preset": "b0"}]),
            PlanRequest(IMAGENET, multiply_adds_per_second=1e12),
        )


def test_plan_is_json(paper):
    document = json.loads(paper.model_dump_json())
    assert document["device_hours"] == paper.device_hours
    assert document["work"][0]["device_hours"] == paper.work[0].device_hours


def test_plan_tables_fit_a_terminal(paper):
    sink = io.StringIO()
    console = Console(file=sink, width=80)
    for table in make_plan_tables(paper):
        console.print(table)
    assert "…" not in sink.getvalue()
    assert re.search(r"1 train +tf_efficientnet_l2@475 +480M +171G +6\.73G", sink.getvalue())


def test_robustness_is_counted_on_the_reported_images():
    counts = KnownCounts({"labeled": 1000, "pool": 5000, "heldout": 300, "test": 2000})
    evaluation = {"suites": ["corruptions", "attacks"], "images": 500}
    run_plan = estimate_run(
        make_experiment(generations=1, data={**NOWHERE, "test": "./nowhere-more"}, evaluation=evaluation),
        PlanRequest(counts, multiply_adds_per_second=1e12),
    )
    for generation in (0, 1):
        assert find_work(run_plan, "evaluate", generation).images == 2300
        assert find_work(run_plan, "robustness", generation).images == 500 * (1 + 75 + 4 * 4 + 31 + 151)
    conditioned = estimate_run(
        make_experiment(
            generations=1,
            data={**NOWHERE, "test": "./nowhere-more"},
            evaluation=evaluation,
            gate={"max_mce_rise": 2, "max_churn": 0.5},
        ),
        PlanRequest(counts, multiply_adds_per_second=1e12),
    )
    # What the gate asks of all held-out images, which are fewer; no attacks.
    assert find_work(conditioned, "robustness", 1).images == find_work(run_plan, "robustness", 1).images + 300 * (1 + 75)
    plain = estimate_run(make_experiment(generations=1), PlanRequest(counts, multiply_adds_per_second=1e12))
    assert {work.task for work in plain.work} == {"train", "label", "evaluate"}
    assert find_work(plain, "evaluate", 0).images == 300


def test_evaluation_sets_are_counted_for_every_model(tmp_path, picture):
    """Plain ones with clean images, but not for a fine-tuned form; published ones with what is distorted."""

    def put(name, *keys):
        for key in keys:
            path = tmp_path / name / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(0))
        return str(tmp_path / name)

    real = put("real", "cat/1.png", "cat/2.png", "dog/3.png")
    photographs = put(
        "c", *(f"{kind}/{n}/n01/{image}.JPEG" for kind in ("fog", "snow") for n in (1, 5) for image in range(3)), "x.txt"
    )
    films = put("p", "tilt/n01/1.mp4", "tilt/n02/2.mp4", "no_such_kind/n01/1.mp4")
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "fog.npy", np.zeros((20, 32, 32, 3), np.uint8))
    np.save(tmp_path / "arrays" / "labels.npy", np.zeros(20, np.uint8))
    sets = {
        "real": {"uri": real},
        "c": {"uri": photographs, "kind": "imagenet-c"},
        "p": {"uri": films, "kind": "imagenet-p"},
        "arrays": {"uri": str(tmp_path / "arrays"), "kind": "cifar10-c"},
    }
    counts = KnownCounts({"labeled": 1000, "pool": 5000, "heldout": 300}, classes=2)

    def estimate(**evaluation):
        config = make_experiment(
            generations=1,
            evaluation={"sets": sets, **evaluation},
            teacher={"train": {"finetune": {"resolution": 48}}, "model": {"arch": "test_efficientnet", "resolution": 32}},
            students=[{"model": {"arch": "test_efficientnet", "resolution": 32}}],
        )
        return estimate_run(config, PlanRequest(counts, multiply_adds_per_second=1e12))

    whole = estimate()
    assert [work.images for work in whole.work if work.task == "evaluate"] == [303, 300, 303]
    assert [work.images for work in whole.work if work.task == "robustness"] == [2 * 2 * 3 + 2 * 31 + 5 * 4] * 2
    quick = estimate(images=2, severities=[1, 2], corruptions=["fog"])
    assert find_work(quick, "robustness", 1).images == 2 + 2 * 31 + 2 * 2
    sets["c"]["uri"] = real
    with pytest.raises(DataError, match=r"evaluation.sets.c: .*real: is no imagenet-c set.*plan without it: --set"):
        estimate()
