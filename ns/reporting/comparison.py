"""Several runs side by side: their best models, what was set differently, and what they were made from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from ns.config.schema import EVERY_FIELD
from ns.core.digest import short
from ns.core.errors import RunError
from ns.evaluation.gate import Gain, paired_gain
from ns.evaluation.robustness.relative_scores import scores
from ns.reporting import charts
from ns.reporting.context import Facts, Trained, gather
from ns.reporting.disagreement import Answers
from ns.reporting.headlines import headline, outcome
from ns.reporting.markdown import measured, plain, table
from ns.reporting.metrics import Line, Measure, lines, measures
from ns.reporting.page import grouped
from ns.reporting.templates import SCRIPTLESS, environment
from ns.storage import Store

LEVEL = 0.975
"""Of each bound of a difference: together 95 %."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Row:
    """Something that runs have one each of."""

    name: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


@dataclass(frozen=True)
class Comparison:
    runs: list[Facts]
    lines: list[Line]
    """What was measured of the best model of each run."""
    settings: list[Row]
    """Fields of the experiments that are not the same in all runs."""
    lineage: list[Row]
    remarks: list[str]
    """What stands against comparing these numbers."""

    @property
    def names(self) -> list[str]:
        return [facts.summary.run for facts in self.runs]


def compare(root: Store, names: Sequence[str]) -> Comparison:
    """Reads two or more runs, given their full names. Raises RunError if one is named twice, or has evaluated no model yet.

    Differences are from the first of them, in pairs of the same held-out images. mCE and mFR are relative to its first teacher, where
    not to AlexNet.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise RunError(f"runs {', '.join(names) or '(none)'}: name two or more different ones to compare")
    found = [gather(root, name, pictures=0) for name in names]
    models: list[Trained] = []
    for facts in found:
        if facts.best is None or facts.first is None:
            raise RunError(f"run {facts.summary.run}: has no evaluated model yet; `ns run --resume` continues it")
        models.append(_scored(facts.best, found[0].trained[0]))
    columns = [
        [*_gain(root, models[0], model), *measures(facts, model), *_total(facts)]
        for facts, model in zip(found, models, strict=True)
    ]
    return Comparison(
        runs=found,
        lines=lines(columns),
        settings=[row for row in _settings(found) if row.differs],
        lineage=_lineage(found, models),
        remarks=_remarks(found, models),
    )


def page(comparison: Comparison) -> str:
    """HTML that needs nothing else."""
    top1 = {
        facts.summary.run: [(m.generation, m.evaluation.top1) for m in facts.trained if m.evaluation]
        for facts in comparison.runs
    }
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            title="Runs compared",
            scripts=SCRIPTLESS,
            comparison=comparison,
            groups=grouped(comparison.lines),
            stories=[(facts.summary.run, headline(facts), outcome(facts)) for facts in comparison.runs],
            chart=Markup(charts.trips(top1)),
        )
    )


def markdown(comparison: Comparison) -> str:
    """The same for an issue or a pull request."""
    heads = tuple(plain(name) for name in comparison.names)
    made = [f"### {' · '.join(heads)}", ""]
    made += [f"- **{plain(facts.summary.run)}**: {plain(headline(facts))}" for facts in comparison.runs]
    if comparison.remarks:
        made += ["", *(f"> {plain(remark)}" for remark in comparison.remarks)]
    made += measured(heads, comparison.lines)
    for title, rows in (("set differently", comparison.settings), ("made from", comparison.lineage)):
        if rows:
            made += table((title, *heads), [(plain(row.name), *(plain(value) for value in row.values)) for row in rows])
    return "\n".join(made) + "\n"


def _scored(model: Trained, reference: Trained) -> Trained:
    """With mCE and mFR relative to one model for all runs."""
    others = {name: found for name, (found, _) in reference.robustness.items()}
    return replace(
        model,
        robustness={name: (found, scores(found, others.get(name))) for name, (found, _) in model.robustness.items()},
    )


def _gain(root: Store, first: Trained, model: Trained) -> list[Measure]:
    """The difference from the first run's model, if both saw the same images."""
    if model is first or not (first.evaluation and model.evaluation and first.predictions and model.predictions):
        return []
    before = Answers.read(first.title, root.at(first.predictions), first.evaluation)
    after = Answers.read(model.title, root.at(model.predictions), model.evaluation)
    if (first.evaluation.dataset, before.keys) != (model.evaluation.dataset, after.keys):
        return []
    gain: Gain = paired_gain(before.right, after.right, level=LEVEL, resamples=RESAMPLES, seed=0)
    name = "difference from the first run, points"
    return [Measure("difference", "Accuracy", name, gain.value, "points", gain.low, gain.high)]


def _total(facts: Facts) -> list[Measure]:
    seconds = sum(note.seconds for note in facts.steps)
    return [
        Measure("total_seconds", "Cost", "all work of the run", seconds, "seconds"),
        Measure("generations", "Cost", "generations judged", len(facts.verdicts), "count"),
    ]


def _settings(found: Sequence[Facts]) -> list[Row]:
    flat = [_flat(facts.experiment.model_dump(mode="json", context=EVERY_FIELD)) for facts in found]
    fields = dict.fromkeys(field for one in flat for field in one)
    return [Row(field, tuple(one.get(field, "not set") for one in flat)) for field in fields]


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """`a.b.0` → value, as text."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            key: text for name, inner in items for key, text in _flat(inner, f"{path}.{name}" if path else str(name)).items()
        }
    return {path: "not set" if value is None else str(value)}


def _lineage(found: Sequence[Facts], models: Sequence[Trained]) -> list[Row]:
    parts = dict.fromkeys(part for facts in found for part in facts.datasets)
    rows = [
        Row(part, tuple(short(facts.datasets[part].digest) if part in facts.datasets else "" for facts in found))
        for part in parts
    ]
    last = [facts.labels_of(model.generation) for facts, model in zip(found, models, strict=True)]
    return [
        *rows,
        Row("its label set", tuple(short(one.label_set.digest) if one else "" for one in last)),
        Row("best model", tuple(f"{model.title.lower()}, {short(model.card.digest)}" for model in models)),
        Row("settings", tuple(short(facts.summary.config_digest) for facts in found)),
        Row("noisy-student", tuple(facts.version for facts in found)),
    ]


def _remarks(found: Sequence[Facts], models: Sequence[Trained]) -> list[str]:
    remarks = []
    sets = dict.fromkeys(name for model in models for name in model.evaluations)
    for name in sets:
        digests = {model.evaluations[name].dataset for model in models if name in model.evaluations}
        if len(digests) > 1:
            what = "The held-out images" if name == "evaluation" else f"The images of {name.removeprefix('set:')}"
            remarks.append(f"{what} are not the same in all runs: their accuracies cannot be compared.")
    unfinished = [facts.summary.run for facts in found if facts.summary.state != "succeeded"]
    if unfinished:
        remarks.append(f"Not finished: {', '.join(unfinished)}.")
    return remarks
