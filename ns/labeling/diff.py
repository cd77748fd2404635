"""Diff: what changed between two label sets of one dataset. It counts all rows, one pair of shards at a time."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError
from ns.labeling.confidence_bins import CONFIDENCE_BIN_EDGES, CONFIDENCE_BINS, bin_confidences
from ns.labeling.label_set import HISTOGRAM_BINS, LabelRows, LabelSet, compute_histogram, read_label_rows
from ns.labeling.selection import CopyReader, Selection
from ns.labeling.top_k import TopRows
from ns.storage import Store
from ns.storage.documents import JsonDocument

SHOWN_BINS = 20
SHOWN_PAIRS = 10
SHOWN_CLASSES = 100
"""Rows of tables."""
KEPT_FLIPS = 200
"""Flips that a diff lists one by one."""


class DiffSide(NamedTuple):
    """A label set, and its selection if that is known."""

    store: Store
    label_set: LabelSet
    selection: Selection | None = None


class ChurnBin(JsonDocument):
    """Images by their confidence in the earlier label set."""

    low: float
    high: float
    """The bin excludes `high`, but the last one includes confidence 1."""
    images: int
    changed: int
    churn: float
    """changed ÷ images; 0 if there are no images."""


class ClassChange(JsonDocument):
    """One class in both label sets."""

    name: str
    before: int
    after: int
    """Labeled images."""
    lost: int
    gained: int
    """Images that moved to another class, and that came from one."""
    kept_before: int | None
    kept_after: int | None
    """Distinct images that the selections keep; None if the selections are not known."""
    confidence_before: float | None
    confidence_after: float | None
    """Mean confidence of the class's images; None if it has none."""
    shift: float | None
    """Mean change of confidence of the images that were in this class before, in whatever class they are now."""


class FlipCount(JsonDocument):
    """A cell of the flip matrix that is not 0."""

    old_class_id: int
    new_class_id: int
    images: int


class LabelFlip(JsonDocument):
    """One image that changed its class."""

    key: str
    shard: int
    row: int
    old_class_id: int
    new_class_id: int
    old_confidence: float
    new_confidence: float

    @property
    def min_confidence(self) -> float:
        """The lower of the two confidences: flips with a high one are the most informative."""
        return min(self.old_confidence, self.new_confidence)


class LabelDiff(JsonDocument):
    format: Literal[1] = 1
    dataset: str
    before: str
    after: str
    """Digests of the dataset and of the label sets."""
    classes: tuple[str, ...]
    images: int
    """Rows of the dataset."""
    compared: int
    """Images with a label in both."""
    only_before: int
    only_after: int
    """Images with a label in only one of them: unreadable or left out in the other."""
    changed: int
    churn: float
    """changed ÷ compared; 0 if no images were compared."""
    confidence_shift: float
    """Mean change of confidence over the compared images."""
    stayed: int | None
    entered: int | None
    left: int | None
    """Images that both selections keep, only the later one, only the earlier one; None if the selections are not known."""
    shrinkage: float
    """Largest share of its images that a class lost: of its kept images if both selections are known, else of its labeled ones.
    Below 0 if every class grew."""
    shrunk_class: str | None
    """The class that shrank most; None if no class had images before."""
    churn_bins: tuple[ChurnBin, ...]
    histogram_before: tuple[int, ...]
    histogram_after: tuple[int, ...]
    """Images by confidence, 20 equal bins from 0 to 1."""
    by_class: tuple[ClassChange, ...]
    matrix: tuple[FlipCount, ...]
    """Flips, ordered by old class, then new class; pairs of classes without flips are left out."""
    flips: tuple[LabelFlip, ...]
    """The surest flips, by `LabelFlip.min_confidence`; of equal ones the earlier image first."""

    def list_frequent_flips(self) -> list[tuple[str, str, int]]:
        """The ten most frequent flips: class before, class after, images."""
        cells = sorted(self.matrix, key=lambda cell: (-cell.images, cell.old_class_id, cell.new_class_id))[:SHOWN_PAIRS]
        return [(self.classes[cell.old_class_id], self.classes[cell.new_class_id], cell.images) for cell in cells]

    def list_changed_classes(self) -> list[ClassChange]:
        """All classes if a table can show them, else the hundred with most flips."""
        if len(self.by_class) <= SHOWN_CLASSES:
            return list(self.by_class)
        return sorted(self.by_class, key=lambda row: (-row.lost - row.gained, row.name))[:SHOWN_CLASSES]


def compare_label_sets(before: DiffSide, after: DiffSide, *, flips: int = KEPT_FLIPS) -> LabelDiff:
    """Counts what changed, shard by shard. `flips`: at most so many are listed one by one.

    Raises DataError if the two do not label the same images with the same classes.
    """
    _check_comparable(before, after)
    counts = _DiffCounter(len(after.label_set.classes), flips)
    # Once: a reader of images that another label set chose reads its manifest, which names all shards.
    copy_readers = [CopyReader(side.store, side.selection) for side in (before, after) if side.selection]
    for shard in range(len(after.label_set.shards)):
        _count_shard_pair(counts, shard, before, after, copy_readers)
    return counts.build_diff(before, after)


def _check_comparable(before: DiffSide, after: DiffSide) -> None:
    old, new = before.label_set, after.label_set
    if old.dataset != new.dataset:
        raise DataError(
            f"{before.store.uri} labels the dataset {old.dataset[:16]}, {after.store.uri} labels {new.dataset[:16]}: "
            "only labels of the same images can be compared; label one of the datasets with both teachers"
        )
    if old.classes != new.classes:
        differ = next((a, b) for a, b in zip((*old.classes, None), (*new.classes, None), strict=False) if a != b)
        raise DataError(
            f"{before.store.uri} and {after.store.uri} have different classes, first {differ[0]!r} and {differ[1]!r}: "
            "only labels of the same classes in the same order can be compared"
        )
    if [shard.source for shard in old.shards] != [shard.source for shard in new.shards]:
        raise DataError(f"{before.store.uri} and {after.store.uri}: their shards of one dataset differ; label the pool again")


def _count_shard_pair(
    counts: "_DiffCounter", shard: int, before: DiffSide, after: DiffSide, copy_readers: Sequence[CopyReader]
) -> None:
    # A function of its own frees this pair before the next one is read.
    old, new = (read_label_rows(side.store, side.label_set.shards[shard]) for side in (before, after))
    if old.keys != new.keys:
        uris = (f"{side.store.uri}/{side.label_set.shards[shard].name}" for side in (before, after))
        raise DataError(f"{' and '.join(uris)}: their keys differ; label the pool again")
    counts.add_rows(shard, old, new)
    if len(copy_readers) == 2:
        was_kept, is_kept = (
            reader.count_shard_copies(shard, rows) > 0 for reader, rows in zip(copy_readers, (old, new), strict=True)
        )
        counts.add_kept(old, new, was_kept, is_kept)


class _DiffCounter:
    """Counts so far. Index 0 is before, 1 after."""

    def __init__(self, num_classes: int, kept_flips: int) -> None:
        self.num_classes = num_classes
        self.images = self.compared = self.only_before = self.only_after = 0
        self.labeled = np.zeros((2, num_classes), np.int64)
        self.kept = np.zeros((2, num_classes), np.int64)
        self.kept_by = np.zeros((2, 2), np.int64)
        """Images kept before (row) and after (column)."""
        self.confidence = np.zeros((2, num_classes))
        self.shift = np.zeros(num_classes)
        self.compared_before = np.zeros(num_classes, np.int64)
        """Compared images by class before."""
        self.histogram = np.zeros((2, SHOWN_BINS), np.int64)
        self.bin_images = np.zeros(CONFIDENCE_BINS, np.int64)
        self.bin_changed = np.zeros(CONFIDENCE_BINS, np.int64)
        self.flipped = np.zeros((2, num_classes), np.int64)
        """Flips by the class before, and by the class after."""
        self.matrix: Counter[tuple[int, int]] = Counter()
        self.top_flips: TopRows[LabelFlip] = TopRows(kept_flips)

    def add_rows(self, shard: int, old: LabelRows, new: LabelRows) -> None:
        self.images += len(old.keys)
        self.only_before += int((old.readable & ~new.readable).sum())
        self.only_after += int((new.readable & ~old.readable).sum())
        for side, rows in enumerate((old, new)):
            class_ids, confidence = rows.top_class[rows.readable, 0], rows.confidence[rows.readable]
            self.labeled[side] += np.bincount(class_ids, minlength=self.num_classes)
            self.confidence[side] += np.bincount(class_ids, confidence, self.num_classes)
            # The bins of the label set's own histogram, fifty at a time.
            fine_counts = compute_histogram(np.zeros_like(class_ids), confidence, 1)[0]
            self.histogram[side] += fine_counts.reshape(SHOWN_BINS, HISTOGRAM_BINS // SHOWN_BINS).sum(1).astype(np.int64)
        common_rows = np.flatnonzero(old.readable & new.readable)
        old_class_ids, new_class_ids = (rows.top_class[common_rows, 0].astype(np.int64) for rows in (old, new))
        old_confidence, new_confidence = old.confidence[common_rows], new.confidence[common_rows]
        changed = old_class_ids != new_class_ids
        self.compared += len(common_rows)
        self.compared_before += np.bincount(old_class_ids, minlength=self.num_classes)
        self.shift += np.bincount(old_class_ids, new_confidence.astype(np.float64) - old_confidence, self.num_classes)
        bins = bin_confidences(old_confidence)
        self.bin_images += np.bincount(bins, minlength=CONFIDENCE_BINS)
        self.bin_changed += np.bincount(bins[changed], minlength=CONFIDENCE_BINS)
        self.flipped += [np.bincount(side[changed], minlength=self.num_classes) for side in (old_class_ids, new_class_ids)]
        pairs, images = np.unique(old_class_ids[changed] * self.num_classes + new_class_ids[changed], return_counts=True)
        for pair, count in zip(pairs.tolist(), images.tolist(), strict=True):
            self.matrix[divmod(pair, self.num_classes)] += count
        score = np.where(changed, np.minimum(old_confidence, new_confidence), -1)
        # No shard needs to give more than the whole list holds.
        for index in np.argsort(-score, kind="stable")[: min(self.top_flips.size, int(changed.sum()))].tolist():
            row = int(common_rows[index])
            flip = LabelFlip(
                key=old.keys[row],
                shard=shard,
                row=row,
                old_class_id=int(old_class_ids[index]),
                new_class_id=int(new_class_ids[index]),
                old_confidence=float(old_confidence[index]),
                new_confidence=float(new_confidence[index]),
            )
            self.top_flips.add_row(flip.min_confidence, shard, row, flip)

    def add_kept(self, old: LabelRows, new: LabelRows, before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> None:
        self.kept[0] += np.bincount(old.top_class[before, 0], minlength=self.num_classes)
        self.kept[1] += np.bincount(new.top_class[after, 0], minlength=self.num_classes)
        np.add.at(self.kept_by, (before.astype(np.int64), after.astype(np.int64)), 1)

    def build_diff(self, before: DiffSide, after: DiffSide) -> LabelDiff:
        class_names = after.label_set.classes
        with_selections = before.selection is not None and after.selection is not None
        sizes = self.kept if with_selections else self.labeled
        losses = [
            (1 - int(after) / int(before), name) for name, before, after in zip(class_names, *sizes, strict=True) if before
        ]
        # max returns the first of equal losses.
        shrinkage, shrunk = max(losses, key=lambda loss: loss[0], default=(0.0, None))
        changed = sum(self.matrix.values())
        return LabelDiff(
            dataset=after.label_set.dataset,
            before=before.label_set.digest,
            after=after.label_set.digest,
            classes=class_names,
            images=self.images,
            compared=self.compared,
            only_before=self.only_before,
            only_after=self.only_after,
            changed=changed,
            churn=changed / max(1, self.compared),
            confidence_shift=float(self.shift.sum()) / max(1, self.compared),
            stayed=int(self.kept_by[1, 1]) if with_selections else None,
            entered=int(self.kept_by[0, 1]) if with_selections else None,
            left=int(self.kept_by[1, 0]) if with_selections else None,
            shrinkage=shrinkage,
            shrunk_class=shrunk,
            churn_bins=tuple(
                ChurnBin(low=low, high=high, images=images, changed=flipped, churn=flipped / max(1, images))
                for (low, high), images, flipped in zip(
                    pairwise(CONFIDENCE_BIN_EDGES), self.bin_images.tolist(), self.bin_changed.tolist(), strict=True
                )
            ),
            histogram_before=tuple(self.histogram[0].tolist()),
            histogram_after=tuple(self.histogram[1].tolist()),
            by_class=tuple(self._build_class_change(number, name, with_selections) for number, name in enumerate(class_names)),
            matrix=tuple(
                FlipCount(old_class_id=old, new_class_id=new, images=images)
                for (old, new), images in sorted(self.matrix.items())
            ),
            flips=tuple(flip for _, _, flip in self.top_flips),
        )

    def _build_class_change(self, class_id: int, class_name: str, with_selections: bool) -> ClassChange:
        labeled = self.labeled[:, class_id].tolist()
        means = [float(self.confidence[side, class_id]) / labeled[side] if labeled[side] else None for side in (0, 1)]
        compared = int(self.compared_before[class_id])
        return ClassChange(
            name=class_name,
            before=labeled[0],
            after=labeled[1],
            lost=int(self.flipped[0, class_id]),
            gained=int(self.flipped[1, class_id]),
            kept_before=int(self.kept[0, class_id]) if with_selections else None,
            kept_after=int(self.kept[1, class_id]) if with_selections else None,
            confidence_before=means[0],
            confidence_after=means[1],
            shift=float(self.shift[class_id]) / compared if compared else None,
        )
