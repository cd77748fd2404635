"""The images of a pool that are most worth a person's label: the teacher is unsure of them, and they are unlike each other.

Candidates are the images with the smallest margins between the two best classes (margin sampling, arXiv:0906.5151 §2), as many for each
class that the teacher gives. Of these, images are taken one by one: each time the one with the largest product of uncertainty and
distance to those taken before (k-center greedy, arXiv:1708.00489), in the features of the teacher, and at most an equal share per class
while there are others.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.loading.shard_reader import ImageSource
from ns.labeling.label_set import LabelSet, iter_top_classes
from ns.labeling.tasks import LabelingTask
from ns.modeling.predictor import Predictor
from ns.storage import Store

CANDIDATES_PER_IMAGE = 10
"""Candidates for each image that is asked for; the features of all of them are computed."""

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Candidates(NamedTuple):
    """Columns [N]."""

    shards: Ints
    rows: Ints
    class_ids: Ints
    """The teacher's classes."""
    confidence: Floats
    uncertainty: Floats
    """1 - (p1 - p2), for the probabilities of the two best classes: 1 if they are equal."""


def choose_next_images(
    label_store: Store, label_set: LabelSet, pool: tuple[Store, Dataset], predictor: Predictor, count: int
) -> list[LabelingTask]:
    """The `count` images most worth a label, the first one first; fewer if the pool has fewer. Raises DataError for one class only,
    in the dataset or per label."""
    if len(label_set.classes) < 2:
        raise DataError(f"{label_store.uri}: has one class; there is nothing to be unsure of")
    if label_set.top_k < 2:
        raise DataError(
            f"{label_store.uri}: keeps one class per image, and margins are between the two best; label the pool with "
            "labeling.top_k: 2 or more"
        )
    candidates = find_unsure_images(label_store, label_set, count * CANDIDATES_PER_IMAGE)
    if not len(candidates.class_ids):
        return []
    features = _extract_features(pool, predictor, candidates)
    taken = take_diverse_images(features, candidates.uncertainty, candidates.class_ids, count)
    return [
        LabelingTask(
            int(candidates.shards[image]),
            int(candidates.rows[image]),
            int(candidates.class_ids[image]),
            float(candidates.confidence[image]),
        )
        for image in taken.tolist()
    ]


def find_unsure_images(label_store: Store, label_set: LabelSet, count: int) -> Candidates:
    """About `count` images with the smallest margins, as many for each class that the teacher gives. Reads shard by shard."""
    per_class = math.ceil(count / len(label_set.classes))
    none, nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    best = Candidates(none, none, none, nothing, nothing)
    for number, top in enumerate(iter_top_classes(label_store, label_set)):
        rows = np.flatnonzero(top.labeled)
        confidence = top.confidence[rows]
        margin = confidence - top.probabilities[rows, 1].astype(np.float32)
        shard = Candidates(np.full(len(rows), number), rows, top.class_ids[rows, 0].astype(np.int64), confidence, 1 - margin)
        columns: list[Any] = [np.concatenate((best[column], shard[column])) for column in range(len(best))]
        merged = Candidates(*columns)
        best = _keep_unsurest(merged, per_class)
    return best


def _keep_unsurest(candidates: Candidates, per_class: int) -> Candidates:
    """The most uncertain candidates of each class; of equal ones the earlier images."""
    order = np.lexsort((candidates.rows, candidates.shards, -candidates.uncertainty, candidates.class_ids))
    sorted_ids = candidates.class_ids[order]
    place_in_class = np.arange(len(order)) - np.searchsorted(sorted_ids, sorted_ids)
    kept = order[place_in_class < per_class]
    return Candidates._make(column[kept] for column in candidates)


def take_diverse_images(features: Floats, uncertainty: Floats, class_ids: Ints, count: int) -> Ints:
    """Indices of up to `count` images, in the order they are taken. `features`: float32 [N, D] of length 1; the others are [N]."""
    classes, class_numbers = np.unique(class_ids, return_inverse=True)
    share = math.ceil(count / len(classes))
    taken_per_class = np.zeros(len(classes), np.int64)
    distance = np.full(len(features), 2, np.float32)
    open_images = np.ones(len(features), np.bool_)
    taken: list[int] = []
    while len(taken) < min(count, len(features)):
        within_share = open_images & (taken_per_class[class_numbers] < share)
        allowed = within_share if within_share.any() else open_images
        image = int(np.argmax(np.where(allowed, uncertainty * distance, -1)))
        taken.append(image)
        open_images[image] = False
        taken_per_class[class_numbers[image]] += 1
        distance = np.minimum(distance, np.linalg.norm(features - features[image], axis=1))
    return np.array(taken, np.int64)


def _extract_features(pool: tuple[Store, Dataset], predictor: Predictor, candidates: Candidates) -> Floats:
    """float32 [N, D] of length 1."""
    source = ImageSource(*pool, max_open_shards=2)
    order = np.lexsort((candidates.rows, candidates.shards))
    features = []
    for start in range(0, len(order), predictor.batch):
        part = order[start : start + predictor.batch]
        locations = zip(candidates.shards[part].tolist(), candidates.rows[part].tolist(), strict=True)
        features.append(
            predictor.extract_features([next(source.read_encoded(shard, row, row + 1)) for shard, row in locations])
        )
    ordered = np.concatenate(features)
    result = np.empty_like(ordered)
    result[order] = ordered / np.maximum(np.linalg.norm(ordered, axis=1, keepdims=True), 1e-12)
    return result
