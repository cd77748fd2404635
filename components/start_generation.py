from typing import NamedTuple

from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def start_generation(
    config: str,
    root: str,
    run: str,
    overrides: list[str],
    labeled: str,
    pool: str,
    heldout: str,
    label_workers: int,
) -> NamedTuple("Started", config_uri=str, run=str, data=str, generation=int, teacher_generation=int, teacher=str):
    """Opens the run of one more generation, from the student that was accepted last, and prepares its data.

    Args:
        config: URI of the experiment's YAML file, or a preset.
        root: URI of the store that holds everything.
        run: Name of the run; made from the experiment, its data and the teacher if empty.
        overrides: Fields to change, as a.b=c.
        labeled: URI of the labeled images; as the experiment says if empty.
        pool: URI of the unlabeled images; as the experiment says if empty.
        heldout: URI of the held-out images; as the experiment says if empty.
        label_workers: Labeling tasks beside each other; as the experiment says if 0.

    Returns:
        The experiment's URI, the run's name, the key of the prepared data, the generation's number, its teacher's, and the key of the
        teacher's folder, 'train' if there is none yet, 'stop' if there is nothing new.
    """
    from ns.stages import steps

    fields: dict[str, str | int] = {
        "data.labeled": labeled,
        "data.pool": pool,
        "data.heldout": heldout,
        "labeling.tasks": label_workers,
    }
    return steps.start_generation(config, root, run, overrides, fields)
