from kfp import dsl
from kfp.dsl import ClassificationMetrics, Metrics, Output

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def evaluate(
    config_uri: str,
    root: str,
    run: str,
    data: str,
    generation: int,
    model: str,
    metrics: Output[Metrics],
    classification: Output[ClassificationMetrics],
) -> str:
    """Evaluates a model on the held-out images. Returns the key of the evaluation.

    Args:
        metrics: All measurements, as numbers.
        classification: Confusion matrix, and ROC curve of the confidence as a sign of a right answer.
    """
    from ns.stages import evaluate, report
    from ns.stages.context import RunRef

    ref = RunRef(config_uri, root, run)
    key = evaluate.evaluate_generation(ref, data=data, generation=generation, model=model)
    report.publish_generation_metrics(ref, generation, metrics, classification)
    return key
