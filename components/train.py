from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def train(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str = "", selection: str = "") -> str:
    """Trains the first teacher (generation 0), or a student of a teacher's labels.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.
        data: Key of the prepared data.
        generation: Counted from 1; 0 is before the first.
        teacher: Key of the teacher's folder; empty for the first teacher.
        labels: Key of the selection's folder; empty for the first teacher.

    Returns:
        Key of the model's folder.
    """
    from ns.stages import steps

    return steps.train_generation(config_uri, root, run, data, generation, teacher, selection)
