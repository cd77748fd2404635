"""`kubectl` as a subprocess: the one way to a cluster that its users have set up already, with their credentials and proxies."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import IO, Any

from ns.core.errors import ClusterError

Object = dict[str, Any]
"""A Kubernetes object, as JSON has it."""

SECONDS = 60
"""For one answer: a server that takes longer hangs."""
INSTALL = "install it (https://kubernetes.io/docs/tasks/tools), and set up a context"


class Forbidden(ClusterError):
    """The cluster does not allow it."""


class Absent(ClusterError):
    """The cluster has no such object, or does not know the kind."""


class Unreachable(ClusterError):
    """No cluster answers."""


class Kubectl:
    """Calls kubectl with one context. Every method raises ClusterError, with kubectl's own reason, when a call fails."""

    def __init__(self, context: str | None = None) -> None:
        """`context`: its name in the kubeconfig; None takes the current one, and in a pod the pod's service account."""
        self.context = context
        self._options = [f"--context={context}"] if context else []

    def run(self, *arguments: str, data: str | None = None, seconds: float = SECONDS, accepted: Sequence[int] = (0,)) -> str:
        """What kubectl prints. `data` goes to its standard input; `accepted` are exit codes that are no failure."""
        command = ["kubectl", *self._options, *arguments]
        process = _start(command, stdin=subprocess.PIPE if data is not None else subprocess.DEVNULL, stderr=subprocess.PIPE)
        with _ended(process):
            try:
                out, err = process.communicate(data, timeout=seconds)
            except subprocess.TimeoutExpired:
                raise Unreachable(
                    f"{_named(arguments)}: no answer in {seconds:g} s; look whether the cluster answers"
                ) from None
        if process.returncode not in accepted:
            raise failure(_named(arguments), err or out, process.returncode)
        return out

    def lines(self, *arguments: str, data: str) -> Generator[str, None, None]:
        """What kubectl prints, line by line, as it comes; its standard error is passed on to ours. For what takes its time.

        Closing the iterator ends kubectl.
        """
        command = ["kubectl", *self._options, *arguments]
        process = _start(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        said: list[str] = []
        passing = threading.Thread(target=_pass_on, args=(process.stderr, said), daemon=True)
        passing.start()
        with _ended(process):
            assert process.stdin is not None
            assert process.stdout is not None
            # One that refuses at once does not read what it is given.
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(data)
            for line in process.stdout:
                yield line.rstrip("\n")
            process.wait()
            passing.join()
        if process.returncode:
            raise failure(_named(arguments), "".join(said), process.returncode)

    def get(self, kind: str, name: str, namespace: str | None = None) -> Object | None:
        """An object; None if there is none."""
        try:
            return _parsed(self.run("get", kind, name, *_within(namespace), "--output=json"))
        except Absent:
            return None

    def list(self, kind: str, namespace: str | None = None, selector: str = "") -> list[Object]:
        """Objects of kinds (`pods`, or `jobs,pods`), in one namespace or in all of them; none of a kind that the cluster does not know."""
        where = _within(namespace) or ["--all-namespaces"]
        chosen = [f"--selector={selector}"] if selector else []
        try:
            return list(_parsed(self.run("get", kind, *where, *chosen, "--output=json"))["items"])
        except Absent:
            return []

    def post(self, path: str, body: Object) -> Object:
        """What the API server answers to a POST."""
        return _parsed(self.run("create", f"--raw={path}", "--filename=-", data=json.dumps(body)))

    def server(self) -> str:
        """URL of the API server, as the kubeconfig has it; empty where that has no current context, as in a pod."""
        try:
            view = _parsed(self.run("config", "view", "--minify", "--output=json"))
        except ClusterError as error:
            if "current-context must exist" in str(error):
                return ""
            raise
        return next((str(one["cluster"].get("server", "")) for one in view.get("clusters") or ()), "")


def contexts() -> tuple[list[str], str | None]:
    """Names of all contexts of the kubeconfig, and the current one."""
    view = _parsed(Kubectl().run("config", "view", "--output=json"))
    names = [str(one["name"]) for one in view.get("contexts") or ()]
    return sorted(names), str(view.get("current-context") or "") or None


def failure(call: str, text: str, code: int) -> ClusterError:
    """The exception for what kubectl said, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Its log comes first; the line that counts is marked, or the last one.
    marked = [line for line in lines if line.startswith(("error:", "Error from server", "Unable to connect", "The connection"))]
    said = (marked or lines or [f"ended with code {code}"])[-1].removeprefix("error: ")
    message = f"{call}: {said}"
    if "(Forbidden)" in said or "is forbidden" in said or "cannot impersonate" in said:
        return Forbidden(f"{message}; ask for that right, or use a context that has it")
    if "(NotFound)" in said or "doesn't have a resource type" in said or "could not find the requested resource" in said:
        return Absent(message)
    if "(Unauthorized)" in said or "must be logged in" in said or "getting credentials" in said:
        return Unreachable(f"{message}; log in to the cluster again")
    if "does not exist" in said and "context" in said:
        return ClusterError(f"{message}; `kubectl config get-contexts` lists those there are")
    if any(mark in said for mark in ("Unable to connect", "was refused", "no such host", "timeout", "connection reset")):
        return Unreachable(f"{message}; see that the context is right, that the cluster runs, and that no VPN is missing")
    return ClusterError(message)


def _start(command: list[str], **pipes: Any) -> "subprocess.Popen[str]":
    if shutil.which("kubectl") is None:
        raise ClusterError(f"kubectl: is not installed; {INSTALL}")
    # A group of its own: its helpers for credentials must go with it. Ctrl-C reaches us, and we end it.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, errors="replace", start_new_session=True, env=_environment(), **pipes
    )


@contextlib.contextmanager
def _ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                with contextlib.suppress(OSError, ValueError):
                    pipe.close()
        raise


def _pass_on(stream: IO[str], said: list[str]) -> None:
    """What kubectl says to standard error, at once; and kept, for the reason."""
    # Reading ends with an error when the process is ended for us.
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            said.append(line)
            sys.stderr.write(line)


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _within(namespace: str | None) -> list[str]:
    return [f"--namespace={namespace}"] if namespace else []


def _named(arguments: Sequence[str]) -> str:
    """The call as a person would say it: without options."""
    return " ".join(["kubectl", *[part for part in arguments if not part.startswith("-")][:3]])


def _parsed(text: str) -> Object:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ClusterError(f"kubectl: printed no JSON ({error}); is another program called kubectl?") from error
    if not isinstance(value, dict):
        raise ClusterError("kubectl: printed JSON that is no object; is another program called kubectl?")
    return value
