"""A process that has loaded what stages need, and forks a child for each of them: a stage begins at once instead of after seconds.

    python -m pipelines.runners.fork_server SOCKET MODULE…

A child is what KFP's own subprocess would be: it has the environment, folder, output and signals of a new Python, and runs the same
module with the same arguments. The server itself never computes, so that no pool of threads exists when it forks. It keeps no state:
if it is killed, the stages that ran are run again by KFP, and find what they had finished.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ns.core.digest import read_sources
from ns.core.process import FORKED_VARIABLES, OWN_CORES_SPINS, run_process, set_openmp_to_sleep

MAX_REQUEST_BYTES = 1 << 17
START_SCRIPT = re.compile(r'_KFP_RUNTIME=true \S+ -P -m (?P<module>[\w.]+) "\$@"')
"""The shell script by which our packages start a component (pipelines/compile.py). One that is started in another way is left to KFP."""
SERVER_VARIABLES = {"_KFP_RUNTIME": "true", **FORKED_VARIABLES}

StartProcess = Callable[..., int]
"""`run_local_subprocess` of kfp.local: command and variables → exit code."""


class StageRequest(NamedTuple):
    """A component that KFP wants to be run."""

    module: str
    """The module that runs it, as `python -m` does."""
    arguments: list[str]
    variables: dict[str, str]
    """Environment variables of its own."""


class ForkServer:
    """The server, seen by its client. Safe to use from several threads."""

    def __init__(self, modules: Sequence[str]) -> None:
        """Starts it without waiting until `modules` are loaded."""
        self._socket, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(far_end.fileno()), *modules],
                pass_fds=[far_end.fileno()],
                env={**os.environ, **SERVER_VARIABLES},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def run_command(
        self, start_process: StartProcess, full_command: list[str], env_vars: Mapping[str, str] | None = None
    ) -> int:
        """Runs a component's command, prints its output, and returns its exit code. Replaces `start_process`, which is left what the
        server cannot do."""
        request = parse_command(full_command, env_vars or {})
        code = self._fork_stage(request) if request else None
        return start_process(full_command=full_command, env_vars=env_vars) if code is None else code

    def _fork_stage(self, request: StageRequest) -> int | None:
        """Runs a component in a child of the server. Returns its exit code, None if there is no server that can tell."""
        output, child_output = os.pipe()
        status, server_status = os.pipe()
        with os.fdopen(output, errors="replace") as lines, os.fdopen(status, "rb") as result:
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], [child_output, server_status])
            except OSError:
                return None
            finally:
                os.close(child_output)
                os.close(server_status)
            for line in lines:
                # KFP's output is redirected to the run's log.
                print(line, end="")  # noqa: T201
            code = result.read()
            return int(code) if code else None


def parse_command(command: Sequence[str], variables: Mapping[str, str]) -> StageRequest | None:
    """The component in a command that KFP starts; None if it is started in another way than the server knows."""
    match list(command):
        case ["sh", "-c", script, _, *arguments] if start := START_SCRIPT.fullmatch(script):
            request = StageRequest(start["module"], arguments, dict(variables))
            return request if len(json.dumps(request).encode()) <= MAX_REQUEST_BYTES else None
    return None


def serve_requests(requests: socket.socket) -> StageRequest | None:
    """Forks a child for each request until the client is gone. Returns None in the server, and in each child its request."""
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for ready, _ in selector.select():
                if ready.fileobj is not requests:
                    selector.unregister(ready.fileobj)
                    _report_end(ready.fd, *ready.data)
                    continue
                message, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 2)
                if not message:
                    return None
                output, status = descriptors
                pid = os.fork()
                if pid == 0:
                    os.dup2(output, 1)
                    os.dup2(output, 2)
                    ends = [(ended.fd, *ended.data[1:]) for ended in selector.get_map().values() if ended.data]
                    for descriptor in (output, status, *(fd for pair in ends for fd in pair)):
                        os.close(descriptor)
                    requests.close()
                    return StageRequest(*json.loads(message))
                os.close(output)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, status))


def _report_end(process: int, pid: int, status: int) -> None:
    """Tells the client how a child ended: its exit code, or the number of the signal, negative."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(status, str(code).encode())
    os.close(status)
    os.close(process)


def run_component(request: StageRequest) -> None:
    """Does what START_SCRIPT does."""
    os.environ.update(request.variables)
    sys.argv[1:] = request.arguments
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


def main() -> None:
    # Ctrl-C in a terminal reaches the whole group; when the client has ended, so does the server.
    at_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A machine on which ends cannot be waited for has no server.
    os.close(os.pidfd_open(os.getpid()))
    requests = socket.socket(fileno=int(sys.argv[1]))
    set_openmp_to_sleep(OWN_CORES_SPINS)
    # What modules make stays; looking for garbage among it would take a fifth of the time.
    gc.disable()
    for module in sys.argv[2:]:
        # The stage that needs it imports it again, and says what is wrong.
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    # Each stage looks whether the run's code has changed.
    read_sources()
    # The children share these objects' memory as long as no collection writes to it.
    gc.collect()
    gc.freeze()
    gc.enable()
    request = serve_requests(requests)
    if request is not None:
        signal.signal(signal.SIGINT, at_interrupt)
        run_process(lambda: run_component(request))


if __name__ == "__main__":
    main()
