"""Compares runs: their best models, the settings that differ, and the lineage."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ns.config.loader import flatten_fields
from ns.core.digest import shorten_digest
from ns.core.errors import RunError
from ns.core.intervals import wilson_interval
from ns.evaluation.paired import paired_gain
from ns.evaluation.robustness.scores import score_robustness
from ns.reporting import charts
from ns.reporting.context import ReportContext, TrainedModel, gather_context, read_answers
from ns.reporting.headlines import format_headline, format_outcomes
from ns.reporting.markdown import render_text
from ns.reporting.metrics import Metric, MetricRow, align_metrics, collect_metrics
from ns.reporting.page import group_metrics
from ns.reporting.templates import render_page
from ns.storage import Store

LEVEL = 0.975
"""Level of each bound of a difference: together a 95 % interval."""
RESAMPLES = 10_000


class ComparisonRow(NamedTuple):
    """One property of all compared runs."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    runs: list[ReportContext]
    metric_rows: list[MetricRow]
    """Metrics of the best model of each run."""
    settings: list[ComparisonRow]
    """Fields of the experiments that differ."""
    lineage: list[ComparisonRow]
    remarks: list[str]
    """Reasons why these numbers cannot be compared."""

    @property
    def names(self) -> list[str]:
        return [context.summary.run for context in self.runs]


def compare_runs(root: Store, names: Sequence[str]) -> Comparison:
    """Compares two or more runs, given their full names. Raises RunError if one is named twice or has no evaluated model yet.

    Differences are from the first run, paired on the same held-out images. mCE and mFR are relative to the first run's first teacher,
    or to AlexNet on ImageNet's classes.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise RunError(f"runs {', '.join(names) or '(none)'}: name two or more different ones to compare")
    contexts = [gather_context(root, name, pictures=0) for name in names]
    models: list[TrainedModel] = []
    for context in contexts:
        if context.best_model is None or context.first_model is None:
            raise RunError(f"run {context.summary.run}: has no evaluated model yet; `ns run --resume` continues it")
        models.append(_score_against(context.best_model, contexts[0].models[0]))
    columns = [
        [
            *_measure_difference(root, models[0], model),
            *_compare_with_baseline(root, context, model),
            *collect_metrics(context, model),
            *_total_metrics(context),
        ]
        for context, model in zip(contexts, models, strict=True)
    ]
    return Comparison(
        runs=contexts,
        metric_rows=align_metrics(columns),
        settings=_setting_rows(contexts),
        lineage=_lineage_rows(contexts, models),
        remarks=_list_remarks(contexts, models),
    )


def render_comparison_page(comparison: Comparison) -> str:
    """One HTML page that loads nothing."""
    top1 = {
        context.summary.run: [(m.generation, m.evaluation.top1) for m in context.models if m.evaluation]
        for context in comparison.runs
    }
    return render_page(
        "comparison.html.j2",
        title="Runs compared",
        comparison=comparison,
        groups=group_metrics(comparison.metric_rows),
        stories=[(context.summary.run, format_headline(context), format_outcomes(context)) for context in comparison.runs],
        chart=charts.draw_run_accuracies(top1),
    )


def render_comparison_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown for an issue or a pull request."""
    headlines = [(context.summary.run, format_headline(context)) for context in comparison.runs]
    return render_text("comparison.md.j2", comparison=comparison, headlines=headlines)


def _score_against(model: TrainedModel, reference: TrainedModel) -> TrainedModel:
    """The model with mCE and mFR relative to `reference`."""
    others = {name: robustness for name, (robustness, _) in reference.robustness.items()}
    return replace(
        model,
        robustness={
            name: (robustness, score_robustness(robustness, others.get(name)))
            for name, (robustness, _) in model.robustness.items()
        },
    )


def _measure_difference(root: Store, first: TrainedModel, model: TrainedModel) -> list[Metric]:
    """The difference from the first run's model; empty for that model itself, and for models that saw other images."""
    return _measure_gain(root, first, model, "difference", "difference from the first run, points")


def _compare_with_baseline(root: Store, context: ReportContext, model: TrainedModel) -> list[Metric]:
    """The run's baseline, and the gain of its best model over it; empty without a baseline."""
    baseline = context.baseline
    if baseline is None or baseline.evaluation is None:
        return []
    top1, images = baseline.evaluation.top1, baseline.evaluation.images
    low, high = wilson_interval(top1, images)
    name = "labeled images only, held out, top-1"
    return [
        Metric("baseline_heldout_top1", "Accuracy", name, top1, "share", low, high, "higher"),
        *_measure_gain(root, baseline, model, "baseline_gain", "gain over labeled images only, points"),
    ]


def _measure_gain(root: Store, first: TrainedModel, model: TrainedModel, key: str, name: str) -> list[Metric]:
    if model is first or not (first.evaluation and model.evaluation):
        return []
    before, after = read_answers(root, first), read_answers(root, model)
    if (first.evaluation.dataset, before.keys) != (model.evaluation.dataset, after.keys):
        return []
    gain = paired_gain(before.is_right, after.is_right, level=LEVEL, resamples=RESAMPLES, seed=0)
    return [Metric(key, "Accuracy", name, gain.value, "points", gain.low, gain.high)]


def _total_metrics(context: ReportContext) -> list[Metric]:
    seconds = sum(note.seconds for note in context.stages)
    return [
        Metric("total_seconds", "Cost", "all work of the run", seconds, "seconds"),
        Metric("generations", "Cost", "generations", len(context.verdicts), "count"),
    ]


def _setting_rows(contexts: Sequence[ReportContext]) -> list[ComparisonRow]:
    """The fields of the experiments that differ."""
    flat = [flatten_fields(context.experiment.model_dump(mode="json")) for context in contexts]
    fields = dict.fromkeys(field for values in flat for field in values)
    rows = ((field, tuple(values.get(field, "not set") for values in flat)) for field in fields)
    return [ComparisonRow(field, values) for field, values in rows if len(set(values)) > 1]


def _lineage_rows(contexts: Sequence[ReportContext], models: Sequence[TrainedModel]) -> list[ComparisonRow]:
    parts = dict.fromkeys(part for context in contexts for part in context.datasets)
    datasets = {part: [context.datasets.get(part) for context in contexts] for part in parts}
    labelings = [context.labeling_of(model.generation) for context, model in zip(contexts, models, strict=True)]
    inputs = datasets | {"label set of the best model": [labeling and labeling.label_set for labeling in labelings]}
    best_models = [f"{model.title.lower()}, {shorten_digest(model.manifest.digest)}" for model in models]
    return [
        *(
            ComparisonRow(name, tuple(shorten_digest(document.digest) if document else "" for document in documents))
            for name, documents in inputs.items()
        ),
        ComparisonRow("best model", tuple(best_models)),
        ComparisonRow("settings", tuple(shorten_digest(context.summary.config_digest) for context in contexts)),
        ComparisonRow("noisy-student", tuple(context.version for context in contexts)),
    ]


def _list_remarks(contexts: Sequence[ReportContext], models: Sequence[TrainedModel]) -> list[str]:
    remarks = []
    sets = dict.fromkeys(name for model in models for name in model.evaluations)
    for name in sets:
        digests = {model.evaluations[name].dataset for model in models if name in model.evaluations}
        if len(digests) > 1:
            what = "The held-out images" if name == "evaluation" else f"The images of {name.removeprefix('set:')}"
            remarks.append(f"{what} are not the same in all runs: their accuracies cannot be compared.")
    unfinished = [context.summary.run for context in contexts if context.summary.state != "succeeded"]
    if unfinished:
        remarks.append(f"Not finished: {', '.join(unfinished)}.")
    return remarks
