"""Signals, and the ends of processes. A stage that a client on this machine started ends with the client: without a reader of its
result it would only get in the way of its successor."""

import atexit
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

CLIENT_VARIABLE = "NS_CLIENT"
"""Identity (`identify_process`) of the client whose stage this is."""
FORKED_VARIABLES = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Environment of a process that forks others after it has loaded libraries: jemalloc's thread in pyarrow would not survive that."""
POLL_SECONDS = 0.5
OPENMP_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""How OpenMP's threads wait: `set_openmp_to_sleep`."""
OWN_CORES_SPINS = 2_000
"""How often a thread of OpenMP looks for work before it sleeps, about 0.1 ms in all, where its process has the cores for itself."""
LOST_OUTPUT = 120
"""Exit code of a process whose output could not be written, as Python has it."""
# PR_SET_PDEATHSIG, which outlives the exec. A parent that was gone before is none.
BIND_AND_RUN = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
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


def run_process(main: Callable[[], int | None]) -> NoReturn:
    """Calls what a process is for, and ends the process with the code that it returns, or that of its exception.

    It ends as Python would: threads that are no daemons are waited for, what is registered with atexit is called, output is flushed. Only
    Python and its libraries are not taken down. Threads of libraries, as Arrow's, outlive the work; one that is busy then aborts
    the process (exit code 134), and a stage that has done all its work counts as failed. It would also take 0.7 s to collect what torch
    and timm loaded.
    """
    code = _call_main(main)
    with contextlib.suppress(KeyboardInterrupt):
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    code = _flush_output() or code
    if code == -signal.SIGINT:
        # Who started it sees that it was interrupted.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _call_main(main: Callable[[], int | None]) -> int:
    """Returns the exit code; that of an interrupt is the signal's number, negative."""
    try:
        return main() or 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


def _flush_output() -> int:
    """Flushes standard output and standard error. Returns Python's exit code for output that was lost, 0 if there was none."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            # Its reader wants no more.
            pass
        except (OSError, ValueError) as error:
            code = LOST_OUTPUT
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"error: cannot write {stream.name}: {error}\n")
    return code


def set_openmp_to_sleep(spins: int = 0) -> None:
    """Lets OpenMP's threads sleep while they wait, after `spins` looks for work, unless OMP_WAIT_POLICY says otherwise. Call it before
    torch is loaded.

    They would look 300,000 times. With a second stage or a neighbor on the same cores that costs a factor of ten (measured: 72 s for
    8.5 s of training); so pods, which share their node, sleep at once. Each sleep costs time too: alone on two cores, EfficientNet-B0 at
    32 px trains 1.6 times as fast with OWN_CORES_SPINS as with none (each of two such trainings side by side: 0.8 times).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(spins))


def count_cores() -> int:
    """Cores that this process may use. They may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


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


def bind_command(command: Sequence[str]) -> list[str]:
    """The command, as one that is killed when the thread that starts it is gone, even by SIGKILL. Elsewhere than on Linux it is not."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", BIND_AND_RUN, str(os.getpid()), *command]


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
        """Whether the process has ended, as far as can be seen from here: never if it is another system's, or named by no number."""
        is_own = self.system == _read_system() and IDENTITY.fullmatch(self.identity) is not None
        return is_own and identify_process(int(self.pid)) != self.identity


def _read_system() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _shorten_system(system: str) -> str:
    return f"{zlib.crc32(system.encode()):08x}"


@contextlib.contextmanager
def set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables of this process inside the context; then they are as before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
