from typing import Any, NamedTuple


def start_generation(
    config: str,
    run: str,
    overrides: list[str],
    data_labeled: str,
    data_pool: str,
    data_heldout: str,
    gpus: str,
    nodes: int,
    cluster: dict[str, Any],
) -> NamedTuple(
    "Started",
    run=str,
    shards=list[str],
    generation=int,
    teacher=str,
    gpus=str,
    cpu=str,
    memory=str,
    nodes=dict,
):
    """Opens the run of one more generation, from the student that was accepted last, and prepares its data.

    An empty URI leaves the experiment's value. Without a name, the run is named after the experiment, its data and the teacher.

    Args:
        config: URI of the experiment's YAML file, or the name of a preset.
        run: Name of the run, or URI of its folder.
        overrides: Fields to change, as a.b=c.
        gpus: GPUs of a training on each of its nodes.
        nodes: Nodes of a training.

    Returns:
        URI of the run's folder, the pool's ranges of shards, the generation's number, the key of its
        teacher's folder, trained or not (`stop` if there is nothing new), and what the pods of trainings are.
    """
    from components.cluster.nodes import plan_training_pod
    from ns.stages import start

    data = {"data.labeled": data_labeled, "data.pool": data_pool, "data.heldout": data_heldout}
    started = start.start_generation(config, run, overrides, data, root=cluster["root"])
    return (
        *(started.run, started.shards, started.generation, started.teacher),
        *plan_training_pod(cluster, gpus, nodes),
    )
