from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def label(run: str, data: str, generation: int, teacher: str, shards: str, gpus: str) -> str:
    """Labels one range of the pool's shards with the un-noised teacher. Returns the range."""
    from ns.stages import label
    from ns.stages.context import RunRef

    ref = RunRef.from_uri(run)
    return label.label_shards(ref, data=data, generation=generation, teacher=teacher, shards=shards, gpus=int(gpus))
