"""The index of a shard: where each image is and how it decodes, in a small file beside the tar.

shard-00000.tar             for any reader of WebDataset
shard-00000.index.parquet   spares our reader the tar's headers; made from the tar if it is missing or not that of the manifest
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ns.core import log
from ns.core.digest import sha256_bytes
from ns.core.errors import DataError
from ns.data.dataset import Dataset, Shard
from ns.data.loading.decode import read_jpeg_size
from ns.data.shards import ShardSample, check_shard_file, read_range, read_samples
from ns.storage import Store
from ns.storage.parquet import encode_table, parse_table

SUFFIX = ".index.parquet"
CURE = "import the data again"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("extension", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("class_id", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """The images of a shard, in the tar's order."""

    table: pa.Table
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    """Bytes."""
    class_ids: npt.NDArray[np.int64]
    """Class indices; -1 where the tar has none."""
    widths: npt.NDArray[np.int32]
    """Width in px of JPEGs that libjpeg-turbo alone decodes upright and in color; 0 for all other images."""
    heights: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def keys(self) -> list[str]:
        values: list[str] = self.table["key"].to_pylist()
        return values

    @classmethod
    def from_samples(cls, samples: list[ShardSample], sizes: list[tuple[int, int]]) -> "ShardIndex":
        """`sizes` are width and height as `decode.read_jpeg_size` returns them."""
        rows = [(*sample, *size) for sample, size in zip(samples, sizes, strict=True)]
        return cls._from_table(pa.table(list(zip(*rows, strict=True)) or [()] * len(SCHEMA), schema=SCHEMA))

    @classmethod
    def _from_table(cls, table: pa.Table) -> "ShardIndex":
        columns = (table[name].fill_null(-1).to_numpy() for name in ("offset", "size", "class_id", "width", "height"))
        return cls(table, *columns)

    @classmethod
    def from_tar(cls, path: Path) -> "ShardIndex":
        """Raises DataError as `read_samples`."""
        samples = read_samples(path)
        with path.open("rb") as file:
            sizes = [read_jpeg_size(read_range(file, sample.offset, sample.size)) for sample in samples]
        return cls.from_samples(samples, sizes)

    def save(self, store: Store, shard: Shard) -> Shard:
        """Writes the index file. Returns the shard with the file's checksum."""
        data = encode_table(self.table)
        store.put(build_index_key(shard), data)
        return shard.model_copy(update={"index_sha256": sha256_bytes(data)})

    @classmethod
    def load(cls, store: Store, shard: Shard) -> "ShardIndex":
        """The index of `shard`, from its file if that is the one of the manifest, or else from the tar.

        Raises DataError if the tar is damaged, or the number of images is not that of the manifest.
        """
        index = cls._load_file(store, shard)
        if index is None:
            path, uri = store.path(shard.name), f"{store.uri}/{shard.name}"
            check_shard_file(path, shard, uri)
            index = cls.from_tar(path)
        if len(index) != shard.samples:
            raise DataError(
                f"{store.uri}/{shard.name}: {len(index)} images, dataset.json says {shard.samples}; import the data again"
            )
        return index

    @classmethod
    def _load_file(cls, store: Store, shard: Shard) -> "ShardIndex | None":
        key = build_index_key(shard)
        if shard.index_sha256 is None or not store.exists(key):
            return None
        data = store.get(key)
        if sha256_bytes(data) != shard.index_sha256:
            log.get_logger().warning(
                "an index is not that of dataset.json, and is made from its tar", index=f"{store.uri}/{key}"
            )
            return None
        table = parse_table(data, f"{store.uri}/{key}", SCHEMA, CURE)
        index = cls._from_table(table)
        sizes = index.offsets.astype(object) + index.sizes
        if len(index) and (index.offsets.min() < 0 or index.sizes.min() < 0 or max(sizes) > shard.bytes):
            raise DataError(f"{store.uri}/{key}: offset: an image lies outside {shard.name}; {CURE}")
        return index


class ImageLocation(NamedTuple):
    shard: int
    row: int


def locate_keys(store: Store, dataset: Dataset, keys: Collection[str]) -> dict[str, ImageLocation]:
    """Key → location, for those of `keys` that the dataset has. Reads indices until all are found."""
    locations: dict[str, ImageLocation] = {}
    for shard_index, shard in enumerate(dataset.shards):
        if len(locations) == len(keys):
            break
        for row, key in enumerate(ShardIndex.load(store, shard).keys):
            if key in keys:
                locations[key] = ImageLocation(shard_index, row)
    return locations


def is_shard_whole(store: Store, shard: Shard) -> bool:
    """Whether the tar has its size, and the index its checksum. The bytes of the tar are checked when it is read."""
    key = build_index_key(shard)
    return (
        store.exists(shard.name)
        and store.size(shard.name) == shard.bytes
        and (shard.index_sha256 is None or (store.exists(key) and sha256_bytes(store.get(key)) == shard.index_sha256))
    )


def build_index_key(shard: Shard) -> str:
    return shard.name.removesuffix(".tar") + SUFFIX
