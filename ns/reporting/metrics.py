"""What is measured of a model, under one name everywhere: on the page, in Markdown, in pipelines, and where runs are compared."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from ns.core.intervals import wilson
from ns.core.log import duration
from ns.evaluation.result import Evaluation, Robustness
from ns.evaluation.robustness.relative_scores import Scores
from ns.reporting.context import Facts, Trained

Group = Literal["Accuracy", "Calibration", "Robustness", "Attacks", "Pseudo-labels it learnt from", "Cost"]
GROUPS: tuple[Group, ...] = get_args(Group)
"""In the order of tables."""
Unit = Literal["share", "rare", "points", "count", "seconds", "hours", "number"]


@dataclass(frozen=True)
class Measure:
    """One number of one model."""

    key: str
    """As scalar metrics are called: `heldout_top1`."""
    group: Group
    name: str
    value: float
    unit: Unit
    low: float | None = None
    high: float | None = None
    """An interval, if there is one."""
    better: Literal["higher", "lower"] | None = None

    def __str__(self) -> str:
        """`90.6 % [87.7, 92.9]`."""
        text = shown(self.value, self.unit)
        if self.low is None or self.high is None:
            return text
        low, high = (shown(bound, self.unit).removesuffix(" %") for bound in (self.low, self.high))
        return f"{text} [{low}, {high}]"


class Line(NamedTuple):
    """A measure of several models, side by side."""

    group: Group
    name: str
    cells: tuple[Measure | None, ...]
    best: float | None
    """The best value of the cells; None if there is no better and worse, or nothing to compare."""


def shown(value: float, unit: Unit) -> str:
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
            return duration(value)
        case "hours":
            return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"
        case "number":
            return f"{value:.1f}"


def set_name(name: str) -> str:
    """What people call a set that models are evaluated on, given what the notes of a run call it."""
    names = {
        "evaluation": "held out",
        "robustness": "",
        "robustness_heldout": "held out",
        "finetuned": "held out, fine-tuned",
        "finetuned_test": "test, fine-tuned",
    }
    return names.get(name, name.removeprefix("set:"))


def measures(facts: Facts, model: Trained) -> list[Measure]:
    """All that is known of a model of a run, in the order of tables."""
    found: list[Measure] = []
    for name, evaluation in model.evaluations.items():
        found += _accuracy(name, evaluation)
    for name, (robustness, scored) in model.robustness.items():
        found += _robustness(name, robustness, scored)
    found += _gate(facts, model)
    found += _labels(facts, model)
    return found + _cost(facts, model)


def lines(models: Iterable[Sequence[Measure]]) -> list[Line]:
    """The measures of several models as the lines of one table; those of one group stand together."""
    columns = [{measure.key: measure for measure in model} for model in models]
    first = {key: measure for column in reversed(columns) for key, measure in column.items()}
    # In the order in which models name them, whichever model names one first.
    order = list(dict.fromkeys(key for column in columns for key in column))
    made = []
    for key in sorted(order, key=lambda key: GROUPS.index(first[key].group)):
        cells = tuple(column.get(key) for column in columns)
        values = [cell.value for cell in cells if cell]
        best = None
        if len(set(values)) > 1 and first[key].better:
            best = max(values) if first[key].better == "higher" else min(values)
        made.append(Line(first[key].group, first[key].name, cells, best))
    return made


def _accuracy(name: str, evaluation: Evaluation) -> list[Measure]:
    prefix = "heldout" if name == "evaluation" else _key(name)
    title = set_name(name)
    found = []
    for key, what, value in (("top1", "top-1", evaluation.top1), ("top5", "top-5", evaluation.top5)):
        low, high = wilson(value, evaluation.images)
        if key == "top1" or len(evaluation.scored or evaluation.classes) > 5:
            found.append(Measure(f"{prefix}_{key}", "Accuracy", f"{title}, {what}", value, "share", low, high, "higher"))
    if evaluation.multi_label_top1 is not None:
        low, high = wilson(evaluation.multi_label_top1, evaluation.multi_label_images or 0)
        about = f"{title}, top-1 of several right classes"
        found.append(
            Measure(f"{prefix}_multi_label", "Accuracy", about, evaluation.multi_label_top1, "share", low, high, "higher")
        )
    if evaluation.calibration is not None:
        ece = evaluation.calibration.ece
        found.append(Measure(f"{prefix}_ece", "Calibration", f"{title}, ECE", ece, "share", better="lower"))
    return found


def _robustness(name: str, found: Robustness, scored: Scores) -> list[Measure]:
    suffix = "" if name == "robustness" else f"_{_key(name.removeprefix('robustness_'))}"
    of = f"{set_name(name)}, " if set_name(name) else ""
    group: Group = "Robustness"
    relative = {"AlexNet": "% of AlexNet's", "reference": "% of the first teacher's", None: ""}
    about: tuple[tuple[str, str, float | None, Unit], ...] = (
        ("corruption_error", "error when corrupted", scored.corruption_error, "share"),
        ("mce", f"mCE, {relative[scored.mce_relative_to]}", scored.mce, "number"),
        ("flip_probability", "flip probability", scored.flip_probability, "rare"),
        ("mfr", f"mFR, {relative[scored.mfr_relative_to]}", scored.mfr, "number"),
        ("mt5d", "mT5D, % of the first teacher's", scored.mt5d, "number"),
    )
    made = [
        Measure(f"{key}{suffix}", group, f"{of}{title}", value, unit, better="lower")
        for key, title, value, unit in about
        if value is not None
    ]
    for attack in found.attacks:
        label = f"{of}{attack.name.upper()}, ε {attack.epsilon:g}"
        label += f", {attack.steps} steps" if attack.name == "pgd" else ""
        label += ", top-1"
        # Intervals as of any accuracy: an image stands the attack or not.
        low, high = wilson(attack.top1, found.images)
        made.append(Measure(f"{_key(str(attack))}{suffix}", "Attacks", label, attack.top1, "share", low, high, "higher"))
    return made


def _key(name: str) -> str:
    """A name as part of a metric's: letters, digits, underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _gate(facts: Facts, model: Trained) -> list[Measure]:
    verdict = facts.verdict_of(model.generation)
    if verdict is None:
        return []
    return [
        Measure("gain", "Accuracy", "gain on its teacher, points", verdict.gain, "points", verdict.gain_low, verdict.gain_high)
    ]


def _labels(facts: Facts, model: Trained) -> list[Measure]:
    labels = facts.labels_of(model.generation)
    if labels is None:
        return []
    group: Group = "Pseudo-labels it learnt from"
    found = [
        Measure("labelled", group, "images labelled", labels.label_set.rows, "count"),
        Measure("kept", group, "kept", labels.selection.kept, "count"),
        Measure("epoch_images", group, "in an epoch, with repeats", labels.selection.images, "count"),
    ]
    if labels.diff is not None:
        found.append(Measure("churn", group, "changed since the generation before", labels.diff.churn, "share"))
    return found


def _cost(facts: Facts, model: Trained) -> list[Measure]:
    # All steps of the run: those of another generation's model too, beside which this one stands.
    own = [note for note in facts.summary.steps if note.generation == model.generation]
    found = [
        Measure("parameters", "Cost", "parameters", model.card.parameters, "count"),
        Measure("steps", "Cost", "steps of training", model.card.steps, "count"),
    ]
    if model.history:
        found.append(Measure("images", "Cost", "images seen in training", model.history[-1]["images"], "count"))
    training = sum(note.seconds for note in own if note.step == "train")
    everything = sum(note.seconds for note in own)
    found.append(Measure("train_seconds", "Cost", "training", training, "seconds"))
    found.append(Measure("seconds", "Cost", "all work of the generation", everything, "seconds"))
    # Histories from before it was kept do not say how many processes trained.
    if model.history and (processes := model.history[-1].get("processes")):
        hours = (everything + (processes - 1) * training) / 3600
        found.append(Measure("device_hours", "Cost", "device-hours", hours, "hours"))
    return found
