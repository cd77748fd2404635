"""The index of a shard: where each image is and how it decodes, in a small file beside the tar.

shard-00000.tar             what any reader of WebDataset reads
shard-00000.index.parquet   what spares ours from walking the tar's headers; made from the tar where it is missing
"""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ns.core.errors import DataError
from ns.data.dataset import Shard
from ns.data.loading.decode import look
from ns.data.shards import Sample, read_index, read_range
from ns.storage import Store
from ns.storage.parquet import read_table

SUFFIX = ".index.parquet"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("extension", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
TAR = b"tar_sha256"


@dataclass(frozen=True)
class ShardIndex:
    """The images of a shard, in the tar's order."""

    table: pa.Table
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    """Bytes."""
    labels: npt.NDArray[np.int64]
    """Class indices; -1 where the tar has none."""
    widths: npt.NDArray[np.int32]
    """px of JPEGs that libjpeg-turbo decodes upright and in colour by itself; 0 for all others."""
    heights: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def keys(self) -> list[str]:
        found: list[str] = self.table["key"].to_pylist()
        return found

    @classmethod
    def of(cls, samples: list[Sample], sizes: list[tuple[int, int]]) -> "ShardIndex":
        """`sizes` are width and height as `decode.look` has them."""
        columns = list(zip(*samples, strict=True)) or [()] * 5
        key, extension, offset, size, label = columns
        width, height = list(zip(*sizes, strict=True)) or [(), ()]
        return cls._from(pa.table([key, extension, offset, size, label, width, height], schema=SCHEMA))

    @classmethod
    def _from(cls, table: pa.Table) -> "ShardIndex":
        def column(name: str) -> Any:
            return table[name].fill_null(-1).to_numpy()

        return cls(table, *(column(name) for name in ("offset", "size", "label", "width", "height")))

    def write(self, folder: Store, shard: Shard) -> None:
        sink = io.BytesIO()
        pq.write_table(self.table.replace_schema_metadata({TAR: shard.sha256}), sink, compression="zstd")
        folder.put(file_name(shard), sink.getvalue())

    @classmethod
    def read(cls, folder: Store, shard: Shard) -> "ShardIndex":
        """The index of `shard`, from its file, or else from the tar itself.

        Raises DataError, naming the tar, if it does not hold what the manifest says.
        """
        found = cls._kept(folder, shard)
        if found is None:
            path = folder.path(shard.name)
            samples = read_index(path)
            found = cls.of(samples, _looked(path, samples))
        if len(found) != shard.samples:
            raise DataError(
                f"{folder.uri}/{shard.name}: {len(found)} images, dataset.json says {shard.samples}; import the data again"
            )
        return found

    @classmethod
    def _kept(cls, folder: Store, shard: Shard) -> "ShardIndex | None":
        name = file_name(shard)
        if not folder.exists(name):
            return None
        try:
            table = read_table(folder.get(name))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{folder.uri}/{name}: damaged: {error}; delete it: it is made again from the tar") from error
        # The index of another tar is none.
        if (table.schema.metadata or {}).get(TAR) != shard.sha256.encode() or not table.schema.equals(SCHEMA):
            return None
        return cls._from(table)


def file_name(shard: Shard) -> str:
    return shard.name.removesuffix(".tar") + SUFFIX


def _looked(path: Path, samples: list[Sample]) -> list[tuple[int, int]]:
    with path.open("rb") as file:
        return [look(read_range(file, sample.offset, sample.size)) for sample in samples]
