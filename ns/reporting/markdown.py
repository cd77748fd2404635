"""Renders texts as GitHub Flavored Markdown for issues and pull requests; of a run's report the verdict first, then the numbers."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from ns.reporting.advice import list_advice
from ns.reporting.context import ReportContext
from ns.reporting.headlines import format_headline, format_outcomes
from ns.reporting.metrics import align_metrics, collect_metrics, evaluation_title
from ns.reporting.templates import make_environment

CLASSES = 5
"""Classes listed of those that gained most, and of those that lost most."""


def render_markdown(context: ReportContext) -> str:
    """The report without pictures and charts: a few kB for any run."""
    rows = context.gains.rows if context.gains else []
    wins = [row for row in rows[-CLASSES:] if row.gain > 0]
    measured = context.models[-1].robustness if context.models else {}
    return render_text(
        "report.md.j2",
        context=context,
        title=context.summary.run + ("" if context.generation is None else f", generation {context.generation}"),
        headline=format_headline(context),
        outcomes=format_outcomes(context),
        advice=list_advice(context),
        metric_rows=align_metrics(collect_metrics(context, model) for model in context.shown_models),
        robustness=[(evaluation_title(name) or "Robustness", robustness) for name, (robustness, _) in measured.items()],
        changed_classes=[row for row in rows[:CLASSES] if row.gain < 0] + wins,
        seconds=sum(note.seconds for note in context.stages),
    )


def render_text(template: str, **fields: Any) -> str:
    """A Markdown text from a template; what is put into it is shown literally, except what our own code marks as markup."""
    return _make_markdown_environment().get_template(template).render(**fields)


@cache
def _make_markdown_environment() -> Environment:
    return make_environment(
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escape_markdown(str(value))),
        keep_trailing_newline=True,
    )


def format_table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The lines of a table, after an empty one; all columns but the first are numbers."""
    rule = ["---", *("---:" for _ in headers[1:])]
    return ["", *(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows))]


def escape_markdown(text: str) -> str:
    """Text that Markdown shows literally and that stays in its table cell."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$@])", r"\\\1", re.sub(r"\s+", " ", text))
