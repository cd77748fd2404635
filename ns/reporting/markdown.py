"""Facts → GitHub Flavored Markdown, for a pull request: the verdict first, then the numbers."""

import re
from collections.abc import Iterable, Sequence

from ns.core.digest import short
from ns.core.log import duration
from ns.evaluation.gate import Verdict
from ns.reporting.context import Facts, Trained
from ns.reporting.headlines import guard_value, headline, outcome
from ns.reporting.metrics import Line, lines, measures, set_name, shown

CLASSES = 5
"""Classes that gained most and that lost most."""


def markdown(facts: Facts) -> str:
    """The report without its pictures and charts: a few kB, whatever the run."""
    made = [f"### {plain(facts.summary.run)}{_generation(facts)}: {plain(headline(facts) or 'no model is evaluated yet')}", ""]
    made += [f"- **{plain(line)}**" for line in outcome(facts)]
    if facts.summary.error and facts.generation is None:
        made += ["", f"**{facts.summary.state}**: {plain(facts.summary.error)}"]
    if facts.trained:
        heads = tuple(plain(model.title) for model in facts.trained)
        made += measured(heads, lines(measures(facts, model) for model in facts.trained))
        made += _robustness(facts.trained[-1])
    for verdict in facts.verdicts:
        made += _guards(verdict)
    made += _gains(facts) + _labels(facts) + _data(facts)
    return "\n".join(made) + "\n"


def measured(heads: Sequence[str], found: Iterable[Line]) -> list[str]:
    """A table of measures; the best of a line is bold."""
    rows = [
        (
            plain(line.name),
            *("" if cell is None else f"**{cell}**" if cell.value == line.best else str(cell) for cell in line.cells),
        )
        for line in found
    ]
    return table(("", *heads), rows)


def table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table with a line before it; all columns but the first are numbers."""
    rule = ["---", *("---:" for _ in headers[1:])]
    return ["", *(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows))]


def plain(text: str) -> str:
    """Text that Markdown shows as it is, and that stays in its cell."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$@])", r"\\\1", re.sub(r"\s+", " ", text))


def _generation(facts: Facts) -> str:
    return "" if facts.generation is None else f", generation {facts.generation}"


def _robustness(model: Trained) -> list[str]:
    """On what robustness was measured."""
    made = []
    for name, (found, _) in model.robustness.items():
        title = set_name(name) or "Robustness"
        some = " of the" if found.subsample else ""
        made += ["", f"{plain(title)}: {found.images:,}{some} images of {plain(found.name)}."]
    return made


def _guards(verdict: Verdict) -> list[str]:
    rows = [
        (
            plain(guard.name),
            guard_value(guard, guard.value),
            guard_value(guard, guard.limit),
            "passed" if guard.passed else "**failed**",
            plain(guard.detail.rstrip(",")),
        )
        for guard in verdict.guards
    ]
    headers = (f"gate of generation {verdict.generation}", "value", "limit", "verdict", "what it is")
    return table(headers, rows)


def _gains(facts: Facts) -> list[str]:
    made: list[str] = []
    if found := facts.disagreement:
        made += [
            "",
            f"On {found.images:,} held-out images {found.after.lower()} won {found.won:,} and lost {found.lost:,} "
            f"against {found.before.lower()}.",
        ]
    if facts.gains:
        rows = facts.gains.rows
        losses = [row for row in rows[:CLASSES] if row.gain < 0]
        wins = [row for row in rows[::-1][:CLASSES] if row.gain > 0]
        if chosen := [*losses, *wins[::-1]]:
            made += table(
                ("class, most lost and most gained", facts.gains.before.lower(), facts.gains.after.lower(), "change, points"),
                [
                    (plain(row.name), shown(row.before, "share"), shown(row.after, "share"), shown(row.gain, "points"))
                    for row in chosen
                ],
            )
    return made


def _labels(facts: Facts) -> list[str]:
    made: list[str] = []
    for one in facts.labels:
        kept = one.selection
        text = (
            f"Labels of generation {one.generation}: {kept.kept:,} of {one.label_set.rows:,} kept, {kept.images:,} in an epoch "
            f"with repeats; {kept.low_confidence:,} below the threshold, {kept.balanced_out:,} beyond the class limit."
        )
        if one.diff:
            text += f" {one.diff.churn:.1%} changed since the generation before"
            pairs = ", ".join(f"{plain(old)} → {plain(new)} {images:,}" for old, new, images in one.diff.frequent()[:3])
            text += f" (most: {pairs})." if pairs else "."
        made += ["", text]
    return made


def _data(facts: Facts) -> list[str]:
    rows = [
        (f"{plain(data.name)} ({plain(part)})", f"{data.samples:,}", f"`{short(data.digest)}`")
        for part, data in facts.datasets.items()
    ]
    rows += [
        (f"label set {one.generation}", f"{one.label_set.rows:,}", f"`{short(one.label_set.digest)}`") for one in facts.labels
    ]
    rows += [(plain(model.title), "", f"`{short(model.card.digest)}`") for model in facts.trained]
    made = table(("data and models", "images", "digest"), rows) if rows else []
    spent = duration(sum(note.seconds for note in facts.steps))
    return [
        *made,
        "",
        f"{spent} of work · config `{short(facts.summary.config_digest)}` · noisy-student {plain(facts.version)}",
    ]
