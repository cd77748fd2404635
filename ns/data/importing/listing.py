"""A listing: the entries of a source in the order of import, on disk. A million entries take no more memory than ten."""

import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

from ns.core.digest import digest_json
from ns.data.class_names import ClassLabel
from ns.data.dataset import DatasetRole
from ns.data.key_list import make_key, make_key_suffix
from ns.storage.scratch import make_scratch_error

INSERT_ROWS = 10_000
"""Rows passed to SQLite at a time."""
MAX_KEY_SUFFIXES = 4
"""Suffixes that make keys different: by path, then by place in a tar. The writer leaves out what is still equal."""


class SourceEntry(NamedTuple):
    """One file that may be an image."""

    path: str
    """Name of the file in the source. Two entries of a table with one path are one file; a tar may hold two files of one name."""
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
    problem: str = ""
    """Why the file is left out, if that is known before it is read."""


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
        self.passed_over: Counter[str] = Counter()
        """Kind of what the source has beside images → number. Only in the process that listed the source."""
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
            "CREATE TABLE listed (sort BLOB, path BLOB, label, size INT, stamp BLOB, container BLOB, offset INT, key TEXT, problem TEXT)"
        )
        rows = (_make_row(entry, mixed=mixed) for entry in entries)
        insert = "INSERT INTO listed VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        inserted = 0
        while batch := list(islice(rows, INSERT_ROWS)):
            self._connection.executemany(insert, batch)
            inserted += len(batch)
        self._connection.create_function("mark", 3, _mark_path, deterministic=True)
        # A file that is named several times is one entry. If the names of its class differ, none of them can be believed.
        self._connection.executescript(
            "CREATE TABLE entries AS SELECT path, CASE WHEN COUNT(DISTINCT label) > 1 THEN NULL ELSE MAX(label) END AS label,"
            " MAX(size) AS size, MAX(stamp) AS stamp, container, offset, MAX(key) AS key,"
            " CASE WHEN COUNT(DISTINCT label) > 1 THEN 'is named ' || COUNT(*) || ' times with different classes: ' ||"
            " CAST(MIN(label) AS TEXT) || ', ' || CAST(MAX(label) AS TEXT) ELSE MAX(problem) END AS problem"
            " FROM listed GROUP BY sort, path, container, offset ORDER BY sort, path, container, offset;"
            "DROP TABLE listed; CREATE INDEX labels ON entries (label); CREATE INDEX keys ON entries (key);"
        )
        if repeated := inserted - len(self):
            self.passed_over["row that names an image again"] = repeated
        # The first suffix follows from the path alone, so that a person's list of paths names the same keys.
        for attempt in range(MAX_KEY_SUFFIXES):
            changed = self._connection.execute(
                "UPDATE entries SET key = key || mark(path, offset, ?)"
                " WHERE key IN (SELECT key FROM entries GROUP BY key HAVING COUNT(*) > 1)",
                (attempt,),
            ).rowcount
            if not changed:
                break
        self._connection.commit()

    def close(self) -> None:
        self._connection.close()

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM entries").fetchone()[0])

    def count_candidates(self) -> int:
        """Number of entries that may be images, as far as it is known before they are read."""
        return int(self._connection.execute("SELECT COUNT(*) FROM entries WHERE problem = ''").fetchone()[0])

    def count_class_labels(self) -> dict[ClassLabel, int]:
        """Label → number of entries: first indices in order, then names in order. Entries without a label are not counted."""
        rows = self._connection.execute(
            "SELECT label, COUNT(*) FROM entries WHERE label IS NOT NULL GROUP BY label ORDER BY label"
        )
        return {_decode_label(raw_label): count for raw_label, count in rows}

    def find_first_problem(self) -> str:
        """Path of an entry that is left out, and why; empty if there is none."""
        row = self._connection.execute("SELECT path, problem FROM entries WHERE problem != '' LIMIT 1").fetchone()
        return ": ".join(part.decode("utf-8", "backslashreplace") for part in row) if row else ""

    def read_entries(self, start: int, stop: int) -> Iterator[SourceEntry]:
        """Entries [start, stop) in the order of import."""
        rows = self._connection.execute(
            "SELECT path, label, size, stamp, container, offset, key, problem FROM entries WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
            (start, stop),
        )
        for path, raw_label, size, stamp, container, offset, key, problem in rows:
            class_label = None if raw_label is None else _decode_label(raw_label)
            yield SourceEntry(
                os.fsdecode(path),
                class_label,
                size,
                stamp.decode(),
                os.fsdecode(container),
                offset,
                key.decode(),
                problem.decode("utf-8", "backslashreplace"),
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
                repr((os.fsencode(entry.path), entry.class_label, entry.size, entry.stamp, entry.problem)).encode(
                    errors="surrogateescape"
                )
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
    container, stamp = os.fsencode(entry.container), entry.stamp.encode()
    return sort, path, raw_label, entry.size, stamp, container, entry.offset, make_key(entry.path), entry.problem


def _decode_label(raw_label: bytes | int) -> ClassLabel:
    return os.fsdecode(raw_label) if isinstance(raw_label, bytes) else raw_label


def _mark_path(path: bytes, offset: int, attempt: int) -> str:
    return make_key_suffix(path + f"\0{offset}\0{attempt}".encode() if attempt else path)
