"""Ports of Services on this machine, kept open while their pods and the API server come and go."""

import re
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from k8s.kubectl import ANSWER_SECONDS, ClusterUnreachableError, Kubectl, classify_failure, kill_process
from ns.core.errors import ClusterError

RETRY_SECONDS = 1.0
_FORWARDING = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+) ->")


class PortForward:
    """`kubectl port-forward` to one port of a Service. It is made again whenever it breaks, always on the same port of this machine."""

    def __init__(
        self,
        kubectl: Kubectl,
        namespace: str,
        service: str,
        port: int,
        *,
        say: Callable[[str], None],
        local_port: int = 0,
    ) -> None:
        """`local_port`: 0 takes a free one. `say`: is told when the connection breaks, and when it is there again."""
        self.local_port = local_port
        self._kubectl = kubectl
        self._target = f"service/{service}"
        self._arguments = ("port-forward", self._target, f"--namespace={namespace}", "--address=127.0.0.1")
        self._port = port
        self._say = say
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = threading.Event()
        self._answered = threading.Event()
        self._error: ClusterError | None = None
        self._thread = threading.Thread(target=self._keep_open, name=f"forward-{service}", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.local_port}"

    def __enter__(self) -> Self:
        """Returns when connections are accepted. Raises ClusterError if the first attempt fails: a later one would too."""
        self._thread.start()
        try:
            if not self._answered.wait(ANSWER_SECONDS):
                raise ClusterUnreachableError(
                    f"kubectl port-forward {self._target}: no answer in {ANSWER_SECONDS:g} s; check that the cluster answers"
                )
            if self._error:
                raise self._error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        self._stopped.set()
        with self._lock:
            if self._process:
                kill_process(self._process)
        self._thread.join()

    def _keep_open(self) -> None:
        is_broken = False
        while True:
            with self._lock:
                if self._stopped.is_set():
                    return
                local_port = self.local_port or ""
                arguments = (*self._arguments, f"{local_port}:{self._port}")
                self._process = process = self._kubectl.start_process(arguments, stderr=subprocess.STDOUT, is_bound=True)
            last_lines: deque[str] = deque(maxlen=5)
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    if match := _FORWARDING.search(line):
                        self.local_port = int(match[1])
                        self._answered.set()
                        if is_broken:
                            self._say(f"port-forward to {self._target}: connected again")
                        is_broken = False
                    elif not line.startswith("Handling connection"):
                        last_lines.append(line)
            process.wait()
            if self._stopped.is_set():
                return
            if not self._answered.is_set():
                self._error = self._explain_failure("".join(last_lines), process.returncode)
                self._answered.set()
                return
            if not is_broken:
                self._say(f"port-forward to {self._target}: broken; connecting again")
            is_broken = True
            self._stopped.wait(RETRY_SECONDS)

    def _explain_failure(self, text: str, code: int) -> ClusterError:
        if "unable to listen" in text.lower():
            return ClusterError(f"port {self.local_port} of this machine is taken by another program; choose another one")
        return classify_failure(f"kubectl port-forward {self._target}", text, code)
