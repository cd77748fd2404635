"""Local copies of remote blobs in bounded space, shared by all processes of a machine."""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from ns.core.digest import digest_json
from ns.core.errors import StoreError
from ns.storage.base import TEMPORARY
from ns.storage.local import HINTS

DIRECTORY_VARIABLE = "NS_CACHE_DIR"
LIMIT_VARIABLE = "NS_CACHE_MIB"
LIMIT_MIB = 20 * 1024

# A file must stay from the return of path() until its caller has opened it. Later it may be unlinked: on Linux, readers that have a file
# open or mapped keep its bytes.
GRACE_SECONDS = 10
# A download that has not grown for this time belongs to a killed process.
ABANDONED_SECONDS = 3600


class BlobCache:
    """A cache that removes the least recently used files first. Two processes that want the same blob fetch it once."""

    def __init__(self, root: Path, limit_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self._clock = clock

    @staticmethod
    def from_environment() -> "BlobCache":
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        root = Path(os.environ.get(DIRECTORY_VARIABLE) or f"{home}/noisy-student").expanduser()
        text = os.environ.get(LIMIT_VARIABLE) or str(LIMIT_MIB)
        if not text.isascii() or not text.isdigit() or int(text) == 0:
            raise StoreError(f"{LIMIT_VARIABLE}={text}: must be a whole number of MiB, at least 1")
        return BlobCache(root.absolute(), int(text) << 20)

    def fetch_blob(self, identity: tuple[str, ...], size: int, suffix: str, download: Callable[[BinaryIO], None]) -> Path:
        """The file for `identity`, which must change whenever the bytes change. `download` writes and checks it if it is not there.

        Raises StoreError if the folder cannot be written or the blob does not fit.
        """
        blob_digest = digest_json(list(identity))
        target = self.root / "blobs" / (blob_digest + suffix)
        try:
            if self._touch_blob(target, size):
                return target
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(exist_ok=True)
            # 256 locks are few enough to stay; two blobs that share one only wait for each other.
            with FileLock(self.root / "locks" / blob_digest[:2]):
                if not self._touch_blob(target, size):
                    self._make_room(size)
                    self._download_blob(target, download)
            return target
        except OSError as error:
            reason = HINTS.get(error.errno or 0, error.strerror or str(error))
            cure = "a folder with more room" if error.errno == errno.ENOSPC else "another folder"
            raise StoreError(
                f"{self.root}: cannot keep copies of remote files: {reason}, or set {DIRECTORY_VARIABLE} to {cure}"
            ) from error

    def _touch_blob(self, target: Path, size: int) -> bool:
        """Whether the file is there and whole. Marks it as used now, since many machines keep no access times."""
        try:
            if target.stat().st_size == size:
                now = self._clock()
                os.utime(target, (now, now))
                return True
            # A crash of the machine has cut it short.
            target.unlink()
        except FileNotFoundError:
            pass
        return False

    def _download_blob(self, target: Path, download: Callable[[BinaryIO], None]) -> None:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                download(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o444)
            now = self._clock()
            os.utime(temporary, (now, now))
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Removes the files that were used longest ago until `size` more bytes fit within the limit and on the disk."""
        if size > self.limit_bytes:
            raise StoreError(
                f"{self.root}: a file of {size >> 20} MiB does not fit into the cache of {self.limit_bytes >> 20} MiB: "
                f"raise {LIMIT_VARIABLE}"
            )
        # If the lock is taken, another process is making room.
        with suppress(Timeout), FileLock(self.root / "locks" / "room", timeout=0):
            now = self._clock()
            entries = []
            for entry in os.scandir(self.root / "blobs"):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    entries.append((status.st_mtime, status.st_size, entry.path))
            used = sum(bytes_ for _, bytes_, _ in entries)
            limit = min(self.limit_bytes, used + shutil.disk_usage(self.root).free)
            for used_at, bytes_, path in sorted(entries):
                unfinished = Path(path).name.startswith(TEMPORARY)
                idle = now - used_at
                if idle > ABANDONED_SECONDS if unfinished else (used + size > limit and idle > GRACE_SECONDS):
                    Path(path).unlink(missing_ok=True)
                    used -= bytes_
