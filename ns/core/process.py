"""Signals, and the ends of processes. A stage that a client on this machine started ends with the client: without a reader of its
result it would only get in the way of its successor."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

CLIENT_VARIABLE = "NS_CLIENT"
"""Identity (`identify_process`) of the client whose stage this is."""
POLL_SECONDS = 0.5

_watch_started = threading.Event()


@contextlib.contextmanager
def handle_signals(
    handler: Callable[[int, FrameType | None], object], numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[None]:
    """Calls `handler` for these signals inside the context, and restores the previous handlers afterwards. It does nothing outside
    the main thread, where Python cannot set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def set_openmp_to_sleep() -> None:
    """Lets OpenMP's threads sleep while they wait, unless OMP_WAIT_POLICY says otherwise. Call it before torch is loaded.

    They would spin. With a data loader, a second stage or a neighbor on the same cores that costs a factor of ten (measured: 72 s
    for 8.5 s of training).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def identify_process(pid: int) -> str:
    """Number of a process and, where the system tells it, when it began: numbers are used again. Empty if there is none, or only its
    remains."""
    try:
        # Behind the program's name, which may hold anything: the state, and as the twentieth word the start, in ticks.
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    else:
        return "" if words[0] in "ZX" else f"{pid}:{words[19]}"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return str(pid)


def die_with_client() -> None:
    """Ends this process when the process that NS_CLIENT identifies is gone. Does nothing without the variable, as on a cluster."""
    client = os.environ.get(CLIENT_VARIABLE, "")
    if not re.fullmatch(r"\d+(:\d+)?", client) or client == identify_process(os.getpid()) or _watch_started.is_set():
        return
    _watch_started.set()
    die_with_process(client)


def init_helper_process(parent: str) -> None:
    """Sets up a process of a pool: it ends with its parent (`identify_process`), and leaves Ctrl-C, which goes to the whole group, to
    the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_process(parent)


def die_with_process(identity: str) -> None:
    """Ends this process when the one of this identity (`identify_process`) is gone."""
    threading.Thread(target=_poll_process, args=(identity,), name="client-watch", daemon=True).start()


def _poll_process(identity: str) -> None:
    pid = int(identity.partition(":")[0])
    while identify_process(pid) == identity:
        time.sleep(POLL_SECONDS)
    # Nothing needs to be tidied up: every write is atomic, and the client that would have read the result is gone.
    os.kill(os.getpid(), signal.SIGKILL)
