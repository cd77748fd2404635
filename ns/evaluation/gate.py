"""The gate: a student becomes the teacher only on evidence, from the same held-out images that the teacher was judged on."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ns.config.schema import CORRUPTIONS, GateConfig
from ns.evaluation.result import Robustness
from ns.evaluation.robustness.averages import relative_score
from ns.storage.documents import JsonDocument


class AccuracyGain(JsonDocument):
    """A difference of two accuracies on the same images, with a bootstrap interval."""

    value: float
    low: float
    """One-sided lower bound at the gate's level."""
    high: float
    """One-sided upper bound at the gate's level."""


class GateCondition(JsonDocument):
    """One condition of promotion."""

    name: str
    value: float
    limit: float
    passed: bool
    detail: str


class LabelQuality(NamedTuple):
    """What is known of the labels that the student learnt from."""

    churn: float | None = None
    """Share of labels that differ from those of the generation before; None in the first."""
    shrinkage: float | None = None
    """Largest share of its images that a class lost since the generation before."""
    shrunk_class: str | None = None
    """That class."""
    audited_precision: tuple[float, float, int] | None = None
    """Share of right labels and its lower bound, and the images that people looked at; None if nobody did."""


class PairedCounts(JsonDocument):
    """Held-out images by who is right."""

    both: int
    only_teacher: int
    only_student: int
    neither: int

    @property
    def images(self) -> int:
        return self.both + self.only_teacher + self.only_student + self.neither


class RequiredGain(JsonDocument):
    """What the bound on the gain asks for beyond what was seen."""

    gain: float
    """The gain that would have had to be seen on these images, about: the limit, and what luck may explain here."""
    images: int | None
    """Held-out images, about, on which a gain as large as the one seen would be enough; None if the gain itself is not above the
    limit, so that no number of images would help."""


class Verdict(JsonDocument):
    filename: ClassVar[str] = "verdict.json"

    format: Literal[1] = 1
    generation: int
    teacher: str
    student: str
    """Keys of the models below the root."""
    images: int
    teacher_top1: float
    student_top1: float
    gain: float
    gain_low: float
    gain_high: float
    """Bounds of the gain, each one-sided at `level`: together an interval at 2·level − 1."""
    level: float
    paired: PairedCounts | None = None
    """None in verdicts from before it was recorded, as the next."""
    mcnemar: float | None = None
    """Two-sided exact p that the two are equally often right where only one of them is. Recorded; the bootstrap decides."""
    conditions: tuple[GateCondition, ...]
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
    bootstrap distribution at no cost in N (Efron & Tibshirani 1993, §6).
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
    """Inputs: bool [N], same images in the same order."""
    both, either = int((teacher_correct & student_correct).sum()), int((teacher_correct | student_correct).sum())
    return PairedCounts(
        both=both,
        only_teacher=int(teacher_correct.sum()) - both,
        only_student=int(student_correct.sum()) - both,
        neither=teacher_correct.size - either,
    )


def mcnemar_p_value(paired: PairedCounts) -> float:
    """Two-sided exact p of McNemar's test (Psychometrika 12, 1947): of images that only one got right, each is as likely right in either.
    1 if there are none."""
    from scipy.special import bdtr

    fewer, discordant = min(paired.only_teacher, paired.only_student), paired.only_teacher + paired.only_student
    return min(1.0, 2 * float(bdtr(fewer, discordant, 0.5)))


def required_gain(verdict: Verdict) -> RequiredGain:
    """What the bound on the gain would have needed to be above its limit: by the normal approximation the gain is as far above its bound
    as here, and that distance falls with the root of the images."""
    min_gain = next(condition.limit for condition in verdict.conditions if condition.name == "gain")
    spread, margin = verdict.gain - verdict.gain_low, verdict.gain - min_gain
    images = None if margin <= 0 else math.floor(verdict.images * (spread / margin) ** 2) + 1
    return RequiredGain(gain=min_gain + spread, images=images)


def corruption_rise(teacher: Robustness, student: Robustness) -> float | None:
    """mCE of the student relative to its teacher, who has 100, less 100: points; the extra kinds left out. None if not measured.

    A kind in which the teacher made no mistake counts as if it had made one: nothing can be divided by 0.
    """
    kinds = [kind for kind in CORRUPTIONS if kind in teacher.corruptions]
    least = 1 / (teacher.images * len(teacher.severities))
    return _compute_rise(teacher.mean_corruption_errors(), student.mean_corruption_errors(), kinds, least)


def flip_rise(teacher: Robustness, student: Robustness) -> float | None:
    """mFR of the student relative to its teacher, who has 100, less 100: points. None if not measured. A kind in which the
    teacher's answers never flipped counts as if one had."""
    kinds = list(teacher.perturbations)
    least = 1 / (teacher.images * max(1, teacher.frames - 1))
    before, after = (
        {kind: perturbed.flip_probability for kind, perturbed in robustness.perturbations.items()}
        for robustness in (teacher, student)
    )
    return _compute_rise(before, after, kinds, least)


def _compute_rise(
    teacher: Mapping[str, float], student: Mapping[str, float], kinds: Sequence[str], least: float
) -> float | None:
    value = relative_score(student, {kind: max(teacher[kind], least) for kind in kinds})
    return None if value is None else value - 100


def beats_chance(top1: float, images: int, num_classes: int) -> bool:
    """Whether an accuracy is above 1 / classes by more than luck explains: one-sided 95 % of the normal approximation."""
    chance = 1 / num_classes
    return top1 > chance + 1.645 * math.sqrt(chance * (1 - chance) / images)


def find_worst_class_drop(
    class_ids: npt.NDArray[np.uint16], teacher_correct: npt.NDArray[np.bool_], student_correct: npt.NDArray[np.bool_]
) -> tuple[float, int]:
    """The largest loss of accuracy of any class (negative if every class gained), and the class."""
    drops = {
        int(class_id): float(teacher_correct[class_ids == class_id].mean() - student_correct[class_ids == class_id].mean())
        for class_id in np.unique(class_ids)
    }
    worst_class_id = max(drops, key=lambda class_id: drops[class_id])
    return drops[worst_class_id], worst_class_id


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
    label_quality: LabelQuality | None = None,
    robustness: tuple[Robustness, Robustness] | None = None,
) -> Verdict:
    """Compares a student with its teacher on the same images. Arrays [N], same order. `about`: the student's pseudo-labels.
    `robustness`: the teacher's and the student's on held-out images, wherever the gate has a limit on it."""
    gain = paired_gain(teacher_correct, student_correct, level=gate.level, resamples=gate.resamples, seed=seed)
    conditions = [
        GateCondition(
            name="gain",
            value=gain.low,
            limit=gate.min_gain,
            # At equality nothing is shown: equal models on few images often have a bound of exactly 0.
            passed=gain.low > gate.min_gain,
            detail=f"lower {gate.level:.0%} bound of the gain in top-1",
        )
    ]
    if gate.max_class_drop is not None:
        drop, worst_class_id = find_worst_class_drop(class_ids, teacher_correct, student_correct)
        conditions.append(
            GateCondition(
                name="class drop",
                value=drop,
                limit=gate.max_class_drop,
                passed=drop <= gate.max_class_drop,
                detail=f"largest loss of accuracy in a class ({classes[worst_class_id]})",
            )
        )
    conditions += _check_robustness(gate, robustness)
    conditions += _check_label_quality(gate, label_quality or LabelQuality())
    failed = [condition for condition in conditions if not condition.passed]
    if failed:
        reason = "; ".join(
            f"{condition.detail} is {condition.value:+.3f}, limit {condition.limit:+.3f}" for condition in failed
        )
    else:
        reason = f"gain {gain.value:+.3f}, lower bound {gain.low:+.3f} > {gate.min_gain:+.3f}"
    if gate.min_audited_precision is not None and (label_quality is None or label_quality.audited_precision is None):
        reason += (
            f"; the labels are not audited, so gate.min_audited_precision = {gate.min_audited_precision} was not asked for"
        )
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
        promoted=not failed,
        reason=reason,
    )


def _check_robustness(gate: GateConfig, robustness: tuple[Robustness, Robustness] | None) -> list[GateCondition]:
    """A guard for each limit that is set. Raises ValueError if what it needs was not measured."""
    limits: tuple[tuple[str, float | None, Callable[[Robustness, Robustness], float | None], str], ...] = (
        ("mCE rise", gate.max_mce_rise, corruption_rise, "mean corruption error, in points above the teacher's 100,"),
        ("mFR rise", gate.max_mfr_rise, flip_rise, "mean flip rate, in points above the teacher's 100,"),
    )
    conditions = []
    for name, limit, measure, detail in limits:
        if limit is None:
            continue
        value = measure(*robustness) if robustness else None
        if value is None:
            raise ValueError(f"{name} is limited to {limit}, but was not measured")
        conditions.append(GateCondition(name=name, value=value, limit=limit, passed=value <= limit, detail=detail))
    return conditions


def _check_label_quality(gate: GateConfig, label_quality: LabelQuality) -> list[GateCondition]:
    """A guard for each limit that is set, as far as there is something to hold against it."""
    conditions = []
    if gate.max_churn is not None and label_quality.churn is not None:
        conditions.append(
            GateCondition(
                name="churn",
                value=label_quality.churn,
                limit=gate.max_churn,
                passed=label_quality.churn <= gate.max_churn,
                detail="share of labels that changed since the generation before",
            )
        )
    if gate.max_class_shrinkage is not None and label_quality.shrinkage is not None:
        conditions.append(
            GateCondition(
                name="class shrinkage",
                value=label_quality.shrinkage,
                limit=gate.max_class_shrinkage,
                passed=label_quality.shrinkage <= gate.max_class_shrinkage,
                detail=f"largest share of its kept images that a class lost ({label_quality.shrunk_class})",
            )
        )
    if gate.min_audited_precision is not None and label_quality.audited_precision is not None:
        precision, low, images = label_quality.audited_precision
        conditions.append(
            GateCondition(
                name="audited precision",
                value=low,
                limit=gate.min_audited_precision,
                passed=low >= gate.min_audited_precision,
                detail=f"lower 95% bound of the labels that are right ({precision:.1%} of {images:,} audited)",
            )
        )
    return conditions
