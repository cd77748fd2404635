"""Stores: a folder, or S3 through the minio client, behind the same interface.

Keys are relative POSIX paths below the store's root. A folder of a store is a store, too (`at`). S3Store is not imported here, because
its client takes long to import, and work in folders does not need it.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ns.core.errors import StoreError
from ns.storage.base import Store, parent_key, split_uri
from ns.storage.local import LocalStore

__all__ = ["LocalStore", "Store", "open_parent", "open_store", "parent_key", "read_uri", "split_uri"]


def open_store(uri: str) -> Store:
    """The store at a folder path, `file:///absolute/path` or `s3://bucket/prefix`.

    Raises StoreError for a scheme that no store implements.
    """
    if uri.startswith("s3://"):
        from ns.storage.s3 import S3Store

        return S3Store(uri)
    if uri.startswith("file:"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise StoreError(f"{uri}: a file URI has three slashes: file:///absolute/path")
        return LocalStore(Path(unquote(parts.path)))
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return LocalStore(Path(uri))
    raise StoreError(
        f"{scheme}://…: no store for scheme {scheme!r}; use a folder path, file:///absolute/path or s3://bucket/prefix"
    )


def open_parent(uri: str) -> tuple[Store, str]:
    """The store of the folder that a file lies in, and the file's key in it."""
    parent, key = split_uri(uri)
    return open_store(parent), key


def read_uri(uri: str) -> bytes:
    """The bytes of the file at a URI or path."""
    store, key = open_parent(uri)
    return store.get(key)
