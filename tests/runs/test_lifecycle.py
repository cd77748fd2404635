"""The lock of the client that drives a run."""

import threading
import time

import pytest

from ns.config.loader import load_with_overrides
from ns.core.errors import RunError
from ns.runs import lifecycle
from ns.runs.lifecycle import _run_lock, check_run_code, lock_run, open_run
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


def test_run_keeps_to_the_code_that_it_was_begun_with(tmp_path, monkeypatch):
    store, experiment = LocalStore(tmp_path), load_with_overrides("quickstart")
    code = {"ns": "aaaa", "torch": "2.14.1"}
    monkeypatch.setattr(lifecycle, "describe_code", lambda: dict(code))
    open_run(store, "one", experiment, "0")
    check_run_code(store, "one")
    code["torch"] = "2.15.0"
    with pytest.raises(RunError, match=r"run one: was begun with torch 2\.14\.1, now 2\.15\.0; the same command continues"):
        check_run_code(store, "one")
    # The same command opens it again.
    open_run(store, "one", experiment, "0")
    check_run_code(store, "one")
