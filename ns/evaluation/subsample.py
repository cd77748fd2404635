"""A part of a dataset for a quick look: drawn evenly over the classes, the same images whoever draws."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ns.data.loading.shard_reader import ImageSource
from ns.evaluation.result import Subsample


def drawn(source: ImageSource, shards: int, classes: int, wanted: Subsample | None) -> dict[int, npt.NDArray[np.int64]]:
    """Shard → rows in ascending order, of shards with any. All images if none are wanted in particular.

    An image's turn follows from the seed and its key, whatever shard it is in. Of each class comes one image, then of each a
    second one, and so on until there are enough.
    """
    sizes = [len(source.index(shard)) for shard in range(shards)]
    if wanted is None or wanted.images >= sum(sizes):
        return {shard: np.arange(size) for shard, size in enumerate(sizes) if size}
    labels = np.concatenate([source.labels(shard, classes) for shard in range(shards)])
    chosen = evenly([key for shard in range(shards) for key in source.index(shard).keys], labels, wanted)
    bounds = np.cumsum([0, *sizes])
    rows = {shard: chosen[(chosen >= bounds[shard]) & (chosen < bounds[shard + 1])] - bounds[shard] for shard in range(shards)}
    return {shard: own for shard, own in rows.items() if len(own)}


def evenly(keys: Sequence[str], labels: npt.NDArray[np.int64], wanted: Subsample | None) -> npt.NDArray[np.int64]:
    """Which of some images are drawn, in ascending order; all if none are wanted in particular."""
    if wanted is None or wanted.images >= len(keys):
        return np.arange(len(keys))
    turns = np.array([_turn(wanted.seed, key) for key in keys], np.uint64)
    order = np.lexsort((turns, labels))
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rounds = np.empty(len(labels), np.int64)
    rounds[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(np.lexsort((turns, rounds))[: wanted.images])


def _turn(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest())
