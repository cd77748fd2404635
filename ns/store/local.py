import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ns.errors import StoreError
from ns.store.base import Store, open_store

# Unfinished writes live beside their target under this prefix, so that the rename stays within one file system.
TEMPORARY = ".tmp-"

HINTS = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder that you may write to, or change its owner",
    errno.ENOENT: "no such file",
    errno.EISDIR: "is a folder, expected a file",
    errno.ENOTDIR: "a part of this path is a file, expected a folder",
    errno.EEXIST: "a part of this path is a file, expected a folder",
}


class LocalStore:
    """A folder. Writes go to a temporary file, are flushed to disk and renamed into place."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = self.root.as_uri()

    def at(self, ref: str) -> Store:
        if "://" in ref or ref.startswith("/"):
            return open_store(ref)
        return LocalStore(self._target(ref))

    def put(self, key: str, data: bytes) -> None:
        target = self._target(key)
        with _explained(target, "write"), self._temporary(target) as temporary:
            temporary.write_bytes(data)
            _publish(temporary, target)

    def put_file(self, key: str, path: Path) -> None:
        target = self._target(key)
        with _explained(target, "write"), self._temporary(target) as temporary:
            shutil.copyfile(path, temporary)
            _publish(temporary, target)

    def create(self, key: str, data: bytes) -> bool:
        target = self._target(key)
        with _explained(target, "write"), self._temporary(target) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            try:
                # A hard link fails where the name exists: unlike a rename, it cannot overwrite the first writer.
                os.link(temporary, target)
            except FileExistsError:
                return False
            return True

    def get(self, key: str) -> bytes:
        target = self._target(key)
        with _explained(target, "read"):
            return target.read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        target = self._target(key)
        with _explained(target, "read"), target.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def path(self, key: str) -> Path:
        target = self._target(key)
        if not target.is_file():
            raise StoreError(f"{target}: cannot read: {HINTS[errno.ENOENT]}")
        return target

    def exists(self, key: str) -> bool:
        return self._target(key).is_file()

    def size(self, key: str) -> int:
        target = self._target(key)
        with _explained(target, "read"):
            return target.stat().st_size

    def list(self, prefix: str = "") -> Iterator[str]:
        folder = self.root / prefix.rpartition("/")[0]
        keys = (
            (Path(parent) / name).relative_to(self.root).as_posix()
            for parent, _, names in os.walk(folder)
            for name in names
            if not name.startswith(TEMPORARY)
        )
        yield from sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        target = self._target(key)
        with _explained(target, "delete"):
            target.unlink(missing_ok=True)

    def _target(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts:
            raise StoreError(f"{key!r}: not a key: must be a relative path without '..'")
        return self.root.joinpath(*parts)

    @contextmanager
    def _temporary(self, target: Path) -> Iterator[Path]:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, target: Path) -> None:
    _sync(temporary)
    temporary.replace(target)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _explained(target: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = HINTS.get(error.errno or 0, error.strerror or str(error))
        raise StoreError(f"{target}: cannot {verb}: {reason}") from error
