"""Reads Argo's Workflow of a run: its pods, the tries of its stages, and the size that Argo limits."""

import base64
import gzip
import json
import re
from datetime import datetime
from typing import Any, NamedTuple

from k8s.kubectl import K8sObject

MAX_PACKED_BYTES = 1024 * 1024
"""Argo ends a run whose Workflow is larger, compressed."""
RUN_LABEL = "pipeline/runid"
"""Label of a Workflow and of its pods: KFP's id of the run."""
NODE_ANNOTATION = "workflows.argoproj.io/node-id"

# run(0).root(0).teacher(0).executor(1): a number for each try of a node.
_EXECUTOR = re.compile(r"\.(?P<task>[^.()]+)(\(\d+\))?\.executor(\(\d+\))?$")
# Numbers of tries and items, and the parts of a path that no person named.
_NUMBERS = re.compile(r"\([^()]*\)")
_UNNAMED = re.compile(r"executor|iteration(-item|-iterations)?")


class WorkflowFigures(NamedTuple):
    """What a run costs Argo."""

    pods: int
    drivers: int
    """Of the pods, those that only start another one."""
    nodes: int
    """Entries of the status."""
    raw_bytes: int
    """The whole object as JSON."""
    packed_bytes: int
    """The same with its nodes as Argo compresses them: gzip, then base64."""


class PodTry(NamedTuple):
    """A pod that worked on a stage."""

    node_id: str
    phase: str
    """As Argo has it: Pending, Running, Succeeded, Failed, Error."""
    message: str
    started_at: str


def read_nodes(workflow: K8sObject) -> list[dict[str, Any]]:
    """Returns the nodes of a Workflow, also if Argo has compressed them."""
    status = workflow.get("status") or {}
    packed = status.get("compressedNodes")
    nodes = json.loads(gzip.decompress(base64.b64decode(packed))) if packed else status.get("nodes") or {}
    return list(nodes.values())


def read_node_id(pod: K8sObject) -> str:
    """Id of the node that a pod belongs to; empty if it is none of Argo's."""
    return str((pod["metadata"].get("annotations") or {}).get(NODE_ANNOTATION, ""))


def find_refused_pods(workflow: K8sObject) -> dict[str, tuple[str, str]]:
    """Pods that Argo waits for, with a message: id of the node → stage, message. A namespace's quota refuses such a pod, which exists
    nowhere; or it exists, and waits for a node."""
    return {
        node["id"]: (_find_stage(node["name"]), node["message"])
        for node in read_nodes(workflow)
        if node.get("type") == "Pod" and node.get("phase") == "Pending" and node.get("message")
    }


def _find_stage(node_name: str) -> str:
    parts = [part.removesuffix("-driver") for part in _NUMBERS.sub("", node_name).split(".")]
    return next((part for part in reversed(parts) if not _UNNAMED.fullmatch(part)), node_name)


def measure_workflow(workflow: K8sObject) -> WorkflowFigures:
    nodes = read_nodes(workflow)
    pods = [node for node in nodes if node.get("type") == "Pod"]
    by_id = {node["id"]: node for node in nodes}
    status = {name: value for name, value in (workflow.get("status") or {}).items() if name != "compressedNodes"}
    packed = base64.b64encode(gzip.compress(_dump_compact(by_id))).decode()
    return WorkflowFigures(
        pods=len(pods),
        drivers=sum(not _EXECUTOR.search(node["name"]) for node in pods),
        nodes=len(nodes),
        raw_bytes=len(_dump_compact({**workflow, "status": {**status, "nodes": by_id}})),
        packed_bytes=len(_dump_compact({**workflow, "status": {**status, "nodes": {}, "compressedNodes": packed}})),
    )


def measure_seconds(workflow: K8sObject) -> float:
    """Wall time of a run that has ended."""
    status = workflow["status"]
    return (datetime.fromisoformat(status["finishedAt"]) - datetime.fromisoformat(status["startedAt"])).total_seconds()


def list_tries(workflow: K8sObject, stage: str) -> list[PodTry]:
    """Returns the pods that worked on the task of that name that was begun first, in the order in which they started."""
    tries_by_task: dict[str, list[PodTry]] = {}
    for node in read_nodes(workflow):
        match = _EXECUTOR.search(node["name"])
        if node.get("type") == "Pod" and match and match["task"] == stage:
            pod_try = PodTry(node["id"], node.get("phase", ""), node.get("message", ""), node.get("startedAt") or "")
            tries_by_task.setdefault(node["name"][: match.start()], []).append(pod_try)
    first = min(tries_by_task.values(), key=lambda tries: min(pod_try.started_at for pod_try in tries), default=[])
    return sorted(first, key=lambda pod_try: pod_try.started_at)


def _dump_compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
