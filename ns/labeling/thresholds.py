"""Thresholds for a wanted precision: how sure the teacher has to be of a class for its labels to be right often enough.

They are found on the held-out images, whose classes are known. Each class gets the lowest threshold above which the
Clopper–Pearson lower bound of the labels' precision reaches the wanted one. Classes that the teacher predicts too rarely for any
bound to reach it share one threshold, found on their predictions together.
"""

import math

import numpy as np
import numpy.typing as npt

from ns.storage.documents import JsonDocument

NEVER_SURE = 2.0
"""Threshold of a class for which no confidence suffices."""


class ClassThreshold(JsonDocument):
    threshold: float
    """Confidences above it are taken; NEVER_SURE if none suffices."""
    heldout: int
    """Held-out images above the threshold that the teacher puts in this class, or in one of the pooled classes."""
    correct: int
    """Those of them that are in this class."""
    bound: float
    """Lower bound of their precision; 0 if there are none."""
    pooled: bool
    """Whether the class is too rare to have its own threshold."""


class Thresholds(JsonDocument):
    precision: float
    confidence: float
    """Confidence level of the bounds, one-sided."""
    evaluation: str
    """Digest of the evaluation that the thresholds were found on."""
    classes: tuple[ClassThreshold, ...]


def find_thresholds(
    predicted: npt.NDArray[np.integer],
    confidence: npt.NDArray[np.float32],
    correct: npt.NDArray[np.bool_],
    num_classes: int,
    *,
    precision: float,
    level: float,
    evaluation: str,
) -> Thresholds:
    """Finds each class's threshold from predictions on held-out images: [N] class index, confidence in [0, 1], and whether it
    is right. `precision` and `level` lie in (0, 1).
    """
    # With fewer, even if all are right, the bound (1 - level)^(1/n) stays below the precision.
    min_heldout = math.ceil(math.log(1 - level) / math.log(precision))
    counts = np.bincount(predicted, minlength=num_classes)
    rare = counts < min_heldout

    def find_class_threshold(mask: npt.NDArray[np.bool_], *, pooled: bool) -> ClassThreshold:
        return _find_lowest_threshold(confidence[mask], correct[mask], precision, level, pooled=pooled)

    pooled_threshold = find_class_threshold(rare[predicted], pooled=True)
    return Thresholds(
        precision=precision,
        confidence=level,
        evaluation=evaluation,
        classes=tuple(
            pooled_threshold if rare[class_id] else find_class_threshold(predicted == class_id, pooled=False)
            for class_id in range(num_classes)
        ),
    )


def clopper_pearson_bound(
    correct: npt.NDArray[np.integer], total: npt.NDArray[np.integer], level: float
) -> npt.NDArray[np.float64]:
    """One-sided Clopper–Pearson bound of a share (Clopper & Pearson 1934), elementwise; 0 where nothing is correct."""
    from scipy.stats import beta  # Its import takes as long as all others here together.

    bound = beta.ppf(1 - level, correct, total - correct + 1)
    return np.where(correct == 0, 0.0, bound)


def _find_lowest_threshold(
    confidence: npt.NDArray[np.float32], correct: npt.NDArray[np.bool_], precision: float, level: float, *, pooled: bool
) -> ClassThreshold:
    """The lowest threshold whose bound reaches the precision."""
    order = np.argsort(-confidence, kind="stable")
    ranked, right = confidence[order], correct[order].cumsum()
    # Only where the confidence changes can a threshold lie.
    ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True)) if len(ranked) else np.zeros(0, np.int64)
    bounds = clopper_pearson_bound(right[ends], ends + 1, level)
    good = np.flatnonzero(bounds >= precision)
    if len(good) == 0:
        return ClassThreshold(threshold=NEVER_SURE, heldout=0, correct=0, bound=0.0, pooled=pooled)
    end = int(ends[good[-1]])
    # Just below the last confidence taken: nothing is known about lower ones.
    threshold = float(np.nextafter(ranked[end], np.float32(0)))
    bound = float(bounds[good[-1]])
    return ClassThreshold(threshold=threshold, heldout=end + 1, correct=int(right[end]), bound=bound, pooled=pooled)
