"""A listing: the entries of a source in the order of import, on disk. A million entries take no more memory than ten."""

import hashlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

from ns.core.digest import digest_json
from ns.data.dataset import DatasetRole
from ns.data.shards import SHARD_EXTENSIONS
from ns.storage.scratch import make_scratch_error

ClassLabel = str | int
"""A class name, or a class index if the source has no names."""
IMAGE_EXTENSIONS = {*SHARD_EXTENSIONS, "bmp", "gif", "tif", "tiff", "ppm", "jp2", "avif"}
"""Extensions that are left out of keys."""
INSERT_ROWS = 10_000
"""Rows passed to SQLite at a time."""


class SourceEntry(NamedTuple):
    """One file that may be an image."""

    path: str
    """Name of the file in the source; unique in it."""
    class_label: ClassLabel | None
    size: int
    """Size in bytes; 0 if the source does not state it."""
    stamp: str = ""
    """Changes with the bytes, as far as the source can tell: a modification time or ETag."""
    container: str = ""
    """The tar that holds the bytes at `offset`; empty for a file of its own."""
    offset: int = 0
    key: str = ""
    """Unique key in shards, made from the path."""


class ImportTask(NamedTuple):
    """Neighboring entries that become one shard."""

    number: int
    start: int
    stop: int
    digest: str
    """Digest of the paths, labels, sizes and stamps of the entries."""


class Listing:
    """Entries in an SQLite file. `from_entries` fills it once; then any number of processes read it.

    A pool is ordered by path, so that its source is read sequentially. Labeled images are ordered by the hash of their path,
    so that every shard mixes the classes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = sqlite3.connect(path)
        # Names on disk may not be UTF-8; they are kept as bytes.
        self._connection.text_factory = bytes

    @classmethod
    def from_entries(cls, path: Path, entries: Iterable[SourceEntry], role: DatasetRole) -> Self:
        """Raises StoreError when the file cannot be written."""
        listing = cls(path)
        try:
            listing._insert_entries(entries, mixed=role != "unlabeled")
        except sqlite3.OperationalError as error:
            listing.close()
            raise make_scratch_error(path, "write the listing", error) from error
        return listing

    def _insert_entries(self, entries: Iterable[SourceEntry], *, mixed: bool) -> None:
        # An unfinished listing is thrown away, so it needs no journal.
        self._connection.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = FILE;"
            "CREATE TABLE listed (sort BLOB, path BLOB, label, size INT, stamp BLOB, container BLOB, offset INT, key TEXT)"
        )
        rows = (_make_row(entry, mixed=mixed) for entry in entries)
        insert = "INSERT INTO listed VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        while batch := list(islice(rows, INSERT_ROWS)):
            self._connection.executemany(insert, batch)
        self._connection.create_function("mark", 1, _make_key_suffix, deterministic=True)
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

    def count_class_labels(self) -> dict[ClassLabel, int]:
        """Label → number of entries: first indices in order, then names in order. Entries without a label are not counted."""
        rows = self._connection.execute(
            "SELECT label, COUNT(*) FROM entries WHERE label IS NOT NULL GROUP BY label ORDER BY label"
        )
        return {_decode_label(raw_label): count for raw_label, count in rows}

    def read_entries(self, start: int, stop: int) -> Iterator[SourceEntry]:
        """Entries [start, stop) in the order of import."""
        rows = self._connection.execute(
            "SELECT path, label, size, stamp, container, offset, key FROM entries WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
            (start, stop),
        )
        for path, raw_label, size, stamp, container, offset, key in rows:
            class_label = None if raw_label is None else _decode_label(raw_label)
            yield SourceEntry(
                os.fsdecode(path), class_label, size, stamp.decode(), os.fsdecode(container), offset, key.decode()
            )

    def cut_tasks(self, *, shard_samples: int, shard_bytes: int, overhead: int) -> Iterator[ImportTask]:
        """Cuts the listing into tasks of at most `shard_samples` entries and, as far as sizes are known, `shard_bytes` bytes.

        `overhead` bytes are added for each entry.
        """
        hasher = hashlib.sha256()
        number = start = used = 0
        for position, entry in enumerate(self.read_entries(0, len(self))):
            size = entry.size + overhead
            if position > start and (position - start >= shard_samples or used + size > shard_bytes):
                yield ImportTask(number, start, position, hasher.hexdigest())
                number, start, used, hasher = number + 1, position, 0, hashlib.sha256()
            used += size
            # The container is left out: the same files at another place are the same task.
            hasher.update(
                repr((os.fsencode(entry.path), entry.class_label, entry.size, entry.stamp)).encode(errors="surrogateescape")
            )
        if used:
            yield ImportTask(number, start, len(self), hasher.hexdigest())

    def compute_digest(self) -> str:
        """Digest of all entries, which changes with the source as far as names, sizes and stamps tell."""
        return digest_json([task.digest for task in self.cut_tasks(shard_samples=1 << 16, shard_bytes=1 << 62, overhead=1)])


def _make_row(entry: SourceEntry, *, mixed: bool) -> tuple[object, ...]:
    path = os.fsencode(entry.path)
    sort = hashlib.sha256(path).digest()[:16] if mixed else path
    raw_label = os.fsencode(entry.class_label) if isinstance(entry.class_label, str) else entry.class_label
    return sort, path, raw_label, entry.size, entry.stamp.encode(), os.fsencode(entry.container), entry.offset, _make_key(path)


def _decode_label(raw_label: bytes | int) -> ClassLabel:
    return os.fsdecode(raw_label) if isinstance(raw_label, bytes) else raw_label


def _make_key(path: bytes) -> str:
    """`cat/IMG.1.jpg` → `cat/IMG_1`: WebDataset's keys have no dot in their last part."""
    text = path.decode("utf-8", "backslashreplace").partition("://")
    folder, slash, base = (text[2] or text[0]).lstrip("/").rpartition("/")
    stem, dot, extension = base.rpartition(".")
    plain = folder + slash + (stem if dot and extension.lower() in IMAGE_EXTENSIONS else base)
    parts = (part.strip() for part in re.sub(r"[\x00-\x1f\\]", "_", plain).split("/"))
    # `..` leads out of the folder and a leading dot hides a file; readers would skip both.
    return "/".join(part.replace(".", "_") or "_" for part in parts)


def _make_key_suffix(path: bytes) -> str:
    """Makes the keys of two paths different that would be equal."""
    return f"-{hashlib.sha256(path).hexdigest()[:8]}"
