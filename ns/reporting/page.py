"""Facts → HTML."""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from markupsafe import Markup

from ns.config import schema as config
from ns.reporting import charts
from ns.reporting.context import Facts, Labels, Trained, gather
from ns.reporting.disagreement import ClassGain
from ns.reporting.headlines import guard_value, headline, outcome
from ns.reporting.metrics import Line, lines, measures, set_name
from ns.reporting.templates import SCRIPTLESS, environment
from ns.runs import records as runs
from ns.storage import Store

MATRIX_CLASSES = 30
"""With more classes the confused pairs are listed instead of the matrix."""
PAIRS = 10
CLASS_ROWS = 100


class SelectedClass(NamedTuple):
    """What became of the images that a teacher put in one class."""

    name: str
    labelled: int
    unsure: int
    """At or below the threshold."""
    beyond: int
    """Above it, but not among the most confident of the class."""
    kept: int
    images: int
    """In an epoch, with repeats."""
    threshold: float


def write(root: Store, run: str) -> str:
    """Writes ROOT/RUN/report.html from what the run has noted so far. Returns its key."""
    root.at(run).put(runs.REPORT, render(gather(root, run)).encode())
    return f"{run}/{runs.REPORT}"


def render(facts: Facts) -> str:
    """The whole page."""
    found = [measures(facts, model) for model in facts.trained]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=_title(facts),
            scripts=SCRIPTLESS,
            facts=facts,
            summary=facts.summary,
            headline=headline(facts),
            outcome=outcome(facts),
            rounds=_rounds(facts),
            accuracy=_accuracy(facts),
            models=[model.title for model in facts.trained],
            groups=grouped(lines(found)),
            guard_value=guard_value,
            robustness=[_robustness(facts, name) for name in _robust(facts)],
            reliability=_reliability(facts),
            matrices=_matrices(facts),
            pairs=_pairs(facts.best),
            class_rows=_class_rows(facts),
            labels=[_labels(labels) for labels in facts.labels],
            diff=_last_diff(facts),
            leaks=[one for one in facts.leaks.overlaps if one.same + one.near] if facts.leaks else [],
            trained=[_trained(model) for model in facts.trained if model.history],
            seconds=sum(note.seconds for note in facts.steps),
            config=config.dump(facts.experiment),
        )
    )


def _title(facts: Facts) -> str:
    return facts.summary.run + (f", generation {facts.generation}" if facts.generation is not None else "")


def grouped(found: Iterable[Line]) -> list[tuple[str, list[Line]]]:
    """The lines of each group together, in their order."""
    return [(group, list(members)) for group, members in itertools.groupby(found, key=lambda line: line.group)]


def _rounds(facts: Facts) -> list[dict[str, Any]]:
    """What the picture of the loop says, a round for each generation that has labels."""
    verdicts = {verdict.generation: verdict for verdict in facts.verdicts}
    models = {model.generation: model for model in facts.trained}
    rounds = []
    for labels in facts.labels:
        student = models.get(labels.generation)
        rounds.append(
            {
                "generation": labels.generation,
                "labelled": labels.label_set.rows,
                "kept": labels.selection.kept,
                "images": labels.selection.images,
                "teacher": _top1(_teacher(facts, labels.generation)),
                "student": _top1(student),
                "arch": student.card.model.arch if student else "",
                "verdict": verdicts.get(labels.generation),
            }
        )
    return rounds


def _teacher(facts: Facts, generation: int) -> Trained | None:
    """The last model before a generation: the loop ends with the first that is refused."""
    earlier = [model for model in facts.trained if model.generation < generation]
    return earlier[-1] if earlier else None


def _top1(model: Trained | None) -> float | None:
    return model.evaluation.top1 if model and model.evaluation else None


def _accuracy(facts: Facts) -> Markup | None:
    done = [(m.generation, m.evaluation) for m in facts.trained if m.evaluation]
    if not done:
        return None
    generations = [generation for generation, _ in done]
    return Markup(charts.accuracy(generations, [e.top1 for _, e in done], done[0][1].images))


def _matrices(facts: Facts) -> list[dict[str, Any]]:
    """Confusion of the first teacher and of the best model, or the latest if none is better, as shares of each row."""
    last = next((model for model in reversed(facts.trained) if model.evaluation), None)
    best = facts.best if facts.best is not facts.first else last
    models = [model for model in (facts.first, best) if model]
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


def _pairs(model: Trained | None) -> list[tuple[str, str, int, float]]:
    """The most frequent mistakes: label, prediction, images, share of the label's images."""
    if model is None or model.evaluation is None:
        return []
    classes = model.evaluation.classes
    mistakes = [
        (classes[label], classes[predicted], count, count / sum(row))
        for label, row in enumerate(model.evaluation.confusion)
        for predicted, count in enumerate(row)
        if count and label != predicted
    ]
    return sorted(mistakes, key=lambda mistake: (-mistake[2], mistake[0], mistake[1]))[:PAIRS]


def _class_rows(facts: Facts) -> list[ClassGain]:
    """All classes if a table can show them, else those that changed most; the largest losses first."""
    rows = facts.gains.rows if facts.gains else []
    return rows if len(rows) <= CLASS_ROWS else [*rows[: CLASS_ROWS // 2], *rows[-CLASS_ROWS // 2 :]]


def _robust(facts: Facts) -> list[str]:
    """What was measured of robustness, as the run's notes call it."""
    return list(dict.fromkeys(name for model in facts.trained for name in model.robustness))


def _robustness(facts: Facts, name: str) -> dict[str, Any]:
    """Charts of one measurement, of all models that have it; a chart of what was not measured is None."""
    found = {model.title: model.robustness[name][0] for model in facts.trained if name in model.robustness}
    last = list(found.values())[-1]
    scored = [model.robustness[name][1] for model in facts.trained if name in model.robustness]
    # Of models that were asked the same: a run whose settings were changed under way has others.
    corrupted = {title: one for title, one in found.items() if one.corruptions.keys() == last.corruptions.keys()}
    perturbed = {title: one for title, one in found.items() if one.perturbations.keys() == last.perturbations.keys()}
    fgsm = {
        title: ([(0.0, one.top1)] if one.top1 is not None else [])
        + [(attack.epsilon, attack.top1) for attack in one.attacks if attack.name == "fgsm"]
        for title, one in found.items()
    }
    kinds, sequences = ([kind.replace("_", " ") for kind in one] for one in (last.corruptions, last.perturbations))
    errors = {title: list(one.corruption_error().values()) for title, one in corrupted.items()}
    flips = {title: [p.flip_probability for p in one.perturbations.values()] for title, one in perturbed.items()}
    attacked = any(len(points) > 1 for points in fgsm.values())
    by = {one.mce_relative_to or one.mfr_relative_to for one in scored}
    relative_to = "AlexNet" if "AlexNet" in by else "the first teacher" if "reference" in by else None
    return {
        "title": set_name(name),
        "last": last,
        "relative_to": relative_to,
        "corruptions": Markup(charts.bars(f"{name}-corruptions", "mean error", kinds, errors)) if kinds else None,
        "perturbations": Markup(charts.bars(f"{name}-flips", "flip probability", sequences, flips)) if sequences else None,
        "attacks": Markup(charts.attacks(f"{name}-attacks", fgsm)) if attacked else None,
        "severities": [
            (kind.replace("_", " "), [(title, one.corruptions[kind]) for title, one in corrupted.items()])
            for kind in last.corruptions
        ],
    }


def _reliability(facts: Facts) -> Markup | None:
    found = {
        model.title: model.evaluation.calibration
        for model in facts.trained
        if model.evaluation and model.evaluation.calibration
    }
    return Markup(charts.reliability(found)) if found else None


def _last_diff(facts: Facts) -> dict[str, Any] | None:
    """The latest labels against those of the generation before."""
    diff = next((labels.diff for labels in reversed(facts.labels) if labels.diff), None)
    if diff is None:
        return None
    return {
        "facts": diff,
        "chart": Markup(charts.shift(diff.histogram_before, diff.histogram_after)),
        "by_class": diff.changed_classes(),
        "pairs": diff.frequent(),
    }


def _labels(labels: Labels) -> dict[str, Any]:
    selection, classes = labels.selection, labels.label_set.classes
    name = str(labels.generation)
    rules = selection.rules
    labelled = labels.histogram.sum(1).tolist()
    rows = [
        SelectedClass(
            label, count, count - rule.candidates, rule.candidates - rule.kept, rule.kept, rule.images, rule.threshold
        )
        for label, count, rule in zip(classes, labelled, rules, strict=True)
    ]
    # Of many classes, those of which most is dropped.
    rows = rows if len(rows) <= CLASS_ROWS else sorted(rows, key=lambda row: (row.kept - row.labelled, row.name))[:CLASS_ROWS]
    return {
        "facts": labels,
        "rows": rows,
        "confidence": Markup(charts.confidence(name, labels.histogram.sum(0), selection.policy.min_confidence)),
        "classes": Markup(charts.classes(name, classes, [rule.candidates for rule in rules], [rule.images for rule in rules])),
    }


def _trained(model: Trained) -> dict[str, Any]:
    name = str(model.generation)
    losses = {"loss_labelled": "labelled", "loss_pseudo": "pseudo-labelled"}
    shares = {"accuracy_labelled": "accuracy on labels", "agreement": "agreement with the teacher"}
    if model.generation == 0:
        del losses["loss_pseudo"], shares["agreement"]
    return {
        "title": model.title,
        "loss": Markup(charts.curves(f"{name}-loss", model.history, losses, "loss")),
        "share": Markup(charts.curves(f"{name}-share", model.history, shares, "share of the noised batch")),
    }
