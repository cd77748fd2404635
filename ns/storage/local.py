import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from ns.core.errors import StoreError
from ns.core.process import ProcessId
from ns.storage.base import TEMPORARY, BlobEntry, Store, check_prefix, check_range, key_parts

HINTS = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "the file is larger than this process or file system may write: raise `ulimit -f` or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder that you may write to, or change its owner",
    errno.EPERM: "permission denied: choose a folder that you may write to, or change its owner",
    errno.ENOENT: "no such file",
    errno.EISDIR: "is a folder, expected a file",
    errno.ENOTDIR: "a part of this path is a file, expected a folder",
    errno.EEXIST: "a part of this path is a file, expected a folder",
    errno.ENAMETOOLONG: "the name is too long: a file system takes 255 bytes a part; shorten it",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
    errno.EIO: "the disk cannot be read or written: look at the kernel's log, and restore the file from a copy",
    errno.ESTALE: "the network file system has lost this file: mount it again and run the same command again",
}

TEMPORARY_SECONDS = 24 * 3600
"""A write that has not touched its file for so long is that of a killed process, on whatever machine."""

# Errors of file systems without hard links (exFAT, many FUSE and network mounts), or with no more links for this file.
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


class LocalStore:
    """A folder. Writes go to a temporary file, are flushed to disk and renamed into place."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = self.root.as_uri()

    def at(self, key_or_uri: str) -> Store:
        if "://" in key_or_uri or key_or_uri.startswith("/"):
            from ns.storage import open_store

            return open_store(key_or_uri)
        return LocalStore(self._resolve_path(key_or_uri))

    def put(self, key: str, data: bytes) -> None:
        target = self._resolve_path(key)
        with os_errors_as_store_errors(target, "write"), self._temporary_path(target) as temporary:
            temporary.write_bytes(data)
            _publish_file(temporary, target)

    def put_file(self, key: str, path: Path) -> None:
        target = self._resolve_path(key)
        with os_errors_as_store_errors(path, "read"):
            source = path.open("rb")
        with source, os_errors_as_store_errors(target, "write"), self._temporary_path(target) as temporary:
            with temporary.open("xb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            _publish_file(temporary, target)

    def create(self, key: str, data: bytes) -> bool:
        target = self._resolve_path(key)
        with os_errors_as_store_errors(target, "write"), self._temporary_path(target) as temporary:
            if target.exists():
                return False
            temporary.write_bytes(data)
            _sync_file(temporary)
            try:
                # A hard link fails where the name exists: unlike a rename, it cannot overwrite the first writer.
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                return _claim_name(temporary, target)
            _sync_file(target.parent)
            return True

    def get(self, key: str) -> bytes:
        target = self._resolve_path(key)
        with os_errors_as_store_errors(target, "read"):
            return target.read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        target = self._resolve_path(key)
        check_range(str(target), start, length)
        with os_errors_as_store_errors(target, "read"), target.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def open(self, key: str) -> BinaryIO:
        target = self._resolve_path(key)
        with os_errors_as_store_errors(target, "read"):
            return target.open("rb")

    def path(self, key: str) -> Path:
        target = self._resolve_path(key)
        with os_errors_as_store_errors(target, "read"):
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            target.stat()
        return target

    def exists(self, key: str) -> bool:
        target = self._resolve_path(key)
        with os_errors_as_store_errors(target, "read"):
            return target.is_file()

    def size(self, key: str) -> int:
        return self.path(key).stat().st_size

    def list(self, prefix: str = "") -> Iterator[str]:
        check_prefix(prefix)
        folder = self.root / prefix.rpartition("/")[0]
        with os_errors_as_store_errors(folder, "list"):
            keys = sorted(self._walk_keys(folder, prefix))
        yield from keys

    def entries(self, prefix: str = "") -> Iterator[BlobEntry]:
        for key in self.list(prefix):
            target = self._resolve_path(key)
            # A file that is gone since it was listed is left out.
            with os_errors_as_store_errors(target, "list"), suppress(FileNotFoundError):
                status = target.stat()
                yield BlobEntry(key, status.st_size, str(status.st_mtime_ns), status.st_mtime)

    def delete(self, key: str) -> None:
        target = self._resolve_path(key)
        with os_errors_as_store_errors(target, "delete"), suppress(NotADirectoryError):
            target.unlink(missing_ok=True)

    def delete_prefix(self, prefix: str) -> int:
        keys = list(self.list(prefix))
        for key in keys:
            self.delete(key)
        return len(keys)

    def _walk_keys(self, folder: Path, prefix: str) -> Iterator[str]:
        for parent, _, names in os.walk(folder, onerror=_raise_unless_gone):
            for name in names:
                key = (Path(parent) / name).relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.startswith(TEMPORARY):
                    yield key

    def _resolve_path(self, key: str) -> Path:
        return self.root.joinpath(*key_parts(key))

    @contextmanager
    def _temporary_path(self, target: Path) -> Iterator[Path]:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep_temporaries(target.parent)
        temporary = target.parent / f"{TEMPORARY}{ProcessId.from_pid(os.getpid())}-{secrets.token_hex(8)}"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _publish_file(temporary: Path, target: Path) -> None:
    _sync_file(temporary)
    temporary.replace(target)
    # Only then does a power cut not take the name back.
    _sync_file(target.parent)


def _claim_name(temporary: Path, target: Path) -> bool:
    """`create` without hard links: an empty file claims the name, and is replaced at once by the whole blob.

    Readers may see it empty for an instant; if the writer is killed in that instant, it stays empty.
    """
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    try:
        temporary.replace(target)
    except OSError:
        target.unlink(missing_ok=True)
        raise
    return True


def _sync_file(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@cache
def _sweep_temporaries(folder: Path) -> None:
    """Removes what killed processes left unfinished in a folder, once in the life of this process."""
    oldest_kept = time.time() - TEMPORARY_SECONDS
    # What cannot be removed is left: it is no key, and does no harm.
    with suppress(OSError):
        for entry in os.scandir(folder):
            if not entry.name.startswith(TEMPORARY):
                continue
            writer = ProcessId.parse(entry.name.removeprefix(TEMPORARY).partition("-")[0])
            if (writer and writer.is_gone()) or entry.stat(follow_symlinks=False).st_mtime < oldest_kept:
                Path(entry.path).unlink(missing_ok=True)


def _raise_unless_gone(error: OSError) -> None:
    # A folder that does not exist, or vanishes while it is listed, holds no keys.
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextmanager
def os_errors_as_store_errors(target: Path | str, verb: str) -> Iterator[None]:
    """Turns an OSError inside the context into a StoreError of one line: the file, what failed, why, and the cure."""
    try:
        yield
    except OSError as error:
        reason = HINTS.get(error.errno or 0, error.strerror or str(error))
        raise StoreError(f"{target}: cannot {verb}: {reason}") from error
