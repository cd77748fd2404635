from kfp import dsl

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def prepare_data(config_uri: str, root: str, run: str) -> str:
    """Checks the experiment; finds or imports labeled images, pool and held-out images. Returns the key of the prepared data."""
    from ns.stages import prepare
    from ns.stages.context import RunRef

    return prepare.prepare_data(RunRef(config_uri, root, run))
