from typing import Any

from kfp.dsl import ClassificationMetrics, Metrics, Output


def teacher(
    run: str,
    teacher: str,
    gpus: str,
    cpu: str,
    memory: str,
    nodes: dict[str, Any],
    metrics: Output[Metrics],
    classification: Output[ClassificationMetrics],
) -> str:
    """Trains the first teacher unless it is there (`teacher` is its key, or empty), and evaluates it. Returns the key of its folder.

    Args:
        metrics: All measurements, as numbers.
        classification: Confusion matrix, and ROC curve of the confidence as a sign of a right answer.
    """
    from components.cluster.nodes import make_launcher
    from ns.stages import report, roles
    from ns.stages.context import RunRef

    ref = RunRef.from_uri(run)
    model = roles.provide_teacher(
        ref, data=ref.read_data_key(), teacher=teacher, gpus=int(gpus), launch_remote=make_launcher(ref.run, nodes)
    )
    report.publish_model_metrics(ref, model, metrics, classification)
    return model
