from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def report(config_uri: str, root: str, run: str) -> str:
    """Writes the run's report.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.

    Returns:
        Key of the report.
    """
    from ns import steps

    return steps.report(config_uri, root, run)
