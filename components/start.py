from typing import Any, NamedTuple


def start(
    config: str,
    run: str,
    overrides: list[str],
    data_labeled: str,
    data_pool: str,
    data_heldout: str,
    generations: int,
    gpus: str,
    nodes: int,
    cluster: dict[str, Any],
) -> NamedTuple("Started", run=str, gpus=str, cpu=str, memory=str, nodes=dict):
    """Opens a run, or continues it, and keeps a copy of the experiment in it.

    An empty URI or 0 leaves the experiment's value. Without a name, the run is named after the experiment.

    Args:
        config: URI of the experiment's YAML file, or the name of a preset.
        run: Name of the run, or URI of its folder.
        overrides: Fields to change, as a.b=c.
        gpus: GPUs of a training on each of its nodes.
        nodes: Nodes of a training.

    Returns:
        URI of the run's folder, and what the pods of trainings are.
    """
    from components.cluster.nodes import plan_training_pod
    from ns.stages import start

    data = {"data.labeled": data_labeled, "data.pool": data_pool, "data.heldout": data_heldout}
    folder = start.start_run(config, run, overrides, {**data, "generations": generations}, root=cluster["root"])
    return (folder, *plan_training_pod(cluster, gpus, nodes))
