"""Waiting until what was applied works, and saying meanwhile what it waits for."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from k8s.kubectl import Kubectl, Object
from k8s.manifests import Key
from ns.core.errors import ClusterError
from ns.core.log import duration

POLL_SECONDS = 3.0
SAY_SECONDS = 20.0
"""After so long without news, what is waited for is said again."""
KINDS = {"Deployment": "deployments", "StatefulSet": "statefulsets", "DaemonSet": "daemonsets", "Job": "jobs"}


class State(NamedTuple):
    """How far a workload is."""

    ready: bool
    said: str
    """`1 of 2 ready`; of a Job, how it stands."""
    failed: bool = False
    """Waiting longer does not help."""


GONE = State(False, "not there")


def state(workload: Object) -> State:
    """Of a Deployment, StatefulSet, DaemonSet or Job, from its status. One that its controller has not seen yet is not ready."""
    spec, status, kind = workload.get("spec") or {}, workload.get("status") or {}, workload["kind"]
    if kind == "Job":
        conditions = {one["type"]: one for one in status.get("conditions") or () if one["status"] == "True"}
        if "Failed" in conditions:
            return State(False, conditions["Failed"].get("message") or "failed", failed=True)
        return State("Complete" in conditions, "done" if "Complete" in conditions else "running")
    if status.get("observedGeneration", 0) < workload["metadata"].get("generation", 0):
        return State(False, "not seen yet")
    if kind == "DaemonSet":
        wanted, updated = status.get("desiredNumberScheduled", 0), status.get("updatedNumberScheduled", 0)
        ready = min(status.get("numberReady", 0), updated)
    else:
        wanted, updated = spec.get("replicas", 1), status.get("updatedReplicas", 0)
        ready = min(status.get("availableReplicas" if kind == "Deployment" else "readyReplicas", 0), updated)
    return State(ready >= wanted, f"{ready} of {wanted} ready")


def trouble(pods: Sequence[Object], workload: str) -> str:
    """Why a workload's pods do not run, as Kubernetes says it; empty if it says nothing."""
    for pod in pods:
        if not pod["metadata"]["name"].startswith(f"{workload}-"):
            continue
        status = pod.get("status") or {}
        for one in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
            waiting = (one.get("state") or {}).get("waiting") or {}
            # These two are the normal course of things.
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                ended = ((one.get("lastState") or {}).get("terminated") or {}).get("exitCode")
                more = waiting.get("message") or (f"exit code {ended}" if ended is not None else "")
                return _line(f"{waiting['reason']}{f': {more}' if more else ''}")
        for one in status.get("conditions") or ():
            if one["type"] == "PodScheduled" and one["status"] == "False":
                return _line(f"{one.get('reason', 'Unschedulable')}: {one.get('message', '')}")
    return ""


def wait(
    kubectl: Kubectl, workloads: Sequence[Key], seconds: float, say: Callable[[str], None], *, poll: float = POLL_SECONDS
) -> None:
    """Returns when all are ready or done.

    Raises ClusterError after `seconds`, with why each of those that are not does not run, and at once for a Job that failed.
    """
    begun = said_at = time.monotonic()
    waiting = list(workloads)
    while waiting:
        states = _states(kubectl, waiting)
        for key in [key for key in waiting if states[key].ready]:
            waiting.remove(key)
            say(f"{key.namespace}/{key.name}: {states[key].said}, after {duration(time.monotonic() - begun)}")
            said_at = time.monotonic()
        for key in waiting:
            if states[key].failed:
                raise ClusterError(
                    f"{key}: {states[key].said}; kubectl -n {key.namespace} logs job/{key.name} says why; then deploy again"
                )
        if not waiting:
            break
        now = time.monotonic()
        if now - begun > seconds:
            reasons = "\n".join(_why(kubectl, key, states[key]) for key in waiting)
            raise ClusterError(f"not ready after {duration(seconds)}; the same command goes on from here:\n{reasons}")
        if now - said_at > SAY_SECONDS:
            said_at = now
            more = f", and {len(waiting) - 1} more" if len(waiting) > 1 else ""
            say(f"waiting for {_why(kubectl, waiting[0], states[waiting[0]])}{more}")
        time.sleep(poll)


def seen(kubectl: Kubectl, keys: Sequence[Key]) -> list[tuple[Key, tuple[bool, str, str]]]:
    """Each workload among these: whether it is ready, how far it is, and why it is not. Jobs may be done and gone."""
    workloads = [key for key in keys if key.kind in KINDS]
    states = _states(kubectl, workloads)
    workloads = [key for key in workloads if key.kind != "Job" or states[key] != GONE]
    pods = {place: kubectl.list("pods", place) for place in {key.namespace for key in workloads if not states[key].ready}}
    return [
        (key, (states[key].ready, states[key].said, "" if states[key].ready else trouble(pods[key.namespace], key.name)))
        for key in workloads
    ]


def _states(kubectl: Kubectl, keys: Sequence[Key]) -> dict[Key, State]:
    """How far each is; one that is not there is not ready."""
    states = dict.fromkeys(keys, GONE)
    for namespace in sorted({key.namespace for key in keys}):
        kinds = sorted({KINDS[key.kind] for key in keys if key.namespace == namespace})
        for one in kubectl.list(",".join(kinds), namespace):
            found = next((key for key in keys if key.same()[1:] == Key.of(one).same()[1:]), None)
            if found:
                states[found] = state(one)
    return states


def _why(kubectl: Kubectl, key: Key, seen: State) -> str:
    reason = trouble(kubectl.list("pods", key.namespace), key.name)
    return f"{key.namespace}/{key.name}: {seen.said}{f': {reason}' if reason else ''}"


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
