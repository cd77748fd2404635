"""Diff: what changed between two label sets of one dataset, an exact count of all rows, a pair of shards at a time."""

from collections import Counter
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError
from ns.labeling.confidence_bins import BANDS, EDGES, bands
from ns.labeling.label_set import BINS as FINE_BINS
from ns.labeling.label_set import LabelSet, LabelShard, Rows, histogram, read_rows
from ns.labeling.selection import Selection, copies
from ns.labeling.top_k import Top
from ns.storage import Store
from ns.storage.documents import Document

BINS = 20
PAIRS = 10
CLASS_ROWS = 100
"""What tables show."""
FLIPS = 200
"""The surest flips that are kept one by one."""


class Side(NamedTuple):
    """A label set, and what a student was given of it, if that is known."""

    folder: Store
    label_set: LabelSet
    selection: Selection | None = None


class Band(Document):
    """Images by how sure the earlier labels were of them."""

    low: float
    high: float
    """Half open, but for the last one, which holds confidence 1 too."""
    images: int
    changed: int
    churn: float
    """changed ÷ images; 0 of none."""


class ClassChange(Document):
    """One class in both label sets."""

    name: str
    before: int
    after: int
    """Labelled images."""
    lost: int
    gained: int
    """Images that went to another class, and that came from one."""
    kept_before: int | None
    kept_after: int | None
    """Distinct images that the selections keep; None if they are not known."""
    confidence_before: float | None
    confidence_after: float | None
    """Means over the class's images; None if it has none."""
    shift: float | None
    """Mean change of confidence of the images that were in this class before, whatever class they are in now."""


class Flips(Document):
    """A cell of the flip matrix that is not 0."""

    old: int
    new: int
    """Class indices."""
    images: int


class Flip(Document):
    """One image that changed its class."""

    key: str
    shard: int
    row: int
    old: int
    new: int
    """Class indices."""
    old_confidence: float
    new_confidence: float

    @property
    def score(self) -> float:
        """How much there is to be learnt from it: both labels are at least so sure."""
        return min(self.old_confidence, self.new_confidence)


class Diff(Document):
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
    """Images with a label in one of them only: unreadable or left out in the other."""
    changed: int
    churn: float
    """changed ÷ compared; 0 of none."""
    shift: float
    """Mean change of confidence over the compared images."""
    stayed: int | None
    entered: int | None
    left: int | None
    """Images that both selections keep, only the later one, only the earlier one; None if they are not known."""
    shrinkage: float
    """Largest share of its images that a class lost: of those kept where both selections are known, else of those labelled.
    Below 0 if every class grew."""
    shrunk: str | None
    """The class; None if no class had images before."""
    bands: tuple[Band, ...]
    histogram_before: tuple[int, ...]
    histogram_after: tuple[int, ...]
    """Images by confidence, 20 equal bins from 0 to 1."""
    by_class: tuple[ClassChange, ...]
    matrix: tuple[Flips, ...]
    """Flips by old and new class, in this order; pairs of classes without any are left out."""
    flips: tuple[Flip, ...]
    """The surest ones, by `Flip.score`; of equal ones the earlier image first."""

    def frequent(self) -> list[tuple[str, str, int]]:
        """The ten most frequent flips: class before, class after, images."""
        cells = sorted(self.matrix, key=lambda cell: (-cell.images, cell.old, cell.new))[:PAIRS]
        return [(self.classes[cell.old], self.classes[cell.new], cell.images) for cell in cells]

    def changed_classes(self) -> list[ClassChange]:
        """All classes if a table can show them, else the hundred with most flips."""
        if len(self.by_class) <= CLASS_ROWS:
            return list(self.by_class)
        return sorted(self.by_class, key=lambda row: (-row.lost - row.gained, row.name))[:CLASS_ROWS]


def compare(before: Side, after: Side, *, flips: int = FLIPS) -> Diff:
    """Counts what changed, shard by shard. Raises DataError if the two do not label the same images into the same classes."""
    _check(before, after)
    old, new = before.label_set, after.label_set
    counts = _Counts(len(new.classes), flips)
    for number, pair in enumerate(zip(old.shards, new.shards, strict=True)):
        _add(counts, number, before, after, pair)
    return counts.diff(before, after)


def _check(before: Side, after: Side) -> None:
    old, new = before.label_set, after.label_set
    if old.dataset != new.dataset:
        raise DataError(
            f"{before.folder.uri} labels the dataset {old.dataset[:16]}, {after.folder.uri} labels {new.dataset[:16]}: "
            "only labels of the same images can be compared; label one of the datasets with both teachers"
        )
    if old.classes != new.classes:
        differ = next((a, b) for a, b in zip((*old.classes, None), (*new.classes, None), strict=False) if a != b)
        raise DataError(
            f"{before.folder.uri} and {after.folder.uri} have different classes, first {differ[0]!r} and {differ[1]!r}: "
            "only labels of the same classes in the same order can be compared"
        )
    if [shard.source for shard in old.shards] != [shard.source for shard in new.shards]:
        raise DataError(f"{before.folder.uri} and {after.folder.uri}: shards of one dataset that differ; label the pool again")


def _add(counts: "_Counts", number: int, before: Side, after: Side, pair: tuple[LabelShard, LabelShard]) -> None:
    # In a function of its own, so that this pair is gone before the next one is read.
    old, new = read_rows(before.folder, pair[0]), read_rows(after.folder, pair[1])
    if old.keys != new.keys:
        raise DataError(
            f"{before.folder.uri}/{pair[0].name} and {after.folder.uri}/{pair[1].name}: other keys; label the pool again"
        )
    counts.add(number, old, new)
    if before.selection and after.selection:
        counts.add_kept(old, new, copies(before.selection, old) > 0, copies(after.selection, new) > 0)


class _Counts:
    """What has been counted so far. Index 0 is before, 1 after."""

    def __init__(self, classes: int, flips: int) -> None:
        self.classes = classes
        self.images = self.compared = self.only_before = self.only_after = 0
        self.labelled = np.zeros((2, classes), np.int64)
        self.kept = np.zeros((2, classes), np.int64)
        self.kept_by = np.zeros((2, 2), np.int64)
        """Images kept before (row) and after (column)."""
        self.confidence = np.zeros((2, classes))
        self.shift = np.zeros(classes)
        self.was = np.zeros(classes, np.int64)
        """Compared images by their class before."""
        self.histogram = np.zeros((2, BINS), np.int64)
        self.band_images = np.zeros(BANDS, np.int64)
        self.band_changed = np.zeros(BANDS, np.int64)
        self.flipped = np.zeros((2, classes), np.int64)
        """Flips by the class before, and by the class after."""
        self.matrix: Counter[tuple[int, int]] = Counter()
        self.top: Top[Flip] = Top(flips)

    def add(self, shard: int, old: Rows, new: Rows) -> None:
        self.images += len(old.keys)
        self.only_before += int((old.readable & ~new.readable).sum())
        self.only_after += int((new.readable & ~old.readable).sum())
        for side, rows in enumerate((old, new)):
            label, sure = rows.top_class[rows.readable, 0], rows.confidence[rows.readable]
            self.labelled[side] += np.bincount(label, minlength=self.classes)
            self.confidence[side] += np.bincount(label, sure, self.classes)
            # The bins of the label set's own histogram, fifty at a time.
            fine = histogram(np.zeros_like(label), sure, 1)[0]
            self.histogram[side] += fine.reshape(BINS, FINE_BINS // BINS).sum(1).astype(np.int64)
        places = np.flatnonzero(old.readable & new.readable)
        was, now = old.top_class[places, 0].astype(np.int64), new.top_class[places, 0].astype(np.int64)
        old_sure, new_sure = old.confidence[places], new.confidence[places]
        differ = was != now
        self.compared += len(places)
        self.was += np.bincount(was, minlength=self.classes)
        self.shift += np.bincount(was, new_sure.astype(np.float64) - old_sure, self.classes)
        band = bands(old_sure)
        self.band_images += np.bincount(band, minlength=BANDS)
        self.band_changed += np.bincount(band[differ], minlength=BANDS)
        self.flipped += [np.bincount(side[differ], minlength=self.classes) for side in (was, now)]
        pairs, images = np.unique(was[differ] * self.classes + now[differ], return_counts=True)
        for pair, count in zip(pairs.tolist(), images.tolist(), strict=True):
            self.matrix[divmod(pair, self.classes)] += count
        score = np.where(differ, np.minimum(old_sure, new_sure), -1)
        # Enough of each shard to fill the list, and no more.
        for index in np.argsort(-score, kind="stable")[: min(self.top.size, int(differ.sum()))].tolist():
            row = int(places[index])
            flip = Flip(
                key=old.keys[row],
                shard=shard,
                row=row,
                old=int(was[index]),
                new=int(now[index]),
                old_confidence=float(old_sure[index]),
                new_confidence=float(new_sure[index]),
            )
            self.top.add(flip.score, shard, row, flip)

    def add_kept(self, old: Rows, new: Rows, before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> None:
        self.kept[0] += np.bincount(old.top_class[before, 0], minlength=self.classes)
        self.kept[1] += np.bincount(new.top_class[after, 0], minlength=self.classes)
        np.add.at(self.kept_by, (before.astype(np.int64), after.astype(np.int64)), 1)

    def diff(self, before: Side, after: Side) -> Diff:
        names = after.label_set.classes
        known = before.selection is not None and after.selection is not None
        sizes = self.kept if known else self.labelled
        losses = [(1 - int(after) / int(before), name) for name, before, after in zip(names, *sizes, strict=True) if before]
        # Of equal losses the first class: max keeps the first of equals.
        shrinkage, shrunk = max(losses, key=lambda loss: loss[0], default=(0.0, None))
        changed = sum(self.matrix.values())
        return Diff(
            dataset=after.label_set.dataset,
            before=before.label_set.digest,
            after=after.label_set.digest,
            classes=names,
            images=self.images,
            compared=self.compared,
            only_before=self.only_before,
            only_after=self.only_after,
            changed=changed,
            churn=changed / max(1, self.compared),
            shift=float(self.shift.sum()) / max(1, self.compared),
            stayed=int(self.kept_by[1, 1]) if known else None,
            entered=int(self.kept_by[0, 1]) if known else None,
            left=int(self.kept_by[1, 0]) if known else None,
            shrinkage=shrinkage,
            shrunk=shrunk,
            bands=tuple(
                Band(low=low, high=high, images=images, changed=flipped, churn=flipped / max(1, images))
                for low, high, images, flipped in zip(
                    EDGES[:-1], EDGES[1:], self.band_images.tolist(), self.band_changed.tolist(), strict=True
                )
            ),
            histogram_before=tuple(self.histogram[0].tolist()),
            histogram_after=tuple(self.histogram[1].tolist()),
            by_class=tuple(self._class(number, name, known) for number, name in enumerate(names)),
            matrix=tuple(Flips(old=old, new=new, images=images) for (old, new), images in sorted(self.matrix.items())),
            flips=tuple(flip for _, _, flip in self.top),
        )

    def _class(self, number: int, name: str, known: bool) -> ClassChange:
        labelled = self.labelled[:, number].tolist()
        means = [float(self.confidence[side, number]) / labelled[side] if labelled[side] else None for side in (0, 1)]
        was = int(self.was[number])
        return ClassChange(
            name=name,
            before=labelled[0],
            after=labelled[1],
            lost=int(self.flipped[0, number]),
            gained=int(self.flipped[1, number]),
            kept_before=int(self.kept[0, number]) if known else None,
            kept_after=int(self.kept[1, number]) if known else None,
            confidence_before=means[0],
            confidence_after=means[1],
            shift=float(self.shift[number]) / was if was else None,
        )
