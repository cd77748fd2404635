"""Signals, and the ends of processes. A stage that a client on this machine started ends with the client: without a reader of its
result it would only get in the way of its successor."""

import contextlib
import os
import re
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

CLIENT_VARIABLE = "NS_CLIENT"
"""Identity (`identify_process`) of the client whose stage this is."""
POLL_SECONDS = 0.5
IDENTITY = re.compile(r"\d+(:\d+)?")

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
    if not IDENTITY.fullmatch(client) or client == identify_process(os.getpid()) or _watch_started.is_set():
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


class ProcessId(NamedTuple):
    """A process, told from all that had its number before or have it elsewhere."""

    system: str
    """What the number belongs to: a boot of a kernel, and its namespace of processes, since containers have numbers of their own."""
    identity: str
    """As `identify_process` gives it."""

    @classmethod
    def from_pid(cls, pid: int) -> "ProcessId":
        return cls(_read_system(), identify_process(pid))

    @classmethod
    def parse(cls, text: str) -> "ProcessId | None":
        """The process of this system that `str` gave the text of; None if it is of another system, or no such text."""
        number, _, system = text.rpartition("@")
        identity = number.replace(".", ":")
        own_system = _read_system()
        return cls(own_system, identity) if IDENTITY.fullmatch(identity) and system == _shorten_system(own_system) else None

    def __str__(self) -> str:
        # Not every file system takes a colon.
        return f"{self.identity.replace(':', '.')}@{_shorten_system(self.system)}"

    @property
    def pid(self) -> str:
        return self.identity.partition(":")[0]

    def is_gone(self) -> bool:
        """Whether the process has ended, as far as can be seen from here: never if it is another system's."""
        return self.system == _read_system() and identify_process(int(self.pid or 0)) != self.identity


def _read_system() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _shorten_system(system: str) -> str:
    return f"{zlib.crc32(system.encode()):08x}"
