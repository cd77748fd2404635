"""Where stages run: the store, the nodes, the images and the secrets of one cluster, written into a compiled package.

There are three pools of nodes. Labeling loses little when a node is taken away and belongs on spot nodes with GPUs; training belongs on
nodes that stay; all other stages need no GPU. Without selectors and tolerations every stage may run on every node.

A run form asks only for what differs from run to run. All else is filled in here, without KFP's compiler, so that a client can make the
package of its own cluster.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, Self

from pydantic import TypeAdapter, ValidationError

from components import SETTINGS_VARIABLES, STAGE_USER, TOOLS_IMAGE, WORKER_IMAGE
from ns.core.errors import ConfigError
from ns.core.git import HOST_VARIABLE, PASSWORD_VARIABLE, USER_VARIABLE
from pipelines import dump_yaml_documents, load_yaml_documents

GPU_COUNTS = ("0", "1", "2", "4", "8")
"""What the run form offers."""
STAGE_RETRIES = 3
"""Retries of a stage that fails or whose node is taken away: it continues where it stopped. Whether a failure is retried is decided by
Kubeflow's configuration (k8s/components/kubeflow/workflow-controller-configmap.yaml)."""
START_RETRIES = 1
"""Retries of the start of a run, which takes a second, and reads what a person has just written: for a lost node. A launcher of KFP ends
with 1 whatever it was, so that Argo cannot leave a wrong field alone."""
STAGE_PAUSE_SECONDS = 30
START_PAUSE_SECONDS = 5
"""Before the first retry; each later pause is twice as long."""
PENDING_HOURS = 168
"""Time that all tries of a stage together may wait for a node."""

Spec = dict[str, Any]


@dataclass(frozen=True)
class Placement:
    """What is the same for all runs on a cluster."""

    root: str = "s3://mlpipeline/noisy-student"
    """URI of the store that holds everything: data, models, label sets, the ledger and the runs."""
    worker_image: str = WORKER_IMAGE
    """Image of the stages, best named by its digest; worker-cuda for GPUs."""
    tools_image: str = TOOLS_IMAGE
    """Image of the stage that selects: tools. Without a label registry the worker image is enough."""
    gpu_type: str = "nvidia.com/gpu"
    """Kind of GPU, as the resource that nodes offer: nvidia.com/gpu, nvidia.com/mig-1g.10gb, amd.com/gpu."""
    label_gpus: str = "0"
    """Default of the input gpus_label."""
    label_cpu: str = "2"
    """CPUs of a labeling task."""
    label_memory: str = "8Gi"
    """Memory of a labeling task."""
    label_node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes for labeling, as {"pool": "spot-gpu"}."""
    label_tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Taints that labeling tolerates, as [{"key": "nvidia.com/gpu", "operator": "Exists"}]."""
    train_gpus: str = "0"
    """Default of the input gpus_train."""
    train_cpu: str = "2"
    """CPUs of a training, on each of its nodes."""
    train_memory: str = "16Gi"
    """Memory of a training on each of its nodes, /dev/shm included."""
    train_node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes for training."""
    train_tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Taints that training tolerates."""
    cpu_node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes for all other stages."""
    cpu_tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Taints that all other stages tolerate."""
    storage_secret: str = "mlpipeline-minio-artifact"
    """Secret with the keys accesskey and secretkey of the store. May be missing."""
    registry_secret: str = "noisy-student-registry"
    """Secret with the keys username, password and host of the label registry's git server. May be missing."""
    settings: str = "noisy-student"
    """ConfigMap with SETTINGS_VARIABLES. May be missing, and so may its keys."""
    runtime: str = "noisy-student"
    """Runtime of Kubeflow Trainer for trainings on several nodes."""
    runtime_kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"] = "TrainingRuntime"
    """Whether the runtime is the namespace's or the cluster's."""
    queue: str = ""
    """Local queue of Kueue for stages and for trainings on several nodes; none if empty."""

    @classmethod
    def from_json(cls, text: str, source: str) -> Self:
        """Parses a JSON object, field → value; what is not named keeps its default, and empty text names nothing.

        Raises ConfigError naming `source` and the field, for an unknown field or an invalid value.
        """
        try:
            values = json.loads(text or "{}")
        except ValueError as error:
            raise ConfigError(f"{source}: is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: must be an object, field → value")
        return cls.from_values(values, source)

    @classmethod
    def from_values(cls, values: dict[str, Any], source: str) -> Self:
        """As `from_json`, from what was parsed."""
        for name in values:
            if name not in PLACEMENT_FIELDS:
                raise ConfigError(f"{source}: {name}: is no field of the placement; there are {', '.join(PLACEMENT_FIELDS)}")
        try:
            placement = TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{source}: {path}: invalid value {first['input']!r}: {first['msg']}") from error
        for name in ("label_gpus", "train_gpus"):
            if (gpus := getattr(placement, name)) not in GPU_COUNTS:
                raise ConfigError(f"{source}: {name}: invalid value {gpus!r}: must be one of {', '.join(GPU_COUNTS)}")
        return placement


class StagePod(NamedTuple):
    """What the pod of a stage needs."""

    pool: Literal["label", "train", "cpu"]
    hours: int
    """Time limit of a try."""


PLACEMENT_FIELDS = {member.name: member.type for member in fields(Placement)}
TEXT_FIELDS = frozenset(name for name, kind in PLACEMENT_FIELDS.items() if kind is str)

STAGE_PODS = {
    "start": StagePod("cpu", 1),
    "start-generation": StagePod("cpu", 24),
    "prepare": StagePod("cpu", 24),
    # A week of training, a day of evaluation.
    "teacher": StagePod("train", 192),
    "next-teacher": StagePod("cpu", 1),
    "label": StagePod("label", 12),
    "select": StagePod("cpu", 6),
    "student": StagePod("train", 192),
    "report": StagePod("cpu", 1),
}
"""Component → its pod."""


def render_package(package: str, placement: Placement, *, name: str = "") -> str:
    """Fills a placement into a compiled pipeline (YAML). The same placement gives the same bytes, whatever was filled in before.

    `name`: another name for the pipeline, so that it becomes no version of the platform's.
    """
    spec, _ = load_yaml_documents(package)
    if name:
        spec["pipelineInfo"]["name"] = name
    return dump_yaml_documents([spec, fill_placement(spec, placement)])


def read_placement(package: str) -> Placement:
    """The placement that was filled into a compiled pipeline (YAML)."""
    spec, _ = load_yaml_documents(package)
    return Placement(**_start_inputs(spec)["cluster"]["runtimeValue"]["constant"])


def fill_placement(spec: Spec, placement: Placement) -> Spec:
    """Fills a placement into the specification of a pipeline. Returns what its pods are on Kubernetes."""
    for input_name, default in (("gpus_label", placement.label_gpus), ("gpus_train", placement.train_gpus)):
        definition = spec["root"]["inputDefinitions"]["parameters"][input_name]
        definition |= {"defaultValue": default, "literals": list(GPU_COUNTS)}
    _start_inputs(spec)["cluster"] = _constant(asdict(placement))
    pods = {}
    for label, executor in spec["deploymentSpec"]["executors"].items():
        stage = label.removeprefix("exec-")
        pod = STAGE_PODS[stage]
        executor["container"]["image"] = placement.tools_image if stage == "select" else placement.worker_image
        executor["container"]["resources"] = _build_resources(pod, placement)
        pods[label] = _build_pod(stage, pod, placement)
    return {"platforms": {"kubernetes": {"deploymentSpec": {"executors": pods}}}}


def _start_inputs(spec: Spec) -> Spec:
    inputs: Spec = spec["root"]["dag"]["tasks"]["start"]["inputs"]["parameters"]
    return inputs


def _build_resources(pod: StagePod, placement: Placement) -> Spec:
    if pod.pool == "cpu":
        return {"resourceCpuRequest": "500m", "resourceMemoryRequest": "2Gi"}
    # Inputs of the task itself: KFP's compiler forgets to pass inputs of the pipeline on to the resources of a task in a loop or an If.
    cpu, memory = placement.label_cpu, placement.label_memory
    if pod.pool == "train":
        cpu, memory = "{{$.inputs.parameters['cpu']}}", "{{$.inputs.parameters['memory']}}"
    return {
        "accelerator": {"resourceCount": "{{$.inputs.parameters['gpus']}}", "resourceType": placement.gpu_type},
        "resourceCpuRequest": cpu,
        "resourceMemoryLimit": memory,
        "resourceMemoryRequest": memory,
    }


def _build_pod(stage: str, pod: StagePod, placement: Placement) -> Spec:
    """What Kubernetes is told of a stage's pod, as KFP's KubernetesExecutorConfig."""
    # The only folder that stages write to: their root file system may be read-only.
    folders = [{"mountPath": "/tmp", "volumeName": "scratch"}]
    if pod.pool != "cpu":
        # Without a limit of its own, /dev/shm is as large as the pod's memory; loaders take at most half of it.
        folders.append({"mountPath": "/dev/shm", "volumeName": "shared-memory", "medium": "Memory"})
    secrets = [_secret(placement.storage_secret, {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"})]
    if stage == "select":
        login = {"username": USER_VARIABLE, "password": PASSWORD_VARIABLE, "host": HOST_VARIABLE}
        secrets.append(_secret(placement.registry_secret, login))
    settings = {
        "configMapNameParameter": _constant(placement.settings),
        "keyToEnv": [{"configMapKey": name, "envVar": name} for name in SETTINGS_VARIABLES],
        "optional": True,
    }
    labels = {"app.kubernetes.io/component": stage, "app.kubernetes.io/part-of": "noisy-student"}
    if placement.queue:
        labels["kueue.x-k8s.io/queue-name"] = placement.queue
    built: Spec = {
        "activeDeadlineSeconds": str(pod.hours * 3600),
        "configMapAsEnv": [settings],
        "emptyDirMounts": folders,
        "podMetadata": {"labels": labels},
        "secretAsEnv": secrets,
        "securityContext": {"runAsGroup": str(STAGE_USER), "runAsNonRoot": True, "runAsUser": str(STAGE_USER)},
    }
    if selector := getattr(placement, f"{pod.pool}_node_selector"):
        built["nodeSelector"] = {"labels": dict(selector)}
    if tolerations := getattr(placement, f"{pod.pool}_tolerations"):
        built["tolerations"] = [dict(toleration) for toleration in tolerations]
    return built


def _secret(name: str, variables: dict[str, str]) -> Spec:
    keys = [{"envVar": variable, "secretKey": key} for key, variable in variables.items()]
    return {"keyToEnv": keys, "optional": True, "secretNameParameter": _constant(name)}


def _constant(value: Any) -> Spec:
    return {"runtimeValue": {"constant": value}}
