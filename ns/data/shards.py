"""Reads tar shards in the WebDataset layout: `KEY.png` (or jpg, jpeg, webp) and, in labeled data, `KEY.cls`."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from ns.core.digest import sha256_file
from ns.core.errors import DataError
from ns.data.dataset import Shard
from ns.storage.local import os_errors_as_store_errors

SHARD_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CLASS_EXTENSION = "cls"
CLASS_ID_BYTES = 18
"""Maximum digits of a class index: more do not fit into 64 bits."""

MEMBER_BYTES = 2 * tarfile.BLOCKSIZE
"""Maximum bytes that a tar adds to a file with a name of up to 100 bytes: a header, and zeros up to a whole block."""
MAX_HEADER_BYTES = 1 << 20
"""Maximum size of an extended header: names are short, and a damaged length must not fill the memory."""


class ShardSample(NamedTuple):
    """One image inside a tar."""

    key: str
    extension: str
    """One of SHARD_EXTENSIONS."""
    offset: int
    """Offset of the image's first byte in the tar."""
    size: int
    """Size in bytes."""
    class_id: int | None
    """Class index; None if the tar has none."""


def split_key(name: str) -> tuple[str, str]:
    """`a/b.c.png` → (`a/b`, `c.png`): WebDataset's key runs to the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def read_samples(path: Path) -> list[ShardSample]:
    """The images of a tar, in its order. Files that are neither images nor class indices are skipped.

    Raises DataError as `iterate_members` does, and for two images of one key, a class index without an image, and a `.cls` file
    that holds no class index. An image that is missing because of damage is always noticed.
    """
    images: dict[str, tuple[str, int, int]] = {}
    class_ids: dict[str, int] = {}
    for name, offset, size in iterate_members(path):
        key, extension = split_key(name)
        if key.endswith("/") or not key:
            # A hidden file, such as macOS's `._a.png`: no reader of WebDataset takes it for a sample.
            continue
        if extension == CLASS_EXTENSION:
            if key in class_ids:
                raise DataError(f"{path}: {name}: is there twice")
            class_ids[key] = read_class_id(path, name, offset, size)
        elif extension in SHARD_EXTENSIONS:
            if key in images:
                raise DataError(f"{path}: {name}: a second image for key {key!r}")
            images[key] = (extension, offset, size)
    if orphans := class_ids.keys() - images.keys():
        raise DataError(f"{path}: {min(orphans)}.{CLASS_EXTENSION}: a label without an image")
    return [ShardSample(key, *member, class_ids.get(key)) for key, member in images.items()]


def iterate_members(path: Path, start: int = 0, size: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Name, offset in the file and size of each plain file of a tar, which may itself lie at [start, start + size) of a file.

    Reads uncompressed USTAR, PAX and GNU tars. Raises DataError naming the tar and the member for compressed, damaged and
    cut-off tars, for names that lead outside or are not UTF-8, and for links, devices and sparse files; StoreError if the file
    cannot be read.
    """
    with os_errors_as_store_errors(path, "read"), path.open("rb") as file:
        yield from _scan_members(path, file.fileno(), start, path.stat().st_size if size is None else start + size)


def read_class_id(path: Path, name: str, offset: int, size: int) -> int:
    """The class index in a `.cls` file of a tar. Raises DataError if it is none."""
    with os_errors_as_store_errors(path, "read"), path.open("rb") as file:
        text = read_range(file, offset, min(size, CLASS_ID_BYTES + 1))
    # int() would also take " 1_0 " and digits of other scripts.
    if len(text) > CLASS_ID_BYTES or not text.strip().isdigit():
        raise DataError(f"{path}: {name}: {text[:16]!r}: must be a class index, 0 or above")
    return int(text)


def read_range(file: IO[bytes], start: int, length: int) -> bytes:
    """Bytes [start, start + length) of an open file. Raises DataError if the file ends earlier."""
    data = os.pread(file.fileno(), length, start)
    if len(data) != length:
        raise DataError(f"cut off: the file ends within its {length} bytes")
    return data


def check_shard_file(path: Path, shard: Shard, uri: str) -> None:
    """Raises DataError, naming `uri`, unless the file has the size and SHA-256 of the manifest."""
    if (size := path.stat().st_size) != shard.bytes:
        raise DataError(f"{uri}: has {size} bytes, dataset.json says {shard.bytes}; import the data again")
    if sha256_file(path) != shard.sha256:
        raise DataError(f"{uri}: its sha256 is not that of dataset.json: it is damaged or was replaced; import the data again")


def is_inside(name: str) -> bool:
    """Whether a member's name stays inside the folder that it is unpacked to."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name


def is_utf8(text: str) -> bool:
    """Whether a name was UTF-8: Python reads other bytes as lone surrogates, which cannot be encoded again."""
    return text.encode(errors="replace").decode() == text


def _scan_members(path: Path, descriptor: int, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset in the file and size of each plain file of the tar at [start, end) of a file."""
    headers = _HeaderReader(descriptor, start, end)
    tar: tarfile.TarFile | None = None
    at = 0
    while True:
        try:
            tar = tar or tarfile.TarFile(fileobj=cast(IO[bytes], headers), encoding="utf-8")
            member = tar.next()
        except OSError:
            raise
        except Exception:
            # Garbage makes tarfile raise TarError, ValueError, IndexError and more. The bytes at `at` tell the reason.
            break
        if member is None:
            break
        # tarfile would keep all members in memory.
        tar.members.clear()  # type: ignore[attr-defined]
        _check_member(path, member)
        if member.isreg() and not member.name.endswith("/"):
            if member.size < 0 or start + member.offset_data + member.size > end:
                raise DataError(
                    f"{path}: not a whole tar file: at byte {start + member.offset}: "
                    f"a member of {member.size} bytes is cut off: the file ends at byte {end}"
                )
            yield member.name, start + member.offset_data, member.size
        at = tar.offset
    _check_end(path, descriptor, start + at, end)


class _HeaderReader(io.RawIOBase):
    """The part of a file that tarfile reads headers from. Refuses lengths from damaged headers that would fill the memory."""

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        self._descriptor, self._start, self._end = descriptor, start, end
        self._at = 0

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        position = self._start + self._at
        data = os.pread(self._descriptor, max(0, min(size, self._end - position)), position)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + (self._at if whence == io.SEEK_CUR else 0)
        return self._at


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not is_utf8(member.name):
        raise DataError(f"{path}: {os.fsencode(member.name)!r}: a name that is not UTF-8")
    if not is_inside(member.name):
        raise DataError(f"{path}: {member.name!r}: a name that leads outside the shard")
    if member.issparse() or not (member.isreg() or member.isdir()):
        kind = "a sparse file" if member.issparse() else "a link or device"
        raise DataError(f"{path}: {member.name}: {kind}; only plain files belong in a shard")


def _check_end(path: Path, descriptor: int, at: int, end: int) -> None:
    """Checks the end mark, since tarfile takes a damaged header, and a file that is cut off, for the end of the archive.

    Nothing but zeros may follow the last member, and some must follow, or missing members would not be noticed.
    """
    header = os.pread(descriptor, max(0, min(tarfile.BLOCKSIZE, end - at)), at)
    problem = ""
    if not header:
        problem = "no end mark, so it may be cut off"
    elif header.strip(b"\0"):
        problem = "a damaged header" if len(header) == tarfile.BLOCKSIZE else "it is cut off in a header"
    if problem:
        raise DataError(f"{path}: not a whole tar file: at byte {at}: {problem}")
    while rest := os.pread(descriptor, min(1 << 20, end - at), at):
        if rest.strip(b"\0"):
            raise DataError(f"{path}: not a whole tar file: more data follows its end mark")
        at += len(rest)
