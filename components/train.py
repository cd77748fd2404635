from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def train(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str = "", selection: str = "") -> str:
    """Trains the first teacher (generation 0, without teacher and selection) or a student. Returns the key of the model's folder."""
    from ns.stages import train
    from ns.stages.context import RunRef

    return train.train_generation(
        RunRef(config_uri, root, run), data=data, generation=generation, teacher=teacher, selection=selection
    )
