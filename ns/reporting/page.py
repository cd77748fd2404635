"""Renders a run's report as one HTML page that loads nothing."""

import itertools
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from ns.config.loader import dump_experiment
from ns.reporting import charts
from ns.reporting.advice import list_advice
from ns.reporting.context import GenerationLabeling, ReportContext, TrainedModel, gather_context
from ns.reporting.disagreement import ClassGain
from ns.reporting.headlines import format_headline
from ns.reporting.metrics import MetricRow, align_metrics, collect_metrics, evaluation_title
from ns.reporting.templates import render_page
from ns.runs.records import REPORT_FILE
from ns.storage import Store

MATRIX_CLASSES = 30
"""With more classes, the most frequent mistakes are listed instead of the matrix."""
PAIRS = 10
CLASS_ROWS = 100


def write_report(root: Store, run: str) -> str:
    """Writes ROOT/RUN/report.html for the run's present state. Returns its key."""
    root.at(run).put(REPORT_FILE, render_report(gather_context(root, run)).encode())
    return f"{run}/{REPORT_FILE}"


def render_report(context: ReportContext) -> str:
    """The whole page."""
    diff = next((labeling.diff for labeling in reversed(context.labelings) if labeling.diff), None)
    robustness_names = dict.fromkeys(name for model in context.models for name in model.robustness)
    calibrations = {model.title: model.evaluation.calibration for model in context.models if model.evaluation}
    return render_page(
        "report.html.j2",
        title=context.summary.run + ("" if context.generation is None else f", generation {context.generation}"),
        context=context,
        summary=context.summary,
        headline=format_headline(context),
        advice=list_advice(context),
        accuracy=_accuracy_chart(context),
        model_titles=[model.title for model in context.shown_models],
        groups=group_metrics(align_metrics(collect_metrics(context, model) for model in context.shown_models)),
        robustness=[_robustness_section(context, name) for name in robustness_names],
        reliability=charts.draw_reliability(calibrations) if calibrations else None,
        matrices=_confusion_matrices(context),
        pairs=_confused_pairs(context.best_model),
        never_predicted=[
            f"{model.title} {text}."
            for model in context.models
            if model.evaluation and (text := model.evaluation.describe_never_predicted())
        ],
        class_rows=_class_rows(context),
        labelings=[_labeling_section(labeling) for labeling in context.labelings],
        diff=diff,
        diff_chart=diff and charts.draw_confidence_shift(diff.histogram_before, diff.histogram_after),
        leaks=[overlap for overlap in context.leaks.overlaps if overlap.same + overlap.near] if context.leaks else [],
        trainings=[_training_section(model) for model in context.shown_models if model.history],
        seconds=sum(note.seconds for note in context.stages),
        config=dump_experiment(context.experiment),
    )


def group_metrics(metric_rows: Iterable[MetricRow]) -> list[tuple[str, list[MetricRow]]]:
    """Consecutive rows of each group."""
    return [(group, list(members)) for group, members in itertools.groupby(metric_rows, key=lambda row: row.group)]


def _accuracy_chart(context: ReportContext) -> Markup | None:
    evaluated = [(m.generation, m.evaluation) for m in context.models if m.evaluation]
    if not evaluated:
        return None
    generations = [generation for generation, _ in evaluated]
    return charts.draw_accuracy(generations, [e.top1 for _, e in evaluated], evaluated[0][1].images)


def _confusion_matrices(context: ReportContext) -> list[dict[str, Any]]:
    """Confusion matrices of the first teacher and of the best model, or the latest if none is better: (images, share of the row)."""
    last = next((model for model in reversed(context.models) if model.evaluation), None)
    best = context.best_model if context.best_model is not context.first_model else last
    models = {model.generation: model for model in (context.first_model, best) if model}
    return [
        {
            "title": model.title,
            "classes": model.evaluation.classes,
            "rows": [
                (name, [(cell, cell / max(1, sum(row))) for cell in row])
                for name, row in zip(model.evaluation.classes, model.evaluation.build_confusion_matrix(), strict=True)
            ],
        }
        for model in models.values()
        if model.evaluation and len(model.evaluation.classes) <= MATRIX_CLASSES
    ]


def _confused_pairs(model: TrainedModel | None) -> list[tuple[str, str, int, float]]:
    """The most frequent mistakes: true class, predicted class, images, share of the true class's images."""
    if model is None or model.evaluation is None:
        return []
    classes, class_images = model.evaluation.classes, model.evaluation.class_images
    return [
        (
            classes[confusion.class_id],
            classes[confusion.predicted_class_id],
            confusion.images,
            confusion.images / class_images[confusion.class_id],
        )
        for confusion in model.evaluation.confusions[:PAIRS]
    ]


def _class_rows(context: ReportContext) -> list[ClassGain]:
    """At most `CLASS_ROWS` classes, those that changed most; the largest losses first."""
    rows = context.gains.rows if context.gains else []
    return rows if len(rows) <= CLASS_ROWS else [*rows[: CLASS_ROWS // 2], *rows[-CLASS_ROWS // 2 :]]


def _robustness_section(context: ReportContext, name: str) -> dict[str, Any]:
    """The charts of one robustness measurement of all models; None for a suite that was not measured."""
    results = {model.title: model.robustness[name][0] for model in context.models if name in model.robustness}
    last = list(results.values())[-1]
    scored = [model.robustness[name][1] for model in context.models if name in model.robustness]
    # Only models with the same kinds: they differ if the run's settings were changed under way.
    corrupted = {title: result for title, result in results.items() if result.corruptions.keys() == last.corruptions.keys()}
    perturbed = {title: result for title, result in results.items() if result.perturbations.keys() == last.perturbations.keys()}
    fgsm = {
        title: ([(0.0, result.top1)] if result.top1 is not None else [])
        + [(attack.epsilon, attack.top1) for attack in result.attacks if attack.name == "fgsm"]
        for title, result in results.items()
    }
    kinds, sequences = ([kind.replace("_", " ") for kind in result] for result in (last.corruptions, last.perturbations))
    errors = {title: list(result.mean_corruption_errors().values()) for title, result in corrupted.items()}
    flips = {title: list(result.flip_probabilities().values()) for title, result in perturbed.items()}
    attacked = any(len(points) > 1 for points in fgsm.values())
    references = {result.mce_relative_to or result.mfr_relative_to for result in scored}
    relative_to = "AlexNet" if "AlexNet" in references else "the first teacher" if "reference" in references else None
    return {
        "title": evaluation_title(name),
        "last": last,
        "relative_to": relative_to,
        "corruptions": charts.draw_bars(f"{name}-corruptions", "mean error", kinds, errors) if kinds else None,
        "perturbations": charts.draw_bars(f"{name}-flips", "flip probability", sequences, flips) if sequences else None,
        "attacks": charts.draw_attacks(f"{name}-attacks", fgsm) if attacked else None,
        "severities": [
            (kind.replace("_", " "), [(title, result.corruptions[kind]) for title, result in corrupted.items()])
            for kind in last.corruptions
        ],
    }


def _labeling_section(labeling: GenerationLabeling) -> dict[str, Any]:
    """The charts of a selection, and rows of class name, labeled images and the class's rule."""
    selection, classes = labeling.selection, labeling.label_set.classes
    name = str(labeling.generation)
    rules = selection.rules
    rows = list(zip(classes, labeling.histogram.sum(1).tolist(), rules, strict=True))
    if len(rows) > CLASS_ROWS:
        # Those with the most dropped images.
        rows = sorted(rows, key=lambda row: (row[2].kept - row[1], row[0]))[:CLASS_ROWS]
    return {
        "labeling": labeling,
        "rows": rows,
        "confidence": charts.draw_confidence(name, labeling.histogram.sum(0), selection.policy.min_confidence),
        "classes": charts.draw_class_balance(
            name, classes, [rule.candidates for rule in rules], [rule.images for rule in rules]
        ),
    }


def _training_section(model: TrainedModel) -> dict[str, Any]:
    name = f"{model.generation}{'-baseline' if model.is_baseline else ''}"
    losses = {"loss_labeled": "labeled", "loss_pseudo": "pseudo-labeled"}
    shares = {"accuracy_labeled": "accuracy on labels", "agreement": "agreement with the teacher"}
    if model.generation == 0 or model.is_baseline:
        del losses["loss_pseudo"], shares["agreement"]
    return {
        "title": model.title,
        "loss": charts.draw_training_curves(f"{name}-loss", model.history, losses, "loss"),
        "share": charts.draw_training_curves(f"{name}-share", model.history, shares, "share of the noised batch"),
    }
