"""Verifies a dataset: everything that its manifest says, read from end to end."""

from collections.abc import Iterator

import numpy as np

from ns.core.digest import hash_text, sha256_bytes
from ns.core.errors import DataError, StoreError
from ns.data.dataset import Dataset, Shard
from ns.data.index import ShardIndex, build_index_key
from ns.data.shards import check_shard_file
from ns.storage import Store


def find_damage(store: Store, dataset: Dataset) -> Iterator[str]:
    """Each problem of a dataset, in a line that names the file and the cure; nothing if it is good.

    Checks sizes and checksums of tars and indices, that each index is the one that follows from its tar, numbers of images, class
    indices, and that no key is there twice. Memory: 8 bytes per image.
    """
    key_hashes: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []
    for shard in dataset.shards:
        try:
            index = _verify_shard(store, dataset, shard)
        except (DataError, StoreError) as error:
            yield str(error)
        else:
            key_hashes.append(np.array([hash_text(key, size=8) for key in index.keys], np.uint64))
    hashes = np.concatenate([np.empty(0, np.uint64), *key_hashes])
    if repeated := len(hashes) - len(np.unique(hashes)):
        yield f"{store.uri}: {repeated:,} keys are there twice; import the data again"


def _verify_shard(store: Store, dataset: Dataset, shard: Shard) -> ShardIndex:
    uri, key = f"{store.uri}/{shard.name}", build_index_key(shard)
    path = store.path(shard.name)
    check_shard_file(path, shard, uri)
    index = ShardIndex.from_tar(path)
    if len(index) != shard.samples:
        raise DataError(f"{uri}: {len(index)} images, dataset.json says {shard.samples}; import the data again")
    labels = index.class_ids
    valid = labels == -1 if dataset.role == "unlabeled" else (labels >= 0) & (labels < len(dataset.classes))
    if not valid.all():
        row = int(np.flatnonzero(~valid)[0])
        raise DataError(f"{uri}: {index.keys[row]}: label {labels[row]}: is none of a dataset with the role {dataset.role}")
    if shard.index_sha256 is not None and store.exists(key):
        data = store.get(key)
        if sha256_bytes(data) != shard.index_sha256:
            raise DataError(f"{store.uri}/{key}: its sha256 is not that of dataset.json; delete it: it is made from the tar")
        if not ShardIndex.load(store, shard).table.equals(index.table):
            raise DataError(f"{store.uri}/{key}: is not the index of its tar; import the data again")
    return index
