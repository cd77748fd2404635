"""Pictures of pseudo-labelled images: rows are read shard by shard, and only the chosen images are opened."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappush, heappushpop

import numpy as np
from PIL import Image

from ns.data.dataset import Dataset
from ns.data.decode import decode
from ns.data.shards import read_index
from ns.data.thumbnail import data_uri
from ns.errors import DataError
from ns.label.labelset import LabelSet, Rows, all_rows
from ns.label.selection import Selection, copies
from ns.store import Store

THUMBNAIL_PX = 96


@dataclass(frozen=True)
class Picture:
    key: str
    caption: str
    source: str
    """A data URI."""


@dataclass(frozen=True)
class Gallery:
    """A group of pictures."""

    title: str
    about: str
    pictures: list[Picture]


@dataclass
class _Top:
    """The `size` highest-scoring places seen so far, in bounded memory."""

    size: int
    heap: list[tuple[float, int, int, str]] = field(default_factory=list)

    def add(self, score: float, shard: int, row: int, caption: str) -> None:
        # Ties go to the earlier image, so that the same labels always show the same pictures.
        item = (score, -shard, -row, caption)
        if len(self.heap) < self.size:
            heappush(self.heap, item)
        elif self.size:
            heappushpop(self.heap, item)

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        return iter([(-shard, -row, caption) for _, shard, row, caption in sorted(self.heap, reverse=True)])


def gallery(folder: Store, pool: Dataset, labels: Store, label_set: LabelSet, selection: Selection, size: int) -> list[Gallery]:
    """The most and the least confident images that were kept, and the most confident that were left out for confidence."""
    most, least, below = _Top(size), _Top(size), _Top(size)
    for shard, rows in enumerate(all_rows(labels, label_set)):
        kept = copies(selection, rows) > 0
        low = rows.readable & (rows.confidence <= selection.policy.min_confidence)
        # Enough of each shard to fill a group, and no more captions than that.
        for top, wanted, sign in ((most, kept, 1), (least, kept, -1), (below, low, 1)):
            places = np.flatnonzero(wanted)
            order = places[np.argsort(-sign * rows.confidence[places], kind="stable")[:size]]
            for row in order.tolist():
                top.add(sign * float(rows.confidence[row]), shard, row, _says(rows, row, label_set.classes))
    threshold = f"{selection.policy.min_confidence:.0%}"
    return [
        Gallery("Most confident", "What the teacher is surest of, among the images kept.", _open(folder, pool, most)),
        Gallery("Least confident", "The shakiest labels that the student still learns from.", _open(folder, pool, least)),
        Gallery("Just below the threshold", f"Left out: confidence at or below {threshold}.", _open(folder, pool, below)),
    ]


def flips(
    folder: Store, pool: Dataset, before: tuple[Store, LabelSet], after: tuple[Store, LabelSet], size: int
) -> tuple[float, Gallery]:
    """The share of images whose label changed between two label sets of one pool, and the surest of those changes."""
    top = _Top(size)
    changed = total = 0
    for shard, (old, new) in enumerate(zip(all_rows(*before), all_rows(*after), strict=True)):
        both = old.readable & new.readable
        differ = np.flatnonzero(both & (old.top_class[:, 0] != new.top_class[:, 0]))
        changed += len(differ)
        total += int(both.sum())
        score = np.minimum(old.confidence[differ], new.confidence[differ])
        for index in np.argsort(-score, kind="stable")[:size].tolist():
            row = int(differ[index])
            caption = f"{_says(old, row, before[1].classes)} → {_says(new, row, after[1].classes)}"
            top.add(float(score[index]), shard, row, caption)
    about = f"{changed:,} of {total:,} images have another label than in the generation before; the surest changes first."
    return changed / max(1, total), Gallery("Changed its mind", about, _open(folder, pool, top))


def _says(rows: Rows, row: int, classes: tuple[str, ...]) -> str:
    return f"{classes[rows.top_class[row, 0]]} {rows.confidence[row]:.0%}"


def _open(folder: Store, pool: Dataset, top: _Top) -> list[Picture]:
    pictures = []
    for shard, row, caption in top:
        name = pool.shards[shard].name
        sample = read_index(folder.path(name))[row]
        try:
            image = Image.fromarray(decode(folder.get_range(name, sample.offset, sample.size)))
        except DataError:
            continue
        pictures.append(Picture(sample.key, caption, data_uri(image, THUMBNAIL_PX)))
    return pictures
