"""The gate: a student becomes the teacher only if it is measurably better than its teacher on the same held-out images."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ns.config.schema import CORRUPTIONS, GateConfig
from ns.data.dataset import format_class_names
from ns.evaluation.result import Evaluation, Robustness
from ns.evaluation.robustness.scores import relative_score
from ns.storage.documents import JsonDocument

CHANCE_LEVEL = 0.025
"""Level of each of the two tests against chance."""
SHUFFLES = 1_999
"""Random orders of the permutation test."""


class AccuracyGain(JsonDocument):
    """A difference of two accuracies on the same images with a bootstrap interval, as shares."""

    value: float
    low: float
    """One-sided lower bound at the gate's level."""
    high: float
    """One-sided upper bound at the gate's level."""


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


class PairedCounts(JsonDocument):
    """Held-out images by which of the two models is right."""

    both: int
    only_teacher: int
    only_student: int
    neither: int

    @property
    def images(self) -> int:
        return self.both + self.only_teacher + self.only_student + self.neither


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
    teacher: str
    student: str
    """Keys of the two models below the root."""
    images: int
    teacher_top1: float
    student_top1: float
    gain: float
    gain_low: float
    gain_high: float
    """Bounds of the gain, each one-sided at `level`: together an interval at 2·level − 1."""
    level: float
    paired: PairedCounts
    mcnemar: float
    """Two-sided exact p-value of McNemar's test. It is only recorded; the bootstrap decides."""
    conditions: tuple[GateCondition, ...]
    lost_classes: tuple[str, ...] = ()
    """Classes with held-out images that the teacher predicts for some image, and the student for none."""
    promoted: bool
    reason: str


def paired_gain(
    teacher_correct: npt.NDArray[np.bool_],
    student_correct: npt.NDArray[np.bool_],
    *,
    level: float,
    resamples: int,
    seed: int,
) -> AccuracyGain:
    """Paired bootstrap of mean(student) − mean(teacher). Inputs: bool [N], same images in the same order.

    Each image contributes −1, 0 or +1, so resampling N images is one multinomial draw over three outcomes: the exact
    bootstrap distribution at a cost independent of N (Efron & Tibshirani 1993, §6). Raises ValueError for unequal or no inputs.
    """
    if teacher_correct.shape != student_correct.shape or teacher_correct.size == 0:
        raise ValueError(
            f"paired results must be of one non-zero length, got {teacher_correct.shape} and {student_correct.shape}"
        )
    difference = student_correct.astype(np.int8) - teacher_correct.astype(np.int8)
    images = difference.size
    shares = np.array([np.mean(difference == -1), np.mean(difference == 0), np.mean(difference == 1)])
    draws = np.random.default_rng(seed).multinomial(images, shares / shares.sum(), size=resamples)
    gains = (draws[:, 2] - draws[:, 0]) / images
    low, high = np.quantile(gains, [1 - level, level])
    return AccuracyGain(value=float(difference.mean()), low=float(low), high=float(high))


def count_pairs(teacher_correct: npt.NDArray[np.bool_], student_correct: npt.NDArray[np.bool_]) -> PairedCounts:
    """Images by which of the two is right. Inputs: bool [N], same images in the same order."""
    both, either = int((teacher_correct & student_correct).sum()), int((teacher_correct | student_correct).sum())
    return PairedCounts(
        both=both,
        only_teacher=int(teacher_correct.sum()) - both,
        only_student=int(student_correct.sum()) - both,
        neither=teacher_correct.size - either,
    )


def mcnemar_p_value(paired: PairedCounts) -> float:
    """Two-sided exact p-value of McNemar's test (Psychometrika 12, 1947) that, of the images that only one model gets right, each
    model gets half. 1 if there are none."""
    from scipy.special import bdtr

    fewer, discordant = min(paired.only_teacher, paired.only_student), paired.only_teacher + paired.only_student
    return min(1.0, 2 * float(bdtr(fewer, discordant, 0.5)))


def required_gain(verdict: Verdict) -> RequiredGain:
    """What would have passed the condition on the gain, by the normal approximation: the distance between a gain and its lower bound
    falls with the square root of the number of images."""
    min_gain = next(condition.required for condition in verdict.conditions if condition.name == "gain")
    spread, margin = verdict.gain - verdict.gain_low, verdict.gain - min_gain
    images = None if margin <= 0 else math.floor(verdict.images * (spread / margin) ** 2) + 1
    return RequiredGain(gain=min_gain + spread, images=images)


def corruption_rise(teacher: Robustness, student: Robustness) -> float | None:
    """mCE of the student with its teacher as 100, minus 100, in points; without the extra corruptions. None if not measured.

    A teacher without a mistake in a kind counts as if it had made one, to avoid a division by 0.
    """
    kinds = [kind for kind in CORRUPTIONS if kind in teacher.corruptions]
    least = 1 / (teacher.images * len(teacher.severities))
    return _compute_rise(teacher.mean_corruption_errors(), student.mean_corruption_errors(), kinds, least)


def flip_rise(teacher: Robustness, student: Robustness) -> float | None:
    """mFR of the student with its teacher as 100, minus 100, in points. None if not measured.

    A teacher without a flip in a kind counts as if it had flipped once, to avoid a division by 0.
    """
    least = 1 / (teacher.images * max(1, teacher.frames - 1))
    return _compute_rise(teacher.flip_probabilities(), student.flip_probabilities(), list(teacher.perturbations), least)


def _compute_rise(
    teacher: Mapping[str, float], student: Mapping[str, float], kinds: Sequence[str], least: float
) -> float | None:
    value = relative_score(student, {kind: max(teacher[kind], least) for kind in kinds})
    return None if value is None else value - 100


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


def find_worst_class_drop(
    class_ids: npt.NDArray[np.uint16], teacher_correct: npt.NDArray[np.bool_], student_correct: npt.NDArray[np.bool_]
) -> tuple[float, int]:
    """The largest loss of accuracy of a class (negative if every class gained), and its class index. Arrays [N], same order."""
    drops = {
        int(class_id): float(teacher_correct[class_ids == class_id].mean() - student_correct[class_ids == class_id].mean())
        for class_id in np.unique(class_ids)
    }
    worst_class_id = max(drops, key=lambda class_id: drops[class_id])
    return drops[worst_class_id], worst_class_id


def find_lost_classes(teacher: Evaluation, student: Evaluation) -> tuple[str, ...]:
    """Classes with images that the teacher predicts for some image, and the student for none."""
    teacher_never = set(teacher.never_predicted)
    return tuple(name for name in student.never_predicted if name not in teacher_never)


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
    robustness: tuple[Robustness, Robustness] | None = None,
) -> Verdict:
    """Compares a student with its teacher on the same images. Arrays [N], same order.

    `robustness`: the teacher's and the student's on held-out images, needed by gate.max_mce_rise and gate.max_mfr_rise. Raises
    ValueError if one of these is set and its value was not measured. `lost_classes` are reported and decide nothing.
    """
    gain = paired_gain(teacher_correct, student_correct, level=gate.level, resamples=gate.resamples, seed=seed)
    # "above": equal models on few images often have a bound of exactly 0, which shows nothing.
    gain_detail = f"lower {gate.level:.0%} bound of the gain in top-1"
    conditions = [GateCondition.from_value("gain", gain.low, "above", gate.min_gain, gain_detail)]
    if gate.max_class_drop is not None:
        drop, worst_class_id = find_worst_class_drop(class_ids, teacher_correct, student_correct)
        drop_detail = f"largest loss of accuracy in a class ({classes[worst_class_id]})"
        conditions.append(GateCondition.from_value("class drop", drop, "at most", gate.max_class_drop, drop_detail))
    conditions += _check_robustness(gate, robustness)
    conditions += _check_label_quality(gate, label_quality or LabelQuality())
    failed = [condition for condition in conditions if not condition.passed]
    if failed:
        reason = "; ".join(
            f"{condition.detail} is {condition.value:+.3f}, must be {condition.relation} {condition.required:+.3f}"
            for condition in failed
        )
    else:
        reason = f"gain {gain.value:+.3f}, lower bound {gain.low:+.3f} > {gate.min_gain:+.3f}"
    if gate.min_audited_precision is not None and (label_quality is None or label_quality.audited_precision is None):
        reason += f"; the labels are not audited, so gate.min_audited_precision = {gate.min_audited_precision} was not checked"
    if lost_classes:
        classes_word = "class" if len(lost_classes) == 1 else "classes"
        names = format_class_names(lost_classes)
        reason += f"; the student never predicts {len(lost_classes):,} {classes_word} that its teacher predicts: {names}"
    paired = count_pairs(teacher_correct, student_correct)
    return Verdict(
        generation=generation,
        teacher=teacher,
        student=student,
        images=int(class_ids.size),
        teacher_top1=float(teacher_correct.mean()),
        student_top1=float(student_correct.mean()),
        gain=gain.value,
        gain_low=gain.low,
        gain_high=gain.high,
        level=gate.level,
        paired=paired,
        mcnemar=mcnemar_p_value(paired),
        conditions=tuple(conditions),
        lost_classes=lost_classes,
        promoted=not failed,
        reason=reason,
    )


def _check_robustness(gate: GateConfig, robustness: tuple[Robustness, Robustness] | None) -> list[GateCondition]:
    """The conditions on robustness that are set. Raises ValueError if a value was not measured."""
    rises: tuple[tuple[str, float | None, Callable[[Robustness, Robustness], float | None], str], ...] = (
        ("mCE rise", gate.max_mce_rise, corruption_rise, "mean corruption error, in points above the teacher's 100,"),
        ("mFR rise", gate.max_mfr_rise, flip_rise, "mean flip rate, in points above the teacher's 100,"),
    )
    conditions = []
    for name, required, compute_rise, detail in rises:
        if required is None:
            continue
        value = compute_rise(*robustness) if robustness else None
        if value is None:
            raise ValueError(f"{name} must be at most {required}, but was not measured")
        conditions.append(GateCondition.from_value(name, value, "at most", required, detail))
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
