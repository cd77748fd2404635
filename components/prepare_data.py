from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def prepare_data(config_uri: str, root: str, run: str) -> str:
    """Checks the experiment; finds or imports labeled images, pool and held-out images.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.

    Returns:
        Key of the prepared data.
    """
    from ns.stages import steps

    return steps.prepare_data(config_uri, root, run)
