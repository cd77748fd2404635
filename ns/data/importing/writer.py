"""Writing tar shards, each with its index beside it."""

import contextlib
import io
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Self

from ns.core.digest import sha256_file
from ns.core.errors import DataError
from ns.data.dataset import Shard
from ns.data.index import ShardIndex
from ns.data.loading.decode import look
from ns.data.scratch import scratch, writing
from ns.data.shards import BLOCK, IMAGES, LABEL, MEMBER_BYTES, Sample, is_inside, is_utf8
from ns.storage import Store


class ShardWriter:
    """Writes shards of at most `max_samples` images and `max_bytes` bytes into a store folder: `shard-00000.tar` …

    With `first`, they are `FIRST.tar`, `FIRST-1.tar` …. The same samples in the same order give the same bytes: no times,
    owners or modes of the machine are kept.
    """

    def __init__(self, folder: Store, *, max_samples: int, max_bytes: int, first: str | None = None) -> None:
        self._folder = folder
        self._first = first
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._done: list[Shard] = []
        self._keys: set[str] = set()
        self._samples: list[Sample] = []
        self._sizes: list[tuple[int, int]] = []
        self._stack = contextlib.ExitStack()
        self._scratch = self._stack.enter_context(scratch("shards"))
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self._roll()
        finally:
            if self._tar is not None:
                with contextlib.suppress(OSError):
                    self._tar.close()
            self._stack.close()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The finished shards; all of them once the writer is closed."""
        return tuple(self._done)

    def add(self, key: str, extension: str, data: bytes, label: int | None) -> None:
        """Appends one image. The key has no dot in its base name and was not used before.

        Raises DataError for a key that would not come back, StoreError when the shard cannot be written.
        """
        base = key.rpartition("/")[2]
        if not base or "." in base or key in self._keys or not is_inside(key) or not is_utf8(key):
            raise DataError(f"key {key!r}: must be new, relative, UTF-8, and without a dot in its last part")
        if extension not in IMAGES:
            raise DataError(f"{key}.{extension}: must be one of {', '.join(IMAGES)}")
        self._keys.add(key)
        if self._tar is not None and (
            len(self._samples) >= self._max_samples or self._tar.offset + len(data) + 2 * MEMBER_BYTES > self._max_bytes
        ):
            self._roll()
        with writing(self._scratch, "write a shard"):
            if self._tar is None:
                self._tar = tarfile.open(self._path, "w:", format=tarfile.PAX_FORMAT)  # noqa: SIM115
            _member(self._tar, f"{key}.{extension}", data)
            offset = self._tar.offset - -(-len(data) // BLOCK) * BLOCK
            if label is not None:
                _member(self._tar, f"{key}.{LABEL}", str(label).encode())
        self._samples.append(Sample(key, extension, offset, len(data), label))
        self._sizes.append(look(data))

    def _roll(self) -> None:
        if self._tar is None:
            return
        number = len(self._done)
        name = f"shard-{number:05d}.tar" if self._first is None else f"{self._first}{f'-{number}' if number else ''}.tar"
        with writing(self._scratch, "write a shard"):
            self._tar.close()
            self._tar = None
            shard = Shard(
                name=name, samples=len(self._samples), bytes=self._path.stat().st_size, sha256=sha256_file(self._path)
            )
        self._folder.put_file(name, self._path)
        ShardIndex.of(self._samples, self._sizes).write(self._folder, shard)
        self._done.append(shard)
        self._samples, self._sizes = [], []

    @property
    def _path(self) -> Path:
        return self._scratch / "shard.tar"


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
