from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def label_shards(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, shards: str) -> str:
    """Labels one range of shards of the pool with the un-noised teacher.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.
        data: Key of the prepared data.
        generation: Counted from 1; 0 is before the first.
        teacher: Key of the teacher's folder.
        shards: Range START-STOP, half open.

    Returns:
        The range.
    """
    from ns.stages import steps

    return steps.label_shard_range(config_uri, root, run, data, generation, teacher, shards)
