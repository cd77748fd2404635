"""A fixed part of a dataset for a quick measurement: drawn evenly over the classes, the same images for every model."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ns.core.digest import hash_text
from ns.data.loading.shard_reader import ImageSource
from ns.storage.documents import JsonDocument


class Subsample(JsonDocument):
    """Which images of a dataset are drawn."""

    images: int
    """The number of images asked for; all are drawn if the dataset has fewer."""
    seed: int


def draw_rows(
    source: ImageSource, shards: int, num_classes: int, subsample: Subsample | None
) -> dict[int, npt.NDArray[np.int64]]:
    """Shard number → its drawn rows in ascending order; shards without any are left out. All rows if `subsample` is None.

    The draw depends on the seed and the images' keys, not on how they are sharded. It takes one image of each class, then a
    second one of each, and so on until there are enough.
    """
    sizes = [len(source.read_index(shard)) for shard in range(shards)]
    if subsample is None or subsample.images >= sum(sizes):
        return {shard: np.arange(size) for shard, size in enumerate(sizes) if size}
    class_ids = np.concatenate([source.read_class_ids(shard, num_classes) for shard in range(shards)])
    positions = draw_evenly([key for shard in range(shards) for key in source.read_index(shard).keys], class_ids, subsample)
    starts = np.cumsum([0, *sizes[:-1]])
    parts = np.split(positions, np.searchsorted(positions, starts[1:]))
    return {shard: part - starts[shard] for shard, part in enumerate(parts) if len(part)}


def draw_evenly(keys: Sequence[str], class_ids: npt.NDArray[np.int64], subsample: Subsample | None) -> npt.NDArray[np.int64]:
    """Positions of the drawn images, ascending; all positions if `subsample` is None. `class_ids`: int64 [N], one per key."""
    if subsample is None or subsample.images >= len(keys):
        return np.arange(len(keys))
    turns = np.array([hash_text(f"{subsample.seed}/{key}", size=8) for key in keys], np.uint64)
    order = np.lexsort((turns, class_ids))
    _, starts, counts = np.unique(class_ids[order], return_index=True, return_counts=True)
    rounds = np.empty(len(class_ids), np.int64)
    rounds[order] = np.arange(len(class_ids)) - np.repeat(starts, counts)
    return np.sort(np.lexsort((turns, rounds))[: subsample.images])
