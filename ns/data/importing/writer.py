"""Writes tar shards, each with its index beside it."""

import contextlib
import io
import tarfile
from types import TracebackType
from typing import Self

from ns.core.digest import sha256_file
from ns.core.errors import DataError
from ns.data.dataset import Shard
from ns.data.index import ShardIndex
from ns.data.loading.decode import read_jpeg_size
from ns.data.shards import CLASS_EXTENSION, MEMBER_BYTES, SHARD_EXTENSIONS, ShardSample, is_inside, is_utf8
from ns.storage import Store
from ns.storage.scratch import explain_scratch_errors, make_scratch_dir


class ShardWriter:
    """Writes shards of at most `max_samples` images and `max_bytes` bytes into a store: `shard-00000.tar` …

    With `stem`, they are `STEM.tar`, `STEM-1.tar` …. The same samples in the same order give the same bytes: times, owners
    and modes are not kept.
    """

    def __init__(self, store: Store, *, max_samples: int, max_bytes: int, stem: str | None = None) -> None:
        self._store = store
        self._stem = stem
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._finished: list[Shard] = []
        self._keys: set[str] = set()
        self._samples: list[ShardSample] = []
        self._sizes: list[tuple[int, int]] = []
        self._stack = contextlib.ExitStack()
        self._tar_path = self._stack.enter_context(make_scratch_dir("shards")) / "shard.tar"
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish_shard()
        finally:
            if self._tar is not None:
                with contextlib.suppress(OSError):
                    self._tar.close()
            self._stack.close()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The finished shards: all, once the writer is closed."""
        return tuple(self._finished)

    def add_image(self, key: str, extension: str, data: bytes, class_id: int | None) -> None:
        """Appends one image. The key must be new, and have no dot in its base name.

        Raises DataError for a key that a reader would not return, StoreError when the shard cannot be written.
        """
        base = key.rpartition("/")[2]
        if not base or "." in base or key in self._keys or not is_inside(key) or not is_utf8(key):
            raise DataError(f"key {key!r}: must be new, relative, UTF-8, and without a dot in its last part")
        if extension not in SHARD_EXTENSIONS:
            raise DataError(f"{key}.{extension}: must be one of {', '.join(SHARD_EXTENSIONS)}")
        self._keys.add(key)
        if self._tar is not None and (
            len(self._samples) >= self._max_samples or self._tar.offset + len(data) + 2 * MEMBER_BYTES > self._max_bytes
        ):
            self._finish_shard()
        with explain_scratch_errors(self._tar_path.parent, "write a shard"):
            if self._tar is None:
                self._tar = tarfile.open(self._tar_path, "w:", format=tarfile.PAX_FORMAT)  # noqa: SIM115
            _add_member(self._tar, f"{key}.{extension}", data)
            offset = self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if class_id is not None:
                _add_member(self._tar, f"{key}.{CLASS_EXTENSION}", str(class_id).encode())
        self._samples.append(ShardSample(key, extension, offset, len(data), class_id))
        self._sizes.append(read_jpeg_size(data))

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        number = len(self._finished)
        name = f"shard-{number:05d}.tar" if self._stem is None else f"{self._stem}{f'-{number}' if number else ''}.tar"
        with explain_scratch_errors(self._tar_path.parent, "write a shard"):
            self._tar.close()
            self._tar = None
            shard = Shard(
                name=name, samples=len(self._samples), bytes=self._tar_path.stat().st_size, sha256=sha256_file(self._tar_path)
            )
        self._store.put_file(name, self._tar_path)
        self._finished.append(ShardIndex.from_samples(self._samples, self._sizes).save(self._store, shard))
        self._samples, self._sizes = [], []


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
