"""Facts → HTML."""

from typing import Any

import yaml
from markupsafe import Markup

from ns.report import charts
from ns.report.environment import environment
from ns.report.facts import Facts, Labels, Trained

MATRIX_CLASSES = 30
"""With more classes the confused pairs are listed instead of the matrix."""
PAIRS = 10
CLASS_ROWS = 100


def render(facts: Facts) -> str:
    """The whole page."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            facts=facts,
            summary=facts.summary,
            headline=_headline(facts),
            rows={row.generation: row for row in facts.summary.generations},
            rounds=_rounds(facts),
            accuracy=_accuracy(facts),
            matrices=_matrices(facts),
            pairs=_pairs(facts.best),
            class_rows=_class_rows(facts),
            labels=[_labels(labels) for labels in facts.labels],
            trained=[_trained(model) for model in facts.trained],
            seconds=sum(note.seconds for note in facts.steps),
            config=yaml.safe_dump(facts.experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        )
    )


def _headline(facts: Facts) -> str:
    """`87.4 % → 92.6 % → 93.2 %`: the accepted models."""
    values = [] if facts.summary.teacher_top1 is None else [facts.summary.teacher_top1]
    values += [row.student_top1 for row in facts.summary.generations if row.verdict == "promoted"]
    return " → ".join(f"{100 * value:.1f} %" for value in values)


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
                "teacher": _top1(models.get(labels.generation - 1)),
                "student": _top1(student),
                "arch": student.card.model.arch if student else "",
                "verdict": verdicts.get(labels.generation),
            }
        )
    return rounds


def _top1(model: Trained | None) -> float | None:
    return model.evaluation.top1 if model and model.evaluation else None


def _accuracy(facts: Facts) -> Markup | None:
    done = [(m.generation, m.evaluation) for m in facts.trained if m.evaluation]
    if not done:
        return None
    generations = [generation for generation, _ in done]
    return Markup(charts.accuracy(generations, [e.top1 for _, e in done], done[0][1].images))


def _matrices(facts: Facts) -> list[dict[str, Any]]:
    """Confusion of the first teacher and of the best model, as shares of each row."""
    models = [model for model in (facts.first, facts.best) if model]
    if len(models) == 2 and models[0].generation == models[1].generation:
        models = models[:1]
    matrices = []
    for model in models:
        evaluation = model.evaluation
        if evaluation is None or len(evaluation.classes) > MATRIX_CLASSES:
            continue
        matrices.append(
            {
                "title": "First teacher" if model.generation == 0 else f"Student {model.generation}, the best model",
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


def _class_rows(facts: Facts) -> list[tuple[str, float, float | None, float]]:
    """Class, accuracy of the first teacher, of the best model, and the gain; the largest losses first."""
    first, best = facts.first, facts.best
    if not first or not best or not first.evaluation or not best.evaluation or first.generation == best.generation:
        return []
    rows = [
        (name, old, new, (new or 0) - (old or 0))
        for name, old, new in zip(
            best.evaluation.classes, first.evaluation.class_accuracy, best.evaluation.class_accuracy, strict=True
        )
        if old is not None
    ]
    return sorted(rows, key=lambda row: (row[3], row[0]))[:CLASS_ROWS]


def _labels(labels: Labels) -> dict[str, Any]:
    selection, classes = labels.selection, labels.label_set.classes
    name = str(labels.generation)
    rules = selection.rules
    return {
        "facts": labels,
        "confidence": Markup(charts.confidence(name, labels.histogram, selection.policy.min_confidence)),
        "classes": Markup(charts.classes(name, classes, [rule.candidates for rule in rules], [rule.images for rule in rules])),
    }


def _trained(model: Trained) -> dict[str, Any]:
    name = str(model.generation)
    losses = {"loss_labelled": "labelled", "loss_pseudo": "pseudo-labelled"}
    shares = {"accuracy_labelled": "accuracy on labels", "agreement": "agreement with the teacher"}
    if model.generation == 0:
        del losses["loss_pseudo"], shares["agreement"]
    return {
        "title": "First teacher" if model.generation == 0 else f"Student {model.generation}",
        "loss": Markup(charts.curves(f"{name}-loss", model.history, losses, "loss")),
        "share": Markup(charts.curves(f"{name}-share", model.history, shares, "share of the noised batch")),
    }
