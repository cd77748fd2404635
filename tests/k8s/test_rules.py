"""Rules and alerts: what they say by promtool, that each alert has a page, and that the metrics they read exist."""

import copy
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from ns.core import telemetry
from tests.k8s.promql import find_metrics

CHECKOUT = Path(__file__).parents[2]
MONITORING = CHECKOUT / "k8s" / "components" / "monitoring"
RULES = yaml.safe_load((MONITORING / "prometheusrule-noisy-student.yaml").read_text())["spec"]
CASES = yaml.safe_load((Path(__file__).parent / "rules.test.yaml").read_text())
ALL_RULES = [rule for group in RULES["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in ALL_RULES if "alert" in rule]
RECORDS = {rule["record"] for rule in ALL_RULES if "record" in rule}

FOREIGN = {
    "ALERTS",  # Prometheus itself
    "up",
    "DCGM_FI_DEV_FB_USED",  # NVIDIA's DCGM exporter
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_POWER_USAGE",
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
    "container_memory_working_set_bytes",  # cadvisor
    "kube_node_info",  # kube-state-metrics
    "kube_node_labels",
    "kube_node_status_allocatable",
    "kube_pod_completion_time",
    "kube_pod_container_resource_limits",
    "kube_pod_labels",
    "kube_pod_status_phase",
}
"""Metrics of others that we rely on; docs/monitoring.md names who shows them."""


def own_metrics() -> set[str]:
    """Every series that this code can show, whether it has been set or not."""
    found = set()
    for registry in (telemetry.REGISTRY, telemetry.SUMMARY):
        for family in (family for collector in registry._collector_to_names for family in collector.describe()):
            ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            found |= {f"{family.name}{end}" for end in ends}
    return found


def known_metrics() -> set[str]:
    return own_metrics() | RECORDS | FOREIGN


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (a, b) (rate(x_total{stage=~"y|z"}[5m])) / on (a) group_left (c) n:r:e', {"x_total", "n:r:e"}),
        ('label_replace(x == bool 1, "pod", "$1", "p", "(.+)") or x offset 5m > 8 * 24e3', {"x"}),
        ("histogram_quantile(0.9, sum by (le) (x_bucket))\nunless on () absent(up == 0)", {"x_bucket", "up"}),
        ("max_over_time(sum(x)[1h:1m]) + time() - clamp_min(y, 60)", {"x", "y"}),
    ],
)
def test_find_metrics_in_expressions(expression, names):
    assert find_metrics(expression) == names


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_read_metrics_that_exist(rule):
    read = find_metrics(rule["expr"])
    assert read
    assert read - known_metrics() == set()


def test_exposed_metrics_are_declared():
    telemetry.begin_stage("train", 0, "shown")
    shown = set(re.findall(r"^nst_\w+", generate_latest(telemetry.REGISTRY).decode(), re.MULTILINE))
    assert shown <= own_metrics()
    assert {
        "nst_images_processed_total",
        "nst_pseudo_label_confidence_bucket",
        "nst_last_success_timestamp_seconds",
    } <= own_metrics()


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_has_a_runbook(alert):
    page = CHECKOUT / alert["annotations"]["runbook_url"]
    assert page == CHECKOUT / "docs" / "runbooks" / f"{alert['alert']}.md"
    text = page.read_text()
    assert text.startswith(f"# {alert['alert']}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["What it means", "What to look at", "What to do"]


def test_each_runbook_has_an_alert():
    pages = {page.stem for page in (CHECKOUT / "docs" / "runbooks").glob("*.md")}
    assert pages == {alert["alert"] for alert in ALERTS}


def promtool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if not shutil.which("promtool"):
        pytest.skip("needs promtool, of the package prometheus")
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.mark.integration
def test_rules_pass_promtool(tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(CASES))
    checked = promtool(tmp_path, "check", "rules", "rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool(tmp_path, "test", "rules", "cases.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.integration
@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_promtool_cases_find_broken_alerts(tmp_path, alert):
    cases = [case for case in CASES["tests"] if any(t["alertname"] == alert for t in case.get("alert_rule_test", []))]
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(CASES | {"tests": cases}))
    for broken in ({"expr": "vector(1) > 2"}, {"expr": "group without () ({__name__!~'ALERTS.*|nst:.*'})", "for": "0s"}):
        rules = copy.deepcopy(RULES)
        (rule,) = [rule for group in rules["groups"] for rule in group["rules"] if rule.get("alert") == alert]
        rule.update(broken)
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
        tested = promtool(tmp_path, "test", "rules", "cases.yaml")
        assert tested.returncode == 1, broken
        assert alert in tested.stdout + tested.stderr
