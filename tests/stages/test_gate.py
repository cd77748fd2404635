"""Who the next teacher is."""

import pytest

from ns.core.errors import StoreError, TrainingError
from ns.runs.summary import summarize_run
from ns.stages.evaluate import evaluate_heldout
from ns.stages.gate import resolve_teacher
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from tests.loop import open_tiny_run, run_loop


def test_refused_student_ends_the_loop(finished_run):
    store, _ = finished_run
    ref = open_tiny_run(store, "generations=3", "gate.min_gain=0.99")
    run_loop(ref)
    summary = summarize_run(store, ref.run)
    assert [generation.verdict for generation in summary.generations] == ["refused"]
    assert "must be above +0.990" in summary.generations[0].reason
    assert summary.best_top1 == summary.teacher_top1


def test_next_teacher_refuses_a_first_teacher_at_chance(finished_run, monkeypatch):
    _, ref = finished_run
    data = prepare_data(ref)
    first = train_generation(ref, data=data, generation=0)
    real = evaluate_heldout

    def useless(*arguments):
        folder, evaluation = real(*arguments)
        return folder, evaluation.model_copy(update={"top1": 0.11})

    monkeypatch.setattr("ns.stages.gate.evaluate_heldout", useless)
    with pytest.raises(TrainingError, match="no better than chance"):
        resolve_teacher(ref, data=data, generation=1, first_teacher=first)


def test_missing_teacher_is_an_error(finished_run):
    _, ref = finished_run
    data = prepare_data(ref)
    missing = pytest.raises(StoreError, match=r"store/models/gone/\S+: .*no such")
    with missing:
        resolve_teacher(ref, data=data, generation=1, first_teacher="store/models/gone")
    with missing:
        train_generation(ref, data=data, generation=1, teacher="store/models/gone")
