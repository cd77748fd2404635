from typing import NamedTuple

from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def start_run(
    config_uri: str,
    root: str,
    run: str,
    overrides: list[str],
    labeled: str,
    pool: str,
    heldout: str,
    generations: int,
    labeling_tasks: int,
) -> NamedTuple("Started", config_uri=str, run=str):
    """Opens a run, or continues it, and keeps a copy of the experiment in it. Returns the copy's URI and the run's name.

    An empty URI or 0 leaves the experiment's value. Without a name, the run is named after the experiment.

    Args:
        config_uri: URI of the experiment's YAML file, or the name of a preset.
        overrides: Fields to change, as a.b=c.
    """
    from ns.stages import start

    return start.start_run(
        config_uri,
        root,
        run,
        overrides,
        {
            "data.labeled": labeled,
            "data.pool": pool,
            "data.heldout": heldout,
            "generations": generations,
            "labeling.tasks": labeling_tasks,
        },
    )
