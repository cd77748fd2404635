"""The gate: a student becomes the teacher only if it is measurably better than its teacher on the same held-out images."""

import math
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ns.config.schema import CORRUPTIONS, GateConfig
from ns.data.dataset import format_class_names
from ns.evaluation.paired import (
    AccuracyGain,
    PairedCounts,
    bound_rise,
    count_by_class,
    count_pairs,
    find_class_drop,
    gain_p_value,
    mcnemar_p_value,
    paired_gain,
    relative_rise,
)
from ns.evaluation.result import Evaluation, ImageMistakes
from ns.storage.documents import BlobKey, JsonDocument

CHANCE_LEVEL = 0.025
"""Level of each of the two tests against chance."""
SHUFFLES = 1_999
"""Random orders of the permutation test."""
FEW_IMAGES = 100
"""Held-out images below which a verdict carries a warning."""
MANY_TRIES = 10
"""Tries on the same held-out images from which a verdict carries a warning."""


Relation = Literal["above", "at least", "at most"]


class GateCondition(JsonDocument):
    """One condition of promotion: `value` must be `relation` `required`."""

    name: str
    value: float
    relation: Relation
    required: float
    passed: bool
    detail: str
    """What the value is."""

    @classmethod
    def from_value(cls, name: str, value: float, relation: Relation, required: float, detail: str) -> "GateCondition":
        passed = {"above": value > required, "at least": value >= required, "at most": value <= required}[relation]
        return cls(name=name, value=value, relation=relation, required=required, passed=passed, detail=detail)

    def format_value(self) -> str:
        """The value with its unit: `+1.25 points`."""
        return self._format_in_units(self.value)

    def format_requirement(self) -> str:
        """The requirement with its unit: `at most +2.00 points`."""
        return f"{self.relation} {self._format_in_units(self.required)}"

    def _format_in_units(self, value: float) -> str:
        if self.name in ("mCE rise", "mFR rise"):
            return f"{value:+.2f} points"
        if self.name in ("gain", "class drop"):
            return f"{100 * value:+.2f} points"
        if self.name == "exact test":
            return f"p = {value:.3g}"
        return f"{100 * value:.1f} %"


class LabelQuality(NamedTuple):
    """Measurements of the pseudo-labels that the student learned from; None for what was not measured."""

    churn: float | None = None
    """Share of labels that differ from those of the generation before; None in the first generation."""
    shrinkage: float | None = None
    """Largest share of its images that a class lost since the generation before."""
    shrunk_class: str | None = None
    """Name of that class."""
    audited_precision: tuple[float, float, int] | None = None
    """Share of correct labels, its lower bound, and the number of audited images; None without an audit."""
    class_coverage: float | None = None
    """Share of the classes that the selection represents."""


class RequiredGain(JsonDocument):
    """What would have passed the condition on the gain, approximately."""

    gain: float
    """The gain that is enough on these images: the required one plus what chance may explain."""
    images: int | None
    """The number of held-out images on which the measured gain is enough; None if the gain itself is not above the required one,
    so that no number of images would help."""


class Verdict(JsonDocument):
    filename: ClassVar[str] = "verdict.json"

    format: Literal[1] = 1
    generation: int
    teacher: BlobKey
    student: BlobKey
    """Keys of the two models below the root."""
    heldout: str
    """Digest of the images that decide: of their bytes, whatever their names, order and classes."""
    images: int
    """Held-out images that decide; those with equal bytes count as one."""
    copies: int
    """Further held-out images with the bytes of one of them."""
    try_number: int
    """Which try on these images it is, from 1: each pair of a teacher and a student is one, however often it is judged."""
    family_error: float
    """Upper bound of the probability that any of these tries accepted a student without the required gain."""
    teacher_top1: float
    student_top1: float
    gain: float
    gain_low: float
    gain_high: float
    """Bounds of the gain, each one-sided at `level`: together an interval at 2·level − 1."""
    level: float
    paired: PairedCounts
    mcnemar: float
    """Two-sided exact p-value of McNemar's test. It is only recorded."""
    conditions: tuple[GateCondition, ...]
    lost_classes: tuple[str, ...] = ()
    """Classes with held-out images that the teacher predicts for some image, and the student for none."""
    promoted: bool
    reason: str
    warnings: tuple[str, ...] = ()
    """What makes the verdict say less than it seems to."""


def required_gain(verdict: Verdict) -> RequiredGain:
    """What would have passed the condition on the gain, by the normal approximation: the distance between a gain and its lower bound
    falls with the square root of the number of images."""
    min_gain = next(condition.required for condition in verdict.conditions if condition.name == "gain")
    spread, margin = verdict.gain - verdict.gain_low, verdict.gain - min_gain
    images = None if margin <= 0 else math.floor(verdict.images * (spread / margin) ** 2) + 1
    return RequiredGain(gain=min_gain + spread, images=images)


def beats_chance(class_ids: npt.NDArray[np.uint16], predicted: npt.NDArray[np.uint16], *, seed: int) -> bool:
    """Whether answers surely depend on the images. Arrays [N], same order, N > 0.

    They do if top-1 is above the share of the largest class (exact binomial test), or if balanced accuracy is above what the same answers
    have in random order (permutation test; it is 1 / classes for a fixed answer). Each test is one-sided at 2.5 %, so answers that do not
    depend on the images pass in at most 5 % of cases. A model that always gives the same answer never passes.
    """
    from scipy.special import bdtrc

    if np.all(predicted == predicted[0]):
        return False
    images = np.bincount(class_ids)
    correct = int((class_ids == predicted).sum())
    if bdtrc(correct - 1, class_ids.size, images.max() / class_ids.size) <= CHANCE_LEVEL:
        return True
    weights = 1 / images[class_ids]
    score = weights[class_ids == predicted].sum()
    rng = np.random.default_rng(seed)
    shuffled = [weights[class_ids == rng.permutation(predicted)].sum() for _ in range(SHUFFLES)]
    # The tolerance counts equal sums in different order as equal.
    at_least = 1 + int((np.array(shuffled) >= score - 1e-9).sum())
    return at_least / (1 + SHUFFLES) <= CHANCE_LEVEL


def find_lost_classes(teacher: Evaluation, student: Evaluation) -> tuple[str, ...]:
    """Classes with images that the teacher predicts for some image, and the student for none."""
    teacher_never = set(teacher.never_predicted)
    return tuple(name for name in student.never_predicted if name not in teacher_never)


def spend_level(gate: GateConfig, try_number: int) -> float:
    """One-sided level at which the `try_number`-th try (1, 2, …) on the same held-out images is tested.

    With `gate.spend` at bonferroni, the k-th try may err with probability (1 − level) / (k · (k + 1)). These sum to 1 − level over any
    number of tries, so that is the probability that any of them errs (Alpha-Spending: Tian and Ramdas, Statistical Methods in Medical
    Research 30, 2021).
    """
    return 1 - (1 - gate.level) / (try_number * (try_number + 1)) if gate.spend == "bonferroni" else gate.level


def bound_family_error(gate: GateConfig, tries: int) -> float:
    """Upper bound of the probability that any of so many tries on the same held-out images accepted a student without the required
    gain."""
    return 1 - gate.level if gate.spend == "bonferroni" else min(1.0, tries * (1 - gate.level))


def evaluate_gate(
    gate: GateConfig,
    *,
    generation: int,
    teacher: str,
    student: str,
    class_ids: npt.NDArray[np.uint16],
    teacher_correct: npt.NDArray[np.bool_],
    student_correct: npt.NDArray[np.bool_],
    classes: tuple[str, ...],
    seed: int,
    lost_classes: tuple[str, ...] = (),
    label_quality: LabelQuality | None = None,
    mistakes: tuple[ImageMistakes, ImageMistakes] | None = None,
    heldout: str = "",
    copies: int = 0,
    try_number: int = 1,
) -> Verdict:
    """Compares a student with its teacher on the same images. Arrays [N], same order; no image may be there twice.

    `mistakes`: the teacher's and the student's on corrupted held-out images, needed by gate.max_mce_rise and gate.max_mfr_rise. Raises
    ValueError if one of these is set and its value was not measured. `lost_classes` are reported and decide nothing. `heldout`,
    `copies` and `try_number` are the verdict's.
    """
    label_quality = label_quality or LabelQuality()
    level = spend_level(gate, try_number)
    paired = count_pairs(teacher_correct, student_correct)
    gain = paired_gain(teacher_correct, student_correct, level=level, resamples=gate.resamples, seed=seed)
    conditions = _check_gain(gate, gain, paired, level)
    if gate.max_class_drop is not None:
        counts = count_by_class(class_ids, teacher_correct, student_correct)
        drop = find_class_drop(*counts, limit=gate.max_class_drop, level=gate.level)
        drop_detail = (
            f"lower {gate.level:.0%} bound, for all classes together, of the loss of accuracy in a class "
            f"({classes[drop.class_id]}: measured {drop.value:+.3f} on {drop.images:,} images)"
        )
        conditions.append(GateCondition.from_value("class drop", drop.low, "at most", gate.max_class_drop, drop_detail))
    conditions += _check_robustness(gate, mistakes, seed)
    conditions += _check_label_quality(gate, label_quality)
    failed = [condition for condition in conditions if not condition.passed]
    if failed:
        reason = "; ".join(
            f"{condition.detail} is {condition.format_value()}, must be {condition.format_requirement()}"
            for condition in failed
        )
    else:
        reason = f"gain {gain.value:+.3f}, lower bound {gain.low:+.3f} > {gate.min_gain:+.3f}"
    if gate.min_audited_precision is not None and label_quality.audited_precision is None:
        reason += f"; the labels are not audited, so gate.min_audited_precision = {gate.min_audited_precision} was not checked"
    if lost_classes:
        classes_word = "class" if len(lost_classes) == 1 else "classes"
        names = format_class_names(lost_classes)
        reason += f"; the student never predicts {len(lost_classes):,} {classes_word} that its teacher predicts: {names}"
    return Verdict(
        generation=generation,
        teacher=teacher,
        student=student,
        heldout=heldout,
        images=paired.images,
        copies=copies,
        try_number=try_number,
        family_error=bound_family_error(gate, try_number),
        teacher_top1=float(teacher_correct.mean()),
        student_top1=float(student_correct.mean()),
        gain=gain.value,
        gain_low=gain.low,
        gain_high=gain.high,
        level=level,
        paired=paired,
        mcnemar=mcnemar_p_value(paired),
        conditions=tuple(conditions),
        lost_classes=lost_classes,
        promoted=not failed,
        reason=reason,
        warnings=(
            *_find_warnings(gate, paired.images, copies, try_number),
            *(_find_unchecked_limits(gate, label_quality) if generation > 1 else ()),
        ),
    )


def _check_gain(gate: GateConfig, gain: AccuracyGain, paired: PairedCounts, level: float) -> list[GateCondition]:
    """The gain by bootstrap, and by an exact test: the bootstrap says little of few discordant images, and far out."""
    # "above": equal models on few images often have a bound of exactly 0, which shows nothing.
    gain_detail = f"lower {100 * level:.5g}% bound of the gain in top-1"
    exact_detail = (
        f"exact p-value of a gain of at most {100 * gate.min_gain:g} points "
        f"({paired.discordant:,} images that only one model gets right)"
    )
    p_value = gain_p_value(paired, gate.min_gain)
    return [
        GateCondition.from_value("gain", gain.low, "above", gate.min_gain, gain_detail),
        GateCondition.from_value("exact test", p_value, "at most", 1 - level, exact_detail),
    ]


def _check_robustness(gate: GateConfig, mistakes: tuple[ImageMistakes, ImageMistakes] | None, seed: int) -> list[GateCondition]:
    """The conditions on robustness that are set. Raises ValueError if a value was not measured."""
    teacher, student = mistakes or (ImageMistakes([], {}, {}, {}), ImageMistakes([], {}, {}, {}))
    # The extra corruptions count for no mCE.
    corruption_kinds = [kind for kind in CORRUPTIONS if kind in teacher.corruptions]
    rises = (
        ("mCE rise", gate.max_mce_rise, "corruption error", corruption_kinds, teacher.corruptions, student.corruptions),
        ("mFR rise", gate.max_mfr_rise, "flip rate", [*teacher.perturbations], teacher.perturbations, student.perturbations),
    )
    conditions = []
    for name, required, quantity, kinds, teacher_counts, student_counts in rises:
        if required is None:
            continue
        if not kinds:
            raise ValueError(f"{name} must be at most {required}, but was not measured")
        before, after = (np.stack([counts[kind] for kind in kinds], 1) for counts in (teacher_counts, student_counts))
        value = float(relative_rise(before.sum(0, dtype=np.int64), after.sum(0, dtype=np.int64)))
        low = bound_rise(before, after, level=gate.level, resamples=gate.resamples, seed=seed)
        detail = (
            f"lower {gate.level:.0%} bound of the mean {quantity}, in points above the teacher's 100 "
            f"(measured {value:+.2f} on {len(before):,} images)"
        )
        conditions.append(GateCondition.from_value(name, low, "at most", required, detail))
    return conditions


def _check_label_quality(gate: GateConfig, label_quality: LabelQuality) -> list[GateCondition]:
    """The conditions on pseudo-labels that are set and whose value was measured."""
    conditions = []
    if gate.max_churn is not None and label_quality.churn is not None:
        detail = "share of labels that changed since the generation before"
        conditions.append(GateCondition.from_value("churn", label_quality.churn, "at most", gate.max_churn, detail))
    if gate.max_class_shrinkage is not None and label_quality.shrinkage is not None:
        detail = f"largest share of its kept images that a class lost ({label_quality.shrunk_class})"
        conditions.append(
            GateCondition.from_value("class shrinkage", label_quality.shrinkage, "at most", gate.max_class_shrinkage, detail)
        )
    if gate.min_audited_precision is not None and label_quality.audited_precision is not None:
        precision, low, images = label_quality.audited_precision
        detail = f"lower 95% bound of the labels that are right ({precision:.1%} of {images:,} audited)"
        conditions.append(GateCondition.from_value("audited precision", low, "at least", gate.min_audited_precision, detail))
    if gate.required_class_coverage is not None and label_quality.class_coverage is not None:
        detail = "share of the classes with their share of pseudo-labels"
        coverage = label_quality.class_coverage
        conditions.append(
            GateCondition.from_value("class coverage", coverage, "at least", gate.required_class_coverage, detail)
        )
    return conditions


def _find_warnings(gate: GateConfig, images: int, copies: int, try_number: int) -> Iterator[str]:
    """What makes a verdict say less than it seems to."""
    if copies:
        yield f"{copies:,} held-out images are byte for byte the same as others; each picture counts once"
    if images < FEW_IMAGES:
        yield (
            f"{images:,} held-out images decide; with fewer than {FEW_IMAGES} only very large gains can be seen, so hold out more"
        )
    if gate.spend == "none" and try_number >= MANY_TRIES:
        yield (
            f"this is try {try_number:,} on the same held-out images; the probability that any of them accepted a student without the "
            f"required gain may be up to {bound_family_error(gate, try_number):.0%}; hold out new images, or set gate.spend to bonferroni"
        )


def _find_unchecked_limits(gate: GateConfig, label_quality: LabelQuality) -> Iterator[str]:
    """Limits on what changed since the generation before, where that is not known: as in a recurring run whose pool grows."""
    limits = (("max_churn", label_quality.churn), ("max_class_shrinkage", label_quality.shrinkage))
    for field, value in limits:
        if value is None and (limit := getattr(gate, field)) is not None:
            yield (
                f"gate.{field} = {limit} was not checked: the labels that the teacher learned from are of another pool, or are not "
                "in this root"
            )
