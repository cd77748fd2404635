"""Signals, and the ends of processes. A stage that a client on this machine started ends with the client: without a reader of its
result it would only get in the way of its successor."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

CLIENT_VARIABLE = "NS_CLIENT_PID"
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


def die_with_client() -> None:
    """Ends this process when the process named by NS_CLIENT_PID is gone. Does nothing without the variable, as on a cluster."""
    client = os.environ.get(CLIENT_VARIABLE, "")
    if not client.isdigit() or int(client) == os.getpid() or _watch_started.is_set():
        return
    _watch_started.set()
    die_with_process(int(client))


def init_helper_process(parent_pid: int) -> None:
    """Sets up a process of a pool: it ends with its parent, and leaves Ctrl-C, which goes to the whole group, to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_process(parent_pid)


def die_with_process(pid: int) -> None:
    """Ends this process when the process `pid` is gone."""
    threading.Thread(target=_poll_process, args=(pid,), name="client-watch", daemon=True).start()


def _poll_process(pid: int) -> None:
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            # Nothing needs to be tidied up: every write is atomic, and the client that would have read the result is gone.
            with contextlib.suppress(ProcessLookupError):
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(POLL_SECONDS)
