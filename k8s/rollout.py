"""Waits until the applied workloads are ready, and reports what it waits for."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from k8s.kubectl import K8sObject, Kubectl
from k8s.manifests import ObjectKey
from k8s.pods import find_trouble
from ns.core.errors import ClusterError
from ns.core.log import format_duration

POLL_SECONDS = 3.0
REPEAT_SECONDS = 20.0
"""Time without news after which the wait is reported again."""
KIND_PLURALS = {"Deployment": "deployments", "StatefulSet": "statefulsets", "DaemonSet": "daemonsets", "Job": "jobs"}


class WorkloadState(NamedTuple):
    """The progress of a workload."""

    ready: bool
    summary: str
    """`1 of 2 ready`; for a Job: running, done, or why it failed."""
    failed: bool = False
    """True: waiting longer does not help."""


class WorkloadRow(NamedTuple):
    """A workload in the output of `make status`."""

    name: str
    """NAMESPACE/NAME."""
    ready: bool
    summary: str
    reason: str
    """Why it is not ready; empty if unknown."""


MISSING = WorkloadState(False, "missing")


def read_workload_state(workload: K8sObject) -> WorkloadState:
    """The state of a Deployment, StatefulSet, DaemonSet or Job from its status; not ready before its controller has seen it."""
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


def wait_until_ready(kubectl: Kubectl, workloads: Sequence[ObjectKey], seconds: float, say: Callable[[str], None]) -> None:
    """Returns when all workloads are ready or done.

    Raises ClusterError after `seconds`, with the reason for each that is not ready, and at once for a Job that failed.
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
            raise ClusterError(f"not ready after {format_duration(seconds)}; run the same command to continue:\n{reasons}")
        if now - said_at > REPEAT_SECONDS:
            said_at = now
            others = f", and {len(waiting) - 1} more" if len(waiting) > 1 else ""
            say(f"waiting for {_explain_wait(kubectl, waiting[0], states[waiting[0]])}{others}")
        time.sleep(POLL_SECONDS)


def list_workload_rows(kubectl: Kubectl, keys: Sequence[ObjectKey]) -> list[WorkloadRow]:
    """Returns the state of each workload among `keys`. Jobs may be done and gone."""
    workloads = [key for key in keys if key.kind in KIND_PLURALS]
    states = _fetch_states(kubectl, workloads)
    unready = {key.namespace for key in workloads if not states[key].ready}
    pods = {namespace: kubectl.list_objects("pods", namespace) for namespace in unready}
    return [
        WorkloadRow(
            f"{key.namespace}/{key.name}",
            states[key].ready,
            states[key].summary,
            "" if states[key].ready else find_trouble(pods[key.namespace], key.name),
        )
        for key in workloads
        if key.kind != "Job" or states[key] != MISSING
    ]


def _fetch_states(kubectl: Kubectl, keys: Sequence[ObjectKey]) -> dict[ObjectKey, WorkloadState]:
    states = dict.fromkeys(keys, MISSING)
    for namespace in sorted({key.namespace for key in keys}):
        kinds = sorted({KIND_PLURALS[key.kind] for key in keys if key.namespace == namespace})
        for workload in kubectl.list_objects(",".join(kinds), namespace):
            for key in keys:
                if key[1:] == ObjectKey.from_object(workload)[1:]:
                    states[key] = read_workload_state(workload)
    return states


def _explain_wait(kubectl: Kubectl, key: ObjectKey, workload_state: WorkloadState) -> str:
    reason = find_trouble(kubectl.list_objects("pods", key.namespace), key.name)
    return f"{key.namespace}/{key.name}: {workload_state.summary}{f': {reason}' if reason else ''}"
