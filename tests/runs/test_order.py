"""The order of runs and accepted students, where clocks go wrong."""

import pytest

from ns.config.loader import load_with_overrides
from ns.modeling.manifest import ModelManifest
from ns.runs import lifecycle, records
from ns.runs.lifecycle import open_run
from ns.runs.lookup import find_accepted_student, list_runs, resolve_run_name, resolve_verdict
from ns.runs.order import read_numbers, take_number
from ns.runs.records import write_stage_note
from ns.storage import LocalStore


@pytest.fixture
def clock_runs_backwards(monkeypatch):
    """Each run is begun on a machine whose clock is behind that of the one before."""
    times = [f"2026-01-{day:02d}T00:00:00.000000+00:00" for day in range(1, 29)]
    for module in (lifecycle, records):
        monkeypatch.setattr(module, "utc_timestamp", lambda: times.pop())


def test_latest_is_the_run_that_was_begun_last(tmp_path, clock_runs_backwards):
    store, experiment = LocalStore(tmp_path), load_with_overrides("quickstart")
    for name in ("c", "a", "b"):
        open_run(store, name, experiment, "test")
    # Continuing a run begins none.
    open_run(store, "c", experiment, "test")
    assert [record.run for record in list_runs(store)] == ["c", "a", "b"]
    assert resolve_run_name(store) == "b"


def test_accepted_student_is_the_one_that_was_accepted_last(finished_run, tmp_path, clock_runs_backwards):
    source, ref = finished_run
    verdict = resolve_verdict(source, ref.run)[1]
    experiment, store = load_with_overrides("quickstart"), LocalStore(tmp_path)
    for name, student in (("a", "models/1"), ("b", "models/2"), ("a-again", "models/1")):
        open_run(store, name, experiment, "test")
        key = f"store/verdicts/{name}/verdict.json"
        verdict.model_copy(update={"student": student, "generation": 1}).save_file(store, key)
        store.put(f"{student}/{ModelManifest.filename}", b"{}")
        take_number(store, "accepted", student)
        write_stage_note(store, name, 1, "gate", {"verdict": key}, 0, reused=False)
    assert find_accepted_student(store, experiment.name) == ("b", 1, "models/2")


def test_take_number_gives_each_name_one_number(tmp_path):
    store = LocalStore(tmp_path)
    for name in ("b", "a/b c", "b"):
        take_number(store, "accepted", name)
    # As another client gives it at the same instant, and what is no number.
    for key in ("000000002-z", "000000003-b", "notes.txt"):
        store.put(f"store/order/accepted/{key}", b"")
    assert read_numbers(store, "accepted") == {"b": (1, "b"), "a/b c": (2, "a/b c"), "z": (2, "z")}
    assert read_numbers(store, "runs") == {}
