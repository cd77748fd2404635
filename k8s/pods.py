"""Why pods wait and why they failed, in the words of Kubernetes."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Collection, Sequence

from k8s.kubectl import K8sObject, Kubectl
from k8s.workflow import RUN_LABEL, find_refused_pods, read_node_id
from ns.core.errors import NsError, RunError

STAGE_LABEL = "app.kubernetes.io/component"
JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""Of the nodes of a TrainJob, whose failures their stage tells."""
WORKFLOWS = "workflows.argoproj.io"
POLL_SECONDS = 15.0
PENDING_SECONDS = 60.0
"""A pod that waits longer is told: images are pulled, and nodes are added, in less."""
LOG_LINES = 50


def find_trouble(pods: Sequence[K8sObject], workload: str) -> str:
    """Why a workload's pods do not run; empty if Kubernetes gives no reason."""
    reasons = (explain_waiting(pod) for pod in pods if pod["metadata"]["name"].startswith(f"{workload}-"))
    return next((reason for reason in reasons if reason), "")


def explain_waiting(pod: K8sObject) -> str:
    """Why a pod does not run; empty if its status has no reason."""
    status = pod.get("status") or {}
    for entry in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        waiting = (entry.get("state") or {}).get("waiting") or {}
        # These two are normal.
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            exit_code = ((entry.get("lastState") or {}).get("terminated") or {}).get("exitCode")
            detail = waiting.get("message") or (f"exit code {exit_code}" if exit_code is not None else "")
            return _shorten_line(f"{waiting['reason']}{f': {detail}' if detail else ''}")
    for entry in status.get("conditions") or ():
        if entry["type"] == "PodScheduled" and entry["status"] == "False":
            return _shorten_line(f"{entry.get('reason', 'Unschedulable')}: {entry.get('message', '')}")
    return ""


def explain_end(pod: K8sObject) -> str:
    """Why a pod failed; empty if its status says no more than that it did."""
    status = pod.get("status") or {}
    if status.get("reason"):
        return _shorten_line(f"{status['reason']}: {status.get('message', '')}")
    entries = sorted(status.get("containerStatuses") or (), key=lambda entry: str(entry.get("name")) != "main")
    for entry in entries:
        ended = (entry.get("state") or {}).get("terminated") or {}
        if ended.get("reason") == "OOMKilled":
            return "OOMKilled: it needs more memory than its limit; raise train_memory or label_memory, or lower the batch size"
        if ended.get("exitCode"):
            detail = str(ended.get("message") or "").strip()
            return _shorten_line(f"exit code {ended['exitCode']}{f': {detail}' if detail else ''}")
    return ""


class RunPods:
    """The pods of a run of Kubeflow."""

    def __init__(self, kubectl: Kubectl, namespace: str, run_id: str, say: Callable[[str], None]) -> None:
        """`say`: is told why pods wait."""
        self._kubectl, self._namespace, self._say = kubectl, namespace, say
        self._selector = f"{RUN_LABEL}={run_id}"
        self._polled_at = -POLL_SECONDS
        self._workflow_read_at = 0.0
        self._refused: dict[str, tuple[str, str]] = {}
        self._was_seen = False
        self._missing_looks = 0
        """How often in a row there was no Workflow, and no pod, which is deleted with it."""
        self._pending_since: dict[str, float] = {}
        self._told: set[tuple[str, str]] = set()

    def report_waiting(self) -> None:
        """Tells why pods have waited for a minute, once for each stage and reason. Looks every few seconds, however often it is called.

        Raises RunError if the run's Workflow was deleted: nothing works any more, and Kubeflow shows the run as running for ever.
        """
        now = time.monotonic()
        if now - self._polled_at < POLL_SECONDS:
            return
        self._polled_at = now
        # The run continues, whether or not its pods can be listed now.
        with contextlib.suppress(NsError):
            pods = self._kubectl.list_objects("pods", self._namespace, self._selector)
            pending = {str(pod["metadata"]["name"]): pod for pod in pods if (pod.get("status") or {}).get("phase") == "Pending"}
            self._read_refused(now, {read_node_id(pod) for pod in pods})
            self._pending_since = {name: self._pending_since.get(name, now) for name in (*pending, *self._refused)}
            for name, pod in pending.items():
                if now - self._pending_since[name] >= PENDING_SECONDS:
                    self._tell_once(_stage_of(pod), f"pod {name} waits:", explain_waiting(pod) or self._find_warning(name))
            for name, (stage, message) in self._refused.items():
                if now - self._pending_since[name] >= PENDING_SECONDS:
                    self._tell_once(stage, "its pod is refused:", _shorten_line(message))
        if self._missing_looks > 1:
            reason = f"its Workflow in {self._namespace} was deleted, and Kubeflow goes on to show it as it was"
            if self._was_seen:
                raise RunError(f"{reason}: terminate it there, though that fails; then the same command starts it again")
            self._tell_once("run", "perhaps", f"{reason}; if so, terminate it there, and start it again")

    def _read_refused(self, now: float, existing: Collection[str]) -> None:
        """Reads which pods do not exist because the namespace has no room. Argo's object may be large: it is read once a minute."""
        if now - self._workflow_read_at >= PENDING_SECONDS:
            self._workflow_read_at, self._refused = now, {}
            workflows = self._kubectl.list_objects(WORKFLOWS, self._namespace, self._selector)
            for workflow in workflows:
                self._refused = find_refused_pods(workflow)
            self._was_seen = self._was_seen or bool(workflows)
            self._missing_looks = 0 if workflows or existing else self._missing_looks + 1
        self._refused = {name: refused for name, refused in self._refused.items() if name not in existing}

    def _tell_once(self, stage: str, what: str, reason: str) -> None:
        # `ErrImagePull` and `ImagePullBackOff` alternate; numbers of nodes, names of pods and amounts change.
        kind = "image" if "ImagePull" in reason.partition(":")[0] else re.sub(r'\d+|"[^"]*"', "", reason)
        if reason and (stage, kind) not in self._told:
            self._told.add((stage, kind))
            self._say(f"{stage}: {what} {reason}{_suggest_cure(reason)}")

    def explain_failures(self) -> dict[str, str]:
        """Why the last pod of each stage failed: stage → reason. Empty if the pods cannot be listed, or are gone."""
        reasons: dict[str, str] = {}
        with contextlib.suppress(NsError):
            pods = self._kubectl.list_objects("pods", self._namespace, self._selector)
            own_pods = [pod for pod in pods if JOB_LABEL not in (pod["metadata"].get("labels") or {})]
            for pod in sorted(own_pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", ""))):
                match (pod.get("status") or {}).get("phase"):
                    case "Failed":
                        reasons[_stage_of(pod)] = self._find_logged_error(pod) or explain_end(pod) or "its pod failed"
                    case "Succeeded":
                        # Another try of the same stage.
                        reasons.pop(_stage_of(pod), None)
        return reasons

    def _find_warning(self, pod_name: str) -> str:
        """The pod's latest event that is a warning: a volume, a secret or a network that is missing stands nowhere else."""
        events = self._kubectl.list_objects("events", self._namespace, field_selector=f"involvedObject.name={pod_name}")
        warnings = [event for event in events if event.get("type") == "Warning"]
        latest = max(warnings, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""), default=None)
        return _shorten_line(f"{latest.get('reason', '')}: {latest.get('message', '')}") if latest else ""

    def _find_logged_error(self, pod: K8sObject) -> str:
        """The error that the stage logged before it ended."""
        with contextlib.suppress(NsError):
            log = self._kubectl.run_command(
                "logs",
                str(pod["metadata"]["name"]),
                f"--namespace={self._namespace}",
                "--container=main",
                f"--tail={LOG_LINES}",
            )
            for line in reversed(log.splitlines()):
                with contextlib.suppress(ValueError, AttributeError):
                    event = json.loads(line)
                    if event.get("event") == "failed" and event.get("error"):
                        return str(event["error"])
        return ""


def _stage_of(pod: K8sObject) -> str:
    labels = pod["metadata"].get("labels") or {}
    return str(labels.get(STAGE_LABEL) or pod["metadata"]["name"])


def _suggest_cure(reason: str) -> str:
    kind = reason.partition(":")[0]
    if "ImagePull" in kind or "ImageName" in kind:
        return "; push that image, or name one that nodes can pull with --image"
    if kind == "SchedulingGated":
        return "; it waits for its turn in a queue"
    if "Insufficient" in reason:
        return "; no node has so much free: wait for other pods, ask for less with --input NAME=VALUE (docs/pipeline.md), or add a node"
    if "were unschedulable" in reason:
        return "; nodes are cordoned: kubectl uncordon NODE, or add a node"
    if "exceeded quota" in reason:
        return "; it starts when the namespace has so much left: wait for other runs, ask for less, or raise the quota"
    if kind == "Unschedulable":
        return "; compare the pool's selectors and tolerations with the labels and taints of the nodes"
    return ""


def _shorten_line(text: str) -> str:
    return " ".join(text.split())[:200]
