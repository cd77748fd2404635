from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def resolve(config_uri: str, root: str, run: str, data: str, generation: int, first_teacher: str) -> str:
    """Says whether a generation takes place, from what the ledger knows of the ones before.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.
        data: Key of the prepared data.
        generation: Counted from 1; 0 is before the first.
        first_teacher: Key of the first teacher's folder.

    Returns:
        Key of the generation's teacher, or 'stop'.
    """
    from ns.stages import steps

    return steps.next_teacher(config_uri, root, run, data, generation, first_teacher)
