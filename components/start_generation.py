from typing import NamedTuple

from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def start_generation(
    config_uri: str,
    root: str,
    run: str,
    overrides: list[str],
    labeled: str,
    pool: str,
    heldout: str,
    labeling_tasks: int,
) -> NamedTuple("Started", config_uri=str, run=str, data=str, generation=int, teacher_generation=int, teacher=str):
    """Opens the run of one more generation, from the student that was accepted last, and prepares its data.

    An empty URI or 0 leaves the experiment's value. Without a name, the run is named after the experiment, its data and the teacher.

    Args:
        config_uri: URI of the experiment's YAML file, or the name of a preset.
        overrides: Fields to change, as a.b=c.

    Returns:
        URI of the run's copy of the experiment, the run's name, the key of the prepared data, the generation's number, its teacher's
        number, and the key of the teacher's folder: `train` if there is no teacher yet, `stop` if there is nothing new.
    """
    from ns.stages import start

    return start.start_generation(
        config_uri,
        root,
        run,
        overrides,
        {
            "data.labeled": labeled,
            "data.pool": pool,
            "data.heldout": heldout,
            "labeling.tasks": labeling_tasks,
        },
    )
