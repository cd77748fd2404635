"""Where steps run: the inputs by which the run form chooses nodes, GPUs, memory, image and secrets, and what they do to a task.

Three pools: labelling and evaluation, which lose little when a node is taken away, belong on spot nodes with GPUs; training on nodes
that stay; all else needs no GPU. Without selectors and tolerations, everything runs anywhere.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from kfp import kubernetes
from kfp.dsl import PipelineTask

from components import TOOLS_IMAGE, WORKER_IMAGE
from ns.core.git import PASSWORD_VARIABLE, USER_VARIABLE

GPU_TYPES = ("nvidia.com/gpu", "nvidia.com/mig-1g.10gb", "nvidia.com/mig-2g.20gb", "nvidia.com/mig-3g.40gb", "amd.com/gpu")
GPU_COUNTS = ("0", "1", "2", "4", "8")

USER = 10001
HOURS = 3600
SHARED_MEMORY = "8Gi"
"""Of /dev/shm, through which the processes that load images hand them over; counts against the step's memory."""
RETRIES = 3
"""When a step fails or its node is taken away: every step goes on where it stopped."""
SETTINGS = ("AWS_ENDPOINT_URL", "AWS_REGION", "NS_METRICS_PORT", "NS_METRICS_LINGER_SECONDS", "NS_PUSHGATEWAY_URL")
"""Environment of every step, from a ConfigMap."""


class Input(NamedTuple):
    """An input of the pipelines."""

    default: Any
    about: str
    choices: tuple[str, ...] = ()
    """What the run form offers; anything if empty."""


INPUTS = {
    "worker_image": Input(WORKER_IMAGE, "Image that steps run in, best by its digest; worker-cuda for GPUs."),
    "tools_image": Input(
        TOOLS_IMAGE, "Image of the step that keeps versions of label sets: tools. The worker's will do without a registry."
    ),
    "gpu_type": Input("nvidia.com/gpu", "Kind of GPU, as the resource that nodes offer.", GPU_TYPES),
    "label_gpus": Input("0", "GPUs for each labelling task and each evaluation.", GPU_COUNTS),
    "label_cpu": Input("2", "CPUs for each labelling task and each evaluation."),
    "label_memory": Input("8Gi", "Memory of each labelling task and each evaluation."),
    "label_node_selector": Input({}, 'Labels of the nodes for labelling and evaluation, as {"pool": "spot-gpu"}.'),
    "label_tolerations": Input(
        [], 'Taints that labelling and evaluation tolerate, as [{"key": "nvidia.com/gpu", "operator": "Exists"}].'
    ),
    "train_gpus": Input("0", "GPUs for a training; each gets a process.", GPU_COUNTS),
    "train_cpu": Input("2", "CPUs for a training."),
    "train_memory": Input("16Gi", "Memory of a training."),
    "train_node_selector": Input({}, "Labels of the nodes for training."),
    "train_tolerations": Input([], "Taints that training tolerates."),
    "cpu_node_selector": Input({}, "Labels of the nodes for all other steps."),
    "cpu_tolerations": Input([], "Taints that all other steps tolerate."),
    "storage_secret": Input(
        "mlpipeline-minio-artifact", "Secret with the keys accesskey and secretkey of the store. May be missing."
    ),
    "registry_secret": Input(
        "noisy-student-registry",
        "Secret with the keys username and password of the label registry's git server. May be missing.",
    ),
    "settings": Input("noisy-student", f"ConfigMap with {', '.join(SETTINGS)}. May be missing, and so may its keys."),
}

Pools = dict[str, Any]


def takes_pools(pipeline: Callable[..., None]) -> Callable[..., None]:
    """Adds INPUTS to a pipeline's inputs; its function gets them as one mapping, `pools`."""
    own = inspect.signature(pipeline)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    added = [inspect.Parameter(name, kind, default=one.default, annotation=type(one.default)) for name, one in INPUTS.items()]
    parameters = [parameter for name, parameter in own.parameters.items() if name != "pools"]

    @functools.wraps(pipeline)
    def wrapped(*values: Any, **named: Any) -> None:
        given = own.replace(parameters=[*parameters, *added]).bind(*values, **named).arguments
        return pipeline(
            **{name: value for name, value in given.items() if name not in INPUTS},
            pools={name: given[name] for name in INPUTS},
        )

    wrapped.__signature__ = own.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
    return wrapped


def on_cpu(task: PipelineTask, pools: Pools, *, hours: int, image: str = "worker_image") -> PipelineTask:
    """A step that needs neither GPU nor much memory. `image`: the input that names its image."""
    task.set_cpu_request("500m")
    task.set_memory_request("2Gi")
    return _placed(task, pools, "cpu", hours, image)


def with_registry(task: PipelineTask, pools: Pools) -> PipelineTask:
    """A step that pushes to the label registry."""
    login = {"username": USER_VARIABLE, "password": PASSWORD_VARIABLE}
    kubernetes.use_secret_as_env(task, pools["registry_secret"], login, optional=True)
    return task


def on_gpu(task: PipelineTask, pools: Pools, pool: str, *, hours: int) -> PipelineTask:
    """A step of the pool `label` or `train`."""
    task.set_cpu_request(pools[f"{pool}_cpu"])
    task.set_memory_request(pools[f"{pool}_memory"])
    task.set_memory_limit(pools[f"{pool}_memory"])
    task.set_accelerator_type(pools["gpu_type"])
    task.set_accelerator_limit(pools[f"{pool}_gpus"])
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=SHARED_MEMORY)
    return _placed(task, pools, pool, hours, "worker_image")


def _placed(task: PipelineTask, pools: Pools, pool: str, hours: int, image: str) -> PipelineTask:
    task.set_container_image(pools[image])
    # KFP's cache keys on strings, and ours, the ledger, on content.
    task.set_caching_options(False)
    task.set_retry(RETRIES, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
    kubernetes.set_timeout(task, hours * HOURS)
    kubernetes.add_node_selector_json(task, pools[f"{pool}_node_selector"])
    kubernetes.add_toleration_json(task, pools[f"{pool}_tolerations"])
    # The images can run with a root file system that cannot be written.
    kubernetes.empty_dir_mount(task, "scratch", "/tmp")
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.use_secret_as_env(
        task,
        pools["storage_secret"],
        {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"},
        optional=True,
    )
    kubernetes.use_config_map_as_env(task, pools["settings"], {name: name for name in SETTINGS}, optional=True)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "noisy-student")
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", task.name.rstrip("-0123456789"))
    return task
