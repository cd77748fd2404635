"""How runs begin."""

import pytest

from ns.config.loader import load_experiment
from ns.core.errors import DataError
from ns.runs.lifecycle import derive_run_name
from ns.runs.summary import summarize_run
from ns.stages.context import RunRef, TeacherSignal
from ns.stages.evaluate import evaluate_generation
from ns.stages.gate import resolve_teacher
from ns.stages.start import start_generation, start_run
from ns.stages.train import train_generation
from tests.loop import TINY, run_generation


def test_start_generation_continues_from_the_accepted_student(finished_run):
    store, ref = finished_run
    root, run = ref.root, ref.run
    best = summarize_run(store, run).best_model
    started = start_generation("quickstart", root, "", TINY)
    assert started[3:] == (2, 1, best)
    assert started == start_generation("quickstart", root, "", TINY), "a stage that is repeated finds its run"
    ref = RunRef(started.config_uri, root, started.run)
    assert resolve_teacher(ref, data=started.data, generation=2, first_teacher=best) == best
    summary = summarize_run(store, started.run)
    assert (summary.best_model, summary.teacher_top1) == (best, None)
    (adopted,) = [note for note in summary.stages if note.stage == "train"]
    assert (adopted.generation, adopted.reused) == (1, True)


def test_start_generation_trains_a_teacher_and_tries_no_refused_student_again(finished_run):
    root = finished_run[1].root
    asked = [*TINY, "name=recurring", "gate.min_gain=0.99"]
    started = start_generation("quickstart", root, "", asked)
    assert started[3:] == (1, 0, TeacherSignal.TRAIN)
    ref = RunRef(started.config_uri, root, started.run)
    first = train_generation(ref, data=started.data, generation=0)
    evaluate_generation(ref, data=started.data, generation=0, model=first)
    teacher = resolve_teacher(ref, data=started.data, generation=1, first_teacher=TeacherSignal.TRAIN)
    assert teacher == first
    run_generation(ref, data=started.data, generation=1, teacher=teacher)
    again = start_generation("quickstart", root, "", asked)
    assert (again.run, again.teacher) == (started.run, TeacherSignal.STOP)
    assert resolve_teacher(ref, data=again.data, generation=1, first_teacher=TeacherSignal.STOP) == TeacherSignal.STOP
    changed = start_generation("quickstart", root, "", [*asked, "seed=8"])
    assert (changed.teacher, changed.run != started.run) == (TeacherSignal.TRAIN, True)


def test_start_generation_refuses_a_teacher_of_other_classes(finished_run, monkeypatch):
    _, ref = finished_run
    root, run = ref.root, ref.run
    monkeypatch.setattr("ns.stages.start.read_labeled_classes", lambda *_: ("cat", "dog"))
    with pytest.raises(DataError, match=rf"data.labeled: digits:labeled: its classes .*\(run {run}\); give the experiment"):
        start_generation("quickstart", root, "", TINY)


def test_start_run_keeps_overrides_and_fields(tmp_path):
    root = str(tmp_path / "root")
    fields = {"data.labeled": "", "data.pool": "s3://bucket/pool", "generations": 1, "labeling.tasks": 0}
    asked = (["seed=7"], fields)
    uri, name = start_run("quickstart", root, "", *asked)
    experiment = load_experiment(uri)
    assert (experiment.seed, experiment.generations, experiment.data.pool) == (7, 1, "s3://bucket/pool")
    assert (experiment.data.labeled, experiment.labeling.tasks) == ("digits:labeled", 2)
    assert name == derive_run_name(experiment)
    assert start_run(uri, root, name) == (uri, name), "a stage that is repeated finds its run"
