"""What to do next, by rule, from what a run measured: one sentence and one command each."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from ns.config.loader import has_preset
from ns.config.schema import MAX_GENERATIONS
from ns.data.dataset import format_class_names
from ns.evaluation.power import find_seen_change
from ns.reporting.context import ReportContext

MAX_ADVICE = 5
WEAK_TEACHER = 0.5
"""Below this accuracy most pseudo-labels are wrong, and no setting helps as much as labels."""
CLASS_LEVEL = 0.05
"""Probability that any class of a model that is equally good at all is called weak."""
COARSE_POINTS = 2.0
"""A gain below this many points is usual (arXiv:1911.04252, Table 2: 0.5 to 2.0); held-out images that cannot show it decide by luck."""
FEW_KEPT, MOST_KEPT = 0.2, 0.98
FOREIGN_SHARE = 0.2
LARGE_ECE = 0.1
UNDERFIT = 0.25
"""How far a student's accuracy on the noised images that it learns from may stay below that on plain ones. The noise alone makes up a
part of it."""


class Advice(NamedTuple):
    """A step that a person can take."""

    text: str
    """Why, one sentence without a period."""
    command: str
    """A command line of `ns`, where NAME.yaml is the experiment's file, unless it is one that `ns` brings along."""


def list_advice(context: ReportContext) -> list[Advice]:
    """At most MAX_ADVICE steps, the most important first. Empty before a model is evaluated."""
    if context.first_model is None:
        return []
    return [advice for rule in RULES for advice in rule(context)][:MAX_ADVICE]


def _advise_labels_first(context: ReportContext) -> Iterator[Advice]:
    evaluation = context.best_model and context.best_model.evaluation
    if evaluation and evaluation.top1 < WEAK_TEACHER:
        yield Advice(
            f"the best model is right on {evaluation.top1:.1%} of the held-out images: more labeled images help more than any setting",
            f"ns labels next {_name_generation(context, 1)} --count 200 --out to-label",
        )


def _advise_weak_classes(context: ReportContext) -> Iterator[Advice]:
    evaluation = context.best_model and context.best_model.evaluation
    if not evaluation or evaluation.top1 < WEAK_TEACHER:
        return
    correct, images = np.array(evaluation.class_correct), np.array(evaluation.class_images)
    weak = sorted(
        (correct[class_id] / images[class_id], evaluation.classes[class_id])
        for class_id in find_weak_classes(correct, images, evaluation.top1)
    )
    if weak:
        share, worst = min(weak)
        others = (
            f" of {len(weak):,} weak classes ({format_class_names([name for _, name in sorted(weak)])})"
            if len(weak) > 1
            else ""
        )
        yield Advice(
            f"{format_class_names([worst])} is right on {share:.1%} of its held-out images, the least{others}: label more of them",
            f"ns labels next {_name_generation(context)} --count 200 --out to-label",
        )


def find_weak_classes(correct: npt.NDArray[np.int64], images: npt.NDArray[np.int64], top1: float) -> npt.NDArray[np.int64]:
    """Indices of the classes with fewer right answers than CLASS_LEVEL allows by chance, for all classes together.

    `correct`, `images`: int64 [classes]. Exact binomial test against the accuracy of all images, with Bonferroni's correction.
    """
    present = images > 0
    by_chance = stats.binom.cdf(correct, images, top1)
    return np.flatnonzero(present & (by_chance < CLASS_LEVEL / max(1, present.sum())))


def _advise_more_heldout(context: ReportContext) -> Iterator[Advice]:
    evaluation = context.first_model and context.first_model.evaluation
    if not evaluation:
        return
    classes = sum(images > 0 for images in evaluation.class_images)
    points = find_seen_change(context.experiment.gate, "min_gain", evaluation.images, classes)
    if points is None or points > COARSE_POINTS:
        shown = "no gain" if points is None else f"a gain of {points:.1f} points or more"
        yield Advice(
            f"{evaluation.images:,} held-out images show {shown}, and gains are mostly below {COARSE_POINTS:g}: hold out more",
            f"ns config check {_name_experiment(context)} --heldout {4 * evaluation.images} --classes {max(2, classes)}",
        )


def _advise_selection(context: ReportContext) -> Iterator[Advice]:
    if not context.labelings:
        return
    labeling = context.labelings[-1]
    selection, rows = labeling.selection, labeling.label_set.rows
    name = _name_generation(context, labeling.generation)
    threshold = selection.policy.min_confidence
    if rows and selection.foreign > FOREIGN_SHARE * rows:
        yield Advice(
            f"{selection.foreign:,} of {rows:,} images of the pool are unlike the labeled ones: look at them, and clean the pool",
            f"ns labels show {name}",
        )
    empty = [labeling.label_set.classes[class_id] for class_id in selection.empty_classes]
    if empty:
        yield Advice(
            f"no image of the pool is taken for {len(empty):,} of {len(selection.rules):,} classes ({format_class_names(empty)}): "
            "they are not there, or the teacher does not know them",
            f"ns labels select {name} --set policy=adaptive --dry-run",
        )
    if rows and selection.kept < FEW_KEPT * rows:
        yield Advice(
            f"the student sees {selection.kept / rows:.1%} of the pool: the threshold of {threshold:g} may be too high, or the pool unlike "
            "the labels",
            f"ns labels select {name} --set min_confidence={threshold / 2:g} --dry-run",
        )
    elif rows and selection.low_confidence < (1 - MOST_KEPT) * rows and context.first_model and context.first_model.evaluation:
        ece = context.first_model.evaluation.calibration.ece
        if ece > LARGE_ECE:
            yield Advice(
                f"the threshold leaves nearly nothing out, and the teacher's confidence is {100 * ece:.0f} points off its accuracy",
                f"ns run {_name_experiment(context)} --set labeling.temperature=fitted",
            )


def _advise_training(context: ReportContext) -> Iterator[Advice]:
    student = context.models[-1]
    role = context.experiment.get_student(max(1, student.generation))
    # Labels of blended images are shares of two classes, and an accuracy says little.
    if not student.generation or not student.history or not student.evaluation or role.noise.mixes_images:
        return
    learned = student.history[-1].get("accuracy_labeled")
    if learned is not None and learned < student.evaluation.top1 - UNDERFIT:
        field = f"students.{min(student.generation, len(context.experiment.students)) - 1}.train.epochs"
        yield Advice(
            f"{student.title.lower()} is right on {learned:.1%} of the noised images that it learns from, and on "
            f"{student.evaluation.top1:.1%} of plain ones: train it longer, or with less noise",
            f"ns run {_name_experiment(context)} --set {field}={2 * role.train.epochs:g}",
        )


def _advise_loop(context: ReportContext) -> Iterator[Advice]:
    if context.generation is not None or not context.verdicts:
        return
    verdict, experiment = context.verdicts[-1], context.experiment
    if not verdict.promoted:
        yield Advice(
            f"student {verdict.generation} was refused: see by how much, and why", f"ns gate explain {context.summary.run}"
        )
    if context.best_model and context.best_model.generation:
        yield Advice(
            f"{context.best_model.title.lower()} is the best model that the gate accepted: put it to use",
            f"ns promote {context.summary.run} --to models/{experiment.name}.yaml",
        )
    if verdict.promoted and verdict.gain > 0 and verdict.generation == experiment.generations < MAX_GENERATIONS:
        yield Advice(
            f"the last student was still better than its teacher, by {100 * verdict.gain:.1f} points: another generation may be too",
            f"ns run {_name_experiment(context)} --set generations={experiment.generations + 1}",
        )


def _name_experiment(context: ReportContext) -> str:
    """What `ns run` takes: the name of an experiment that is part of the package, or the file that the user calls so."""
    name = context.experiment.name
    return name if has_preset(name) else f"{name}.yaml"


def _name_generation(context: ReportContext, generation: int | None = None) -> str:
    if generation is None:
        generation = context.labelings[-1].generation if context.labelings else 1
    return f"{context.summary.run}/gen-{generation}"


RULES: tuple[Callable[[ReportContext], Iterator[Advice]], ...] = (
    _advise_labels_first,
    _advise_weak_classes,
    _advise_selection,
    _advise_training,
    _advise_more_heldout,
    _advise_loop,
)
"""In the order of importance: data before settings before more work."""
