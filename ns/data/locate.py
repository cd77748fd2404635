"""Where images of a dataset are, by their keys."""

from collections.abc import Collection
from typing import NamedTuple

from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.storage import Store


class ImageLocation(NamedTuple):
    shard: int
    row: int


def locate_keys(store: Store, dataset: Dataset, keys: Collection[str]) -> dict[str, ImageLocation]:
    """Where the keys are, of those that the dataset has. Reads no more shards' indices than it must."""
    locations: dict[str, ImageLocation] = {}
    for shard_index, shard in enumerate(dataset.shards):
        if len(locations) == len(keys):
            break
        for row, key in enumerate(ShardIndex.load(store, shard).keys):
            if key in keys:
                locations[key] = ImageLocation(shard_index, row)
    return locations
