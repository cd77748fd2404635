from kfp import dsl
from kfp.dsl import HTML, Markdown, Output

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def report(config_uri: str, root: str, run: str, page: Output[HTML], summary: Output[Markdown]) -> str:
    """Writes the run's report.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.
        page: The report, with fewer pictures.
        summary: The same as tables.

    Returns:
        Key of the report.
    """
    from ns.stages import steps

    key = steps.report_run(config_uri, root, run)
    steps.publish_run_report(root, run, page, summary)
    return key
