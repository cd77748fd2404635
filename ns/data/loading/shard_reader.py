"""Images of a dataset by (shard, row), read from shards that are fetched ahead and kept open, a bounded number at a time."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError, StoreError
from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.data.loading.decode import Encoded, decode
from ns.data.loading.sampler import WINDOW
from ns.data.shards import check_bytes, read_range
from ns.storage import Store

DECODED_BYTES = 256 << 20
"""Decoded images that a process may keep: small datasets are decoded once."""
RUN = 256
"""Neighbours that are read at once: a small image on its own costs an eighth more to read than to decode."""
FETCHERS = 2


class ImageSource:
    """Encoded images of a dataset. One for each process; safe to hand to a child before its first use.

    `held`: shards that stay open. Training reads from a window of them at a time; who goes through them in order needs two.
    """

    def __init__(self, folder: Store, dataset: Dataset, *, held: int = 2 * WINDOW) -> None:
        self._folder = folder
        self._dataset = dataset
        self._decoded: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
        self._decoded_bytes = 0
        self._checked: set[int] = set()
        self._fetchers: ThreadPoolExecutor | None = None
        self._fetching: set[int] = set()
        self.index = lru_cache(maxsize=held)(self._read_index)
        self._open = lru_cache(maxsize=held)(self._open_shard)

    def fetch_ahead(self, shards: Iterable[int]) -> None:
        """Begins to fetch shards that will be read soon. What goes wrong is said when they are read."""
        fresh = set(shards) - self._fetching
        if not fresh:
            return
        if self._fetchers is None:
            self._fetchers = ThreadPoolExecutor(FETCHERS, "fetch")
        self._fetching = set(shards)
        for shard in sorted(fresh):
            self._fetchers.submit(self._folder.path, self._dataset.shards[shard].name)

    def encoded(self, shard: int, start: int = 0, stop: int | None = None) -> Iterator[Encoded | bytes]:
        """Rows [start, stop) of a shard: JPEGs that libjpeg-turbo decodes by itself, and the bytes of other images.

        Raises DataError naming the shard and its cure when it is not what the manifest says, StoreError when it is out of reach.
        """
        opened = self._open(shard)
        stop = len(opened.index) if stop is None else stop
        for at in range(start, stop, RUN):
            yield from opened.read(at, min(at + RUN, stop))

    def image(self, shard: int, row: int) -> Encoded | npt.NDArray[np.uint8]:
        """A JPEG to be decoded, or any other image as uint8 [H, W, 3] RGB."""
        data = self._open(shard).one(row)
        if isinstance(data, Encoded):
            return data
        with self.blaming(shard, row):
            return decode(data)

    def pixels(self, shard: int, row: int) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3] RGB, decoded whole, and kept while there is room."""
        known = self._decoded.get((shard, row))
        if known is not None:
            return known
        image = self.image(shard, row)
        with self.blaming(shard, row):
            pixels = image.whole() if isinstance(image, Encoded) else image
        if self._decoded_bytes + pixels.nbytes <= DECODED_BYTES:
            self._decoded[shard, row] = pixels
            self._decoded_bytes += pixels.nbytes
        return pixels

    def blaming(self, shard: int, row: int) -> "_Blame":
        """A context in which an image that cannot be decoded is named."""
        return _Blame(self, shard, row)

    def name(self, shard: int) -> str:
        return f"{self._folder.uri}/{self._dataset.shards[shard].name}"

    def labels(self, shard: int, classes: int) -> npt.NDArray[np.int64]:
        """Class indices of a labelled shard. Raises DataError for an image without one below `classes`."""
        index = self.index(shard)
        wrong = np.flatnonzero((index.labels < 0) | (index.labels >= classes))
        if len(wrong):
            row = int(wrong[0])
            label = None if index.labels[row] < 0 else int(index.labels[row])
            raise DataError(f"{self.name(shard)}: {index.keys[row]}: label {label}: must be a class index below {classes}")
        return index.labels

    def _read_index(self, shard: int) -> ShardIndex:
        return ShardIndex.read(self._folder, self._dataset.shards[shard])

    def _open_shard(self, shard: int) -> "_Opened":
        entry = self._dataset.shards[shard]
        path = self._folder.path(entry.name)
        try:
            file = path.open("rb")
            if shard not in self._checked:
                check_bytes(path, entry, self.name(shard))
                self._checked.add(shard)
            return _Opened(file, self.index(shard), self.name(shard))
        except OSError as error:
            raise StoreError(f"{self.name(shard)}: cannot be read: {error.strerror or error}") from error


class _Opened:
    """An open shard."""

    def __init__(self, file: IO[bytes], index: ShardIndex, name: str) -> None:
        self.index = index
        self._file = file
        self._name = name

    def one(self, row: int) -> Encoded | bytes:
        index = self.index
        data = self._bytes(row, int(index.offsets[row]), int(index.sizes[row]))
        width = int(index.widths[row])
        return Encoded(data, width, int(index.heights[row])) if width else data

    def read(self, start: int, stop: int) -> list[Encoded | bytes]:
        """Rows [start, stop), in one read."""
        index = self.index
        first = int(index.offsets[start])
        data = memoryview(self._bytes(start, first, int(index.offsets[stop - 1] + index.sizes[stop - 1]) - first))
        starts = index.offsets[start:stop] - first
        ends = (starts + index.sizes[start:stop]).tolist()
        images = [data[at:end] for at, end in zip(starts.tolist(), ends, strict=True)]
        sizes = zip(images, index.widths[start:stop].tolist(), index.heights[start:stop].tolist(), strict=True)
        # Encoded(…) by itself takes four times as long, which shows at 32 px.
        found: list[Encoded] = list(map(partial(tuple.__new__, Encoded), sizes))
        if index.widths[start:stop].all():
            return cast(list[Encoded | bytes], found)
        return [image if image.width else bytes(image.data) for image in found]

    def _bytes(self, row: int, at: int, length: int) -> bytes:
        try:
            return read_range(self._file, at, length)
        except DataError as error:
            raise DataError(f"{self._name}: {self.index.keys[row]}: {error}; import the data again") from error
        except OSError as error:
            raise StoreError(f"{self._name}: cannot be read: {error.strerror or error}") from error


class _Blame:
    """Cheaper than a generator's context: it is entered for each image."""

    __slots__ = ("_row", "_shard", "_source")

    def __init__(self, source: ImageSource, shard: int, row: int) -> None:
        self._source, self._shard, self._row = source, shard, row

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, DataError):
            key = self._source.index(self._shard).keys[self._row]
            raise DataError(f"{self._source.name(self._shard)}: {key}: {error}; import the data again") from error
