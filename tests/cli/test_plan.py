"""What is said before a run begins."""

import io
import json
import subprocess

import pytest
import typer
from rich.console import Console

from ns.cli import plan
from ns.config.loader import parse_experiment


@pytest.fixture
def experiment(tmp_path):
    data = {"labeled": f"{tmp_path}/l", "pool": f"{tmp_path}/p", "heldout": f"{tmp_path}/h"}
    return parse_experiment({"name": "timed", "data": data}, "test")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), force_terminal=True, highlight=False, width=200)


def estimate(monkeypatch, hours):
    monkeypatch.setattr(plan, "_estimate_quickly", lambda _: {"hours": hours, "machine": "a laptop"})


def ask(monkeypatch, answer: bool) -> list[str]:
    questions: list[str] = []

    def confirm(text, **_):
        questions.append(text)
        if not answer:
            raise typer.Abort

    monkeypatch.setattr(typer, "confirm", confirm)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    return questions


def test_time_is_said_and_nothing_asked(experiment, console, monkeypatch):
    estimate(monkeypatch, 3.5)
    questions = ask(monkeypatch, answer=False)
    plan.announce_time(experiment, console, agreed=False)
    assert "about 3 h 30 min on a laptop, if every generation is run" in console.file.getvalue()
    assert questions == []


def test_a_run_of_more_than_a_day_is_asked_for(experiment, console, monkeypatch):
    estimate(monkeypatch, 59)
    questions = ask(monkeypatch, answer=False)
    with pytest.raises(typer.Abort):
        plan.announce_time(experiment, console, agreed=False)
    assert questions == ["Begin?"]
    plan.announce_time(experiment, console, agreed=True)
    assert len(questions) == 1
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    plan.announce_time(experiment, console, agreed=False)
    assert len(questions) == 1, "a script cannot answer"


@pytest.mark.parametrize("outcome", ["failed", "slow", "no JSON"])
def test_a_run_begins_without_an_estimate(experiment, console, monkeypatch, outcome):
    def run(command, **_):
        if outcome == "slow":
            raise subprocess.TimeoutExpired(command, plan.QUICK_LIMIT)
        return subprocess.CompletedProcess(command, int(outcome == "failed"), "no JSON", "")

    monkeypatch.setattr(subprocess, "run", run)
    plan.announce_time(experiment, console, agreed=False)
    assert console.file.getvalue() == ""


def test_nothing_is_said_off_a_terminal_nor_of_the_quickstart(experiment, console, monkeypatch):
    monkeypatch.setattr(plan, "_estimate_quickly", lambda _: pytest.fail("was estimated"))
    plan.announce_time(experiment, Console(file=io.StringIO()), agreed=False)
    digits = {part: f"digits:{part}" for part in ("labeled", "pool", "heldout")}
    plan.announce_time(parse_experiment({"name": "digits", "data": digits}, "test"), console, agreed=False)


@pytest.mark.integration
def test_estimate_is_that_of_ns_plan(tmp_path):
    digits = {part: f"digits:{part}" for part in ("labeled", "pool", "heldout")}
    network = {"model": {"arch": "test_efficientnet", "resolution": 32}, "train": {"labeled_batch": 10, "epochs": 1}}
    experiment = parse_experiment({"name": "digits", "data": digits, "teacher": network, "students": [network]}, "test")
    run_plan = plan._estimate_quickly(experiment)
    assert 0 < run_plan["hours"] < 1
    assert (run_plan["labeled"], run_plan["pool"]) == (50, 847)
    json.dumps(run_plan)
