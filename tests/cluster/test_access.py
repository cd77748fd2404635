"""Port-forwards that break, and pods that wait or fail, on a real API server and kubelet."""

import contextlib
import json
import socket
import threading
import time
import urllib.request
from urllib.parse import urlsplit

import pytest

from k8s import access, pods
from k8s.access import open_cluster_access
from k8s.kubectl import Kubectl
from k8s.pods import RunPods
from k8s.port_forward import PortForward
from tests.cluster.conftest import IMAGE, apply

SERVER = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["HOSTNAME"].encode())
    def log_message(self, *_):
        pass
print("ready", flush=True)
http.server.HTTPServer(("", 8888), Handler).serve_forever()
"""
RESTRICTED = {
    "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
    "terminationGracePeriodSeconds": 0,
}


def make_pod_spec(*command, image=IMAGE, **container):
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {
        **RESTRICTED,
        "containers": [{"name": "main", "image": image, "command": list(command), "securityContext": security, **container}],
    }


def make_run_pod(name, namespace, stage, spec):
    labels = {"pipeline/runid": "run-1", "app.kubernetes.io/component": stage}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"restartPolicy": "Never", **spec},
    }


@pytest.fixture(scope="module")
def served(kubectl, make_namespace):
    """A namespace whose Services `ml-pipeline` and `store` lead to one pod, which says its name."""
    namespace = make_namespace()
    labels = {"app": "server"}
    probe = {"httpGet": {"port": 8888}, "periodSeconds": 1}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "server", "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": make_pod_spec("python", "-c", SERVER, readinessProbe=probe)},
        },
    }
    services = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"selector": labels, "ports": [{"port": port, "targetPort": 8888}]},
        }
        for name, port in (("ml-pipeline", 8888), ("store", 9000))
    ]
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "noisy-student", "namespace": namespace},
        "data": {"AWS_ENDPOINT_URL": f"http://store.{namespace}:9000", "AWS_REGION": "us-east-1"},
    }
    apply(kubectl, deployment, *services, settings)
    kubectl.run_command("rollout", "status", "deployment/server", f"--namespace={namespace}", "--timeout=120s", seconds=130)
    return namespace


def ask(url):
    """Name of the pod that answers; None if none does."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()
    return None


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def test_port_forward_survives_its_pod(kubectl, served):
    said = []
    with PortForward(kubectl, served, "ml-pipeline", 8888, say=said.append) as forward:
        first = ask(forward.url)
        assert first
        kubectl.run_command("delete", "pod", first, f"--namespace={served}", "--grace-period=0", "--force")
        second = wait_for(lambda: (found := ask(forward.url)) != first and found)
    assert second.startswith("server-")
    assert said[0] == "port-forward to service/ml-pipeline: broken; connecting again"
    assert said[-1] == "port-forward to service/ml-pipeline: connected again"


class Gateway:
    """Passes connections on to the API server until it goes down, as when that restarts."""

    def __init__(self, host, port):
        self._target = (host, port)
        self._connections = []
        self.port = 0

    def start(self):
        self._server = socket.create_server(("127.0.0.1", self.port))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def stop(self):
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, server):
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                upstream = socket.create_connection(self._target)
                self._connections += [client, upstream]
                for source, sink in ((client, upstream), (upstream, client)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def test_port_forward_survives_the_api_server(kubectl, served, tmp_path, monkeypatch):
    config = json.loads(kubectl.run_command("config", "view", "--raw", "--minify", "--flatten", "--output=json"))
    cluster = config["clusters"][0]["cluster"]
    parts = urlsplit(cluster["server"])
    gateway = Gateway(parts.hostname, parts.port or 443)
    gateway.start()
    cluster |= {"server": f"https://127.0.0.1:{gateway.port}", "tls-server-name": parts.hostname}
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    said = []
    with PortForward(Kubectl(kubectl.context), served, "ml-pipeline", 8888, say=said.append) as forward:
        assert ask(forward.url)
        gateway.stop()
        wait_for(lambda: said)
        assert ask(forward.url) is None
        gateway.start()
        assert wait_for(lambda: ask(forward.url))
    gateway.stop()
    assert [line.rpartition(": ")[2] for line in said] == ["broken; connecting again", "connected again"]


def test_cluster_access_reaches_kubeflow_and_the_store(kubectl, served, monkeypatch):
    monkeypatch.setattr(access, "KUBEFLOW_NAMESPACE", served)
    for name in access.ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with open_cluster_access(kubectl, served, print) as url:
        store = access.os.environ["AWS_ENDPOINT_URL"]
        assert ask(url) == ask(store) != None  # noqa: E711
        assert url != store


def test_pending_pods_are_told_with_their_own_reason_once(kubectl, make_namespace, monkeypatch):
    monkeypatch.setattr(pods, "PENDING_SECONDS", 2.0)
    monkeypatch.setattr(pods, "POLL_SECONDS", 0.5)
    namespace = make_namespace()
    volume = {"volumes": [{"name": "v", "secret": {"secretName": "missing"}}]}
    mounts = [{"name": "v", "mountPath": "/v"}]
    specs = {
        "train": make_pod_spec("true", resources={"requests": {"cpu": "1000"}}),
        "label": make_pod_spec("true", image=f"{IMAGE.partition(':')[0]}-no-such:1"),
        "select": {**make_pod_spec("true", volumeMounts=mounts), **volume},
        "gate": {**make_pod_spec("true"), "nodeSelector": {"pool": "nowhere"}},
    }
    apply(kubectl, *[make_run_pod(f"{stage}-1", namespace, stage, spec) for stage, spec in specs.items()])
    said = []
    run_pods = RunPods(kubectl, namespace, "run-1", said.append)

    def poll():
        run_pods.report_waiting()
        return len(said) >= len(specs)

    wait_for(poll)
    for _ in range(4):
        time.sleep(0.5)
        run_pods.report_waiting()
    told = {line.partition(":")[0]: line for line in said}
    assert len(said) == len(told) == len(specs)
    assert "Insufficient cpu" in told["train"]
    assert "ask for less with --input" in told["train"]
    assert "ImagePull" in told["label"]
    assert "push that image" in told["label"]
    assert 'secret "missing" not found' in told["select"]
    assert "node(s) didn't match" in told["gate"]
    assert "compare the pool's selectors" in told["gate"]


def test_failed_pods_are_explained(kubectl, make_namespace):
    namespace = make_namespace()
    event = json.dumps({"event": "failed", "error": "data.pool: there are no images; add some", "exit_code": 3})
    hungry = "x = bytearray(512 << 20); x[::4096] = b'x' * len(x[::4096])"
    specs = {
        "prepare": make_pod_spec("sh", "-c", f"echo '{event}'; exit 1"),
        "train": make_pod_spec("python", "-c", hungry, resources={"limits": {"memory": "64Mi"}}),
        "gate": make_pod_spec("sh", "-c", "exit 7"),
        "report": make_pod_spec("true"),
    }
    apply(kubectl, *[make_run_pod(f"{stage}-1", namespace, stage, spec) for stage, spec in specs.items()])
    wait_for(lambda: all(pod["status"]["phase"] in ("Failed", "Succeeded") for pod in kubectl.list_objects("pods", namespace)))
    reasons = RunPods(kubectl, namespace, "run-1", print).explain_failures()
    assert reasons.pop("train").startswith("OOMKilled")
    assert reasons == {"prepare": "data.pool: there are no images; add some", "gate": "exit code 7"}
