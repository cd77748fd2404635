from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol
from urllib.parse import unquote

from ns.core.errors import StoreError

# Names with this prefix belong to unfinished writes: they are never listed, and never keys.
TEMPORARY = ".tmp-"
# S3's limit for a key, including the store's prefix.
KEY_BYTES = 1024


class BlobEntry(NamedTuple):
    """A blob in a listing."""

    key: str
    size: int
    """Bytes."""
    stamp: str
    """A text that changes when the blob changes."""
    modified_at: float = 0
    """When it was written, seconds since 1970 by the store's clock; 0 if that is unknown."""


class Store(Protocol):
    """A tree of immutable blobs below `uri`. All methods raise StoreError, naming the blob, the reason and the cure.

    A key is a relative POSIX path of any characters but NUL, with at most 255 bytes per part and 1024 bytes in all, counted from the
    bucket or the store's root. `a//b` and `a/./b` are other spellings of `a/b`; `..` is refused. What one process has written, all
    others can read at once.
    """

    uri: str

    def at(self, key_or_uri: str) -> "Store":
        """The store of a folder, given by a key below this store, a URI or an absolute path."""

    def put(self, key: str, data: bytes) -> None:
        """Writes the whole blob or nothing; readers never see a part of it. Replaces an existing blob."""

    def put_file(self, key: str, path: Path) -> None:
        """Like `put`, from a file that may be larger than memory."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes the blob unless the key exists; returns whether it wrote.

        In a folder, and on an S3 server that knows conditional puts, exactly one of several simultaneous writers wins. Other S3 servers
        cannot promise that: if two writers look at the same instant, both write, and the later bytes stay. A writer whose answer was
        lost on the way may be told False: who must know for sure writes bytes of its own, and reads them back.
        """

    def get(self, key: str) -> bytes:
        """The whole blob, checked against its checksum if the store keeps one."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length), fewer at the end of the blob. Their number is checked, but not their content."""

    def open(self, key: str) -> BinaryIO:
        """The blob from its first byte to its last, in bounded memory, for one reader that does not seek.

        The last read raises StoreError if the bytes do not match the checksum.
        """

    def path(self, key: str) -> Path:
        """A local file with the blob's bytes, for readers that map or seek: the blob itself, or a copy that is fetched once into a cache.

        Open it at once: a cached file may be unlinked after a few seconds. A reader that has it open or mapped by then keeps its bytes.
        """

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int:
        """Bytes."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with `prefix` (any text, not only a folder), in the order of their UTF-8 bytes."""

    def entries(self, prefix: str = "") -> Iterator[BlobEntry]:
        """Like `list`, with sizes and stamps."""

    def delete(self, key: str) -> None:
        """Removes the blob; a key that is not there is no error."""

    def delete_prefix(self, prefix: str) -> int:
        """Removes all blobs whose keys start with `prefix`, in any order; returns their number."""


def split_uri(uri: str) -> tuple[str, str]:
    """`a/b/c.yaml` → (`a/b`, `c.yaml`): the folder to open, and the key in it."""
    parent, _, key = uri.rpartition("/")
    if not key or parent.endswith(":/"):
        raise StoreError(f"{uri}: must name a file, not a folder")
    return parent or ("/" if uri.startswith("/") else "."), unquote(key) if uri.startswith("file:") else key


def parent_key(key: str) -> str:
    """The folder of a key: `store/models/x/model.json` → `store/models/x`."""
    return key.rpartition("/")[0]


def key_parts(key: str) -> tuple[str, ...]:
    """The folders and the name in a key. Raises StoreError for an invalid key."""
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
