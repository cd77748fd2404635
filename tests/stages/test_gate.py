"""Who the next teacher is."""

import re
import shutil

import numpy as np
import pytest

from ns.core.digest import sha256_bytes
from ns.core.errors import DataError, RunError, StoreError, TrainingError
from ns.data.shards import read_samples
from ns.evaluation.accuracy import build_predictions_table, summarize_predictions
from ns.evaluation.gate import Verdict
from ns.evaluation.result import read_predictions
from ns.modeling.manifest import ModelManifest
from ns.runs.lookup import list_runs, read_prepared_data, resolve_verdict
from ns.runs.records import RunRecord, find_stage_note, record_key, write_stage_note
from ns.runs.summary import summarize_run
from ns.stages.context import STOP, RunRef
from ns.stages.evaluate import evaluate_heldout
from ns.stages.gate import check_first_teacher, gate_generation, resolve_teacher
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from ns.storage import LocalStore
from ns.storage.parquet import encode_table
from tests.loop import open_tiny_run, run_loop


def test_refused_student_ends_the_loop(finished_run):
    store, _ = finished_run
    ref = open_tiny_run(store, "generations=3", "gate.min_gain=0.99")
    run_loop(ref)
    summary = summarize_run(store, ref.run)
    assert [generation.verdict for generation in summary.generations] == ["refused"]
    assert "must be above +99.00 points" in summary.generations[0].reason
    assert summary.best_top1 == summary.teacher_top1


def test_loop_is_decided_by_its_own_verdicts(finished_run):
    """A change of code that no ledger entry knows must not look like the end of the loop."""
    store, finished = finished_run
    verdict = Verdict.load_file(store, find_stage_note(store, finished.run, 1, "gate").outputs["verdict"])
    ref = open_tiny_run(store, "generations=2", "seed=77")
    data = prepare_data(ref)

    def resolve(**changes):
        verdict.model_copy(update=changes).save_file(store, "verdict.json")
        write_stage_note(store, ref.run, 1, "gate", {"verdict": "verdict.json"}, 1.0, reused=False)
        return resolve_teacher(ref, data=data, generation=2, first_teacher=verdict.teacher)

    assert resolve(promoted=True) == verdict.student
    assert resolve(promoted=False) == STOP
    assert resolve(promoted=True, teacher="store/models/another") == STOP


def test_stage_refuses_code_that_the_run_was_not_begun_with(finished_run, monkeypatch):
    store, ref = finished_run
    record = RunRecord.load_file(store, record_key(ref.run))
    with monkeypatch.context() as patch:
        patch.setattr("ns.runs.lifecycle.describe_code", lambda: record.code | {"ns": "changed"})
        with pytest.raises(RunError, match=r"was begun with ns .*, now changed; the same command continues"):
            prepare_data(ref)
    prepare_data(ref)


def test_check_first_teacher_refuses_one_at_chance(finished_run, monkeypatch, tmp_path):
    _, ref = finished_run
    data = prepare_data(ref)
    first = train_generation(ref, data=data, generation=0)

    def answer_one_class(*arguments):
        """95 % of the images are a `1`, and so are all answers."""
        rows = read_predictions(*evaluate_heldout(*arguments))
        _, evaluation = evaluate_heldout(*arguments)
        class_ids = np.repeat([1, 7], [190, 10])
        probabilities = np.tile(np.eye(10, dtype=np.float32)[1], (200, 1))
        table = build_predictions_table(rows["key"].to_pylist()[:200], class_ids, probabilities)
        encoded = encode_table(table)
        fields = {name: getattr(evaluation, name) for name in ("model", "dataset", "name", "classes", "unreadable", "mode")}
        summary = summarize_predictions(table, **fields, predictions_sha256=sha256_bytes(encoded))
        LocalStore(tmp_path).put(summary.predictions_key, encoded)
        return LocalStore(tmp_path), summary

    monkeypatch.setattr("ns.stages.gate.evaluate_heldout", answer_one_class)
    expected = (
        "no better than chance on 200 held-out images: its top-1 is 95.0%, always '1' has 95.0%; its balanced accuracy is 50.0%, "
        "any fixed answer has 50.0%; it never predicts 1 of 2 classes: 7; "
    )
    with pytest.raises(TrainingError, match=re.escape(expected)):
        check_first_teacher(ref, data=data, teacher=first)


def test_missing_teacher_is_an_error(finished_run):
    _, ref = finished_run
    data = prepare_data(ref)
    missing = pytest.raises(StoreError, match=r"store/models/gone/\S+: .*no such")
    with missing:
        resolve_teacher(ref, data=data, generation=1, first_teacher="store/models/gone")
    with missing:
        train_generation(ref, data=data, generation=1, teacher="store/models/gone")


@pytest.fixture
def copied_root(finished_run, tmp_path):
    """A copy of the finished run's store: students that are accepted in it change no other test."""
    store, _ = finished_run
    shutil.copytree(store.root, tmp_path / "root")
    return LocalStore(tmp_path / "root")


def test_gate_refuses_models_that_were_evaluated_on_different_images(copied_root, monkeypatch):
    """A file of the store was changed by hand."""
    store = copied_root
    ref = list_runs(store)[0].run
    ref = RunRef(f"{store.uri}/{ref}/config.yaml", store.uri, ref)
    verdict = resolve_verdict(store, ref.run)[1]
    student = ModelManifest.load(store.at(verdict.student)).digest

    def read_fewer(evaluation_store, evaluation):
        rows = read_predictions(evaluation_store, evaluation)
        return rows[1:] if evaluation.model == student else rows

    monkeypatch.setattr("ns.stages.gate.read_predictions", read_fewer)
    with pytest.raises(
        DataError, match="gate: teacher and student were evaluated on different images; run the evaluation again"
    ):
        gate_generation(ref, data=prepare_data(ref), generation=1, teacher=verdict.teacher, student=verdict.student)


@pytest.mark.integration
def test_copies_of_heldout_images_count_once(copied_root, tmp_path):
    """25 images, each 20 times under other names: the gate sees 25."""
    store = copied_root
    source = _export_heldout(store, tmp_path, images=25)
    copies = tmp_path / "copies"
    for path in sorted(source.glob("*/*")):
        for number in range(20):
            target = copies / path.parent.name / f"{path.stem}-{number:02d}{path.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    verdicts = {}
    for name, heldout in (("once", source), ("copied", copies)):
        ref = open_tiny_run(store, f"data.heldout={heldout}", "data.leak_guard='off'")
        run_loop(ref)
        verdicts[name] = resolve_verdict(store, ref.run)[1]
    once, copied = verdicts["once"], verdicts["copied"]
    assert (once.images, once.copies) == (25, 0)
    assert (copied.images, copied.copies) == (25, 475)
    assert (copied.paired, copied.heldout) == (once.paired, once.heldout)
    assert any(warning.startswith("475 held-out images are byte for byte the same") for warning in copied.warnings)
    # The same pair on the same images, under other names, is no further try.
    assert copied.try_number == once.try_number


def _export_heldout(store, folder, images):
    """A folder of the first held-out digits, one subfolder per class."""
    data_store, dataset = read_prepared_data(store, list_runs(store)[0].run).heldout.open_dataset(store)
    target = folder / "heldout"
    shard = dataset.shards[0]
    for number, sample in enumerate(read_samples(data_store.path(shard.name))[:images]):
        path = target / dataset.classes[sample.class_id] / f"{number}.{sample.extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data_store.get_range(shard.name, sample.offset, sample.size))
    for name in dataset.classes:
        (target / name).mkdir(exist_ok=True)
    return target


@pytest.mark.integration
def test_tries_are_counted_per_pair_and_repeated_verdicts_are_not(copied_root):
    store = copied_root
    first_ref = open_tiny_run(store)
    _, first = resolve_verdict(store, first_ref.run)
    data = find_stage_note(store, first_ref.run, 0, "prepare").outputs["data"]
    again = gate_generation(first_ref, data=data, generation=1, teacher=first.teacher, student=first.student)
    assert Verdict.load_file(store, again).try_number == first.try_number
    ref = open_tiny_run(store, "seed=7")
    run_loop(ref)
    _, other = resolve_verdict(store, ref.run)
    assert other.heldout == first.heldout
    assert other.try_number > first.try_number
    # Settings of the gate make no new try.
    strict = open_tiny_run(store, "gate.spend=bonferroni")
    run_loop(strict)
    _, spent = resolve_verdict(store, strict.run)
    assert spent.try_number == first.try_number
    assert spent.level == pytest.approx(1 - 0.05 / (first.try_number * (first.try_number + 1)))
