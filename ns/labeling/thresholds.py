"""Thresholds for a wanted precision: how sure the teacher has to be of a class for its labels to be right often enough.

They are found on calibration images, whose classes are known, by fixed-sequence testing (Learn then Test, arXiv:2110.01052 §4): a few
thresholds are tested from high to low, each by an exact binomial test of "the precision above it is less than the wanted one", and the
search ends at the first one that is not rejected. Because it ends there, no correction for many tests is needed. To take the lowest
of all thresholds that pass would need one: where confidence says little, it would miss the precision far more often than its level
says.

Which thresholds are tested depends on the confidences alone, never on which labels are right. The level is that of each class by
itself: of 100 thresholds at confidence 0.95 about five may miss. To split the level over the classes would ask for four times as many
images per class (1,000 classes, precision 0.95), which few have. Classes that the teacher predicts too rarely for any test to
succeed share one threshold, found on their predictions together; the promise is then that of their labels together.

The level is exact if the precision does not rise when the threshold falls, and close to it otherwise. It holds for pools that look
like the calibration images, so not for images of no class at all.
"""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

from ns.storage.documents import JsonDocument

NEVER_SURE = 2.0
"""Threshold of a class for which no confidence suffices."""
FIRST_MISTAKES = 4
"""The first threshold is tested on so many images that this many may be wrong: if fewer may be, one bad image ends the search where
it begins. Classes with few images begin with a quarter of them."""
GROWTH = 1.1
"""Ratio of the numbers of images above one threshold and above the one before."""


class ClassThreshold(JsonDocument):
    threshold: float
    """Confidences above it are taken; NEVER_SURE if none suffices."""
    calibration: int
    """Calibration images above the threshold that the teacher puts in this class, or in one of the pooled classes."""
    correct: int
    """Those of them that are in this class."""
    bound: float
    """Clopper–Pearson lower bound of their precision; 0 if there are none."""
    pooled: bool
    """Whether the class is too rare to have its own threshold."""


class Thresholds(JsonDocument):
    precision: float
    confidence: float
    """Confidence level of each threshold, one-sided."""
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
    min_confidence: float = 0.0,
) -> Thresholds:
    """Finds each class's threshold from predictions on calibration images: [N] class index, confidence in [0, 1], and whether it
    is right. `precision` and `level` lie in (0, 1). No threshold is below `min_confidence`.
    """
    is_candidate = confidence > np.float32(min_confidence)
    predicted, confidence, correct = predicted[is_candidate], confidence[is_candidate], correct[is_candidate]
    rare = np.bincount(predicted, minlength=num_classes) < count_required_images(precision, level)

    def find_class_threshold(mask: npt.NDArray[np.bool_], *, pooled: bool) -> ClassThreshold:
        return _test_from_high_to_low(confidence[mask], correct[mask], precision, level, min_confidence, pooled=pooled)

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


@cache
def count_required_images(precision: float, level: float, mistakes: int = 0) -> int:
    """The least number of images of which `mistakes` may be wrong for the test to succeed."""
    # With fewer images, even if all are right, the bound (1 - level)^(1/n) stays below the precision.
    images = math.ceil(math.log(1 - level) / math.log(precision))
    if mistakes == 0:
        return images
    high = 2 * images
    while _bound_precision(high - mistakes, high, level) < precision:
        high *= 2
    counts = np.arange(images, high + 1)
    passing = clopper_pearson_bound(counts - mistakes, counts, level) >= precision
    return int(counts[passing.argmax()])


def clopper_pearson_bound(
    correct: npt.NDArray[np.integer], total: npt.NDArray[np.integer], level: float
) -> npt.NDArray[np.float64]:
    """One-sided Clopper–Pearson bound of a share (Clopper & Pearson 1934), elementwise; 0 where nothing is correct.

    It is at least `precision` exactly where the binomial test rejects a lower precision at `level`.
    """
    from scipy.stats import beta  # Its import takes as long as all others here together.

    bound = beta.ppf(1 - level, correct, total - correct + 1)
    return np.where(correct == 0, 0.0, bound)


def _bound_precision(correct: int, total: int, level: float) -> float:
    return float(clopper_pearson_bound(np.array([correct]), np.array([total]), level)[0])


def _test_from_high_to_low(
    confidence: npt.NDArray[np.float32],
    correct: npt.NDArray[np.bool_],
    precision: float,
    level: float,
    min_confidence: float,
    *,
    pooled: bool,
) -> ClassThreshold:
    """The last threshold before the first one whose test fails."""
    order = np.argsort(-confidence, kind="stable")
    ranked, right = confidence[order], correct[order].cumsum()
    best = ClassThreshold(threshold=NEVER_SURE, calibration=0, correct=0, bound=0.0, pooled=pooled)
    for images in _iter_test_sizes(ranked, precision, level):
        bound = _bound_precision(int(right[images - 1]), images, level)
        if bound < precision:
            break
        # The next image's confidence: those above it are a sample of all images with more confidence than it has.
        threshold = float(ranked[images]) if images < len(ranked) else min_confidence
        best = ClassThreshold(
            threshold=threshold, calibration=images, correct=int(right[images - 1]), bound=bound, pooled=pooled
        )
    return best


def _iter_test_sizes(ranked: npt.NDArray[np.float32], precision: float, level: float) -> Iterator[int]:
    """Numbers of images, of those with the highest confidences, to test on; equal confidences stay together."""
    count = len(ranked)
    least = count_required_images(precision, level)
    if count < least:
        return
    size = max(least, min(count // 4, count_required_images(precision, level, FIRST_MISTAKES)))
    while True:
        images = int(np.searchsorted(-ranked, -ranked[min(size, count) - 1], "right"))
        yield images
        if images == count:
            return
        size = max(images + 1, math.ceil(GROWTH * images))
