"""Writes the run's report, and hands numbers and pages to Kubeflow."""

from pathlib import Path
from typing import Any

from ns.modeling.manifest import ModelManifest
from ns.reporting import mlflow_runs, run_metrics
from ns.reporting.report_record import provide_report
from ns.runs.lifecycle import finish_run
from ns.stages.context import RunRef, has_client, stage
from ns.storage import open_store


def report_run(ref: RunRef) -> str:
    """Writes the run's report, unless it is there as it would be written. Returns its key."""
    with stage("report", ref) as context:
        key, reused = provide_report(context.root, ref.run)
        context.add_log_fields(reused=reused)
        if not has_client():
            # On a cluster no client keeps the record.
            finish_run(context.root, ref.run, "succeeded")
        mlflow_runs.publish_mlflow_run(context.root, ref.run)
        run_metrics.push_run_summary(context.root, ref.run, context.experiment.name)
        return key


# What follows hands something to Kubeflow's UI, and does nothing where a client shows the run, as on a laptop.


def publish_model_metrics(ref: RunRef, model: str, metrics: Any, classification_metrics: Any) -> None:
    """Hands over the numbers, the confusion matrix and the ROC curve of a model, as Kubeflow's `Metrics` and `ClassificationMetrics`."""
    if has_client():
        return
    from ns.reporting import artifacts

    store = open_store(ref.root)
    generation = ModelManifest.load(store.at(model)).generation
    for name, value in artifacts.collect_generation_metrics(store, ref.run, generation).items():
        metrics.log_metric(name, value)
    if confusion := artifacts.read_confusion(store, ref.run, generation):
        classification_metrics.log_confusion_matrix(*confusion)
    if curve := artifacts.compute_roc(store, ref.run, generation):
        classification_metrics.log_roc_curve(*curve)


def publish_report(ref: RunRef, page: Any, summary: Any, generation: int | None = None) -> None:
    """Hands over the page and the tables of a generation, or of the whole run, as Kubeflow's `HTML` and `Markdown`."""
    if has_client():
        return
    from ns.reporting import artifacts

    store = open_store(ref.root)
    Path(page.path).write_text(artifacts.render_small_html(store, ref.run, generation), encoding="utf-8")
    Path(summary.path).write_text(artifacts.render_small_markdown(store, ref.run, generation), encoding="utf-8")
