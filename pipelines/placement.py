"""Where stages run: the store, the nodes, the images and the secrets of one cluster, written into a compiled package.

There are three pools of nodes. Labeling loses little when a node is taken away and belongs on spot nodes with GPUs; training belongs on
nodes that stay; all other stages need no GPU. Without selectors and tolerations every stage may run on every node.

A run form asks only for what differs from run to run. All else is filled in here, without KFP's compiler, so that a client can make the
package of its own cluster.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, Self

from pydantic import TypeAdapter, ValidationError

from components import MLFLOW_FOLDER, REGISTRY_FOLDER, SETTINGS_FOLDER, STAGE_USER, STORE_FOLDER, TOOLS_IMAGE, WORKER_IMAGE
from ns.core.errors import ConfigError
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

ITEMS_INPUT = "items"
"""Input of a task that is run for each item of a loop: what the loop is over."""
VOLUME_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
MOUNTED_FIELDS = ("storage_secret", "registry_secret", "mlflow_secret", "settings")
"""Fields of the placement that name what is mounted into pods; Kubeflow names the volumes after them."""

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
    mlflow_secret: str = "noisy-student-mlflow"
    """Secret with the keys username and password, or token, of MLflow's server. May be missing."""
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
        mounted = Counter(getattr(placement, name) for name in MOUNTED_FIELDS)
        for name in MOUNTED_FIELDS:
            value = getattr(placement, name)
            if not VOLUME_NAME.fullmatch(value):
                cure = "is mounted as a volume of its name: use lower-case letters, digits and hyphens, at most 63, as in my-secret"
                raise ConfigError(f"{source}: {name}: invalid value {value!r}: {cure}")
            if mounted[value] > 1:
                cure = f"{', '.join(MOUNTED_FIELDS)} are mounted as volumes of their names: give each a name of its own"
                raise ConfigError(f"{source}: {name}: invalid value {value!r}: {cure}")
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

TRACKED_STAGES = ("teacher", "student", "report")
"""Stages that log to MLflow."""


def render_package(package: str, placement: Placement, *, name: str = "", generations: int = 0) -> str:
    """Fills a placement into a compiled pipeline (YAML). The same placement gives the same bytes, whatever was filled in before.

    `name`: another name for the pipeline, so that it becomes no version of the platform's. `generations`: only so many are left in it, and
    its input of that name is gone; 0 for all.
    """
    spec, _ = load_yaml_documents(package)
    if name:
        spec["pipelineInfo"]["name"] = name
    flatten_loops(spec)
    if generations:
        keep_generations(spec, generations)
    return dump_yaml_documents([spec, fill_placement(spec, placement)])


def read_placement(package: str) -> Placement:
    """The placement that was filled into a compiled pipeline (YAML)."""
    spec, _ = load_yaml_documents(package)
    return Placement(**_start_inputs(spec)["cluster"]["runtimeValue"]["constant"])


def flatten_loops(spec: Spec) -> None:
    """Runs the single task of a loop's body for each item, without a pipeline around it: an item is two pods in place of three.

    KFP's compiler always makes a pipeline of a loop's body, and kfp.local wants one; the backend takes any task. A loop keeps a component
    of its own, after which the backend names its templates.
    """
    components: Spec = spec["components"]
    bodies: Spec = {}
    for task in (task for component in components.values() for task in component.get("dag", {}).get("tasks", {}).values()):
        component_name = task["componentRef"]["name"]
        body = components[component_name].get("dag", {}).get("tasks", {})
        if "parameterIterator" not in task or len(body) != 1:
            continue
        (inner,) = body.values()
        given, iterator = task["inputs"]["parameters"], task["parameterIterator"]
        sources = {name: value.get("componentInputParameter") for name, value in inner["inputs"]["parameters"].items()}
        (item_input,) = (name for name, source in sources.items() if source == iterator["itemInput"])
        inputs = {
            name: given[sources[name]] if sources[name] else value
            for name, value in inner["inputs"]["parameters"].items()
            if name != item_input
        }
        inputs[ITEMS_INPUT] = given[iterator["items"]["inputParameter"]]
        task |= {"inputs": {"parameters": inputs}, "retryPolicy": inner["retryPolicy"]}
        task["parameterIterator"] = {"itemInput": item_input, "items": {"inputParameter": ITEMS_INPUT}}
        bodies[component_name] = inner["componentRef"]["name"]
    copies = {name: components[inner_name] for name, inner_name in bodies.items()}
    for name in set(bodies.values()):
        del components[name]
    components |= copies


def keep_generations(spec: Spec, generations: int) -> None:
    """Leaves only the first generations in the pipeline of the loop. Each of the others costs a run four pods even if it is skipped."""
    root = spec["root"]
    tasks: Spec = root["dag"]["tasks"]
    kept = [f"generation-{number}" for number in range(1, generations + 1)]
    for task_name in [task_name for task_name in tasks if task_name.startswith("generation-") and task_name not in kept]:
        del tasks[task_name]
    tasks["report"]["dependentTasks"] = sorted({*tasks["report"]["dependentTasks"], kept[-1]} & set(tasks))
    del root["inputDefinitions"]["parameters"]["generations"]
    _start_inputs(spec)["generations"] = _constant(float(generations))
    components: Spec = {}
    unvisited = [root]
    while unvisited:
        for task in unvisited.pop().get("dag", {}).get("tasks", {}).values():
            component_name = task["componentRef"]["name"]
            if component_name not in components:
                components[component_name] = spec["components"][component_name]
                unvisited.append(components[component_name])
    spec["components"] = components
    executors, labels = (
        spec["deploymentSpec"]["executors"],
        {component.get("executorLabel") for component in components.values()},
    )
    spec["deploymentSpec"]["executors"] = {label: executor for label, executor in executors.items() if label in labels}


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
    # Files, not variables, each of which Argo would keep eight times a pod; `python -m components` reads them.
    secrets = [_mount("secretNameParameter", placement.storage_secret, STORE_FOLDER)]
    if stage == "select":
        secrets.append(_mount("secretNameParameter", placement.registry_secret, REGISTRY_FOLDER))
    if stage in TRACKED_STAGES:
        secrets.append(_mount("secretNameParameter", placement.mlflow_secret, MLFLOW_FOLDER))
    labels = {"app.kubernetes.io/component": stage, "app.kubernetes.io/part-of": "noisy-student"}
    if placement.queue:
        labels["kueue.x-k8s.io/queue-name"] = placement.queue
    built: Spec = {
        "activeDeadlineSeconds": str(pod.hours * 3600),
        "configMapAsVolume": [_mount("configMapNameParameter", placement.settings, SETTINGS_FOLDER)],
        "emptyDirMounts": folders,
        "podMetadata": {"labels": labels},
        "secretAsVolume": secrets,
        "securityContext": {"runAsGroup": str(STAGE_USER), "runAsNonRoot": True, "runAsUser": str(STAGE_USER)},
    }
    if selector := getattr(placement, f"{pod.pool}_node_selector"):
        built["nodeSelector"] = {"labels": dict(selector)}
    if tolerations := getattr(placement, f"{pod.pool}_tolerations"):
        built["tolerations"] = [dict(toleration) for toleration in tolerations]
    return built


def _mount(kind: str, name: str, folder: str) -> Spec:
    return {kind: _constant(name), "mountPath": folder, "optional": True}


def _constant(value: Any) -> Spec:
    return {"runtimeValue": {"constant": value}}
