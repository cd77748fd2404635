from kfp import dsl
from kfp.dsl import HTML, Markdown, Output

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def gate(
    config_uri: str,
    root: str,
    run: str,
    data: str,
    generation: int,
    teacher: str,
    student: str,
    page: Output[HTML],
    summary: Output[Markdown],
) -> str:
    """Compares student and teacher on the held-out images and records the verdict. Returns the key of the verdict.

    Args:
        page: The generation's part of the report.
        summary: The same as tables.
    """
    from ns.stages import gate, report
    from ns.stages.context import RunRef

    ref = RunRef(config_uri, root, run)
    key = gate.gate_generation(ref, data=data, generation=generation, teacher=teacher, student=student)
    report.publish_report(ref, page, summary, generation)
    return key
