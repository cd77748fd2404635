from kfp import dsl
from kfp.dsl import HTML, Markdown, Output

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def report(run: str, page: Output[HTML], summary: Output[Markdown]) -> str:
    """Writes the run's report. Returns the key of the report.

    Args:
        page: The report, with fewer pictures.
        summary: The same as tables.
    """
    from ns.stages import report
    from ns.stages.context import RunRef

    ref = RunRef.from_uri(run)
    key = report.report_run(ref)
    report.publish_report(ref, page, summary)
    return key
