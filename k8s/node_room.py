"""How much CPU and memory a stage can ask for: what the largest node has left beside the platform's own pods."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from k8s.kubectl import K8sObject, parse_quantity
from ns.core.errors import prefix_errors

NODE_POOLS = ("train", "label")
RUN_LABEL = "workflows.argoproj.io/workflow"
# Of the driver pods that come and go beside a stage.
RESERVED = {"cpu": 0.2, "memory": 512 * 2**20}
# Below these a stage is not worth starting.
SMALLEST = {"cpu": 0.5, "memory": 2 * 2**30}


class NodeRoom(NamedTuple):
    """What a node has left."""

    name: str
    cpu: float
    memory: float
    """Bytes."""


def find_rooms(nodes: Sequence[K8sObject], pods: Sequence[K8sObject], workloads: Sequence[K8sObject]) -> dict[str, NodeRoom]:
    """Name → room of each node that takes pods.

    `workloads`: those of the platform, which are counted on every node, because any may get them; then their own pods are not, nor those
    of runs, so that a deployment finds the same room each time.
    """
    planned = [item["spec"]["template"]["spec"] for item in workloads]
    names = tuple((item["metadata"]["namespace"], item["metadata"]["name"] + "-") for item in workloads)
    others = [pod for pod in pods if _is_foreign(pod, names)]
    rooms = {}
    for node in nodes:
        ready = any(item["type"] == "Ready" and item["status"] == "True" for item in node["status"].get("conditions") or ())
        if ready and not node["spec"].get("unschedulable"):
            name, allocatable = node["metadata"]["name"], node["status"].get("allocatable") or {}
            specs = [*planned, *(pod["spec"] for pod in others if pod["spec"].get("nodeName") == name)]
            left = {
                resource: parse_quantity(allocatable.get(resource, "0"))
                - reserved
                - sum(_read_request(spec, resource) for spec in specs)
                for resource, reserved in RESERVED.items()
            }
            rooms[name] = NodeRoom(name, **left)
    return rooms


def _is_foreign(pod: K8sObject, names: Sequence[tuple[str, str]]) -> bool:
    meta = pod["metadata"]
    is_platform = any(meta.get("namespace") == namespace and meta["name"].startswith(name) for namespace, name in names)
    is_over = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    return not is_platform and not is_over and RUN_LABEL not in (meta.get("labels") or {})


def _read_request(spec: K8sObject, resource: str) -> float:
    def read(container: K8sObject) -> float:
        return parse_quantity(((container.get("resources") or {}).get("requests") or {}).get(resource, "0"))

    return max(sum(map(read, spec["containers"])), *map(read, spec.get("initContainers") or [{}]))


def fit_resources(
    nodes: Sequence[K8sObject], rooms: Mapping[str, NodeRoom], inputs: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """Returns what to fill in for `train_cpu`, `train_memory`, `label_cpu` and `label_memory`, and lines that tell about it.

    `inputs`: what the overlay says, which is kept, and told if no node has so much. `defaults`: of the pipeline, which are lowered where
    the largest node that the pool's selector takes has less.
    """
    filled, lines = {}, []
    for pool in NODE_POOLS:
        selector = inputs.get(f"{pool}_node_selector") or {}
        members = [
            rooms[node["metadata"]["name"]]
            for node in nodes
            if node["metadata"]["name"] in rooms and selector.items() <= (node["metadata"].get("labels") or {}).items()
        ]
        # A pool that scales from zero shows no node.
        if members:
            largest = max(members, key=lambda room: (room.memory, room.cpu))
            for resource in RESERVED:
                name, room = f"{pool}_{resource}", getattr(largest, resource)
                requested = str(inputs.get(name, defaults[name]))
                with prefix_errors(f"{name} of the placement"):
                    fits = parse_quantity(requested) <= room
                if fits:
                    continue
                if name in inputs or room < SMALLEST[resource]:
                    lines.append(
                        f"{name} {requested}: no node has so much left ({largest.name}: {format_amount(resource, room)})"
                    )
                else:
                    filled[name] = format_amount(resource, room)
                    lines.append(f"{name} {filled[name]}, not {requested}: what {largest.name} has beside the platform")
    return filled, lines


def format_amount(resource: str, amount: float) -> str:
    """CPUs to a tenth, or memory in whole MiB of 256, rounded down."""
    if resource == "cpu":
        return f"{max(0, math.floor(amount * 10 + 1e-6)) * 100}m"
    return f"{max(0, math.floor(amount / 2**28)) * 256}Mi"
