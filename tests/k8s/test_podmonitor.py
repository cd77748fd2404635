"""Which pods are scraped, and where: the PodMonitor's relabeling, carried out as Prometheus documents it.

And what reaches the Pushgateway."""

import re

import pytest
import yaml

from k8s import validate
from tests.k8s.test_rules import MONITORING

ENDPOINT = yaml.safe_load((MONITORING / "podmonitor-noisy-student.yaml").read_text())["spec"]["podMetricsEndpoints"][0]
META = "__meta_kubernetes_pod_"
STEP = {
    f"{META}phase": "Running",
    f"{META}container_name": "main",
    f"{META}container_init": "false",
    f"{META}ip": "10.1.2.3",
    "__address__": "10.1.2.3",
}


def relabeled(labels: dict[str, str]) -> dict[str, str] | None:
    """A target's labels after all rules; None if it is dropped. Regular expressions match the whole value."""
    for rule in ENDPOINT["relabelings"]:
        value = ";".join(labels.get(name, "") for name in rule["sourceLabels"])
        match = re.fullmatch(rule["regex"], value)
        action = rule.get("action", "replace")
        if (action == "drop" and match) or (action == "keep" and not match):
            return None
        if action == "replace" and match:
            labels = labels | {rule["targetLabel"]: match.expand(rule["replacement"].replace("$", "\\"))}
    return labels


def test_pod_monitor_uses_the_port_of_the_settings():
    settings = yaml.safe_load((MONITORING.parents[1] / "base" / "configmap-noisy-student.yaml").read_text())["data"]
    assert relabeled(STEP)["__address__"].endswith(f":{settings['NS_METRICS_PORT']}")


def test_pod_monitor_scrapes_running_stages():
    assert relabeled(STEP)["__address__"] == "10.1.2.3:9090"
    first = {f"{META}container_name": "node", f"{META}label_batch_kubernetes_io_job_completion_index": "0"}
    assert relabeled(STEP | first)["__address__"] == "10.1.2.3:9090"


@pytest.mark.parametrize(
    "other",
    [
        {"phase": "Succeeded"},
        {"phase": "Failed"},
        {"phase": "Pending"},
        {"container_name": "wait"},
        {"container_init": "true"},
        {"container_name": "node", "label_batch_kubernetes_io_job_completion_index": "1"},
        {"container_name": "node", "label_batch_kubernetes_io_job_completion_index": "12"},
    ],
    ids=str,
)
def test_pod_monitor_drops_other_pods(other):
    assert relabeled(STEP | {META + name: value for name, value in other.items()}) is None


def test_metrics_linger_for_two_scrapes():
    settings = yaml.safe_load((MONITORING / "settings.yaml").read_text())["data"]
    assert ENDPOINT["interval"].endswith("s")
    assert float(settings["NS_METRICS_LINGER_SECONDS"]) >= 2 * int(ENDPOINT["interval"][:-1])


@pytest.mark.integration
def test_network_policy_allows_the_pushgateway():
    objects = {
        (one["kind"], one["metadata"]["name"]): one
        for one in validate.build_folder(MONITORING.parents[1] / "overlays" / "production")
    }
    address = objects["ConfigMap", "noisy-student"]["data"]["NS_PUSHGATEWAY_URL"]
    service = objects["Service", "noisy-student-pushgateway"]
    port = service["spec"]["ports"][0]["port"]
    assert address == f"http://{service['metadata']['name']}.{service['metadata']['namespace']}:{port}"
    (pod,) = [
        one["spec"]["template"] for (kind, name), one in objects.items() if kind == "Deployment" and "pushgateway" in name
    ]
    allowed = [
        rule
        for rule in objects["NetworkPolicy", "runs"]["spec"]["egress"]
        for to in rule["to"]
        if to.get("podSelector", {}).get("matchLabels", {}).items() <= pod["metadata"]["labels"].items() and "podSelector" in to
    ]
    # A policy is held against the pod's port, whatever the service's is.
    assert [rule["ports"] for rule in allowed] == [[{"port": pod["spec"]["containers"][0]["ports"][0]["containerPort"]}]]
