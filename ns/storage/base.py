from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from ns.core.errors import StoreError

# Names that begin so belong to unfinished writes: never listed, never a key.
TEMPORARY = ".tmp-"
# Of S3, with the store's prefix.
KEY_BYTES = 1024


class BlobEntry(NamedTuple):
    """A blob as a listing has it."""

    key: str
    size: int
    """Bytes."""
    stamp: str
    """Changes when the blob does."""


class Store(Protocol):
    """A tree of immutable blobs below `uri`. All methods raise StoreError, naming the blob, the reason and the cure.

    A key is a relative POSIX path of any characters but NUL, at most 255 bytes a part and 1024 bytes in all, from the
    bucket or the store's root; `a//b` and `a/./b` are other spellings of `a/b`, `..` is refused. What one process has
    written, every other can read at once.
    """

    uri: str

    def at(self, key_or_uri: str) -> "Store":
        """The store of a folder: `ref` is a key below this store, or a URI or absolute path of its own."""

    def put(self, key: str, data: bytes) -> None:
        """Writes the whole blob or nothing; readers never see a part of it. Replaces what was there."""

    def put_file(self, key: str, path: Path) -> None:
        """Like `put`, from a file that may be larger than memory."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes the blob unless the key exists; says whether it wrote.

        In a folder exactly one of several simultaneous creators wins. S3 in its portable form has no such promise: two
        that look within the same instant both write, and the later bytes stay. So let the bytes follow from the key, or
        let one writer own it.
        """

    def get(self, key: str) -> bytes:
        """The whole blob, checked against its checksum where the store keeps one."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length), fewer at the end of the blob. Their number is checked, their content is not."""

    def open(self, key: str) -> BinaryIO:
        """The blob from its first byte to its last, in bounded memory, for one reader that does not seek.

        The last read raises StoreError if the bytes do not match the checksum.
        """

    def path(self, key: str) -> Path:
        """A local file with the blob's bytes, for readers that map or seek: in place, or fetched once into a cache.

        Open it at once: a cached file may be unlinked from a few seconds later on. Whoever has it open or mapped by then
        keeps its bytes.
        """

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int:
        """Bytes."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with `prefix` (any beginning, not only a folder), in the order of their UTF-8 bytes."""

    def entries(self, prefix: str = "") -> Iterator[BlobEntry]:
        """Like `list`, with sizes and stamps."""

    def delete(self, key: str) -> None:
        """Removes the blob; a key that is not there is no error."""

    def delete_prefix(self, prefix: str) -> int:
        """Removes all blobs whose keys start with `prefix`, in no order; says how many."""


def open_store(uri: str) -> Store:
    """The store at a folder path, `file:///absolute/path` or `s3://bucket/prefix`.

    Raises StoreError for a scheme that no store implements.
    """
    from ns.storage.local import LocalStore
    from ns.storage.s3 import S3Store

    scheme, separator, _ = uri.partition("://")
    if scheme == "s3" and separator:
        return S3Store(uri)
    if not separator and not uri.startswith("file:"):
        return LocalStore(Path(uri))
    if scheme.partition(":")[0] == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise StoreError(f"{uri}: a file URI has three slashes: file:///absolute/path")
        return LocalStore(Path(unquote(parts.path)))
    raise StoreError(
        f"{scheme}://…: no store for scheme {scheme!r}; use a folder path, file:///absolute/path or s3://bucket/prefix"
    )


def split_uri(uri: str) -> tuple[str, str]:
    """`a/b/c.yaml` → (`a/b`, `c.yaml`): the folder to open and the key in it."""
    parent, _, key = uri.rpartition("/")
    if not key or parent.endswith(":/"):
        raise StoreError(f"{uri}: must name a file, not a folder")
    return parent or ("/" if uri.startswith("/") else "."), unquote(key) if uri.startswith("file:") else key


def parent_key(key: str) -> str:
    """The folder of a key: `store/models/x/model.json` → `store/models/x`."""
    return key.rpartition("/")[0]


def read_uri(uri: str) -> bytes:
    """The bytes of one file by its URI or path."""
    parent, key = split_uri(uri)
    return open_store(parent).get(key)


def key_parts(key: str) -> tuple[str, ...]:
    """The folders and the name in a key. Raises StoreError for what is no key."""
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts or "\0" in key:
        raise StoreError(f"{key!r}: not a key: must be a relative path without '..'")
    if any(part.startswith(TEMPORARY) for part in parts):
        raise StoreError(f"{key!r}: not a key: names that begin with {TEMPORARY} are kept for unfinished writes")
    try:
        length = len(key.encode())
    except UnicodeEncodeError as error:
        raise StoreError(f"{key!r}: not a key: must be text that UTF-8 can spell; rename the file") from error
    if length > KEY_BYTES:
        raise StoreError(f"{key[:40]!r}…: not a key: {length} bytes are too long, S3 takes {KEY_BYTES}; shorten it")
    return parts


def check_prefix(prefix: str) -> None:
    if prefix.startswith("/") or ".." in prefix.split("/") or "\0" in prefix:
        raise StoreError(f"{prefix!r}: not a prefix: must be the beginning of a relative path without '..'")


def check_range(uri: str, start: int, length: int) -> None:
    if start < 0 or length < 0:
        raise StoreError(f"{uri}: cannot read bytes [{start}, {start + length}): start and length must not be negative")
