"""Scratch folders, and what killed processes leave of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ns.core.errors import StoreError
from ns.storage.scratch import SCRATCH_PREFIX, SWEEP_AFTER_SECONDS, make_scratch_dir, sweep_scratch_dirs

HOLD = """
import time
from ns.storage.scratch import make_scratch_dir
with make_scratch_dir("held") as path:
    print(path, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temp(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def age(path):
    old = time.time() - SWEEP_AFTER_SECONDS - 1
    os.utime(path, (old, old))


def hold_folder():
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    return process, Path(process.stdout.readline().strip())


def test_scratch_dir_goes_at_its_end(temp):
    with make_scratch_dir("a") as path:
        (path / "file").write_text("x")
    assert list(temp.iterdir()) == []


def test_folder_of_a_killed_process_is_swept_and_of_a_living_one_is_not(temp):
    (killed, left), (living, held) = hold_folder(), hold_folder()
    try:
        for path in (left, held):
            age(path)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with make_scratch_dir("b"):
            assert not left.exists()
            assert held.exists()
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()
            process.stdout.close()


def test_sweep_leaves_what_is_not_scratch(temp):
    others = [temp / "ns-data-20261129", temp / "work", temp / f"{SCRATCH_PREFIX}young"]
    for path in others:
        path.mkdir()
    linked = temp / f"{SCRATCH_PREFIX}link"
    linked.symlink_to(others[1])
    for path in others[:2]:
        age(path)
    with make_scratch_dir("c"):
        assert all(path.exists() for path in (*others, linked))


def test_missing_scratch_space_is_one_line(temp, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(temp / "gone"))
    cure = "cannot write: No such file or directory; free some space there, or set TMPDIR"
    with pytest.raises(StoreError, match=cure), make_scratch_dir("d"):
        pass


SOCKETS = """
import os, signal, sys
from multiprocessing import util
from ns.core.process_pool import ProcessPool
from ns.storage.scratch import place_sockets
if __name__ == "__main__":
    place_sockets()
    place_sockets()
    with ProcessPool(1) as pool:
        print(util.get_temp_dir(), pool.submit(len, "abc").result(), flush=True)
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.integration
@pytest.mark.parametrize("end", ["ended", "killed"])
@pytest.mark.parametrize("long_part", ["", 90 * "x"])
def test_processes_start_below_a_long_temporary_folder_and_leave_no_sockets(temp, monkeypatch, long_part, end):
    """The path of a socket has at most 107 bytes; and folders `pymp-…` of killed processes would stay for good."""
    parent = temp / long_part
    parent.mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(parent))
    (temp / "program.py").write_text(SOCKETS)
    done = subprocess.run([sys.executable, temp / "program.py", end], capture_output=True, text=True)
    folder, answer = done.stdout.split()
    assert (answer, done.stderr) == ("3", "")
    assert len(folder) < 85
    assert Path(folder).exists() == (end == "killed")
    assert not list(parent.glob("pymp-*"))
    if end == "killed":
        age(Path(folder))
        sweep_scratch_dirs(Path(folder).parent)
        assert not Path(folder).exists()
