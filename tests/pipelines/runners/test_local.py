"""The local runner with a pipeline of stand-in steps: order, failure, and what a person is told."""

import json
import tempfile
import textwrap

import pytest

from ns.core.errors import NsError
from pipelines import GENERATION_PACKAGE
from pipelines.runners import local

STEPS = """
import json, os, sys
STOP, TRAIN = "stop", "train"
PLAN = json.loads(os.environ["STAND_IN"])

def say(event, step, generation, **facts):
    with open(os.environ["NS_EVENTS"], "a") as file:
        file.write(json.dumps({"event": event, "step": step, "generation": generation, "pid": os.getpid(), **facts}) + "\\n")

def done(step, generation, value):
    say("started", step, generation)
    if PLAN.get("fail") == [step, generation]:
        say("failed", step, generation, error="the reason", exit_code=3)
        sys.exit(1)
    if PLAN.get("die") == [step, generation]:
        os.kill(os.getpid(), 9)
    say("finished", step, generation, seconds=0, quiet=True)
    return value

def start_run(c, r, n, overrides, fields): return c, n
def start_generation(c, r, n, overrides, fields):
    done("start-generation", 0, None)
    teacher = PLAN["teacher"]
    return c, n, "data", 3 if teacher == "known" else 1, 2 if teacher == "known" else 0, teacher
def dry_run(c, r, overrides, fields, *, devices, one_generation, page): return done(f"plan-{one_generation}", 0, "plan")
def prepare_data(c, r, n): return done("prepare-data", 0, "data")
def train(c, r, n, data, generation, teacher="", labels=""): return done("train", generation, f"model-{generation}")
def evaluate(c, r, n, data, generation, model): return done("evaluate", generation, "evaluation")
def resolve(c, r, n, data, generation, first):
    going_on = first != STOP and generation <= PLAN["generations"]
    return done("resolve", generation, "model" if going_on else STOP)
def plan_labels(c, r, n, data, generation): return done("plan-labels", generation, ["0-1", "1-2", "2-3"])
def label_shards(c, r, n, data, generation, teacher, shards): return done("label-shards", generation, shards)
def commit_labels(c, r, n, data, generation, teacher): return done("commit-labels", generation, f"labels-{generation}")
def gate(c, r, n, data, generation, teacher, student): return done("gate", generation, student)
def report(c, r, n): return done("report", 0, "report")
def show_measures(r, n, generation, metrics, answers): pass
def show_generation(r, n, generation, page, summary): pass
def show_run(r, n, page, summary): pass
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Runs the pipeline with stand-in steps; returns the events, or raises as the runner does."""
    # Loaded by every Python that starts, before the component imports the real steps.
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import os, sys
            if "STAND_IN" in os.environ:
                import importlib.util
                spec = importlib.util.spec_from_file_location("ns.stages.steps", os.path.join(os.path.dirname(__file__), "steps.py"))
                import ns
                ns.steps = ns.plan = sys.modules["ns.stages.steps"] = sys.modules["ns.planning"] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(ns.steps)
            """
        )
    )
    (tmp_path / "steps.py").write_text(STEPS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")

    def run(given=None, **plan):
        events = []
        monkeypatch.setenv("STAND_IN", json.dumps({"generations": 2, **plan}))
        log = tmp_path / "pipeline.log"
        local.run_locally(config_uri="c", root="r", run="n", log=log, on_event=events.append, **(given or {}))
        return [(e["step"], e["generation"]) for e in events if e["event"] == "finished"]

    return run


GENERATION = [
    "resolve",
    "plan-labels",
    "label-shards",
    "label-shards",
    "label-shards",
    "commit-labels",
    "train",
    "evaluate",
    "gate",
]


def test_steps_run_in_the_order_of_the_loop_and_stop_where_resolve_says(stand_in):
    expected = [("prepare-data", 0), ("train", 0), ("evaluate", 0)]
    expected += [(step, generation) for generation in (1, 2) for step in GENERATION]
    expected += [("resolve", generation) for generation in (3, 4, 5)] + [("report", 0)]
    assert stand_in() == expected


@pytest.mark.integration
@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("train", [("train", 0), ("evaluate", 0), *[(step, 1) for step in GENERATION]]),
        ("known", [("evaluate", 2), *[(step, 3) for step in GENERATION]]),
        ("stop", [("resolve", 1)]),
    ],
)
def test_one_generation_trains_a_teacher_or_goes_on_from_one_or_has_nothing_to_do(stand_in, teacher, expected):
    done = stand_in({"package": GENERATION_PACKAGE}, generations=3, teacher=teacher)
    assert done == [("start-generation", 0), *expected, ("report", 0)]


@pytest.mark.parametrize("given", [{}, {"package": GENERATION_PACKAGE}])
def test_a_dry_run_plans_and_runs_nothing(stand_in, given):
    assert stand_in({"dry_run": True, **given}) == [(f"plan-{bool(given)}", 0)]


def test_a_run_leaves_nothing_behind_among_temporary_files(stand_in, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    stand_in({"dry_run": True})
    assert list(temporary.iterdir()) == []


def test_a_failing_step_fails_the_run_with_its_name_its_reason_and_its_code(stand_in):
    with pytest.raises(NsError) as caught:
        stand_in(fail=["train", 1])
    assert str(caught.value) == "generation 1: train: the reason"
    assert caught.value.exit_code == 3


def test_a_failing_labeling_task_fails_the_run(stand_in):
    with pytest.raises(NsError, match="generation 1: label shards: the reason"):
        stand_in(fail=["label-shards", 1])


def test_a_step_that_dies_without_a_word_is_named(stand_in):
    with pytest.raises(NsError, match=r"teacher: train: ended without a word \(killed\? out of memory\?\)"):
        stand_in(die=["train", 0])


def test_kfps_output_goes_to_the_log_without_colors_and_indentation(stand_in, tmp_path, capsys):
    stand_in(generations=0)
    lines = (tmp_path / "pipeline.log").read_text().splitlines()
    assert any("finished with status SUCCESS" in line for line in lines)
    assert not any(line.startswith(" ") or "\x1b" in line for line in lines)
    assert capsys.readouterr().out == ""


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    output = local.LogWriter(tmp_path / "no" / "such" / "folder" / "log")
    output.write("one\n  two\nTraceback (most recent call last):\n")
    assert output.last_words() == "two"
    output.write("ns.core.errors.StoreError: store/a: cannot write: the disk is full\n")
    assert output.last_words() == "store/a: cannot write: the disk is full"
    output.close()
