"""Comparisons of two models on the same images: the gain in accuracy, the loss of a class, the rise of a mean corruption error."""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ns.storage.documents import JsonDocument

Floats = npt.NDArray[np.float64]

NUISANCE_POINTS = 100
"""Values that the exact test tries for the share of images that only one model gets right."""
NUISANCE_SPREADS = 8
"""Standard deviations around their mean within which the exact test counts outcomes; less than 1e-14 lies outside."""
MAX_RESAMPLES = 1_000_000
"""Bootstrap resamples at most, however far out the bound is."""
RESAMPLES_BEYOND = 50
"""Bootstrap resamples beyond a bound, at least."""
BLOCK_DRAWS = 1 << 22
"""Images that are drawn at a time."""


class AccuracyGain(JsonDocument):
    """A difference of two accuracies on the same images with a bootstrap interval, as shares."""

    value: float
    low: float
    """One-sided lower bound at the gate's level."""
    high: float
    """One-sided upper bound at the gate's level."""


class PairedCounts(JsonDocument):
    """Held-out images by which of the two models is right."""

    both: int
    only_teacher: int
    only_student: int
    neither: int

    @property
    def images(self) -> int:
        return self.both + self.only_teacher + self.only_student + self.neither

    @property
    def discordant(self) -> int:
        """Images that only one of the models gets right."""
        return self.only_teacher + self.only_student


class ClassDrop(NamedTuple):
    """The class whose loss of accuracy is the surest to be too large."""

    class_id: int
    images: int
    value: float
    """Its loss of accuracy as measured, a share; negative for a gain."""
    low: float
    """Lower bound of the loss, one-sided, at the level that all classes share."""


def count_pairs(teacher_correct: npt.NDArray[np.bool_], student_correct: npt.NDArray[np.bool_]) -> PairedCounts:
    """Images by which of the two is right. Inputs: bool [N], same images in the same order."""
    both, either = int((teacher_correct & student_correct).sum()), int((teacher_correct | student_correct).sum())
    return PairedCounts(
        both=both,
        only_teacher=int(teacher_correct.sum()) - both,
        only_student=int(student_correct.sum()) - both,
        neither=teacher_correct.size - either,
    )


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
    bootstrap distribution at a cost independent of N (Efron & Tibshirani 1993, §6). There are more than `resamples` of them if a bound
    lies so far out that few would be beyond it. Raises ValueError for unequal or no inputs.
    """
    if teacher_correct.shape != student_correct.shape or teacher_correct.size == 0:
        raise ValueError(
            f"paired results must be of one non-zero length, got {teacher_correct.shape} and {student_correct.shape}"
        )
    difference = student_correct.astype(np.int8) - teacher_correct.astype(np.int8)
    images = difference.size
    shares = np.array([np.mean(difference == -1), np.mean(difference == 0), np.mean(difference == 1)])
    resamples = max(resamples, min(MAX_RESAMPLES, math.ceil(RESAMPLES_BEYOND / (1 - level))))
    draws = np.random.default_rng(seed).multinomial(images, shares / shares.sum(), size=resamples)
    gains = (draws[:, 2] - draws[:, 0]) / images
    low, high = np.quantile(gains, [1 - level, level])
    return AccuracyGain(value=float(difference.mean()), low=float(low), high=float(high))


def mcnemar_p_value(paired: PairedCounts) -> float:
    """Two-sided exact p-value of McNemar's test (Psychometrika 12, 1947) that, of the images that only one model gets right, each
    model gets half. 1 if there are none."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(paired.only_teacher, paired.only_student), paired.discordant, 0.5)))


def gain_p_value(paired: PairedCounts, min_gain: float) -> float:
    """Exact one-sided p-value of the hypothesis that the student's gain in accuracy is at most `min_gain`.

    That the gain is above 0 is asked of McNemar's test, which counts discordant images alone, and above any other value of
    `exact_p_value`; above a value over 0 of both.
    """
    from scipy.special import bdtr

    sign_p = float(bdtr(paired.only_teacher, paired.discordant, 0.5)) if min_gain >= 0 else 0.0
    if min_gain == 0:
        return sign_p
    return max(sign_p, exact_p_value(paired.only_student, paired.only_teacher, paired.images, min_gain))


@cache
def exact_p_value(more: int, less: int, images: int, margin: float) -> float:
    """P-value of the hypothesis that the share of `more` outcomes is at most `margin` above that of `less` ones, of this many images.

    Exact and unconditional: the largest probability, over all shares that the hypothesis allows, of outcomes whose score statistic
    (Tango, Statistics in Medicine 17, 1998) is as large as this one's (Hsueh, Liu and Chen, Biometrics 57, 2001). 0 for a margin of −1,
    which is always exceeded or reached.
    """
    from scipy.special import bdtrc, gammaln, xlog1py, xlogy

    if margin <= -1:
        return 0.0
    counts = np.arange(images + 1.0)
    # A little less, so that rounding does not exclude the outcome itself.
    fewest = _count_fewest_more(counts, images, margin, float(_score(np.array(more), np.array(less), images, margin)) - 1e-9)
    least, most = max(0.0, -margin), (1 - margin) / 2
    # Close to both ends, where few images are discordant, or few are not, a difference of one image counts.
    half_steps = np.geomspace(min(0.1 / images, 0.1), 0.5, NUISANCE_POINTS // 2)
    steps = np.concatenate([[0.0], half_steps, 1 - half_steps, [1.0]])
    less_shares = least + steps[:, None] * (most - least)
    width = min(images + 1, math.ceil(NUISANCE_SPREADS * math.sqrt(images)) + 20)
    start = np.clip(np.round(images * less_shares) - width // 2, 0, images + 1 - width).astype(np.int64)
    less_counts = start + np.arange(width)
    others, needed = images - less_counts, fewest[less_counts]
    log_probability = (
        gammaln(images + 1.0) - gammaln(less_counts + 1.0) - gammaln(others + 1.0)
        + xlogy(less_counts, less_shares) + xlog1py(others, -less_shares)
    )  # fmt: skip
    more_share = np.minimum(1, (less_shares + margin) / np.maximum(1 - less_shares, 1e-300))
    tail = bdtrc(np.clip(needed - 1, 0, others), others, np.broadcast_to(more_share, others.shape))
    tail = np.where(needed <= 0, 1.0, np.where(needed > others, 0.0, tail))
    return min(1.0, float((np.exp(log_probability) * tail).sum(1).max()))


def exact_lower_bound(more: int, less: int, images: int, level: float, *, between: tuple[float, float] | None = None) -> float:
    """One-sided lower bound of the difference between the shares of `more` and `less` outcomes: the largest margin that
    `exact_p_value` rejects at 1 − `level`, to 0.0001. `between`: a margin that it is known to reject, and one that it does not."""
    from scipy.optimize import brentq

    def compare_p_value(margin: float) -> float:
        return math.log(max(exact_p_value(more, less, images, margin), 1e-300) / (1 - level))

    low, high = between or (-1.0, (more - less) / images)
    return low if compare_p_value(high) <= 0 else float(brentq(compare_p_value, low, high, xtol=1e-4))


def _score(
    more: npt.NDArray[np.number], less: npt.NDArray[np.number], images: int | npt.NDArray[np.integer], margin: float
) -> Floats:
    """Tango's score statistic of each pair of counts; 0 where they differ by exactly the margin."""
    linear = (2 * images - more + less) * margin - more - less
    constant = -less * margin * (1 - margin)
    less_share = (np.sqrt(np.maximum(linear**2 - 8 * images * constant, 0)) - linear) / (4 * images)
    variance = images * (2 * less_share + margin * (1 - margin))
    distance = more - less - images * margin
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(distance) < 1e-9, 0.0, distance / np.sqrt(np.maximum(variance, 0)))


def _count_fewest_more(less: Floats, images: int, margin: float, score: float) -> Floats:
    """The fewest `more` outcomes beside each count of `less` ones whose statistic reaches `score`; images − less + 1 if none does."""
    low, high = np.zeros_like(less), images - less + 1
    while (low < high).any():
        middle = np.floor((low + high) / 2)
        reached = (middle <= images - less) & (_score(np.minimum(middle, images - less), less, images, margin) >= score)
        low, high = np.where(reached, low, np.minimum(middle + 1, high)), np.where(reached, middle, high)
    return low


def count_by_class(
    class_ids: npt.NDArray[np.integer], teacher_correct: npt.NDArray[np.bool_], student_correct: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Images that only the teacher gets right, that only the student gets right, and all, each int64 [classes]. Inputs: [N], same order."""
    images = np.bincount(class_ids)
    lost, won = (
        np.bincount(class_ids[mask], minlength=len(images))
        for mask in (teacher_correct & ~student_correct, student_correct & ~teacher_correct)
    )
    return lost, won, images


def find_class_drop(
    lost: npt.NDArray[np.int64],
    won: npt.NDArray[np.int64],
    images: npt.NDArray[np.int64],
    *,
    limit: float,
    level: float,
) -> ClassDrop:
    """The class that is the surest to lose more than `limit` of its accuracy. Inputs: what `count_by_class` returns; N > 0.

    The lower bound of its loss is exact, at a level that is divided over the classes (Bonferroni): if no class loses more than the
    limit, the bound of any class is above it in at most 1 − `level` of cases.
    """
    present = np.flatnonzero(images)
    drops = (lost - won)[present] / images[present]
    class_level = 1 - (1 - level) / len(present)
    score = _score(lost[present], won[present], images[present], limit)
    worst, worst_p = int(present[drops.argmax()]), 1.0
    # Of classes with as many images, the largest statistic has the least p-value.
    for class_images in np.unique(images[present]).tolist():
        rows = np.flatnonzero(images[present] == class_images)
        row = rows[score[rows].argmax()]
        class_id = int(present[row])
        # A loss that is measured below the limit is never surely above it.
        if (
            drops[row] > limit
            and (p_value := exact_p_value(int(lost[class_id]), int(won[class_id]), class_images, limit)) < worst_p
        ):
            worst, worst_p = class_id, p_value
    counts = int(lost[worst]), int(won[worst]), int(images[worst])
    value = (counts[0] - counts[1]) / counts[2]
    between = (limit, value) if worst_p <= 1 - class_level else (-1.0, min(limit, value))
    return ClassDrop(worst, counts[2], value, exact_lower_bound(*counts, class_level, between=between))


def relative_rise(teacher: npt.NDArray[np.number], student: npt.NDArray[np.number]) -> Floats:
    """Mean over kinds of the student's mistakes ÷ its teacher's, in points above 100: mCE or mFR with the teacher as 100, minus 100.

    Both: mistakes by kind, [..., K]. Returns [...]. A teacher without a mistake in a kind counts as if it had made one, to avoid a
    division by 0.
    """
    rise: Floats = 100 * (student / np.maximum(teacher, 1)).mean(-1) - 100
    return rise


def bound_rise(
    teacher: npt.NDArray[np.integer], student: npt.NDArray[np.integer], *, level: float, resamples: int, seed: int
) -> float:
    """One-sided lower bound of `relative_rise`, from mistakes by image and kind, integers [N, K]: paired bootstrap over images. Of a single
    image nothing is sure: -inf.

    Bias-corrected and accelerated (BCa; Efron, JASA 82, 1987): a ratio to few mistakes is too large on average, and skewed.
    """
    from scipy.special import ndtr, ndtri

    if len(teacher) < 2:
        return -math.inf
    mistakes = np.concatenate([teacher, student], 1).astype(np.float32)
    kinds = teacher.shape[1]

    def compute_rise(sums: npt.NDArray[np.number]) -> Floats:
        return relative_rise(sums[..., :kinds], sums[..., kinds:])

    sums = mistakes.sum(0, dtype=np.float64)
    value = compute_rise(sums)
    rises = np.concatenate([compute_rise(drawn) for drawn in _iter_resampled_sums(mistakes, resamples, seed)])
    bias = ndtri(np.clip(((rises < value).mean() + (rises <= value).mean()) / 2, 1 / resamples, 1 - 1 / resamples))
    # What each image contributes to the rise, to first order.
    teacher_sums = np.maximum(sums[:kinds], 1)
    influence = ((student - sums[kinds:] / teacher_sums * teacher) / teacher_sums).mean(1)
    spread = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6 * spread**1.5) if spread else 0.0
    shifted = bias + ndtri(1 - level)
    return float(np.quantile(rises, ndtr(bias + shifted / (1 - acceleration * shifted))))


def _iter_resampled_sums(values: npt.NDArray[np.float32], resamples: int, seed: int) -> Iterator[Floats]:
    """Sums over N rows drawn with replacement, [n, K] at a time. `values`: [N, K]."""
    rng, images = np.random.default_rng(seed), len(values)
    block_size = max(1, BLOCK_DRAWS // images)
    for start in range(0, resamples, block_size):
        block = min(block_size, resamples - start)
        drawn = rng.integers(0, images, (block, images)) + np.arange(block)[:, None] * images
        times = np.bincount(drawn.ravel(), minlength=block * images).reshape(block, images)
        yield (times.astype(np.float32) @ values).astype(np.float64)
