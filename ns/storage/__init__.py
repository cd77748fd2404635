"""Where bytes live: a folder, or S3 through the minio client, behind the same interface.

Keys are relative POSIX paths below the store's root. A folder of the store is itself a store (`at`). S3Store is not named
here: its client takes a while to import, which those who work in a folder are spared.
"""

from ns.storage.base import Store, open_store, parent_key, read_uri, split_uri
from ns.storage.local import LocalStore

__all__ = ["LocalStore", "Store", "open_store", "parent_key", "read_uri", "split_uri"]
