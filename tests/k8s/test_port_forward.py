"""Port-forwards that break, with a stand-in for kubectl that forwards to itself."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from k8s import port_forward
from k8s.kubectl import Kubectl, NotFoundError
from k8s.port_forward import PortForward
from ns.core.errors import ClusterError
from ns.core.process import identify_process

KUBECTL = """
import os, pathlib, socket, sys
folder = pathlib.Path(os.environ["FORWARD_FOLDER"])
if (folder / "down").exists():
    sys.exit("error: " + (folder / "down").read_text())
local, _, remote = sys.argv[-1].partition(":")
try:
    server = socket.create_server(("127.0.0.1", int(local or 0)))
except OSError:
    print(f"Unable to listen on port {local}: Listeners failed to create", flush=True)
    sys.exit("error: unable to listen on any of the requested ports")
call = len(list(folder.glob("call-*")))
(folder / f"call-{call}").write_text(f"{os.getpid()} {' '.join(sys.argv[1:])}")
print(f"Forwarding from 127.0.0.1:{server.getsockname()[1]} -> {remote}", flush=True)
while True:
    connection, _ = server.accept()
    print("Handling connection for", local, flush=True)
    connection.sendall(str(call).encode())
    connection.close()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the stand-in keeps its calls; with a file `down` it fails with the text in it."""
    program = tmp_path / "kubectl"
    program.write_text(f"#!{os.path.realpath(sys.executable)} -SE\n{KUBECTL}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("FORWARD_FOLDER", str(tmp_path))
    monkeypatch.setattr(port_forward, "RETRY_SECONDS", 0.02)
    return tmp_path


def ask(port):
    """Number of the call of kubectl that answers on the port; None if none does."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        return int(connection.recv(10) or -1)
    return None


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pid(folder, call):
    return int((folder / f"call-{call}").read_text().split()[0])


def test_port_forward_is_made_again_on_the_same_port(folder):
    said = []
    with PortForward(Kubectl("one"), "kubeflow", "ml-pipeline", 8888, say=said.append) as forward:
        port = forward.local_port
        assert forward.url == f"http://127.0.0.1:{port}"
        assert ask(port) == 0
        assert "--context=one port-forward service/ml-pipeline --namespace=kubeflow" in (folder / "call-0").read_text()
        # The API server goes away, and does not come back at once.
        (folder / "down").write_text("lost connection to pod")
        os.kill(pid(folder, 0), signal.SIGKILL)
        wait_for(lambda: said)
        assert ask(port) is None
        (folder / "down").unlink()
        wait_for(lambda: ask(port) == 1)
        assert said == [
            "port-forward to service/ml-pipeline: broken; connecting again",
            "port-forward to service/ml-pipeline: connected again",
        ]
        last = pid(folder, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)
    assert ask(port) is None


def test_port_forward_that_fails_at_first_is_an_error(folder):
    (folder / "down").write_text('Error from server (NotFound): services "ml-pipeline" not found')
    with (
        pytest.raises(NotFoundError, match=r"kubectl port-forward service/ml-pipeline: .*not found"),
        PortForward(Kubectl(), "kubeflow", "ml-pipeline", 8888, say=print),
    ):
        pass


def test_port_forward_to_a_port_that_is_taken_says_so(folder):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            pytest.raises(ClusterError, match=f"port {port} of this machine is taken by another program; choose another"),
            PortForward(Kubectl(), "kubeflow", "ml-pipeline-ui", 80, local_port=port, say=print),
        ):
            pass


def test_port_forward_to_a_cluster_that_does_not_answer(folder, monkeypatch):
    (folder / "kubectl").write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(port_forward, "ANSWER_SECONDS", 0.1)
    with (
        pytest.raises(ClusterError, match=r"no answer in 0\.1 s"),
        PortForward(Kubectl(), "kubeflow", "ml-pipeline", 8888, say=print),
    ):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bind processes to others")
def test_kubectl_ends_with_a_client_that_is_killed(folder):
    program = """
import time
from k8s.kubectl import Kubectl
from k8s.port_forward import PortForward
with PortForward(Kubectl(), "kubeflow", "ml-pipeline", 8888, say=print) as forward:
    print(forward.url, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as client:
        client.stdout.readline()
        assert identify_process(pid(folder, 0))
        client.kill()
    wait_for(lambda: not identify_process(pid(folder, 0)))
