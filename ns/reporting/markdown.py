"""Renders a run's report as GitHub Flavored Markdown for a pull request: the verdict first, then the numbers."""

import re
from collections.abc import Iterable, Sequence

from ns.core.digest import shorten_digest
from ns.core.log import format_duration
from ns.evaluation.gate import Verdict
from ns.reporting.context import ReportContext, TrainedModel
from ns.reporting.headlines import format_headline, format_outcomes
from ns.reporting.metrics import MetricRow, align_metrics, collect_metrics, evaluation_title, format_metric

CLASSES = 5
"""Classes listed of those that gained most, and of those that lost most."""


def render_markdown(context: ReportContext) -> str:
    """The report without pictures and charts: a few kB for any run."""
    title = context.summary.run + ("" if context.generation is None else f", generation {context.generation}")
    headline = format_headline(context) or "no model is evaluated yet"
    output = [f"### {escape_markdown(title)}: {escape_markdown(headline)}", ""]
    output += [f"- **{escape_markdown(line)}**" for line in format_outcomes(context)]
    if context.summary.error and context.generation is None:
        output += ["", f"**{context.summary.state}**: {escape_markdown(context.summary.error)}"]
    if context.models:
        heads = tuple(escape_markdown(model.title) for model in context.models)
        output += format_metric_table(heads, align_metrics(collect_metrics(context, model) for model in context.models))
        output += _robustness_lines(context.models[-1])
    for verdict in context.verdicts:
        output += _condition_table(verdict)
    output += _gain_lines(context) + _labeling_lines(context) + _data_lines(context)
    return "\n".join(output) + "\n"


def format_metric_table(heads: Sequence[str], metric_rows: Iterable[MetricRow]) -> list[str]:
    """A table of metrics; the best value of a row is bold."""
    rows = [
        (
            escape_markdown(metric_row.name),
            *(
                "" if cell is None else f"**{cell}**" if cell.value == metric_row.best else str(cell)
                for cell in metric_row.cells
            ),
        )
        for metric_row in metric_rows
    ]
    return format_table(("", *heads), rows)


def format_table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The lines of a table, after an empty one; all columns but the first are numbers."""
    rule = ["---", *("---:" for _ in headers[1:])]
    return ["", *(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows))]


def escape_markdown(text: str) -> str:
    """Text that Markdown shows literally and that stays in its table cell."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$@])", r"\\\1", re.sub(r"\s+", " ", text))


def _robustness_lines(model: TrainedModel) -> list[str]:
    """The images on which robustness was measured."""
    output = []
    for name, (robustness, _) in model.robustness.items():
        title = escape_markdown(evaluation_title(name) or "Robustness")
        some = " of the" if robustness.subsample else ""
        output += ["", f"{title}: {robustness.images:,}{some} images of {escape_markdown(robustness.name)}."]
    return output


def _condition_table(verdict: Verdict) -> list[str]:
    rows = [
        (
            escape_markdown(condition.name),
            condition.format_value(),
            condition.format_requirement(),
            "passed" if condition.passed else "**failed**",
            escape_markdown(condition.detail.rstrip(",")),
        )
        for condition in verdict.conditions
    ]
    headers = (f"gate of generation {verdict.generation}", "value", "required", "verdict", "what it is")
    return format_table(headers, rows)


def _gain_lines(context: ReportContext) -> list[str]:
    output: list[str] = []
    if disagreement := context.disagreement:
        output += [
            "",
            f"On {disagreement.images:,} held-out images {disagreement.after.lower()} won {disagreement.won:,} and lost "
            f"{disagreement.lost:,} against {disagreement.before.lower()}.",
        ]
    if context.gains:
        rows = context.gains.rows
        losses = [row for row in rows[:CLASSES] if row.gain < 0]
        wins = [row for row in rows[::-1][:CLASSES] if row.gain > 0]
        if shown_rows := [*losses, *wins[::-1]]:
            output += format_table(
                (
                    "class, most lost and most gained",
                    context.gains.before.lower(),
                    context.gains.after.lower(),
                    "change, points",
                ),
                [
                    (
                        escape_markdown(row.name),
                        format_metric(row.before, "share"),
                        format_metric(row.after, "share"),
                        format_metric(row.gain, "points"),
                    )
                    for row in shown_rows
                ],
            )
    return output


def _labeling_lines(context: ReportContext) -> list[str]:
    output: list[str] = []
    for labeling in context.labelings:
        selection = labeling.selection
        text = (
            f"Label set of generation {labeling.generation}: {selection.kept:,} of {labeling.label_set.rows:,} kept, "
            f"{selection.images:,} per epoch with repeats; {selection.low_confidence:,} at or below the threshold, "
            f"{selection.balanced_out:,} beyond the class limit."
        )
        if labeling.diff:
            text += f" {labeling.diff.churn:.1%} changed since the previous generation"
            pairs = ", ".join(
                f"{escape_markdown(old)} → {escape_markdown(new)} {images:,}"
                for old, new, images in labeling.diff.list_frequent_flips()[:3]
            )
            text += f" (most: {pairs})." if pairs else "."
        output += ["", text]
    return output


def _data_lines(context: ReportContext) -> list[str]:
    rows = [
        (
            f"{escape_markdown(dataset.name)} ({escape_markdown(part)})",
            f"{dataset.samples:,}",
            f"`{shorten_digest(dataset.digest)}`",
        )
        for part, dataset in context.datasets.items()
    ]
    rows += [
        (f"label set {labeling.generation}", f"{labeling.label_set.rows:,}", f"`{shorten_digest(labeling.label_set.digest)}`")
        for labeling in context.labelings
    ]
    rows += [(escape_markdown(model.title), "", f"`{shorten_digest(model.manifest.digest)}`") for model in context.models]
    output = format_table(("data and models", "images", "digest"), rows) if rows else []
    spent = format_duration(sum(note.seconds for note in context.stages))
    return [
        *output,
        "",
        f"{spent} of work · config `{shorten_digest(context.summary.config_digest)}` · noisy-student {escape_markdown(context.version)}",
    ]
