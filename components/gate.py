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
    """Compares student and teacher on the held-out images and records the verdict.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.
        data: Key of the prepared data.
        generation: Counted from 1; 0 is before the first.
        teacher: Key of the teacher's folder.
        student: Key of the student's folder.
        page: The generation's part of the report.
        summary: The same as tables.

    Returns:
        Key of the verdict.
    """
    from ns.stages import steps

    key = steps.gate_generation(config_uri, root, run, data, generation, teacher, student)
    steps.publish_generation_report(root, run, generation, page, summary)
    return key
