"""Pictures of pseudo-labelled images: rows are read shard by shard, and only the chosen images are opened."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.data.loading.decode import decode
from ns.data.thumbnail import data_uri
from ns.labeling.diff import Diff
from ns.labeling.label_set import LabelSet, Rows, all_rows
from ns.labeling.selection import Selection, copies
from ns.labeling.top_k import Top
from ns.storage import Store

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


def gallery(folder: Store, pool: Dataset, labels: Store, label_set: LabelSet, selection: Selection, size: int) -> list[Gallery]:
    """The most and the least confident images that were kept, and the most confident that were left out for confidence."""
    most, least, below = (Top[tuple[str, str]](size) for _ in range(3))
    for shard, rows in enumerate(all_rows(labels, label_set)):
        kept = copies(selection, rows) > 0
        low = rows.readable & (rows.confidence <= selection.policy.min_confidence)
        # Enough of each shard to fill a group, and no more captions than that.
        for top, wanted, sign in ((most, kept, 1), (least, kept, -1), (below, low, 1)):
            places = np.flatnonzero(wanted)
            order = places[np.argsort(-sign * rows.confidence[places], kind="stable")[:size]]
            for row in order.tolist():
                top.add(sign * float(rows.confidence[row]), shard, row, (rows.keys[row], _says(rows, row, label_set.classes)))
    threshold = f"{selection.policy.min_confidence:.0%}"
    return [
        Gallery("Most confident", "What the teacher is surest of, among the images kept.", _open(folder, pool, most)),
        Gallery("Least confident", "The shakiest labels that the student still learns from.", _open(folder, pool, least)),
        Gallery("Just below the threshold", f"Left out: confidence at or below {threshold}.", _open(folder, pool, below)),
    ]


def changed(folder: Store, pool: Dataset, diff: Diff) -> Gallery:
    """The surest changes since the generation before."""
    about = (
        f"{diff.changed:,} of {diff.compared:,} images have another label than in the generation before; "
        "the surest changes first."
    )
    return Gallery("Changed its mind", about, flips(folder, pool, diff))


def flips(folder: Store, pool: Dataset, diff: Diff) -> list[Picture]:
    """The surest changes between two label sets of one pool."""
    captions = [
        f"{diff.classes[flip.old]} {flip.old_confidence:.0%} → {diff.classes[flip.new]} {flip.new_confidence:.0%}"
        for flip in diff.flips
    ]
    sources = thumbnails(folder, pool, [(flip.shard, flip.row) for flip in diff.flips], THUMBNAIL_PX)
    return [
        Picture(flip.key, caption, source)
        for flip, caption, source in zip(diff.flips, captions, sources, strict=True)
        if source is not None
    ]


def shorten(galleries: Sequence[Gallery], size: int) -> None:
    """Takes last pictures away, of the largest group first, until all together take no more than `size` bytes."""
    sizes = [sum(len(picture.source) for picture in group.pictures) for group in galleries]
    while sum(sizes) > size:
        largest = sizes.index(max(sizes))
        sizes[largest] -= len(galleries[largest].pictures.pop().source)


def thumbnails(folder: Store, pool: Dataset, places: Sequence[tuple[int, int]], largest_px: int) -> list[str | None]:
    """Data URIs of the images at (shard, row); None for those that cannot be decoded. Reads no more than these images."""
    found: dict[tuple[int, int], str | None] = {}
    index: ShardIndex | None = None
    opened = -1
    # In the pool's order, so that each shard's index is read once and none but one is held.
    for shard, row in sorted(places):
        if index is None or shard != opened:
            opened, index = shard, ShardIndex.read(folder, pool.shards[shard])
        try:
            pixels = decode(folder.get_range(pool.shards[shard].name, int(index.offsets[row]), int(index.sizes[row])))
            found[shard, row] = data_uri(Image.fromarray(pixels), largest_px)
        except DataError:
            found[shard, row] = None
    return [found[place] for place in places]


def _says(rows: Rows, row: int, classes: tuple[str, ...]) -> str:
    return f"{classes[rows.top_class[row, 0]]} {rows.confidence[row]:.0%}"


def _open(folder: Store, pool: Dataset, top: Top[tuple[str, str]]) -> list[Picture]:
    places = list(top)
    sources = thumbnails(folder, pool, [(shard, row) for shard, row, _ in places], THUMBNAIL_PX)
    return [
        Picture(key, caption, source)
        for (_, _, (key, caption)), source in zip(places, sources, strict=True)
        if source is not None
    ]
