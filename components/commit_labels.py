from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def commit_labels(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str) -> str:
    """Joins the labeled shards into a label set and selects what the student will see.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.
        data: Key of the prepared data.
        generation: Counted from 1; 0 is before the first.
        teacher: Key of the teacher's folder.

    Returns:
        Key of the selection's folder.
    """
    from ns.stages import steps

    return steps.commit_labels(config_uri, root, run, data, generation, teacher)
