"""Where bytes live: a folder today, S3 behind the same interface.

Keys are relative POSIX paths below the store's root. A folder of the store is itself a store (`at`).
"""

from ns.store.base import Store, open_store, read_uri, split_uri
from ns.store.local import LocalStore

__all__ = ["LocalStore", "Store", "open_store", "read_uri", "split_uri"]
