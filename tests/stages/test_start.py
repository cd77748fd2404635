"""How runs begin."""

import pytest

from ns.config.loader import load_experiment
from ns.core.errors import ConfigError, DataError
from ns.runs.lifecycle import derive_run_name
from ns.runs.records import list_stage_failures, list_stage_tries
from ns.runs.summary import summarize_run
from ns.stages.context import STOP, RunRef
from ns.stages.roles import provide_teacher
from ns.stages.start import start_generation, start_run
from ns.storage import LocalStore
from tests.loop import TINY, run_generation


def test_start_generation_continues_from_the_accepted_student(finished_run):
    store, ref = finished_run
    root, run = ref.root, ref.run
    best = summarize_run(store, run).best_model
    started = start_generation("quickstart", "", TINY, root=root)
    assert started[2:] == (["0-1", "1-2"], 2, best)
    assert started == start_generation("quickstart", "", TINY, root=root), "a stage that is repeated finds its run"
    ref = RunRef.from_uri(started.run)
    assert provide_teacher(ref, data=started.data, teacher=best) == best
    summary = summarize_run(store, ref.run)
    assert summary.best_model == best
    assert [(note.stage, note.generation, note.reused) for note in summary.stages] == [
        ("prepare", 0, True),
        ("train", 1, True),
        ("evaluate", 1, True),
    ]


def test_start_generation_trains_a_teacher_and_tries_no_refused_student_again(finished_run):
    root = finished_run[1].root
    asked = [*TINY, "name=recurring", "gate.min_gain=0.99"]
    started = start_generation("quickstart", "", asked, root=root)
    assert started.generation == 1
    ref = RunRef.from_uri(started.run)
    teacher = provide_teacher(ref, data=started.data, teacher=started.teacher)
    assert teacher == started.teacher
    run_generation(ref, data=started.data, generation=1, teacher=teacher)
    again = start_generation("quickstart", "", asked, root=root)
    assert (again.run, again.teacher) == (started.run, STOP)
    changed = start_generation("quickstart", "", [*asked, "seed=8"], root=root)
    assert changed.teacher not in (STOP, started.teacher)
    assert changed.run != started.run


def test_start_generation_refuses_a_teacher_of_other_classes(finished_run, monkeypatch):
    _, ref = finished_run
    root, run = ref.root, ref.run
    monkeypatch.setattr("ns.stages.start.read_labeled_classes", lambda *_: ("cat", "dog"))
    with pytest.raises(DataError, match=rf"data.labeled: digits:labeled: its classes .*\(run {run}\); give the experiment"):
        start_generation("quickstart", "", TINY, root=root)


def test_start_run_keeps_overrides_and_fields(tmp_path):
    root = str(tmp_path / "root")
    fields = {"data.labeled": "", "data.pool": "s3://bucket/pool", "generations": 1, "labeling.tasks": 0}
    folder = start_run("quickstart", "", ["seed=7"], fields, root=root)
    experiment = load_experiment(f"{folder}/config.yaml")
    assert (experiment.seed, experiment.generations, experiment.data.pool) == (7, 1, "s3://bucket/pool")
    assert (experiment.data.labeled, experiment.labeling.tasks) == ("digits:labeled", 2)
    name = derive_run_name(experiment)
    assert RunRef.from_uri(folder) == RunRef(f"{folder}/config.yaml", f"file://{tmp_path}/root", name)
    assert start_run(f"{folder}/config.yaml", name, root=root) == folder, "a stage that is repeated finds its run"


@pytest.mark.parametrize(("run", "name"), [("elsewhere/", ""), ("elsewhere/mine", "mine")])
def test_start_run_below_another_root(tmp_path, run, name):
    folder = start_run("quickstart", f"{tmp_path}/{run}", root=str(tmp_path / "root"))
    assert folder == f"file://{tmp_path}/elsewhere/{name or derive_run_name(load_experiment(f'{folder}/config.yaml'))}"
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("start", [start_run, start_generation])
def test_start_keeps_why_it_failed_and_is_not_begun_again_in_vain(tmp_path, monkeypatch, start):
    store = LocalStore(tmp_path)
    uri = f"{store.uri}/mine"
    with pytest.raises(ConfigError, match=r"seed: invalid value -1") as first:
        start("quickstart", uri, ["seed=-1"], root=store.uri)
    (failure,) = list_stage_failures(store, "mine")
    assert str(failure) == f"start: {first.value}"
    assert list_stage_tries(store, "mine") == []
    with monkeypatch.context() as patch:
        patch.setenv("KFP_RETRY_INDEX", "1")
        patch.setattr("ns.stages.start.load_with_overrides", None)
        with pytest.raises(ConfigError, match=r"seed: invalid value -1"):
            start("quickstart", uri, ["seed=-1"], root=store.uri)
    start("quickstart", uri, ["seed=1"], root=store.uri)
    assert list_stage_failures(store, "mine") == []


@pytest.mark.parametrize("name", ["", "latest"])
def test_start_keeps_nothing_of_a_run_without_a_valid_name(tmp_path, name):
    with pytest.raises(ConfigError):
        start_run("quickstart", name, ["seed=-1"], root=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
