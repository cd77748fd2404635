"""Where images of a dataset are, by their keys."""

from collections.abc import Collection
from typing import NamedTuple

from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.storage import Store


class Place(NamedTuple):
    shard: int
    row: int


def find(folder: Store, dataset: Dataset, keys: Collection[str]) -> dict[str, Place]:
    """Where the keys are, of those that the dataset has. Reads no more shards' indices than it must."""
    found: dict[str, Place] = {}
    for number, shard in enumerate(dataset.shards):
        if len(found) == len(keys):
            break
        for row, key in enumerate(ShardIndex.read(folder, shard).keys):
            if key in keys:
                found[key] = Place(number, row)
    return found
