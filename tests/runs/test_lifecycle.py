"""The lock of the client that drives a run."""

import threading
import time

import pytest

from ns.config.loader import load_with_overrides
from ns.core.errors import RunError
from ns.runs.lifecycle import _run_lock, lock_run, open_run
from ns.runs.summary import summarize_run
from ns.storage import LocalStore


def test_run_without_a_client_is_interrupted(tmp_path):
    store = LocalStore(tmp_path)
    open_run(store, "one", load_with_overrides("quickstart"), "0")
    with lock_run(store, "one"):
        assert summarize_run(store, "one").state == "running"
        assert (tmp_path / "one" / ".client").read_text()
    (tmp_path / "one" / ".client").write_text("1")
    assert summarize_run(store, "one").state == "interrupted"
    assert (tmp_path / "one" / ".client").read_text() == "1"


def test_lock_run_waits_for_a_short_look(tmp_path):
    store, begun = LocalStore(tmp_path), threading.Event()

    def look() -> None:
        with _run_lock(store, "one"):
            begun.set()
            time.sleep(0.1)

    looking = threading.Thread(target=look)
    looking.start()
    begun.wait()
    with (
        lock_run(store, "one"),
        pytest.raises(RunError, match=r"under way already \(process \d+\)"),
        lock_run(store, "one"),
    ):
        pass
    looking.join()
