"""Which pods are scraped, and where: the PodMonitor's relabelling, carried out as Prometheus documents it."""

import re

import pytest
import yaml

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


def relabelled(labels: dict[str, str]) -> dict[str, str] | None:
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


def test_a_running_step_is_scraped_on_the_port_of_its_metrics():
    assert relabelled(STEP)["__address__"] == "10.1.2.3:9090"
    first = {f"{META}container_name": "node", f"{META}label_batch_kubernetes_io_job_completion_index": "0"}
    assert relabelled(STEP | first)["__address__"] == "10.1.2.3:9090"


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
def test_nothing_else_is(other):
    assert relabelled(STEP | {META + name: value for name, value in other.items()}) is None


def test_metrics_of_a_step_can_be_seen_twice_before_it_ends():
    settings = yaml.safe_load((MONITORING / "settings.yaml").read_text())["data"]
    assert ENDPOINT["interval"].endswith("s")
    assert float(settings["NS_METRICS_LINGER_SECONDS"]) >= 2 * int(ENDPOINT["interval"][:-1])
