"""Facts → HTML."""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from markupsafe import Markup

from ns.config import schema as config
from ns.reporting import charts
from ns.reporting.context import GenerationLabeling, ReportContext, TrainedModel, gather_context
from ns.reporting.disagreement import ClassGain
from ns.reporting.headlines import format_condition_value, format_headline, format_outcomes
from ns.reporting.metrics import MetricRow, align_metrics, collect_metrics, evaluation_title
from ns.reporting.templates import SCRIPTLESS, make_environment
from ns.runs import records as runs
from ns.storage import Store

MATRIX_CLASSES = 30
"""With more classes the confused pairs are listed instead of the matrix."""
PAIRS = 10
CLASS_ROWS = 100


class SelectedClass(NamedTuple):
    """What became of the images that a teacher put in one class."""

    name: str
    labeled: int
    unsure: int
    """At or below the threshold."""
    beyond: int
    """Above it, but not among the most confident of the class."""
    kept: int
    images: int
    """In an epoch, with repeats."""
    threshold: float


def write_report(root: Store, run: str) -> str:
    """Writes ROOT/RUN/report.html from what the run has noted so far. Returns its key."""
    root.at(run).put(runs.REPORT, render_report(gather_context(root, run)).encode())
    return f"{run}/{runs.REPORT}"


def render_report(context: ReportContext) -> str:
    """The whole page."""
    metrics_by_model = [collect_metrics(context, model) for model in context.models]
    return (
        make_environment()
        .get_template("report.html.j2")
        .render(
            title=_page_title(context),
            scripts=SCRIPTLESS,
            facts=context,
            summary=context.summary,
            headline=format_headline(context),
            outcome=format_outcomes(context),
            rounds=_loop_rounds(context),
            accuracy=_accuracy_chart(context),
            models=[model.title for model in context.models],
            groups=group_metrics(align_metrics(metrics_by_model)),
            guard_value=format_condition_value,
            robustness=[_robustness_section(context, name) for name in _robustness_names(context)],
            reliability=_reliability_chart(context),
            matrices=_confusion_matrices(context),
            pairs=_confused_pairs(context.best_model),
            class_rows=_class_rows(context),
            labels=[_labeling_section(labeling) for labeling in context.labelings],
            diff=_last_diff(context),
            leaks=[overlap for overlap in context.leaks.overlaps if overlap.same + overlap.near] if context.leaks else [],
            trained=[_training_section(model) for model in context.models if model.history],
            seconds=sum(note.seconds for note in context.stages),
            config=config.dump_experiment(context.experiment),
        )
    )


def _page_title(context: ReportContext) -> str:
    return context.summary.run + (f", generation {context.generation}" if context.generation is not None else "")


def group_metrics(metric_rows: Iterable[MetricRow]) -> list[tuple[str, list[MetricRow]]]:
    """The lines of each group together, in their order."""
    return [(group, list(members)) for group, members in itertools.groupby(metric_rows, key=lambda line: line.group)]


def _loop_rounds(context: ReportContext) -> list[dict[str, Any]]:
    """What the picture of the loop says, a round for each generation that has labels."""
    verdicts = {verdict.generation: verdict for verdict in context.verdicts}
    models = {model.generation: model for model in context.models}
    rounds = []
    for labeling in context.labelings:
        student = models.get(labeling.generation)
        rounds.append(
            {
                "generation": labeling.generation,
                "labeled": labeling.label_set.rows,
                "kept": labeling.selection.kept,
                "images": labeling.selection.images,
                "teacher": _heldout_top1(_previous_model(context, labeling.generation)),
                "student": _heldout_top1(student),
                "arch": student.manifest.model.arch if student else "",
                "verdict": verdicts.get(labeling.generation),
            }
        )
    return rounds


def _previous_model(context: ReportContext, generation: int) -> TrainedModel | None:
    """The last model before a generation: the loop ends with the first that is refused."""
    earlier = [model for model in context.models if model.generation < generation]
    return earlier[-1] if earlier else None


def _heldout_top1(model: TrainedModel | None) -> float | None:
    return model.evaluation.top1 if model and model.evaluation else None


def _accuracy_chart(context: ReportContext) -> Markup | None:
    evaluated = [(m.generation, m.evaluation) for m in context.models if m.evaluation]
    if not evaluated:
        return None
    generations = [generation for generation, _ in evaluated]
    return Markup(charts.draw_accuracy(generations, [e.top1 for _, e in evaluated], evaluated[0][1].images))


def _confusion_matrices(context: ReportContext) -> list[dict[str, Any]]:
    """Confusion of the first teacher and of the best model, or the latest if none is better, as shares of each row."""
    last = next((model for model in reversed(context.models) if model.evaluation), None)
    best = context.best_model if context.best_model is not context.first_model else last
    models = [model for model in (context.first_model, best) if model]
    if len(models) == 2 and models[0].generation == models[1].generation:
        models = models[:1]
    matrices = []
    for model in models:
        evaluation = model.evaluation
        if evaluation is None or len(evaluation.classes) > MATRIX_CLASSES:
            continue
        matrices.append(
            {
                "title": model.title,
                "classes": evaluation.classes,
                "rows": [
                    (name, [(cell, cell / max(1, sum(row))) for cell in row])
                    for name, row in zip(evaluation.classes, evaluation.confusion, strict=True)
                ],
            }
        )
    return matrices


def _confused_pairs(model: TrainedModel | None) -> list[tuple[str, str, int, float]]:
    """The most frequent mistakes: label, prediction, images, share of the label's images."""
    if model is None or model.evaluation is None:
        return []
    classes = model.evaluation.classes
    mistakes = [
        (classes[class_id], classes[predicted], count, count / sum(row))
        for class_id, row in enumerate(model.evaluation.confusion)
        for predicted, count in enumerate(row)
        if count and class_id != predicted
    ]
    return sorted(mistakes, key=lambda mistake: (-mistake[2], mistake[0], mistake[1]))[:PAIRS]


def _class_rows(context: ReportContext) -> list[ClassGain]:
    """All classes if a table can show them, else those that changed most; the largest losses first."""
    rows = context.gains.rows if context.gains else []
    return rows if len(rows) <= CLASS_ROWS else [*rows[: CLASS_ROWS // 2], *rows[-CLASS_ROWS // 2 :]]


def _robustness_names(context: ReportContext) -> list[str]:
    """What was measured of robustness, as the run's notes call it."""
    return list(dict.fromkeys(name for model in context.models for name in model.robustness))


def _robustness_section(context: ReportContext, name: str) -> dict[str, Any]:
    """Charts of one measurement, of all models that have it; a chart of what was not measured is None."""
    results = {model.title: model.robustness[name][0] for model in context.models if name in model.robustness}
    last = list(results.values())[-1]
    scored = [model.robustness[name][1] for model in context.models if name in model.robustness]
    # Of models that were asked the same: a run whose settings were changed under way has others.
    corrupted = {title: result for title, result in results.items() if result.corruptions.keys() == last.corruptions.keys()}
    perturbed = {title: result for title, result in results.items() if result.perturbations.keys() == last.perturbations.keys()}
    fgsm = {
        title: ([(0.0, result.top1)] if result.top1 is not None else [])
        + [(attack.epsilon, attack.top1) for attack in result.attacks if attack.name == "fgsm"]
        for title, result in results.items()
    }
    kinds, sequences = ([kind.replace("_", " ") for kind in result] for result in (last.corruptions, last.perturbations))
    errors = {title: list(result.mean_corruption_errors().values()) for title, result in corrupted.items()}
    flips = {title: [p.flip_probability for p in result.perturbations.values()] for title, result in perturbed.items()}
    attacked = any(len(points) > 1 for points in fgsm.values())
    references = {result.mce_relative_to or result.mfr_relative_to for result in scored}
    relative_to = "AlexNet" if "AlexNet" in references else "the first teacher" if "reference" in references else None
    return {
        "title": evaluation_title(name),
        "last": last,
        "relative_to": relative_to,
        "corruptions": Markup(charts.draw_bars(f"{name}-corruptions", "mean error", kinds, errors)) if kinds else None,
        "perturbations": Markup(charts.draw_bars(f"{name}-flips", "flip probability", sequences, flips)) if sequences else None,
        "attacks": Markup(charts.draw_attacks(f"{name}-attacks", fgsm)) if attacked else None,
        "severities": [
            (kind.replace("_", " "), [(title, result.corruptions[kind]) for title, result in corrupted.items()])
            for kind in last.corruptions
        ],
    }


def _reliability_chart(context: ReportContext) -> Markup | None:
    calibrations = {
        model.title: model.evaluation.calibration
        for model in context.models
        if model.evaluation and model.evaluation.calibration
    }
    return Markup(charts.draw_reliability(calibrations)) if calibrations else None


def _last_diff(context: ReportContext) -> dict[str, Any] | None:
    """The latest labels against those of the generation before."""
    diff = next((labeling.diff for labeling in reversed(context.labelings) if labeling.diff), None)
    if diff is None:
        return None
    return {
        "facts": diff,
        "chart": Markup(charts.draw_confidence_shift(diff.histogram_before, diff.histogram_after)),
        "by_class": diff.list_changed_classes(),
        "pairs": diff.list_frequent_flips(),
    }


def _labeling_section(labeling: GenerationLabeling) -> dict[str, Any]:
    selection, classes = labeling.selection, labeling.label_set.classes
    name = str(labeling.generation)
    rules = selection.rules
    labeled = labeling.histogram.sum(1).tolist()
    rows = [
        SelectedClass(
            class_name, count, count - rule.candidates, rule.candidates - rule.kept, rule.kept, rule.images, rule.threshold
        )
        for class_name, count, rule in zip(classes, labeled, rules, strict=True)
    ]
    # Of many classes, those of which most is dropped.
    rows = rows if len(rows) <= CLASS_ROWS else sorted(rows, key=lambda row: (row.kept - row.labeled, row.name))[:CLASS_ROWS]
    return {
        "facts": labeling,
        "rows": rows,
        "confidence": Markup(charts.draw_confidence(name, labeling.histogram.sum(0), selection.policy.min_confidence)),
        "classes": Markup(
            charts.draw_class_balance(name, classes, [rule.candidates for rule in rules], [rule.images for rule in rules])
        ),
    }


def _training_section(model: TrainedModel) -> dict[str, Any]:
    name = str(model.generation)
    losses = {"loss_labeled": "labeled", "loss_pseudo": "pseudo-labeled"}
    shares = {"accuracy_labeled": "accuracy on labels", "agreement": "agreement with the teacher"}
    if model.generation == 0:
        del losses["loss_pseudo"], shares["agreement"]
    return {
        "title": model.title,
        "loss": Markup(charts.draw_training_curves(f"{name}-loss", model.history, losses, "loss")),
        "share": Markup(charts.draw_training_curves(f"{name}-share", model.history, shares, "share of the noised batch")),
    }
