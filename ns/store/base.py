from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from ns.errors import StoreError


class Store(Protocol):
    """A tree of immutable blobs below `uri`. All methods raise StoreError, naming the key and the reason."""

    uri: str

    def at(self, ref: str) -> "Store":
        """The store of a folder: `ref` is a key below this store, or a URI or absolute path of its own."""

    def put(self, key: str, data: bytes) -> None:
        """Writes the whole blob or nothing; readers never see a part of it. Replaces what was there."""

    def put_file(self, key: str, path: Path) -> None:
        """Like `put`, from a file that may be larger than memory."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes the blob unless the key exists; says whether it wrote. The first writer wins."""

    def get(self, key: str) -> bytes: ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length), fewer at the end of the blob."""

    def path(self, key: str) -> Path:
        """A local file with the blob's bytes, for readers that map or seek: in place, or fetched once into a cache."""

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int:
        """Bytes."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with `prefix`, in lexical order."""

    def delete(self, key: str) -> None:
        """Removes the blob; a key that is not there is no error."""


def open_store(uri: str) -> Store:
    """The store at a folder path or `file://` URI.

    Raises StoreError for a scheme that no store implements.
    """
    from ns.store.local import LocalStore

    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return LocalStore(Path(unquote(parts.path) if parts.scheme else uri))
    raise StoreError(f"{uri}: no store for scheme {parts.scheme!r}; use a folder path or file:///absolute/path")


def split_uri(uri: str) -> tuple[str, str]:
    """`a/b/c.yaml` → (`a/b`, `c.yaml`): the folder to open and the key in it."""
    folder, _, name = uri.rpartition("/")
    if not name:
        raise StoreError(f"{uri}: must name a file, not a folder")
    return folder or ("/" if uri.startswith("/") else "."), unquote(name) if uri.startswith("file://") else name


def read_uri(uri: str) -> bytes:
    """The bytes of one file by its URI or path."""
    folder, name = split_uri(uri)
    return open_store(folder).get(name)
