"""The nodes of a training: the stage's own pod, or others that a TrainJob starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ns.core.errors import ConfigError


@dataclass(frozen=True)
class TrainingNodes:
    """The nodes of a training on several."""

    count: int
    image: str
    runtime: str
    runtime_kind: str
    """TrainingRuntime (of the namespace) or ClusterTrainingRuntime."""
    gpu_type: str
    gpus: int
    """GPUs of each node, which starts one process per GPU, or a single process without GPUs."""
    cpu: str
    memory: str
    selector: Mapping[str, str]
    tolerations: Sequence[dict[str, Any]]
    secret: str
    """Secret with the keys accesskey and secretkey of the store. May be missing."""
    settings: str
    """ConfigMap with SETTINGS_VARIABLES. May be missing, as may its keys."""
    queue: str = ""
    """Local queue of Kueue; none if empty."""


class TrainingPod(NamedTuple):
    """What the pod of a stage that trains asks for, as KFP passes it on."""

    gpus: str
    cpu: str
    memory: str
    nodes: dict[str, Any]
    """Fields of TrainingNodes; empty if the pod itself trains."""


def plan_training_pod(cluster: Mapping[str, Any], gpus: str, nodes: int) -> TrainingPod:
    """Plans the pod of a training with `gpus` GPUs on each of `nodes` nodes: with several it only starts and follows them.

    `cluster`: fields of the cluster's placement. Raises ConfigError for a number that cannot be.
    """
    if nodes < 1:
        raise ConfigError(f"nodes: invalid value {nodes}: must be at least 1")
    if not gpus.isdecimal():
        raise ConfigError(f"gpus_train: invalid value {gpus!r}: must be a number")
    if nodes == 1:
        return TrainingPod(gpus, cluster["train_cpu"], cluster["train_memory"], {})
    others = TrainingNodes(
        count=nodes,
        image=cluster["worker_image"],
        runtime=cluster["runtime"],
        runtime_kind=cluster["runtime_kind"],
        gpu_type=cluster["gpu_type"],
        gpus=int(gpus),
        cpu=cluster["train_cpu"],
        memory=cluster["train_memory"],
        selector=cluster["train_node_selector"],
        tolerations=cluster["train_tolerations"],
        secret=cluster["storage_secret"],
        settings=cluster["settings"],
        queue=cluster["queue"],
    )
    return TrainingPod("0", "500m", "2Gi", asdict(others))


def make_launcher(run: str, nodes: Mapping[str, Any]) -> Callable[[str, Sequence[str]], None] | None:
    """What trains on the nodes of a TrainingPod; None if the stage's own pod trains."""
    if not nodes:
        return None
    from components.cluster.trainjob import run_trainjob

    # KFP passes whole numbers on as floats.
    training_nodes = TrainingNodes(**{**nodes, "count": int(nodes["count"]), "gpus": int(nodes["gpus"])})
    return lambda training_id, arguments: run_trainjob(run, training_nodes, training_id, arguments)
