"""Where stages run: the pipelines' inputs for nodes, GPUs, memory, images and secrets, and how they apply to a task.

There are three node pools. Labeling and evaluation lose little when a node is taken away and belong on spot nodes with GPUs; training
belongs on nodes that stay; all other stages need no GPU. Without selectors and tolerations every stage may run on every node.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from kfp import kubernetes
from kfp.dsl import PipelineTask

from components import SETTINGS_VARIABLES, STAGE_USER, TOOLS_IMAGE, WORKER_IMAGE
from ns.core.git import HOST_VARIABLE, PASSWORD_VARIABLE, USER_VARIABLE

GPU_TYPES = ("nvidia.com/gpu", "nvidia.com/mig-1g.10gb", "nvidia.com/mig-2g.20gb", "nvidia.com/mig-3g.40gb", "amd.com/gpu")
GPU_COUNTS = ("0", "1", "2", "4", "8")

STAGE_RETRIES = 3
"""Retries of a stage that fails or whose node is taken away: it continues where it stopped. Whether a failure is retried is decided by
Kubeflow's configuration (k8s/components/kubeflow/workflow-controller-configmap.yaml)."""
PENDING_HOURS = 168
"""Time that all tries of a stage together may wait for a node."""


class PipelineInput(NamedTuple):
    """An input of the pipelines."""

    default: Any
    description: str
    choices: tuple[str, ...] = ()
    """The values that the run form offers; if empty, any value is allowed."""


PLACEMENT_INPUTS = {
    "worker_image": PipelineInput(WORKER_IMAGE, "Image of the stages, best named by its digest; worker-cuda for GPUs."),
    "tools_image": PipelineInput(
        TOOLS_IMAGE, "Image of the stage that commits label sets: tools. Without a label registry the worker image is enough."
    ),
    "gpu_type": PipelineInput("nvidia.com/gpu", "Kind of GPU, as the resource that nodes offer.", GPU_TYPES),
    "label_gpus": PipelineInput("0", "GPUs of each labeling task and each evaluation.", GPU_COUNTS),
    "label_cpu": PipelineInput("2", "CPUs of each labeling task and each evaluation."),
    "label_memory": PipelineInput("8Gi", "Memory of each labeling task and each evaluation."),
    "label_node_selector": PipelineInput({}, 'Labels of the nodes for labeling and evaluation, as {"pool": "spot-gpu"}.'),
    "label_tolerations": PipelineInput(
        [], 'Taints that labeling and evaluation tolerate, as [{"key": "nvidia.com/gpu", "operator": "Exists"}].'
    ),
    "train_gpus": PipelineInput("0", "GPUs of a training; each GPU gets a process.", GPU_COUNTS),
    "train_cpu": PipelineInput("2", "CPUs of a training."),
    "train_memory": PipelineInput("16Gi", "Memory of a training, /dev/shm included."),
    "train_node_selector": PipelineInput({}, "Labels of the nodes for training."),
    "train_tolerations": PipelineInput([], "Taints that training tolerates."),
    "cpu_node_selector": PipelineInput({}, "Labels of the nodes for all other stages."),
    "cpu_tolerations": PipelineInput([], "Taints that all other stages tolerate."),
    "storage_secret": PipelineInput(
        "mlpipeline-minio-artifact", "Secret with the keys accesskey and secretkey of the store. May be missing."
    ),
    "registry_secret": PipelineInput(
        "noisy-student-registry",
        "Secret with the keys username, password and host of the label registry's git server. May be missing.",
    ),
    "settings": PipelineInput(
        "noisy-student", f"ConfigMap with {', '.join(SETTINGS_VARIABLES)}. May be missing, and so may its keys."
    ),
}

Inputs = dict[str, Any]

_make_parameter = functools.partial(inspect.Parameter, kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
_STAGE_INPUTS = {"config_uri": str, "root": str, "run": str, "data": str, "generation": int}
INPUT_GROUPS = {
    "base": [_make_parameter(name, annotation=kind) for name, kind in _STAGE_INPUTS.items()],
    "placement": [
        _make_parameter(name, annotation=type(spec.default), default=spec.default) for name, spec in PLACEMENT_INPUTS.items()
    ],
}


def with_input_groups(pipeline: Callable[..., None]) -> Callable[..., None]:
    """Gives a pipeline the inputs in INPUT_GROUPS; its function gets those of a group as one mapping, `base` or `placement`."""
    signature = inspect.signature(pipeline)
    expanded = [part for name, parameter in signature.parameters.items() for part in INPUT_GROUPS.get(name, [parameter])]

    @functools.wraps(pipeline)
    def call_pipeline(*values: Any) -> None:
        inputs = {part.name: value for part, value in zip(expanded, values, strict=True)}
        groups = {
            name: {part.name: inputs.pop(part.name) for part in group}
            for name, group in INPUT_GROUPS.items()
            if name in signature.parameters
        }
        return pipeline(**inputs, **groups)

    call_pipeline.__signature__ = signature.replace(parameters=expanded)  # type: ignore[attr-defined]
    return call_pipeline


def place_on_cpu(task: PipelineTask, placement: Inputs, *, hours: int, image: str = "worker_image") -> PipelineTask:
    """Places a stage that needs neither GPU nor much memory. `image` is the input that names its image."""
    task.set_cpu_request("500m")
    task.set_memory_request("2Gi")
    return _place_task(task, placement, "cpu", hours, image)


def add_registry_login(task: PipelineTask, placement: Inputs) -> PipelineTask:
    """Gives a stage the login of the label registry's git server."""
    login = {"username": USER_VARIABLE, "password": PASSWORD_VARIABLE, "host": HOST_VARIABLE}
    kubernetes.use_secret_as_env(task, placement["registry_secret"], login, optional=True)
    return task


def place_on_gpu(task: PipelineTask, placement: Inputs, node_pool: str, *, hours: int) -> PipelineTask:
    """Places a stage on the node pool `label` or `train`."""
    task.set_cpu_request(placement[f"{node_pool}_cpu"])
    task.set_memory_request(placement[f"{node_pool}_memory"])
    task.set_memory_limit(placement[f"{node_pool}_memory"])
    task.set_accelerator_type(placement["gpu_type"])
    task.set_accelerator_limit(placement[f"{node_pool}_gpus"])
    # Without a limit of its own, /dev/shm is as large as the pod's memory; loaders take at most half of it.
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory")
    return _place_task(task, placement, node_pool, hours, "worker_image")


def _place_task(task: PipelineTask, placement: Inputs, node_pool: str, hours: int, image: str) -> PipelineTask:
    task.set_container_image(placement[image])
    # KFP's cache compares strings; ours, the ledger, compares content.
    task.set_caching_options(False)
    # KFP's maximum is for all tries together, from the first one's start: a try that is under way at its end is killed.
    tries_hours = (STAGE_RETRIES + 1) * hours + PENDING_HOURS
    task.set_retry(STAGE_RETRIES, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration=f"{tries_hours}h")
    kubernetes.set_timeout(task, hours * 3600)
    kubernetes.add_node_selector_json(task, placement[f"{node_pool}_node_selector"])
    kubernetes.add_toleration_json(task, placement[f"{node_pool}_tolerations"])
    # The only folder that stages write to: their root file system may be read-only.
    kubernetes.empty_dir_mount(task, "scratch", "/tmp")
    kubernetes.set_security_context(task, run_as_user=STAGE_USER, run_as_group=STAGE_USER, run_as_non_root=True)
    kubernetes.use_secret_as_env(
        task,
        placement["storage_secret"],
        {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"},
        optional=True,
    )
    kubernetes.use_config_map_as_env(task, placement["settings"], {name: name for name in SETTINGS_VARIABLES}, optional=True)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "noisy-student")
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", task.name.rstrip("-0123456789"))
    return task
