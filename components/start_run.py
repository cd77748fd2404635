from typing import NamedTuple

from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def start_run(
    config: str,
    root: str,
    run: str,
    overrides: list[str],
    labeled: str,
    pool: str,
    heldout: str,
    generations: int,
    label_workers: int,
) -> NamedTuple("Started", config_uri=str, run=str):
    """Opens a run, or opens it again, and keeps the experiment in it.

    Args:
        config: URI of the experiment's YAML file, or a preset.
        root: URI of the store that holds everything.
        run: Name of the run; made from the experiment if empty.
        overrides: Fields to change, as a.b=c.
        labeled: URI of the labeled images; as the experiment says if empty.
        pool: URI of the unlabeled images; as the experiment says if empty.
        heldout: URI of the held-out images; as the experiment says if empty.
        generations: Trips round the loop, at most; as the experiment says if 0.
        label_workers: Labeling tasks beside each other; as the experiment says if 0.

    Returns:
        The experiment's URI, and the run's name.
    """
    from ns.stages import steps

    fields: dict[str, str | int] = {
        "data.labeled": labeled,
        "data.pool": pool,
        "data.heldout": heldout,
        "generations": generations,
        "labeling.tasks": label_workers,
    }
    return steps.start_run(config, root, run, overrides, fields)
