"""Which failures Kubeflow retries, by Argo's rules in our own words (v4.0.5, `processNodeRetries`), from what we apply and compile.

A template's own retryStrategy is merged over `templateDefaults` field by field. After a failed try Argo gives up if the window from the
first try's start is over, the policy does not name the phase, the limit is reached, or the expression is false.
"""

import re
from typing import Any

import pytest
import yaml

from k8s.doctor import find_retry_policy
from pipelines import GENERATION_PACKAGE, PACKAGE, load_yaml_documents
from pipelines.placement import STAGE_RETRIES, START_RETRIES
from tests.k8s.test_validate import K8S

CONFIG_MAP = K8S / "components" / "kubeflow" / "workflow-controller-configmap.yaml"
RETRIED_PHASES = {
    "Always": {"Failed", "Error"},
    "OnFailure": {"Failed"},
    "OnError": {"Error"},
}


def read_defaults() -> dict[str, Any]:
    config_map = yaml.safe_load(CONFIG_MAP.read_text())
    return yaml.safe_load(config_map["data"]["workflowDefaults"])["spec"]["templateDefaults"]["retryStrategy"]


def is_retried(strategy: dict[str, Any], phase: str, exit_code: int | None, message: str) -> bool:
    """Whether Argo tries again, limit and window aside. A node without an exit code has -1."""
    if phase not in RETRIED_PHASES[strategy["retryPolicy"]]:
        return False
    expression = strategy.get("expression", "true")
    variables = {"status": phase, "exitCode": str(-1 if exit_code is None else exit_code), "message": message}
    text = re.sub(r"lastRetry\.(\w+)", lambda match: repr(variables[match[1]]), expression)
    return bool(eval(text.replace("||", " or ").replace("&&", " and "), {"asInt": int, "true": True}))


def iterate_stages(package: str):
    """Yields name, retry policy and time limit, s, of every task that runs a container."""
    spec, platform = load_yaml_documents(package)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for component in [spec["root"], *spec["components"].values()]:
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if label:
                yield name, task["retryPolicy"], int(executors[label]["activeDeadlineSeconds"])


def sum_pauses(policy: dict[str, Any]) -> float:
    """Seconds that Argo waits between all tries of a stage."""
    pause = int(policy["backoffDuration"].removesuffix("s"))
    return sum(pause * policy["backoffFactor"] ** number for number in range(policy["maxRetryCount"]))


@pytest.mark.parametrize(
    ("phase", "exit_code", "message", "retried"),
    [
        ("Failed", 1, "main: Error (exit code 1)", True),
        ("Failed", 137, "main: OOMKilled (exit code 137)", True),
        ("Failed", 143, "main: Error (exit code 143)", True),
        ("Failed", None, "The node was low on resource: memory.", True),
        ("Error", None, "pod deleted", True),
        # Nested pipelines, whose second try ML Metadata refuses.
        ("Failed", None, "", False),
        ("Error", None, "", False),
    ],
    ids=["exit", "out of memory", "terminated", "evicted", "deleted", "pipeline failed", "pipeline errored"],
)
def test_kubeflow_as_we_apply_it_retries_pods_only(phase, exit_code, message, retried):
    assert is_retried(read_defaults(), phase, exit_code, message) is retried


def test_kubeflow_as_its_authors_publish_it_retries_no_failed_stage():
    published = {"limit": "2", "retryPolicy": "OnError"}
    assert not is_retried(published, "Failed", 137, "main: OOMKilled (exit code 137)")
    assert is_retried(published, "Error", None, "pod deleted")


def test_find_retry_policy_reads_what_we_apply():
    assert find_retry_policy(yaml.safe_load(CONFIG_MAP.read_text())) == "Always"
    assert find_retry_policy({"metadata": {"name": "empty"}}) == "OnFailure"


@pytest.mark.parametrize("package", [PACKAGE, GENERATION_PACKAGE], ids=lambda path: path.stem)
def test_window_of_every_stage_is_longer_than_all_its_tries(package):
    stages = list(iterate_stages(package.read_text()))
    assert len({name for name, _, _ in stages}) >= 6
    for name, policy, limit_seconds in stages:
        retries = policy["maxRetryCount"]
        window = int(policy["backoffMaxDuration"].removesuffix("s"))
        assert window > (retries + 1) * limit_seconds + sum_pauses(policy) + 24 * 3600, name


@pytest.mark.parametrize(
    ("package", "retries", "seconds"), [(PACKAGE, START_RETRIES, 5), (GENERATION_PACKAGE, STAGE_RETRIES, 210)], ids=str
)
def test_a_run_with_a_wrong_field_fails_soon_and_one_whose_node_is_lost_is_tried_again(package, retries, seconds):
    """The start of one generation also imports the data, and nobody waits for it."""
    policies = {name: policy for name, policy, _ in iterate_stages(package.read_text())}
    started = policies.pop("start")
    assert (started["maxRetryCount"], sum_pauses(started)) == (retries, seconds)
    assert {policy["maxRetryCount"] for policy in policies.values()} == {STAGE_RETRIES}
