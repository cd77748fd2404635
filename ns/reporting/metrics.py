"""The metrics of a model, under the same names on the page, in Markdown, in pipelines and in comparisons of runs."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from ns.core.intervals import wilson_interval
from ns.core.log import format_duration
from ns.evaluation.result import Evaluation, Robustness
from ns.evaluation.robustness.scores import RobustnessScores
from ns.reporting.context import ReportContext, TrainedModel
from ns.runs.records import BASELINE_STAGES, BASELINE_TRAIN

MetricGroup = Literal["Accuracy", "Calibration", "Robustness", "Attacks", "Pseudo-labels of its training", "Cost"]
GROUPS: tuple[MetricGroup, ...] = get_args(MetricGroup)
"""The groups in the order of tables."""
MetricUnit = Literal["share", "rare", "points", "count", "seconds", "hours", "number"]


@dataclass(frozen=True)
class Metric:
    """One number of one model."""

    key: str
    """Name as a scalar metric: `heldout_top1`."""
    group: MetricGroup
    name: str
    value: float
    unit: MetricUnit
    low: float | None = None
    high: float | None = None
    """Interval; None without one."""
    better: Literal["higher", "lower"] | None = None

    def __str__(self) -> str:
        """`90.6 % [87.7, 92.9]`."""
        text = format_metric(self.value, self.unit)
        if self.low is None or self.high is None:
            return text
        low, high = (format_metric(bound, self.unit).removesuffix(" %") for bound in (self.low, self.high))
        return f"{text} [{low}, {high}]"


class MetricRow(NamedTuple):
    """One metric of several models, side by side."""

    group: MetricGroup
    name: str
    cells: tuple[Metric | None, ...]
    best: float | None
    """The best value of the cells; None if all are equal or neither direction is better."""


def format_metric(value: float, unit: MetricUnit) -> str:
    match unit:
        case "share":
            return f"{100 * value:.1f} %"
        case "rare":
            return f"{100 * value:.2f} %"
        case "points":
            return f"{100 * value:+.1f}"
        case "count":
            return f"{value:,.0f}"
        case "seconds":
            return format_duration(value)
        case "hours":
            return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"
        case "number":
            return f"{value:.1f}"


def evaluation_title(name: str) -> str:
    """The title of an evaluation, given its name in the notes of a run."""
    names = {
        "evaluation": "held out",
        "calibration": "calibration, as it labels",
        "robustness": "",
        "gate_robustness": "held out",
        "finetuned": "held out, fine-tuned",
        "finetuned_test": "test, fine-tuned",
    }
    return names.get(name, name.removeprefix("set:"))


def collect_metrics(context: ReportContext, model: TrainedModel) -> list[Metric]:
    """All metrics of a model of a run, in the order of tables."""
    metrics: list[Metric] = []
    for name, evaluation in model.evaluations.items():
        metrics += _accuracy_metrics(name, evaluation)
    for name, (robustness, scored) in model.robustness.items():
        metrics += _robustness_metrics(name, robustness, scored)
    if not model.is_baseline:
        metrics += _gate_metrics(context, model)
        metrics += _labeling_metrics(context, model)
    return metrics + _cost_metrics(context, model)


def flatten_metrics(metrics: Iterable[Metric]) -> dict[str, float]:
    """Key → value; the bounds of an interval have keys that end in `_low` and `_high`."""
    values: dict[str, float] = {}
    for metric in metrics:
        values[metric.key] = float(metric.value)
        if metric.low is not None and metric.high is not None:
            values |= {f"{metric.key}_low": float(metric.low), f"{metric.key}_high": float(metric.high)}
    return values


def align_metrics(models: Iterable[Sequence[Metric]]) -> list[MetricRow]:
    """The metrics of several models as the rows of one table; the rows of a group are adjacent."""
    columns = [{metric.key: metric for metric in model} for model in models]
    first = {key: metric for column in reversed(columns) for key, metric in column.items()}
    # In the order in which the models first name them.
    order = list(dict.fromkeys(key for column in columns for key in column))
    metric_rows = []
    for key in sorted(order, key=lambda key: GROUPS.index(first[key].group)):
        cells = tuple(column.get(key) for column in columns)
        values = [cell.value for cell in cells if cell]
        best = None
        if len(set(values)) > 1 and first[key].better:
            best = max(values) if first[key].better == "higher" else min(values)
        metric_rows.append(MetricRow(first[key].group, first[key].name, cells, best))
    return metric_rows


def _accuracy_metrics(name: str, evaluation: Evaluation) -> list[Metric]:
    prefix = "heldout" if name == "evaluation" else _metric_key(name)
    title = evaluation_title(name)
    metrics = []
    for key, what, value in (("top1", "top-1", evaluation.top1), ("top5", "top-5", evaluation.top5)):
        low, high = wilson_interval(value, evaluation.images)
        if key == "top1" or len(evaluation.scored_classes or evaluation.classes) > 5:
            metrics.append(Metric(f"{prefix}_{key}", "Accuracy", f"{title}, {what}", value, "share", low, high, "higher"))
    balanced = f"{title}, balanced accuracy"
    metrics.append(
        Metric(f"{prefix}_balanced_accuracy", "Accuracy", balanced, evaluation.balanced_accuracy, "share", better="higher")
    )
    if evaluation.multi_label_top1 is not None:
        low, high = wilson_interval(evaluation.multi_label_top1, evaluation.multi_label_images or 0)
        about = f"{title}, top-1 of several right classes"
        metrics.append(
            Metric(f"{prefix}_multi_label", "Accuracy", about, evaluation.multi_label_top1, "share", low, high, "higher")
        )
    ece = evaluation.calibration.ece
    return [*metrics, Metric(f"{prefix}_ece", "Calibration", f"{title}, ECE", ece, "share", better="lower")]


def _robustness_metrics(name: str, robustness: Robustness, scores: RobustnessScores) -> list[Metric]:
    suffix = {"robustness": "", "gate_robustness": "_heldout"}.get(name, f"_{_metric_key(name)}")
    set_prefix = f"{evaluation_title(name)}, " if evaluation_title(name) else ""
    group: MetricGroup = "Robustness"
    relative = {"AlexNet": "% of AlexNet's", "reference": "% of the first teacher's", None: ""}
    columns: tuple[tuple[str, str, float | None, MetricUnit], ...] = (
        ("corruption_error", "error when corrupted", scores.corruption_error, "share"),
        ("mce", f"mCE, {relative[scores.mce_relative_to]}", scores.mce, "number"),
        ("flip_probability", "flip probability", scores.flip_probability, "rare"),
        ("mfr", f"mFR, {relative[scores.mfr_relative_to]}", scores.mfr, "number"),
        ("mt5d", "mT5D, % of the first teacher's", scores.mt5d, "number"),
    )
    metrics = [
        Metric(f"{key}{suffix}", group, f"{set_prefix}{title}", value, unit, better="lower")
        for key, title, value, unit in columns
        if value is not None
    ]
    for attack in robustness.attacks:
        label = f"{set_prefix}{attack.name.upper()}, ε {attack.epsilon:g}"
        label += f", {attack.steps} steps" if attack.name == "pgd" else ""
        label += ", top-1"
        # The interval is that of any accuracy: an image withstands the attack or not.
        low, high = wilson_interval(attack.top1, robustness.images)
        metrics.append(
            Metric(f"{_metric_key(str(attack))}{suffix}", "Attacks", label, attack.top1, "share", low, high, "higher")
        )
    return metrics


def _metric_key(name: str) -> str:
    """A name as part of a metric's key: letters, digits, underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _gate_metrics(context: ReportContext, model: TrainedModel) -> list[Metric]:
    verdict = context.verdict_of(model.generation)
    if verdict is None:
        return []
    return [
        Metric("gain", "Accuracy", "gain over its teacher, points", verdict.gain, "points", verdict.gain_low, verdict.gain_high)
    ]


def _labeling_metrics(context: ReportContext, model: TrainedModel) -> list[Metric]:
    labeling = context.labeling_of(model.generation)
    if labeling is None:
        return []
    group: MetricGroup = "Pseudo-labels of its training"
    label_set, selection = labeling.label_set, labeling.selection
    metrics = [
        Metric("labeled", group, "images labeled", label_set.rows, "count"),
        Metric("kept", group, "kept", selection.kept, "count"),
        Metric("epoch_images", group, "per epoch, with repeats", selection.images, "count"),
        Metric("class_coverage", group, "classes with 1/5 of their share, or more", selection.represented_share, "share"),
    ]
    if selection.foreign_limit is not None and label_set.rows:
        metrics.append(Metric("foreign", group, "left out as foreign", selection.foreign / label_set.rows, "share"))
    if labeling.diff is not None:
        metrics.append(Metric("churn", group, "changed since the previous generation", labeling.diff.churn, "share"))
    return metrics


def _cost_metrics(context: ReportContext, model: TrainedModel) -> list[Metric]:
    # Of all stages of the run: `context.stages` may be confined to one generation, and the model may be of another one.
    generation_notes = [
        note
        for note in context.summary.stages
        if note.generation == model.generation and (note.stage in BASELINE_STAGES) == model.is_baseline
    ]
    metrics = [
        Metric("parameters", "Cost", "parameters", model.manifest.parameters, "count"),
        Metric("steps", "Cost", "training steps", model.manifest.steps, "count"),
    ]
    if model.history:
        metrics.append(Metric("images", "Cost", "training images, with repeats", model.history[-1]["images"], "count"))
    training_seconds = sum(note.seconds for note in generation_notes if note.stage in ("train", BASELINE_TRAIN))
    total_seconds = sum(note.seconds for note in generation_notes)
    metrics.append(Metric("train_seconds", "Cost", "training", training_seconds, "seconds"))
    metrics.append(Metric("seconds", "Cost", "all work of the generation", total_seconds, "seconds"))
    if model.history:
        hours = (total_seconds + (model.history[-1]["processes"] - 1) * training_seconds) / 3600
        metrics.append(Metric("device_hours", "Cost", "device-hours", hours, "hours"))
    return metrics
