"""The local runner with stand-in stages: order, failures, messages."""

import json
import tempfile
import textwrap

import pytest

from ns.core.errors import NsError
from pipelines import GENERATION_PACKAGE
from pipelines.runners import local

STAND_IN = """
import json, os, sys
from collections import namedtuple

RunRef = namedtuple("RunRef", "config_uri root run")
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

def start_run(config_uri, root, run, overrides, fields): return config_uri, run
def start_generation(config_uri, root, run, overrides, fields):
    run_stage("start-generation", 0, None)
    teacher = PLAN["teacher"]
    return config_uri, run, "data", 3 if teacher == "known" else 1, 2 if teacher == "known" else 0, teacher
def prepare_data(ref): return run_stage("prepare-data", 0, "data")
def train_generation(ref, *, data, generation, teacher="", selection=""): return run_stage("train", generation, f"model-{generation}")
def evaluate_generation(ref, *, data, generation, model): return run_stage("evaluate", generation, "evaluation")
def resolve_teacher(ref, *, data, generation, first_teacher):
    continues = first_teacher != STOP and generation <= PLAN["generations"]
    return run_stage("next-teacher", generation, "model" if continues else STOP)
def plan_labels(ref, *, data, generation): return run_stage("plan-labels", generation, ["0-1", "1-2", "2-3"])
def label_shard_range(ref, *, data, generation, teacher, shards): return run_stage("label-shards", generation, shards)
def commit_labels(ref, *, data, generation, teacher): return run_stage("commit-labels", generation, f"selection-{generation}")
def gate_generation(ref, *, data, generation, teacher, student): return run_stage("gate", generation, student)
def report_run(ref): return run_stage("report", 0, "report")
def publish_generation_metrics(ref, generation, metrics, classification): pass
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
                for name in "context", "start", "prepare", "train", "label", "select", "evaluate", "gate", "report":
                    sys.modules[f"ns.stages.{name}"] = stand_in
            """
        )
    )
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")

    def run(given=None, **plan):
        events = []
        monkeypatch.setenv("STAND_IN", json.dumps({"generations": 2, **plan}))
        log = tmp_path / "pipeline.log"
        local.run_locally(config_uri="c", root="r", run="n", log=log, on_event=events.append, **(given or {}))
        return [(e["stage"], e["generation"]) for e in events if e["event"] == "finished"]

    return run


GENERATION = [
    "next-teacher",
    "plan-labels",
    "label-shards",
    "label-shards",
    "label-shards",
    "commit-labels",
    "train",
    "evaluate",
    "gate",
]


def test_run_locally_runs_stages_in_order_until_stop(run_stand_in):
    expected = [("prepare-data", 0), ("train", 0), ("evaluate", 0)]
    expected += [(stage, generation) for generation in (1, 2) for stage in GENERATION]
    expected += [("next-teacher", generation) for generation in (3, 4, 5)] + [("report", 0)]
    assert run_stand_in() == expected


@pytest.mark.integration
@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("train", [("train", 0), ("evaluate", 0), *[(stage, 1) for stage in GENERATION]]),
        ("known", [("evaluate", 2), *[(stage, 3) for stage in GENERATION]]),
        ("stop", [("next-teacher", 1)]),
    ],
)
def test_run_locally_one_generation(run_stand_in, teacher, expected):
    done = run_stand_in({"package": GENERATION_PACKAGE}, generations=3, teacher=teacher)
    assert done == [("start-generation", 0), *expected, ("report", 0)]


def test_run_locally_leaves_no_temporary_files(run_stand_in, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    run_stand_in(generations=0)
    assert list(temporary.iterdir()) == []


def test_run_locally_failed_stage_message_and_exit_code(run_stand_in):
    with pytest.raises(NsError) as caught:
        run_stand_in(fail=["train", 1])
    assert str(caught.value) == "generation 1: train: the reason"
    assert caught.value.exit_code == 3


def test_run_locally_failed_labeling_task(run_stand_in):
    with pytest.raises(NsError, match="generation 1: label shards: the reason"):
        run_stand_in(fail=["label-shards", 1])


def test_run_locally_names_a_stage_that_died(run_stand_in):
    with pytest.raises(NsError, match=r"teacher: train: exited without an error message \(killed\? out of memory\?\)"):
        run_stand_in(die=["train", 0])


def test_run_locally_writes_output_of_kfp_to_the_log(run_stand_in, tmp_path, capsys):
    run_stand_in(generations=0)
    lines = (tmp_path / "pipeline.log").read_text().splitlines()
    assert any("finished with status SUCCESS" in line for line in lines)
    assert not any(line.startswith(" ") or "\x1b" in line for line in lines)
    assert capsys.readouterr().out == ""


def test_log_writer_without_a_writable_file(tmp_path):
    output = local.LogWriter(tmp_path / "no" / "such" / "folder" / "log")
    output.write("one\n  two\nTraceback (most recent call last):\n")
    assert output.find_last_message() == "two"
    output.write("ns.core.errors.StoreError: store/a: cannot write: the disk is full\n")
    assert output.find_last_message() == "store/a: cannot write: the disk is full"
    output.close()
