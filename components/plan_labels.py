from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def plan_labels(config_uri: str, root: str, run: str, data: str, generation: int) -> list[str]:
    """Splits the pool into ranges of shards, one for each labeling task.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.
        data: Key of the prepared data.
        generation: Counted from 1; 0 is before the first.

    Returns:
        Ranges START-STOP, half open.
    """
    from ns.stages import steps

    return steps.plan_labels(config_uri, root, run, data, generation)
