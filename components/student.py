from typing import Any

from kfp.dsl import HTML, ClassificationMetrics, Markdown, Metrics, Output


def student(
    run: str,
    generation: int,
    teacher: str,
    selection: str,
    gpus: str,
    cpu: str,
    memory: str,
    nodes: dict[str, Any],
    metrics: Output[Metrics],
    classification: Output[ClassificationMetrics],
    page: Output[HTML],
    summary: Output[Markdown],
) -> str:
    """Trains a student, evaluates it, and decides whether it replaces its teacher. Returns the key of the model's folder.

    Args:
        metrics: All measurements, as numbers.
        classification: Confusion matrix, and ROC curve of the confidence as a sign of a right answer.
        page: The generation's part of the report.
        summary: The same as tables.
    """
    from components.cluster.nodes import make_launcher
    from ns.stages import report, roles
    from ns.stages.context import RunRef

    ref = RunRef.from_uri(run)
    launcher = make_launcher(ref.run, nodes)
    model = roles.provide_student(
        ref,
        data=ref.read_data_key(),
        generation=generation,
        teacher=teacher,
        selection=selection,
        gpus=int(gpus),
        launch_remote=launcher,
    )
    report.publish_model_metrics(ref, model, metrics, classification)
    report.publish_report(ref, page, summary, generation)
    return model
