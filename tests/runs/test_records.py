"""Records of runs and stages, and their order."""

from datetime import UTC, datetime, timedelta

import pytest

from ns.config.loader import load_experiment, resolve_preset
from ns.runs.lifecycle import open_run
from ns.runs.lookup import list_runs, resolve_run_name
from ns.runs.records import (
    list_stage_failures,
    list_stage_notes,
    list_stage_tries,
    write_stage_failure,
    write_stage_note,
    write_stage_try,
)
from ns.storage import LocalStore


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by ten microseconds with every look."""

    class Clock(datetime):
        reads = datetime(2026, 1, 1, tzinfo=UTC)

        @classmethod
        def now(cls, tz=None):
            cls.reads += timedelta(microseconds=10)
            return cls.reads

    monkeypatch.setattr("ns.runs.records.datetime", Clock)


@pytest.fixture
def experiment():
    return load_experiment(resolve_preset("quickstart"))


def test_records_of_one_millisecond_are_listed_in_their_order(tmp_path, clock, experiment):
    store = LocalStore(tmp_path)
    for name in ("c", "b", "a"):
        open_run(store, name, experiment, "0")
        write_stage_failure(store, "c", 0, name, "killed", note_name=name)
        write_stage_note(store, "c", 1, name, {}, 0.0, reused=False)
    assert [record.run for record in list_runs(store)] == ["c", "b", "a"]
    assert resolve_run_name(store) == "a"
    assert [failure.stage for failure in list_stage_failures(store, "c")] == ["c", "b", "a"]
    assert [note.stage for note in list_stage_notes(store, "c")] == ["c", "b", "a"]


def test_open_run_again_forgets_failures_and_tries(tmp_path, experiment):
    store = LocalStore(tmp_path)
    open_run(store, "a", experiment, "0")
    write_stage_failure(store, "a", 0, "train", "killed", note_name="train")
    write_stage_try(store, "a", 1, "label-0-2", 2, "pod")
    write_stage_note(store, "a", 0, "prepare", {}, 0.0, reused=False)
    assert [(found.stage, found.number) for found in list_stage_tries(store, "a")] == [("label-0-2", 2)]
    open_run(store, "a", experiment, "0")
    assert (list_stage_failures(store, "a"), list_stage_tries(store, "a")) == ([], [])
    assert len(list_stage_notes(store, "a")) == 1
