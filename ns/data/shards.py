"""Reading tar shards in the WebDataset layout: `KEY.png` (or jpg, jpeg, webp), and `KEY.cls` where labeled."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

from ns.core.digest import sha256_file
from ns.core.errors import DataError
from ns.data.dataset import Shard

SHARD_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CLASS_EXTENSION = "cls"
CLASS_ID_BYTES = 18
"""A class index of more digits than this does not fit into 64 bits."""

BLOCK = 512
MEMBER_BYTES = 2 * BLOCK
"""What a tar adds to a file, at most but for names of over 100 bytes: a header, and zeros up to a whole block."""
MAX_HEADER_BYTES = 1 << 20
"""The longest extended header that is read: names are short, and a damaged length must not fill the memory."""


class ShardSample(NamedTuple):
    """One image inside a tar."""

    key: str
    extension: str
    """One of IMAGES."""
    offset: int
    """Of the image's first byte in the tar file."""
    size: int
    """Bytes."""
    class_id: int | None
    """Class index, where the tar has one."""


def split_key(name: str) -> tuple[str, str]:
    """`a/b.c.png` → (`a/b`, `c.png`): WebDataset's key runs to the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def read_samples(path: Path) -> list[ShardSample]:
    """The images of a tar, in its order. Other files than images and labels are passed over.

    Reads plain USTAR, PAX and GNU tars. Raises DataError naming tar and member for what does not belong in a shard: names that
    lead outside, links, devices, two images of one key, labels without an image or that are no class index; and for compressed,
    damaged and cut-off tars: an image that is missing from the index is always noticed.
    """
    images: dict[str, tuple[str, int, int]] = {}
    class_ids: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for name, offset, size in _scan_members(path, file, 0, path.stat().st_size):
                key, extension = split_key(name)
                if key.endswith("/") or not key:
                    # A hidden file, such as macOS's `._a.png`: no reader of WebDataset takes it for a sample.
                    continue
                if extension == CLASS_EXTENSION:
                    if key in class_ids:
                        raise DataError(f"{path}: {name}: is there twice")
                    class_ids[key] = parse_class_id(
                        f"{path}: {name}", os.pread(file.fileno(), min(size, CLASS_ID_BYTES + 1), offset)
                    )
                elif extension in SHARD_EXTENSIONS:
                    if key in images:
                        raise DataError(f"{path}: {name}: a second image for key {key!r}")
                    images[key] = (extension, offset, size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if orphans := class_ids.keys() - images.keys():
        raise DataError(f"{path}: {min(orphans)}.{CLASS_EXTENSION}: a label without an image")
    return [ShardSample(key, *member, class_ids.get(key)) for key, member in images.items()]


def iterate_members(path: Path, start: int = 0, size: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Name, offset in the file, and size of each plain file of a tar, which may itself lie at [start, start + size) of a file.

    Raises DataError as `read_index` does: no name leads outside, nothing is a link or device, and nothing is missing.
    """
    try:
        with path.open("rb") as file:
            yield from _scan_members(path, file, start, path.stat().st_size if size is None else start + size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_range(file: IO[bytes], start: int, length: int) -> bytes:
    """Bytes [start, start + length) of an open file. Raises DataError if the file ends before."""
    data = os.pread(file.fileno(), length, start)
    if len(data) != length:
        raise DataError(f"cut off: the file ends within its {length} bytes")
    return data


def check_shard_file(path: Path, shard: Shard, uri: str) -> None:
    """Raises DataError, naming `place`, unless the file has the bytes that the manifest describes."""
    if (size := path.stat().st_size) != shard.bytes:
        raise DataError(f"{uri}: has {size} bytes, dataset.json says {shard.bytes}; import the data again")
    if sha256_file(path) != shard.sha256:
        raise DataError(f"{uri}: its sha256 is not that of dataset.json: it is damaged or was replaced; import the data again")


def is_inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name


def is_utf8(text: str) -> bool:
    # Python reads names that are no UTF-8 as lone surrogates, which nothing can write down again.
    return text.encode(errors="replace").decode() == text


def parse_class_id(location: str, text: bytes) -> int:
    """What a `.cls` file says. Raises DataError for what is no class index."""
    # int() would also take " 1_0 " and other digits than ours.
    if len(text) > CLASS_ID_BYTES or not text.strip().isdigit():
        raise DataError(f"{location}: {text[:16]!r}: must be a class index, 0 or above")
    return int(text)


def _scan_members(path: Path, file: BinaryIO, at: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each plain file of a tar.

    Reads headers and no data, three times faster than tarfile, which besides takes a damaged header for the archive's end.
    """
    descriptor = file.fileno()
    extended: dict[bytes, bytes] = {}
    while (header := os.pread(descriptor, min(BLOCK, end - at), at)).strip(b"\0"):
        start = at
        try:
            kind, size = _parse_header(header)
            size = _parse_decimal(extended[b"size"]) if b"size" in extended else size
            data = at + BLOCK
            if data + size > end:
                raise ValueError(f"a member of {size} bytes is cut off: the file ends at byte {end}")
            at = data + (size + BLOCK - 1) // BLOCK * BLOCK
            if kind in b"xXgLK":
                if size > MAX_HEADER_BYTES:
                    raise ValueError(f"an extended header of {size} bytes")
                text = os.pread(descriptor, size, data)
                if kind in b"xX":
                    extended.update(_parse_pax_records(text))
                elif kind in b"L":
                    extended[b"path"] = text.partition(b"\0")[0]
                # Global headers hold comments; long link names belong to links, which are refused by themselves.
                continue
        except ValueError as error:
            raise DataError(f"{path}: not a whole tar file: at byte {start}: {error}") from error
        raw = _read_member_name(header, extended)
        try:
            name = raw.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: {raw!r}: a name that is not UTF-8") from error
        if not is_inside(name):
            raise DataError(f"{path}: {name!r}: a name that leads outside the shard")
        sparse = kind in b"S" or any(key.startswith(b"GNU.sparse") for key in extended)
        extended = {}
        if kind in b"5" or name.endswith("/"):
            # Some writers give folders a size, but none of them data.
            at = data
            continue
        if kind not in b"0\x007" or sparse:
            raise DataError(
                f"{path}: {name}: {'a sparse file' if sparse else 'a link or device'}; only plain files belong in a shard"
            )
        yield name, data, size
    _check_end(path, descriptor, at, end, len(header))


def _parse_header(header: bytes) -> tuple[bytes, int]:
    """Raises ValueError unless the header is whole: its checksum covers every byte."""
    if len(header) < BLOCK:
        raise ValueError("it is cut off in a header")
    if _parse_number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError("a damaged header")
    return header[156:157], _parse_number(header[124:136])


def _parse_number(field: bytes) -> int:
    """Octal text, or as GNU and star have it for large numbers, binary after a set bit."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:])
    text = field.partition(b"\0")[0].strip()
    if text.strip(b"01234567"):
        raise ValueError("a damaged header")
    return int(text or b"0", 8)


def _parse_decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > CLASS_ID_BYTES:
        raise ValueError(f"a size of {text[:CLASS_ID_BYTES]!r}")
    return int(text)


def _parse_pax_records(text: bytes) -> dict[bytes, bytes]:
    """PAX: `LENGTH KEYWORD=VALUE\\n`, LENGTH counting the whole record."""
    records = {}
    at = 0
    while at < len(text) and text[at]:
        length = _parse_decimal(text[at : at + CLASS_ID_BYTES + 2].partition(b" ")[0])
        keyword, equals, value = text[at : at + length].partition(b" ")[2].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise ValueError("a damaged extended header")
        records[keyword] = value[:-1]
        at += length
    return records


def _read_member_name(header: bytes, extended: dict[bytes, bytes]) -> bytes:
    name = extended.get(b"path")
    if name is None:
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0]
        # GNU's older format ("ustar  ") keeps times where USTAR has the front part of long names.
        if prefix and header[257:263] == b"ustar\0":
            name = prefix + b"/" + name
    return name


def _check_end(path: Path, descriptor: int, at: int, end: int, last: int) -> None:
    """Nothing but zeros may follow the last member, and some must, or nobody could tell that members are missing."""
    if not last:
        raise DataError(f"{path}: not a whole tar file: at byte {at}: no end mark, so it may be cut off")
    while rest := os.pread(descriptor, min(1 << 20, end - at), at):
        if rest.strip(b"\0"):
            raise DataError(f"{path}: not a whole tar file: more data follows its end mark")
        at += len(rest)
