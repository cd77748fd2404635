"""Reads images of a dataset by (shard, row), from a bounded number of shards that are fetched ahead and kept open."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError, StoreError
from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.data.loading.decode import EncodedJpeg, decode_image
from ns.data.loading.sampler import WINDOW_SHARDS
from ns.data.shards import check_shard_file, read_range
from ns.storage import Store
from ns.storage.local import os_errors_as_store_errors

DECODED_BYTES = 256 << 20
"""Bytes of decoded images that a process may keep: small datasets are decoded once."""
READ_ROWS = 256
"""Neighbors that are read at once: reading a small image by itself takes an eighth longer than decoding it."""
FETCH_THREADS = 2
WINDOW_BYTES = 8 << 30
"""Largest size of the shards that are read together. The cache of remote files must hold a window of the labeled images, one of the
pool, and some of the windows that follow."""
MIN_WINDOW_SHARDS = 8
"""Number of shards that are read together however large they are."""


class ImageSource:
    """Images of a dataset. Each process needs its own; it may be passed to a child process before its first use.

    `max_open_shards`: training reads from a window of shards at a time, the default; reading in order needs two.
    """

    def __init__(self, store: Store, dataset: Dataset, *, max_open_shards: int | None = None) -> None:
        self.window_shards = count_window_shards(dataset)
        """Number of shards that training reads together."""
        max_open_shards = max_open_shards or self.window_shards
        self._store = store
        self._dataset = dataset
        self._decoded: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
        self._decoded_bytes = 0
        self._checked: set[int] = set()
        self._fetchers: ThreadPoolExecutor | None = None
        self._fetching: set[int] = set()
        self.read_index = lru_cache(maxsize=max_open_shards)(self._read_index)
        self._open_cached = lru_cache(maxsize=max_open_shards)(self._open_shard)

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Begins to fetch shards that will be read soon, in this order. Errors are raised when they are read."""
        fresh = [shard for shard in shards if shard not in self._fetching]
        if not fresh:
            return
        if self._fetchers is None:
            self._fetchers = ThreadPoolExecutor(FETCH_THREADS, "fetch")
        self._fetching = set(shards)
        for shard in fresh:
            self._fetchers.submit(self._store.path, self._dataset.shards[shard].name)

    def read_encoded(self, shard: int, start: int = 0, stop: int | None = None) -> Iterator[EncodedJpeg | bytes]:
        """Rows [start, stop) of a shard: JPEGs that libjpeg-turbo alone decodes, and the bytes of other images.

        Raises DataError for a shard that differs from its manifest, StoreError for one that is out of reach.
        """
        open_shard = self._open_cached(shard)
        stop = len(open_shard.index) if stop is None else stop
        for at in range(start, stop, READ_ROWS):
            yield from open_shard.read_rows(at, min(at + READ_ROWS, stop))

    def read_image(self, shard: int, row: int) -> EncodedJpeg | npt.NDArray[np.uint8]:
        """A JPEG to be decoded, or any other image as uint8 [H, W, 3] RGB. Raises as `read_encoded`."""
        data = self._open_cached(shard).read_row(row)
        if isinstance(data, EncodedJpeg):
            return data
        with self.prefix_decode_errors(shard, row):
            return decode_image(data)

    def read_pixels(self, shard: int, row: int) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3] RGB, decoded whole and kept while there is room. Raises as `read_encoded`."""
        cached = self._decoded.get((shard, row))
        if cached is not None:
            return cached
        image = self.read_image(shard, row)
        with self.prefix_decode_errors(shard, row):
            pixels = image.decode_whole() if isinstance(image, EncodedJpeg) else image
        if self._decoded_bytes + pixels.nbytes <= DECODED_BYTES:
            self._decoded[shard, row] = pixels
            self._decoded_bytes += pixels.nbytes
        return pixels

    def prefix_decode_errors(self, shard: int, row: int) -> "_DecodeErrorPrefix":
        """A context that puts the shard and key of an image in front of a DataError."""
        return _DecodeErrorPrefix(self, shard, row)

    def shard_uri(self, shard: int) -> str:
        return f"{self._store.uri}/{self._dataset.shards[shard].name}"

    def read_class_ids(self, shard: int, num_classes: int) -> npt.NDArray[np.int64]:
        """int64 [rows] class indices of a labeled shard. Raises DataError for an image without one below `num_classes`."""
        index = self.read_index(shard)
        wrong = np.flatnonzero((index.class_ids < 0) | (index.class_ids >= num_classes))
        if len(wrong):
            row = int(wrong[0])
            class_id = None if index.class_ids[row] < 0 else int(index.class_ids[row])
            raise DataError(
                f"{self.shard_uri(shard)}: {index.keys[row]}: label {class_id}: must be a class index below {num_classes}"
            )
        return index.class_ids

    def _read_index(self, shard: int) -> ShardIndex:
        return ShardIndex.load(self._store, self._dataset.shards[shard])

    def _open_shard(self, shard: int) -> "_OpenShard":
        manifest, uri = self._dataset.shards[shard], self.shard_uri(shard)
        path = self._store.path(manifest.name)
        with os_errors_as_store_errors(uri, "read"):
            file = path.open("rb")
            if shard not in self._checked:
                check_shard_file(path, manifest, uri)
                self._checked.add(shard)
            return _OpenShard(file, self.read_index(shard), uri)


def count_window_shards(dataset: Dataset) -> int:
    """The number of shards of a dataset that training reads together: 128 of small images, 32 of 256 MiB."""
    fitting = WINDOW_BYTES * len(dataset.shards) // max(dataset.bytes, 1)
    return min(max(fitting, MIN_WINDOW_SHARDS), WINDOW_SHARDS)


class _OpenShard:
    def __init__(self, file: IO[bytes], index: ShardIndex, uri: str) -> None:
        self.index = index
        self._file = file
        self._uri = uri

    def read_row(self, row: int) -> EncodedJpeg | bytes:
        index = self.index
        data = self._read_bytes(row, int(index.offsets[row]), int(index.sizes[row]))
        width = int(index.widths[row])
        return EncodedJpeg(data, width, int(index.heights[row])) if width else data

    def read_rows(self, start: int, stop: int) -> list[EncodedJpeg | bytes]:
        """Rows [start, stop), in one read."""
        index = self.index
        first = int(index.offsets[start])
        data = memoryview(self._read_bytes(start, first, int(index.offsets[stop - 1] + index.sizes[stop - 1]) - first))
        starts = index.offsets[start:stop] - first
        ends = (starts + index.sizes[start:stop]).tolist()
        images = [data[at:end] for at, end in zip(starts.tolist(), ends, strict=True)]
        sizes = zip(images, index.widths[start:stop].tolist(), index.heights[start:stop].tolist(), strict=True)
        # EncodedJpeg(…) takes four times as long, which is noticeable at 32 px.
        encoded: list[EncodedJpeg] = list(map(partial(tuple.__new__, EncodedJpeg), sizes))
        if index.widths[start:stop].all():
            return cast(list[EncodedJpeg | bytes], encoded)
        return [image if image.width else bytes(image.data) for image in encoded]

    def _read_bytes(self, row: int, offset: int, length: int) -> bytes:
        try:
            return read_range(self._file, offset, length)
        except DataError as error:
            raise DataError(f"{self._uri}: {self.index.keys[row]}: {error}; import the data again") from error
        except OSError as error:
            raise StoreError(f"{self._uri}: {self.index.keys[row]}: cannot read: {error.strerror or error}") from error


class _DecodeErrorPrefix:
    """A class, since it is entered for each image and a generator's context costs more."""

    __slots__ = ("_row", "_shard", "_source")

    def __init__(self, source: ImageSource, shard: int, row: int) -> None:
        self._source, self._shard, self._row = source, shard, row

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, DataError):
            key = self._source.read_index(self._shard).keys[self._row]
            raise DataError(f"{self._source.shard_uri(self._shard)}: {key}: {error}; import the data again") from error
