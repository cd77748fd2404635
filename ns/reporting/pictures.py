"""Galleries of pseudo-labeled images: rows are read shard by shard, and only the shown images are opened."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ns.core.errors import DataError
from ns.data.contact_sheet import encode_data_uri
from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.data.loading.decode import decode_image
from ns.labeling.alignment import align_rows
from ns.labeling.diff import LabelDiff
from ns.labeling.label_set import LabelSet, iter_label_rows
from ns.labeling.selection import CopyReader, Selection
from ns.labeling.top_k import TopRows
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
    """A titled group of pictures."""

    title: str
    about: str
    pictures: list[Picture]


def build_label_galleries(
    pool_store: Store, pool: Dataset, label_store: Store, label_set: LabelSet, selection: Selection, size: int
) -> list[Gallery]:
    """The most and the least confident kept images, and if these labels chose them, the most confident ones below the threshold, and the
    most foreign ones if foreign images are left out; `size` of each."""
    most, least, below, most_foreign = (TopRows[tuple[str, str]](size) for _ in range(4))
    copy_reader = CopyReader(label_store, selection)
    for shard, raw_rows in enumerate(iter_label_rows(label_store, label_set)):
        kept = copy_reader.count_shard_copies(shard, raw_rows) > 0
        rows = align_rows(raw_rows, selection.alignment)
        low = rows.readable & (rows.confidence <= selection.policy.min_confidence)
        # `size` images of a shard are enough to fill a gallery.
        for top, mask, sign in ((most, kept, 1), (least, kept, -1), (below, low, 1)):
            candidates = np.flatnonzero(mask)
            order = candidates[np.argsort(-sign * rows.confidence[candidates], kind="stable")[:size]]
            for row in order.tolist():
                caption = f"{label_set.classes[rows.top_class[row, 0]]} {rows.confidence[row]:.0%}"
                top.add_row(sign * float(rows.confidence[row]), shard, row, (rows.keys[row], caption))
        if rows.foreign_score is not None:
            scored = np.flatnonzero(rows.readable)
            for row in scored[np.argsort(-rows.foreign_score[scored], kind="stable")[:size]].tolist():
                caption = f"score {rows.foreign_score[row]:.3g}, {label_set.classes[rows.top_class[row, 0]]} {rows.confidence[row]:.0%}"
                most_foreign.add_row(float(rows.foreign_score[row]), shard, row, (rows.keys[row], caption))
    low_confidence = f"Left out because their confidence is at or below {selection.policy.min_confidence:.0%}."
    galleries = [
        Gallery(title, about, _open_pictures(pool_store, pool, top))
        for title, about, top in (
            ("Most confident", "The kept images with the highest confidence.", most),
            ("Least confident", "The kept images with the lowest confidence.", least),
            *([("Just below the threshold", low_confidence, below)] if selection.choice is None else []),
        )
    ]
    # Where an earlier label set chose the images, its confidences and scores decided.
    if selection.foreign_limit is not None and selection.choice is None:
        about = (
            "The images of the pool that are least like the labeled ones. "
            f"Above a score of {selection.foreign_limit:.3g} they are left out."
        )
        galleries.append(Gallery("Most foreign", about, _open_pictures(pool_store, pool, most_foreign)))
    return galleries


def build_flip_gallery(pool_store: Store, pool: Dataset, diff: LabelDiff) -> Gallery:
    """The most confident changes since the previous generation."""
    about = (
        f"{diff.changed:,} of {diff.compared:,} images have a different label than in the previous generation; "
        "the most confident changes come first."
    )
    return Gallery("Changed labels", about, read_flip_pictures(pool_store, pool, diff))


def read_flip_pictures(pool_store: Store, pool: Dataset, diff: LabelDiff) -> list[Picture]:
    """The most confident changes between two label sets of one pool."""
    captions = [
        f"{diff.classes[flip.old_class_id]} {flip.old_confidence:.0%} → {diff.classes[flip.new_class_id]} {flip.new_confidence:.0%}"
        for flip in diff.flips
    ]
    rows = ((flip.shard, flip.row, (flip.key, caption)) for flip, caption in zip(diff.flips, captions, strict=True))
    return _open_pictures(pool_store, pool, rows)


def limit_galleries(galleries: Sequence[Gallery], size: int) -> None:
    """Removes pictures from the end of the largest gallery until all together take at most `size` bytes."""
    sizes = [sum(len(picture.source) for picture in group.pictures) for group in galleries]
    while sum(sizes) > size:
        largest = sizes.index(max(sizes))
        sizes[largest] -= len(galleries[largest].pictures.pop().source)


def make_thumbnails(store: Store, pool: Dataset, locations: Sequence[tuple[int, int]], largest_px: int) -> list[str | None]:
    """Data URIs of the images at (shard, row), `largest_px` on the long side; None for those that cannot be decoded."""
    thumbnail_by_location: dict[tuple[int, int], str | None] = {}
    index: ShardIndex | None = None
    open_shard = -1
    # In the pool's order, so that each shard's index is read once and only one is in memory.
    for shard, row in sorted(locations):
        if index is None or shard != open_shard:
            open_shard, index = shard, ShardIndex.load(store, pool.shards[shard])
        try:
            pixels = decode_image(store.get_range(pool.shards[shard].name, int(index.offsets[row]), int(index.sizes[row])))
            thumbnail_by_location[shard, row] = encode_data_uri(Image.fromarray(pixels), largest_px)
        except DataError:
            thumbnail_by_location[shard, row] = None
    return [thumbnail_by_location[location] for location in locations]


def _open_pictures(pool_store: Store, pool: Dataset, rows: Iterable[tuple[int, int, tuple[str, str]]]) -> list[Picture]:
    """Pictures of the images at (shard, row), each with its key and caption; without those that cannot be decoded."""
    ranked = list(rows)
    sources = make_thumbnails(pool_store, pool, [(shard, row) for shard, row, _ in ranked], THUMBNAIL_PX)
    return [
        Picture(key, caption, source)
        for (_, _, (key, caption)), source in zip(ranked, sources, strict=True)
        if source is not None
    ]
