import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from ns.config import schema as config
from ns.core.errors import RunError
from ns.runs import records as runs
from ns.storage import LocalStore


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by ten microseconds whenever it is looked at."""

    class Clock(datetime):
        looked = datetime(2026, 1, 1, tzinfo=UTC)

        @classmethod
        def now(cls, tz=None):
            cls.reviewed += timedelta(microseconds=10)
            return cls.reviewed

    monkeypatch.setattr(runs, "datetime", Clock)


@pytest.fixture
def experiment():
    return config.load_experiment(config.resolve_preset("quickstart"))


def test_runs_and_failures_of_one_millisecond_are_told_in_their_order(tmp_path, clock, experiment):
    store = LocalStore(tmp_path)
    for name in ("c", "b", "a"):
        runs.open_run(store, name, experiment, "0")
        runs.write_stage_failure(store, "c", 0, name, "killed", note_name=name)
        runs.write_stage_note(store, "c", 1, name, {}, 0.0, reused=False)
    assert [record.run for record in runs.list_runs(store)] == ["c", "b", "a"]
    assert runs.resolve_run_name(store) == "a"
    assert [failure.stage for failure in runs.list_stage_failures(store, "c")] == ["c", "b", "a"]
    assert [note.stage for note in runs.list_stage_notes(store, "c")] == ["c", "b", "a"]


def test_a_run_that_nobody_drives_was_interrupted(tmp_path, experiment):
    store = LocalStore(tmp_path)
    runs.open_run(store, "one", experiment, "0")
    with runs.lock_run(store, "one"):
        assert runs.summarize_run(store, "one").state == "running"
        assert (tmp_path / "one" / ".client").read_text()
    (tmp_path / "one" / ".client").write_text("1")
    assert runs.summarize_run(store, "one").state == "interrupted"
    assert (tmp_path / "one" / ".client").read_text() == "1"


def test_a_client_waits_for_whoever_only_looks(tmp_path):
    store, begun = LocalStore(tmp_path), threading.StageEvent()

    def look() -> None:
        with runs._run_lock(store, "one"):
            begun.set()
            time.sleep(0.1)

    looking = threading.Thread(target=look)
    looking.start()
    begun.wait()
    with (
        runs.lock_run(store, "one"),
        pytest.raises(RunError, match=r"under way already \(process \d+\)"),
        runs.lock_run(store, "one"),
    ):
        pass
    looking.join()
