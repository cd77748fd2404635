"""The local runner with stand-in stages: order, failures, messages."""

import builtins
import json
import os
import tempfile
import textwrap
from pathlib import Path

import pytest
from kfp.local.logging_utils import indented_print

from ns.core.errors import NsError
from ns.core.process import set_environment
from pipelines import GENERATION_PACKAGE
from pipelines.runners import local

STAND_IN = """
import json, os, sys
from collections import namedtuple

class RunRef(namedtuple("RunRef", "run")):
    from_uri = classmethod(lambda cls, uri: cls(uri))
    read_data_key = lambda ref: "data"

NextGeneration = namedtuple("NextGeneration", "run data shards generation teacher")
STOP = "stop"
PLAN = json.loads(os.environ["STAND_IN"])

def write_event(event, stage, generation, **fields):
    with open(os.environ["NS_EVENTS"], "a") as file:
        file.write(json.dumps({"event": event, "stage": stage, "generation": generation, "pid": os.getpid(), **fields}) + "\\n")

def run_stage(stage, generation, value):
    write_event("started", stage, generation)
    if PLAN.get("fail") == [stage, generation]:
        write_event("failed", stage, generation, error="the reason", exit_code=3)
        sys.exit(1)
    if PLAN.get("die") == [stage, generation]:
        os.kill(os.getpid(), 9)
    write_event("finished", stage, generation, seconds=0)
    return value

def start_run(config, run, overrides, fields, *, root): return run
def start_generation(config, run, overrides, fields, *, root):
    run_stage("start", 0, None)
    return NextGeneration(run, "data", ["0-1", "1-2", "2-3"], 3, PLAN["teacher"])
def prepare_data(ref): return run_stage("prepare", 0, "data")
def split_pool(ref, *, data): return ["0-1", "1-2", "2-3"]
def provide_teacher(ref, *, data, teacher, gpus, launch_remote): return run_stage("train", 0, "model-0")
def provide_student(ref, *, data, generation, teacher, selection, gpus, launch_remote):
    assert (teacher, selection, gpus, launch_remote) == (PLAN.get("labels", f"model-{generation - 1}"), f"selection-{generation}", 2, None)
    return run_stage("gate", generation, f"model-{generation}")
def resolve_teacher(ref, *, data, generation, first_teacher):
    assert first_teacher == "model-0"
    return run_stage("next-teacher", generation, f"model-{generation - 1}" if generation <= PLAN["generations"] else STOP)
def label_shards(ref, *, data, generation, teacher, shards, gpus):
    # A value from beside the loop may be replaced by the loop's item.
    assert (data, teacher, gpus) == ("data", PLAN.get("labels", f"model-{generation - 1}"), 1)
    return run_stage("label", generation, shards)
def commit_labels(ref, *, data, generation, teacher): return run_stage("select", generation, f"selection-{generation}")
def report_run(ref): return run_stage("report", 0, "report")
def publish_model_metrics(ref, model, metrics, classification): pass
def publish_report(ref, page, summary, generation=None): pass
"""


@pytest.fixture
def run_stand_in(tmp_path, monkeypatch):
    """Runs the pipeline with stand-in stages; returns the events, or raises as the runner does."""
    # Loaded by every Python that starts, before a component imports the real stages: one module stands in for all of ns.stages.
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import os, sys
            if "STAND_IN" in os.environ:
                import stand_in
                for name in "context", "start", "prepare", "label", "select", "roles", "gate", "report":
                    sys.modules[f"ns.stages.{name}"] = stand_in
            """
        )
    )
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")
    # Stand-ins need no library.
    monkeypatch.setattr(local, "STAGE_MODULES", [name for name in local.STAGE_MODULES if name.startswith(("components", "ns"))])

    def run(given=None, **plan):
        events = []
        monkeypatch.setenv("STAND_IN", json.dumps({"generations": 2, **plan}))
        log = tmp_path / "pipeline.log"
        options = {"expect_work": False, **GPUS, **(given or {})}
        local.run_locally(config_uri="c", root="r", run="n", log=log, on_event=events.append, **options)
        return [(e["stage"], e["generation"]) for e in events if e["event"] == "finished"]

    return run


GPUS = {"gpus_label": "1", "gpus_train": "2"}
GENERATION = ["label", "label", "label", "select", "gate"]


@pytest.mark.integration
def test_run_locally_runs_stages_in_order_until_stop(run_stand_in):
    expected = [("prepare", 0), ("train", 0), *[(stage, 1) for stage in GENERATION]]
    expected += [(stage, 2) for stage in ("next-teacher", *GENERATION)]
    expected += [("next-teacher", generation) for generation in (3, 4, 5)] + [("report", 0)]
    assert run_stand_in() == expected


@pytest.mark.integration
@pytest.mark.parametrize(
    ("teacher", "expected"), [("student-2", [("train", 0), *[(stage, 3) for stage in GENERATION]]), ("stop", [])]
)
def test_run_locally_one_generation(run_stand_in, teacher, expected):
    done = run_stand_in({"package": GENERATION_PACKAGE}, teacher=teacher, labels=teacher)
    assert done == [("start", 0), *expected, ("report", 0)]


@pytest.mark.integration
def test_run_locally_starts_a_python_per_stage_where_asked_to(run_stand_in, monkeypatch):
    monkeypatch.setenv(local.FORK_VARIABLE, "0")
    monkeypatch.setattr(local, "ForkServer", None)
    assert run_stand_in({"package": GENERATION_PACKAGE}, teacher="stop")[0] == ("start", 0)


@pytest.mark.integration
def test_run_locally_writes_output_of_kfp_to_the_log_and_leaves_no_temporary_files(run_stand_in, tmp_path, monkeypatch, capsys):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    run_stand_in(generations=1)
    assert list(temporary.iterdir()) == []
    lines = (tmp_path / "pipeline.log").read_text().splitlines()
    assert any("finished with status SUCCESS" in line for line in lines)
    assert not any(line.startswith(" ") or "\x1b" in line for line in lines)
    assert capsys.readouterr().out == ""


@pytest.mark.integration
def test_run_locally_failed_stage_message_and_exit_code(run_stand_in):
    with pytest.raises(NsError) as caught:
        run_stand_in(fail=["gate", 1])
    assert str(caught.value) == "generation 1: gate: the reason"
    assert caught.value.exit_code == 3


@pytest.mark.integration
def test_run_locally_failed_labeling_task(run_stand_in):
    with pytest.raises(NsError, match="generation 1: label: the reason"):
        run_stand_in(fail=["label", 1])


@pytest.mark.integration
def test_run_locally_names_a_stage_that_died(run_stand_in):
    with pytest.raises(NsError, match=r"teacher: train: exited without an error message \(killed\? out of memory\?\)"):
        run_stand_in(die=["train", 0])


def test_print_is_what_it_was_after_a_run(monkeypatch):
    """KFP's tasks that overlap leave an indenting one."""

    def overlap():
        first, second = indented_print(), indented_print()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)

    before = builtins.print
    local.run_redirected(overlap, None, local._EventWatcher(lambda event: None))
    assert builtins.print is before


def test_stages_import_the_project_of_their_client():
    with set_environment(local._make_import_variables()):
        first = os.environ["PYTHONPATH"].split(os.pathsep)[0]
    assert Path(first, "pipelines", "runners", "local.py") == Path(local.__file__)


def test_log_writer_without_a_writable_file(tmp_path):
    output = local.LogWriter(tmp_path / "no" / "such" / "folder" / "log")
    output.write("one\n  two\nTraceback (most recent call last):\n")
    assert output.find_last_message() == "two"
    output.write("ns.core.errors.StoreError: store/a: cannot write: the disk is full\n")
    assert output.find_last_message() == "store/a: cannot write: the disk is full"
    output.close()
