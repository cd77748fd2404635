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
    answers: Output[ClassificationMetrics],
) -> str:
    """Evaluates a model on the held-out images.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything.
        run: Name of the run, a folder below the root.
        data: Key of the prepared data.
        generation: Counted from 1; 0 is before the first.
        model: Key of the model's folder.
        metrics: All that was measured, as numbers.
        answers: Confusion matrix, and how well the confidence tells right answers from wrong ones.

    Returns:
        Key of the evaluation.
    """
    from ns.stages import steps

    key = steps.evaluate_generation(config_uri, root, run, data, generation, model)
    steps.publish_generation_metrics(root, run, generation, metrics, answers)
    return key
