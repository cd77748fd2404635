from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def label_shards(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, shards: str) -> str:
    """Labels one range of the pool's shards with the un-noised teacher. Returns the range."""
    from ns.stages import label
    from ns.stages.context import RunRef

    return label.label_shard_range(
        RunRef(config_uri, root, run), data=data, generation=generation, teacher=teacher, shards=shards
    )
