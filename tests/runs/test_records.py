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
            cls.looked += timedelta(microseconds=10)
            return cls.looked

    monkeypatch.setattr(runs, "datetime", Clock)


@pytest.fixture
def experiment():
    return config.load(config.located("quickstart"))


def test_runs_and_failures_of_one_millisecond_are_told_in_their_order(tmp_path, clock, experiment):
    store = LocalStore(tmp_path)
    for name in ("c", "b", "a"):
        runs.start(store, name, experiment, "0")
        runs.note_failure(store, "c", 0, name, "killed", key=name)
        runs.note(store, "c", 1, name, {}, 0.0, reused=False)
    assert [record.run for record in runs.listed(store)] == ["c", "b", "a"]
    assert runs.find(store) == "a"
    assert [failure.step for failure in runs.failures(store, "c")] == ["c", "b", "a"]
    assert [note.step for note in runs.notes(store, "c")] == ["c", "b", "a"]


def test_a_run_that_nobody_drives_was_interrupted(tmp_path, experiment):
    store = LocalStore(tmp_path)
    runs.start(store, "one", experiment, "0")
    with runs.alone(store, "one"):
        assert runs.summarise(store, "one").state == "running"
        assert (tmp_path / "one" / ".client").read_text()
    (tmp_path / "one" / ".client").write_text("1")
    assert runs.summarise(store, "one").state == "interrupted"
    assert (tmp_path / "one" / ".client").read_text() == "1"


def test_a_client_waits_for_whoever_only_looks(tmp_path):
    store, begun = LocalStore(tmp_path), threading.Event()

    def look() -> None:
        with runs._lock(store, "one"):
            begun.set()
            time.sleep(0.1)

    looking = threading.Thread(target=look)
    looking.start()
    begun.wait()
    with (
        runs.alone(store, "one"),
        pytest.raises(RunError, match=r"under way already \(process \d+\)"),
        runs.alone(store, "one"),
    ):
        pass
    looking.join()
