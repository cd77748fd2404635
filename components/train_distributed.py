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
    """Trains on several nodes, in a TrainJob of Kubeflow Trainer v2, which it creates or finds, follows, and clears away.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.
        data: Key of the prepared data.
        generation: Counted from 1; 0 is before the first.
        nodes: How many.
        image: What they run: worker-cuda, or worker.
        teacher: Key of the teacher's folder; empty for the first teacher.
        labels: Key of the selection's folder; empty for the first teacher.
        runtime: Name of Trainer's runtime for torch.
        runtime_kind: TrainingRuntime, of the namespace, or ClusterTrainingRuntime.
        gpu_type: Kind of GPU, as the resource that nodes offer.
        gpus: GPUs of each node; each gets a process.
        cpu: CPUs of each node.
        memory: Memory of each node.
        node_selector: Labels of the nodes.
        tolerations: Taints that are tolerated.
        storage_secret: Secret with the keys accesskey and secretkey of the store. May be missing.
        settings: ConfigMap with AWS_ENDPOINT_URL, AWS_REGION and NS_METRICS_PORT. May be missing.
        queue: Local queue of Kueue; none if empty.

    Returns:
        Key of the model's folder.
    """
    from components.cluster import trainjob

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
    return trainjob.train_on_nodes(config_uri, root, run, data, generation, teacher, selection, node_spec)
