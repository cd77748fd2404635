"""The network policies of the overlay `dev`, enforced: what is needed passes, and nothing else does."""

import json
from itertools import product

import pytest

from k8s.dns import find_dns_peers
from k8s.manifests import render_overlay
from tests.cluster.conftest import IMAGE, apply
from tests.cluster.deployer import IMAGES, list_kinds, move_objects

PORTS = (22, 443, 3306, 6443, 8080, 8333, 8887, 8888, 9090, 9999)
SERVER = f"""
import selectors, socket
selector = selectors.DefaultSelector()
for port in {PORTS}:
    server = socket.create_server(("", port), backlog=64)
    selector.register(server, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for event, _ in selector.select():
        event.fileobj.accept()[0].close()
"""
CLIENT = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def reach(target):
    try:
        socket.create_connection(target, timeout=4).close()
        return True
    except OSError:
        return False
targets = json.loads(sys.argv[1])
with ThreadPoolExecutor(len(targets)) as threads:
    print(json.dumps(list(threads.map(reach, map(tuple, targets)))))
"""
LABELS = {
    "kubeflow": {"application-crd-id": "kubeflow-pipelines"},
    "run": {"workflows.argoproj.io/workflow": "w", "app.kubernetes.io/part-of": "noisy-student"},
    "store": {"app.kubernetes.io/name": "seaweedfs", "app.kubernetes.io/component": "object-store"},
    "training-0": {"jobset.sigs.k8s.io/jobset-name": "t"},
    "training-1": {"jobset.sigs.k8s.io/jobset-name": "t"},
    "upload": {"app.kubernetes.io/name": "upload-pipelines"},
    "other": {},
}
# The addresses of pods are among those that policies allow for the cluster's API, a store outside and git's servers; so what "anywhere"
# opens is open to any pod that lets it in.
ANYWHERE = {"kubeflow": {443, 6443}, "run": {22, 443, 6443}, "training-0": {443}, "training-1": {443}}
ALLOWED = {
    ("run", "kubeflow"): {8080, 8887, 8888},
    ("upload", "kubeflow"): {8888},
    **{(source, "store"): {8333} for source in LABELS},
    **{(source, target): set(PORTS) for source in ("training-0", "training-1") for target in ("training-0", "training-1")},
}
"""(from, to) → the ports on which pods of the namespace may connect; no others do. A pod may always connect to itself."""


def make_pod(name, namespace, labels):
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "sysctls": [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}],
            },
            "containers": [
                {
                    "name": "main",
                    "image": IMAGE,
                    "command": ["python", "-c", SERVER],
                    "ports": [{"name": "s3", "containerPort": 8333}],
                    "securityContext": security,
                },
            ],
        },
    }


@pytest.fixture(scope="module")
def addresses(kubectl, make_namespace):
    """Namespace, and name → address of its pods, one of each kind, and of one pod elsewhere."""
    namespace, outside = make_namespace(), make_namespace()
    images = dict(zip(("noisy-student/worker", "noisy-student/tools"), IMAGES, strict=True))
    rendered = render_overlay(kubectl, "dev", images)
    rendered = rendered.with_dns_peers(find_dns_peers(kubectl))
    objects = move_objects(rendered.objects, namespace, list_kinds(kubectl))
    apply(kubectl, *(item for item in objects if item["kind"] == "NetworkPolicy"))
    apply(kubectl, *(make_pod(name, namespace, labels) for name, labels in LABELS.items()), make_pod("outside", outside, {}))
    found = {}
    for name, place in [*((name, namespace) for name in LABELS), ("outside", outside)]:
        kubectl.run_command(
            "wait", "--for=condition=Ready", f"pod/{name}", f"--namespace={place}", "--timeout=120s", seconds=130
        )
        found[name] = (place, kubectl.get_object("pod", name, place)["status"]["podIP"])
    return found


def reach(kubectl, addresses, source, targets):
    """Which (name, port) a pod can connect to."""
    place, _ = addresses[source]
    pairs = json.dumps([(addresses[name][1], port) for name, port in targets])
    command = [f"--namespace={place}", source, "--", "python", "-c", CLIENT, pairs]
    answers = json.loads(kubectl.run_command("exec", *command, seconds=120))
    return {target for target, answer in zip(targets, answers, strict=True) if answer}


@pytest.mark.parametrize("source", [*LABELS, "outside"])
def test_pods_connect_where_policies_allow(kubectl, addresses, source):
    targets = [(name, port) for name, port in product([*LABELS, "outside"], PORTS) if name != source]
    reached = reach(kubectl, addresses, source, targets)
    expected = {(name, port) for name, port in targets if port in ALLOWED.get((source, name), ())}
    # From "anywhere" to a pod that no policy protects.
    expected |= {
        ("outside", port) for port in (PORTS if source == "outside" else ANYWHERE.get(source, ())) if source != "outside"
    }
    assert reached == expected


def test_pods_of_runs_resolve_names(kubectl, addresses):
    place, _ = addresses["run"]
    program = "import socket; print(socket.getaddrinfo('kubernetes.default', 443)[0][4][0])"
    service = kubectl.get_object("service", "kubernetes", "default")
    answer = kubectl.run_command("exec", f"--namespace={place}", "run", "--", "python", "-c", program)
    assert answer.strip() == service["spec"]["clusterIP"]


def test_pods_of_runs_reach_the_api_server(kubectl, addresses):
    place, _ = addresses["run"]
    program = "import socket, os; socket.create_connection((os.environ['KUBERNETES_SERVICE_HOST'], 443), timeout=10)"
    kubectl.run_command("exec", f"--namespace={place}", "run", "--", "python", "-c", program)
