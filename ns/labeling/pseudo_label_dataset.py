"""A selection as training data: soft labels and copies for each image of the pool, read shard by shard."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.loading.shard_reader import ImageSource
from ns.data.loading.stream import PseudoLabeledImages
from ns.labeling.alignment import align_rows
from ns.labeling.label_set import LabelRows, LabelSet, iter_label_rows, read_label_rows
from ns.labeling.selection import CopyReader, Selection
from ns.storage import Store


class TopKTargets:
    """The targets of a shard's kept rows: the kept classes of a label, and the rest of its probability spread evenly over the others.

    As compact as the label set: dense targets of all rows would be 40 MB with 1,000 classes. A target sums to the image's weight: its
    confidence divided by `mean_confidence`, or 1 without it.
    """

    def __init__(
        self, rows: LabelRows, kept_rows: npt.NDArray[np.int64], num_classes: int, mean_confidence: float | None = None
    ) -> None:
        self._kept_rows = kept_rows
        self._num_classes = num_classes
        self._top_class = rows.top_class[kept_rows]
        self._top_prob = rows.top_prob[kept_rows]
        total = self._top_prob.sum(1, dtype=np.float32)
        others = num_classes - self._top_prob.shape[1]
        rest = np.clip(1 - total, 0, 1) / others if others else np.zeros_like(total)
        weights = 1 if mean_confidence is None else rows.confidence[kept_rows] / np.float32(mean_confidence)
        # Rounded probabilities do not quite sum to 1.
        self._scale = weights / (total + rest * others)
        self._rest = rest * self._scale

    def __getitem__(self, row: int) -> npt.NDArray[np.float32]:
        """float32 [classes] of a kept row."""
        at = self._kept_rows.searchsorted(row)
        target = np.full(self._num_classes, self._rest[at], np.float32)
        target[self._top_class[at]] = self._top_prob[at] * self._scale[at]
        return target


def load_pseudo_labels(
    label_store: Store, label_set: LabelSet, selection: Selection, pool_store: Store, pool: Dataset
) -> PseudoLabeledImages:
    """The images of `pool` that `selection` kept, with the soft labels of `label_set` as targets: each row sums to the
    image's weight in the loss, 1 unless the policy weights images by confidence.

    Raises DataError if the labels were made from another pool. Reading the targets of a shard raises what `read_label_rows`
    raises, and DataError if its keys are not those of the pool.
    """
    if label_set.dataset != pool.digest:
        raise DataError(
            f"{label_store.uri}: labels of dataset {label_set.dataset}, but the pool is {pool.digest}: label the pool again"
        )
    copy_reader = CopyReader(label_store, selection)
    repeats = [
        _shrink_dtype(copy_reader.count_shard_copies(shard, rows))
        for shard, rows in enumerate(iter_label_rows(label_store, label_set))
    ]
    source = ImageSource(pool_store, pool)

    @lru_cache(maxsize=source.window_shards)
    def read_targets(index: int) -> TopKTargets:
        shard = label_set.shards[index]
        rows = read_label_rows(label_store, shard)
        # Not `.keys`, which would keep 10,000 strings for as long as the shard is open.
        if rows.keys != source.read_index(index).table["key"].to_pylist():
            raise DataError(
                f"{label_store.uri}/{shard.name}: its keys are not those of the pool's shard {index}: label the pool again"
            )
        rows = align_rows(rows, selection.alignment)
        return TopKTargets(rows, np.flatnonzero(repeats[index]), len(label_set.classes), selection.mean_confidence)

    return PseudoLabeledImages(source, read_targets, repeats)


def _shrink_dtype(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
    """The counts in as few bytes per row as they need: one, unless images are repeated more than 255 times."""
    return counts.astype(np.min_scalar_type(int(counts.max(initial=0))))
