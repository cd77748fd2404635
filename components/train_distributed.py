from kfp import dsl

from components import TOOLS_IMAGE


@dsl.component(base_image=TOOLS_IMAGE, packages_to_install=[], install_kfp_package=False)
def train_distributed(
    config_uri: str,
    root: str,
    run: str,
    data: str,
    generation: int,
    nodes: int,
    image: str,
    teacher: str = "",
    selection: str = "",
    runtime: str = "noisy-student",
    runtime_kind: str = "TrainingRuntime",
    gpu_type: str = "nvidia.com/gpu",
    gpus: str = "0",
    cpu: str = "2",
    memory: str = "16Gi",
    node_selector: dict[str, str] = {},  # noqa: B006  (KFP copies it)
    tolerations: list[dict[str, str]] = [],  # noqa: B006
    storage_secret: str = "mlpipeline-minio-artifact",
    settings: str = "noisy-student",
    queue: str = "",
) -> str:
    """Trains on several nodes: creates a TrainJob of Kubeflow Trainer v2 or finds its own, follows it and deletes it.

    Returns the key of the model's folder.

    Args:
        nodes: Number of nodes.
        image: Image that the nodes run: worker-cuda, or worker.
        runtime: Name of Trainer's runtime for torch.
        runtime_kind: TrainingRuntime (of the namespace) or ClusterTrainingRuntime.
        gpu_type: Kind of GPU, as the resource that nodes offer.
        gpus: GPUs of each node; each GPU gets a process.
        cpu: CPUs of each node.
        memory: Memory of each node.
        node_selector: Labels of the nodes.
        tolerations: Taints that are tolerated.
        storage_secret: Secret with the keys accesskey and secretkey of the store. May be missing.
        settings: ConfigMap with the stages' settings, as AWS_ENDPOINT_URL. May be missing.
        queue: Local queue of Kueue; none if empty.
    """
    from components.cluster import trainjob
    from ns.stages.context import RunRef

    node_spec = trainjob.TrainingNodes(
        count=nodes,
        image=image,
        runtime=runtime,
        runtime_kind=runtime_kind,
        gpu_type=gpu_type,
        gpus=int(gpus),
        cpu=cpu,
        memory=memory,
        selector=node_selector,
        tolerations=tolerations,
        secret=storage_secret,
        settings=settings,
        queue=queue,
    )
    ref = RunRef(config_uri, root, run)
    return trainjob.train_on_nodes(ref, node_spec, data=data, generation=generation, teacher=teacher, selection=selection)
