"""Scratch space: folders on the local disk that go when they are no longer needed, also if their process was killed."""

import fcntl
import multiprocessing.process
import multiprocessing.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ns.core.errors import StoreError

SCRATCH_PREFIX = "noisy-student-scratch-"
"""Beginning of the names of scratch folders, and of nothing that a person keeps."""
SHORT_TEMP_DIR = Path("/tmp")
MAX_SOCKET_PARENT_BYTES = 45
"""The path of a socket has at most 103 bytes on macOS, 107 on Linux: that of the folder, 39 for the name of ours, 18 for the socket's."""
SWEEP_AFTER_SECONDS = 60
"""A younger folder may have been made a moment ago, and not be locked yet."""


@contextmanager
def make_scratch_dir(name: str) -> Iterator[Path]:
    """An empty folder under TMPDIR, removed at the end. Those of killed processes are removed first.

    Raises StoreError when it cannot be made.
    """
    parent = Path(os.environ.get("TMPDIR", "/tmp"))
    sweep_scratch_dirs(parent)
    with explain_scratch_errors(parent, "write"):
        path = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{name}-", dir=parent))
        lock = _lock_folder(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def place_sockets() -> None:
    """Gives multiprocessing, which names its sockets by files, a folder for them that is swept if this process is killed, and whose path
    is short enough: below a long TMPDIR no process could be started (Python before 3.14). Call it before any is."""
    config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") and Path(config["tempdir"]).is_dir():
        return
    parents = [Path(tempfile.gettempdir()), SHORT_TEMP_DIR]
    parent = next((parent for parent in parents if len(os.fsencode(parent)) <= MAX_SOCKET_PARENT_BYTES), parents[0])
    sweep_scratch_dirs(parent)
    with explain_scratch_errors(parent, "write"):
        path = tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}sockets-", dir=parent)
        # Open as long as this process lives, and those that it forks.
        _lock_folder(Path(path))
    multiprocessing.util.Finalize(None, shutil.rmtree, args=(path, True), exitpriority=-100)
    config["tempdir"] = path


def sweep_scratch_dirs(parent: Path) -> None:
    """Removes this user's scratch folders that no process holds."""
    oldest_kept = time.time() - SWEEP_AFTER_SECONDS
    with suppress(OSError):
        for entry in os.scandir(parent):
            # What cannot be looked at or removed is left.
            with suppress(OSError):
                if not entry.name.startswith(SCRATCH_PREFIX) or not entry.is_dir(follow_symlinks=False):
                    continue
                status = entry.stat(follow_symlinks=False)
                if os.getuid() not in (0, status.st_uid) or status.st_mtime > oldest_kept:
                    continue
                lock = _lock_folder(Path(entry.path))
                if lock is not None:
                    shutil.rmtree(entry.path, ignore_errors=True)
                    os.close(lock)


def _lock_folder(path: Path) -> int | None:
    """Locks a folder until the descriptor is closed, by this process and all that it forked; None if it is locked."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def explain_scratch_errors(path: Path, action: str) -> Iterator[None]:
    """Turns an OSError inside into the StoreError of `make_scratch_error`."""
    try:
        yield
    except OSError as error:
        raise make_scratch_error(path, action, error) from error


def make_scratch_error(path: Path, action: str, error: Exception) -> StoreError:
    """An error that says which action failed in scratch space, why, and what to do."""
    reason = getattr(error, "strerror", None) or error
    return StoreError(f"{path}: cannot {action}: {reason}; free some space there, or set TMPDIR to another folder")
