"""Waiting until what was applied works, and saying meanwhile what it waits for."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from k8s.kubectl import K8sObject, Kubectl
from k8s.manifests import ObjectKey
from ns.core.errors import ClusterError
from ns.core.log import format_duration

POLL_SECONDS = 3.0
REPEAT_SECONDS = 20.0
"""After so long without news, what is waited for is said again."""
KIND_PLURALS = {"Deployment": "deployments", "StatefulSet": "statefulsets", "DaemonSet": "daemonsets", "Job": "jobs"}


class WorkloadState(NamedTuple):
    """How far a workload is."""

    ready: bool
    summary: str
    """`1 of 2 ready`; of a Job, how it stands."""
    failed: bool = False
    """Waiting longer does not help."""


MISSING = WorkloadState(False, "not there")


def read_workload_state(workload: K8sObject) -> WorkloadState:
    """Of a Deployment, StatefulSet, DaemonSet or Job, from its status. One that its controller has not seen yet is not ready."""
    spec, status, kind = workload.get("spec") or {}, workload.get("status") or {}, workload["kind"]
    if kind == "Job":
        conditions = {
            condition["type"]: condition for condition in status.get("conditions") or () if condition["status"] == "True"
        }
        if "Failed" in conditions:
            return WorkloadState(False, conditions["Failed"].get("message") or "failed", failed=True)
        return WorkloadState("Complete" in conditions, "done" if "Complete" in conditions else "running")
    if status.get("observedGeneration", 0) < workload["metadata"].get("generation", 0):
        return WorkloadState(False, "not seen yet")
    if kind == "DaemonSet":
        desired, updated = status.get("desiredNumberScheduled", 0), status.get("updatedNumberScheduled", 0)
        ready = min(status.get("numberReady", 0), updated)
    else:
        desired, updated = spec.get("replicas", 1), status.get("updatedReplicas", 0)
        ready = min(status.get("availableReplicas" if kind == "Deployment" else "readyReplicas", 0), updated)
    return WorkloadState(ready >= desired, f"{ready} of {desired} ready")


def find_trouble(pods: Sequence[K8sObject], workload: str) -> str:
    """Why a workload's pods do not run, as Kubernetes says it; empty if it says nothing."""
    for pod in pods:
        if not pod["metadata"]["name"].startswith(f"{workload}-"):
            continue
        status = pod.get("status") or {}
        for entry in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
            waiting = (entry.get("state") or {}).get("waiting") or {}
            # These two are the normal course of things.
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                exit_code = ((entry.get("lastState") or {}).get("terminated") or {}).get("exitCode")
                detail = waiting.get("message") or (f"exit code {exit_code}" if exit_code is not None else "")
                return _shorten_line(f"{waiting['reason']}{f': {detail}' if detail else ''}")
        for entry in status.get("conditions") or ():
            if entry["type"] == "PodScheduled" and entry["status"] == "False":
                return _shorten_line(f"{entry.get('reason', 'Unschedulable')}: {entry.get('message', '')}")
    return ""


def wait_until_ready(
    kubectl: Kubectl, workloads: Sequence[ObjectKey], seconds: float, say: Callable[[str], None], *, poll: float = POLL_SECONDS
) -> None:
    """Returns when all are ready or done.

    Raises ClusterError after `seconds`, with why each of those that are not does not run, and at once for a Job that failed.
    """
    started = said_at = time.monotonic()
    waiting = list(workloads)
    while waiting:
        states = _fetch_states(kubectl, waiting)
        for key in [key for key in waiting if states[key].ready]:
            waiting.remove(key)
            say(f"{key.namespace}/{key.name}: {states[key].summary}, after {format_duration(time.monotonic() - started)}")
            said_at = time.monotonic()
        for key in waiting:
            if states[key].failed:
                raise ClusterError(
                    f"{key}: {states[key].summary}; kubectl -n {key.namespace} logs job/{key.name} says why; then deploy again"
                )
        if not waiting:
            break
        now = time.monotonic()
        if now - started > seconds:
            reasons = "\n".join(_explain_wait(kubectl, key, states[key]) for key in waiting)
            raise ClusterError(f"not ready after {format_duration(seconds)}; the same command goes on from here:\n{reasons}")
        if now - said_at > REPEAT_SECONDS:
            said_at = now
            others = f", and {len(waiting) - 1} more" if len(waiting) > 1 else ""
            say(f"waiting for {_explain_wait(kubectl, waiting[0], states[waiting[0]])}{others}")
        time.sleep(poll)


def list_workload_states(kubectl: Kubectl, keys: Sequence[ObjectKey]) -> list[tuple[ObjectKey, tuple[bool, str, str]]]:
    """Each workload among these: whether it is ready, how far it is, and why it is not. Jobs may be done and gone."""
    workloads = [key for key in keys if key.kind in KIND_PLURALS]
    states = _fetch_states(kubectl, workloads)
    workloads = [key for key in workloads if key.kind != "Job" or states[key] != MISSING]
    pods = {
        namespace: kubectl.list_objects("pods", namespace)
        for namespace in {key.namespace for key in workloads if not states[key].ready}
    }
    return [
        (
            key,
            (states[key].ready, states[key].summary, "" if states[key].ready else find_trouble(pods[key.namespace], key.name)),
        )
        for key in workloads
    ]


def _fetch_states(kubectl: Kubectl, keys: Sequence[ObjectKey]) -> dict[ObjectKey, WorkloadState]:
    """How far each is; one that is not there is not ready."""
    states = dict.fromkeys(keys, MISSING)
    for namespace in sorted({key.namespace for key in keys}):
        kinds = sorted({KIND_PLURALS[key.kind] for key in keys if key.namespace == namespace})
        for workload in kubectl.list_objects(",".join(kinds), namespace):
            matched = next(
                (key for key in keys if key.without_version()[1:] == ObjectKey.from_object(workload).without_version()[1:]),
                None,
            )
            if matched:
                states[matched] = read_workload_state(workload)
    return states


def _explain_wait(kubectl: Kubectl, key: ObjectKey, workload_state: WorkloadState) -> str:
    reason = find_trouble(kubectl.list_objects("pods", key.namespace), key.name)
    return f"{key.namespace}/{key.name}: {workload_state.summary}{f': {reason}' if reason else ''}"


def _shorten_line(text: str) -> str:
    return " ".join(text.split())[:200]
