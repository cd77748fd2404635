"""A listing: what a source holds, in the order of import, on disk. A million entries take no more memory than ten."""

import hashlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

from ns.core.digest import digest
from ns.core.errors import StoreError
from ns.data.dataset import Role
from ns.data.shards import IMAGES

Label = str | int
"""A class name, or the index of a class where a source has only that."""
EXTENSIONS = {*IMAGES, "bmp", "gif", "tif", "tiff", "ppm", "jp2", "avif"}
"""Left out of keys."""
INSERTS = 10_000
"""Rows handed to SQLite at a time."""


class Entry(NamedTuple):
    """One file that may be an image."""

    path: str
    """As the source names it; unique in it."""
    label: Label | None
    size: int
    """Bytes; 0 where the source does not say."""
    stamp: str = ""
    """Changes when the bytes do, as far as the source can tell."""
    container: str = ""
    """The file that holds the bytes at `offset`, where they have no file of their own."""
    offset: int = 0
    key: str = ""
    """In shards; made from the path, and unique."""


class Task(NamedTuple):
    """Neighbouring entries that become one shard."""

    number: int
    start: int
    stop: int
    digest: str
    """Of what goes in."""


class Listing:
    """Entries in an SQLite file. Filled once by `write`, then read by any number of processes.

    A pool keeps the order of its paths, so that it is read from end to end; labelled images are ordered by the hash of their
    path, so that every shard mixes the classes.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._connection = sqlite3.connect(file)
        # Names on disk may be no UTF-8; they are kept as the bytes they are.
        self._connection.text_factory = bytes

    @classmethod
    def write(cls, file: Path, entries: Iterable[Entry], role: Role) -> Self:
        """Raises StoreError when the file cannot be written."""
        listing = cls(file)
        try:
            listing._fill(entries, mixed=role != "unlabelled")
        except sqlite3.OperationalError as error:
            listing.close()
            raise StoreError(
                f"{file}: cannot write the listing: {error}; free some space there, or set TMPDIR to another folder"
            ) from error
        return listing

    def _fill(self, entries: Iterable[Entry], *, mixed: bool) -> None:
        # A listing that is not finished is thrown away, so it needs no journal.
        self._connection.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = FILE;"
            "CREATE TABLE listed (sort BLOB, path BLOB, label, size INT, stamp BLOB, container BLOB, offset INT, key TEXT)"
        )
        rows = (_row(entry, mixed=mixed) for entry in entries)
        insert = "INSERT INTO listed VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        while batch := list(islice(rows, INSERTS)):
            self._connection.executemany(insert, batch)
        self._connection.create_function("mark", 1, _mark, deterministic=True)
        self._connection.executescript(
            "CREATE TABLE entries AS SELECT path, label, size, stamp, container, offset, key FROM listed ORDER BY sort, path;"
            "DROP TABLE listed; CREATE INDEX labels ON entries (label); CREATE INDEX keys ON entries (key);"
            "UPDATE entries SET key = key || mark(path)"
            " WHERE key IN (SELECT key FROM entries GROUP BY key HAVING COUNT(*) > 1)"
        )
        self._connection.commit()

    def close(self) -> None:
        self._connection.close()

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM entries").fetchone()[0])

    def labels(self) -> dict[Label, int]:
        """Label → entries, indices in order, then names in order; entries without a label are not counted."""
        rows = self._connection.execute(
            "SELECT label, COUNT(*) FROM entries WHERE label IS NOT NULL GROUP BY label ORDER BY label"
        )
        return {_label(label): count for label, count in rows}

    def entries(self, start: int, stop: int) -> Iterator[Entry]:
        """Entries [start, stop) in the order of import."""
        rows = self._connection.execute(
            "SELECT path, label, size, stamp, container, offset, key FROM entries WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
            (start, stop),
        )
        for path, label, size, stamp, container, offset, key in rows:
            known = None if label is None else _label(label)
            yield Entry(os.fsdecode(path), known, size, stamp.decode(), os.fsdecode(container), offset, key.decode())

    def tasks(self, *, shard_samples: int, shard_bytes: int, overhead: int) -> Iterator[Task]:
        """Cuts the listing into tasks of at most so many entries, and of so many bytes as far as sizes are known.

        `overhead` bytes are added for each entry.
        """
        hasher = hashlib.sha256()
        number = start = used = 0
        for position, entry in enumerate(self.entries(0, len(self))):
            size = entry.size + overhead
            if position > start and (position - start >= shard_samples or used + size > shard_bytes):
                yield Task(number, start, position, hasher.hexdigest())
                number, start, used, hasher = number + 1, position, 0, hashlib.sha256()
            used += size
            # Where the bytes lie does not matter: the same files moved elsewhere are the same task.
            hasher.update(
                repr((os.fsencode(entry.path), entry.label, entry.size, entry.stamp)).encode(errors="surrogateescape")
            )
        if used:
            yield Task(number, start, len(self), hasher.hexdigest())

    def digest(self) -> str:
        """Of all entries: changes when the source does, as far as names, sizes and stamps tell."""
        return digest([task.digest for task in self.tasks(shard_samples=1 << 16, shard_bytes=1 << 62, overhead=1)])


def _row(entry: Entry, *, mixed: bool) -> tuple[object, ...]:
    path = os.fsencode(entry.path)
    sort = hashlib.sha256(path).digest()[:16] if mixed else path
    label = os.fsencode(entry.label) if isinstance(entry.label, str) else entry.label
    return sort, path, label, entry.size, entry.stamp.encode(), os.fsencode(entry.container), entry.offset, _key(path)


def _label(label: bytes | int) -> Label:
    return os.fsdecode(label) if isinstance(label, bytes) else label


def _key(path: bytes) -> str:
    """`cat/IMG.1.jpg` → `cat/IMG_1`: WebDataset's keys have no dot in their last part."""
    text = path.decode("utf-8", "backslashreplace").partition("://")
    folder, slash, base = (text[2] or text[0]).lstrip("/").rpartition("/")
    stem, dot, extension = base.rpartition(".")
    plain = folder + slash + (stem if dot and extension.lower() in EXTENSIONS else base)
    parts = (part.strip() for part in re.sub(r"[\x00-\x1f\\]", "_", plain).split("/"))
    # What leads out of a folder, or is hidden, would not come back.
    return "/".join(part.replace(".", "_") or "_" for part in parts)


def _mark(path: bytes) -> str:
    """Tells files apart whose keys are the same."""
    return f"-{hashlib.sha256(path).hexdigest()[:8]}"
