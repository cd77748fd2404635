from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def plan_labels(config_uri: str, root: str, run: str, data: str, generation: int) -> list[str]:
    """Splits the pool into ranges of shards START-STOP, half open: one for each labeling task."""
    from ns.stages import label
    from ns.stages.context import RunRef

    return label.plan_labels(RunRef(config_uri, root, run), data=data, generation=generation)
