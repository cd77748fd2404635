"""Alignment: probabilities divided by a power of the label set's mean prediction, so that no class is favored (arXiv:2201.01490 §4).

A teacher's mistakes favor some classes, and a student that learns from them favors these even more. DebiasPL subtracts λ log q̂ from
the logits, where q̂ is the mean prediction over the pool; for probabilities this is p_c / q̂_c^λ, renormalized.

Of a label set only the best classes of each image are known. The rest of the mass counts as spread evenly over the other classes,
before the alignment and after it.
"""

import copy
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ns.labeling.label_set import LabelRows, TopClasses

LEAST_SHARE = 0.01
"""Least mean prediction of a class, as a share of the even one: a class that the teacher never predicts would be raised without
bound, and its noise with it."""


def compute_alignment(shards: Iterable[TopClasses], num_classes: int, strength: float) -> tuple[float, ...]:
    """Factor q_c^-λ of each class, with `strength` = λ; their geometric mean is 1. Goes through the shards once."""
    mass, images = np.zeros(num_classes), 0
    for shard in shards:
        class_ids, probabilities = shard.class_ids[shard.labeled], _join_probabilities(shard)[shard.labeled]
        tail = _spread_tail(probabilities, num_classes)
        # The tail goes to all classes, and is taken from the best ones again.
        mass += np.bincount(class_ids.ravel(), (probabilities - tail[:, None]).ravel(), num_classes) + tail.sum()
        images += len(class_ids)
    mean = np.maximum(mass / max(1, images), LEAST_SHARE / num_classes)
    logs = -strength * np.log(mean)
    return tuple(np.exp(logs - logs.mean()).tolist())


def align_classes(shard: TopClasses, factors: tuple[float, ...]) -> TopClasses:
    """The best classes of each image after the alignment, best first, with probabilities in float32.

    Each image's result depends on that image alone, so that a selection finds the same numbers again.
    """
    weights = np.array(factors)
    class_weights = weights[shard.class_ids]
    probabilities = _join_probabilities(shard)
    scaled = probabilities * class_weights
    tail = _spread_tail(probabilities, len(weights))
    total = scaled.sum(1) + tail * np.maximum(0, weights.sum() - class_weights.sum(1))
    scaled /= np.maximum(total, np.finfo(np.float64).tiny)[:, None]
    order = np.argsort(-scaled, axis=1, kind="stable")
    aligned = np.take_along_axis(scaled, order, axis=1).astype(np.float32)
    return TopClasses(shard.labeled, np.take_along_axis(shard.class_ids, order, axis=1), aligned, aligned[:, 0])


def align_rows(rows: LabelRows, factors: tuple[float, ...] | None) -> LabelRows:
    """The rows after the alignment; the same rows without factors."""
    if factors is None:
        return rows
    aligned = align_classes(rows.top_classes, factors)
    aligned_rows = copy.copy(rows)
    aligned_rows.top_class, aligned_rows.top_prob = aligned.class_ids, aligned.probabilities
    aligned_rows.confidence = np.where(aligned.labeled, aligned.confidence, np.float32(np.nan))
    return aligned_rows


def _join_probabilities(shard: TopClasses) -> npt.NDArray[np.float64]:
    """[N, k], with the first one exact: in float16 the surest images would be equal."""
    probabilities: npt.NDArray[np.float64] = shard.probabilities.astype(np.float64)
    probabilities[:, 0] = shard.confidence
    return probabilities


def _spread_tail(probabilities: npt.NDArray[np.float64], num_classes: int) -> npt.NDArray[np.float64]:
    """[N]: probability of each class that is not among the best ones."""
    k = probabilities.shape[1]
    if k >= num_classes:
        return np.zeros(len(probabilities))
    rest: npt.NDArray[np.float64] = np.clip(1 - probabilities.sum(1), 0, 1)
    tail: npt.NDArray[np.float64] = rest / (num_classes - k)
    return tail
