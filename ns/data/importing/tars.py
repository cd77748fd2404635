"""Images in tars and the labels beside them: `KEY.jpg` with `KEY.cls`, `KEY.json` or `KEY.txt`, in any order.

Each file of a tar is an image, a label, something known that is passed over, or is listed with the reason why it is left out.
"""

import json
import posixpath
import re
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ns.core.errors import DataError
from ns.data.class_names import NUMBER, ClassLabel, normalize_name
from ns.data.dataset import DatasetRole
from ns.data.importing.file_kinds import classify_document, get_extension, is_left_by_program
from ns.data.importing.listing import SourceEntry
from ns.data.shards import CLASS_EXTENSION, CLASS_ID_BYTES, iterate_members, read_range, split_key
from ns.storage.local import os_errors_as_store_errors
from ns.storage.scratch import make_scratch_error

LABEL_EXTENSIONS = (CLASS_EXTENSION, "json", "txt")
"""Files that may hold the label of an image; an earlier one counts more."""
LABEL_FIELDS = ("label", "class", "class_name", "category", "target", "cls", "class_id")
"""Fields of a JSON file, and columns of a table, that may hold the class; an earlier one counts more."""
MAX_LABEL_BYTES = 1 << 20
MAX_NAME_LENGTH = 200
"""Longest class name, characters. A longer text is a caption."""


class TarMember(NamedTuple):
    name: str
    """Relative, without `./`."""
    offset: int
    size: int


def list_members(tar: Path) -> Iterator[TarMember]:
    """All files of a tar that no program left there. A tar in the tar counts as a folder of its name. Raises as `iterate_members`."""
    for name, offset, size in iterate_members(tar):
        path = posixpath.normpath(name)
        if is_left_by_program(path):
            continue
        if get_extension(path) == "tar":
            for inner_name, inner_offset, inner_size in iterate_members(tar, offset, size):
                inner_path = f"{path[:-4]}/{posixpath.normpath(inner_name)}"
                if not is_left_by_program(inner_path):
                    yield TarMember(inner_path, inner_offset, inner_size)
        else:
            yield TarMember(path, offset, size)


class TarSource(NamedTuple):
    """A tar whose members become entries."""

    tar: Path
    container: str
    """What entries name as their container: a path or URI."""
    prefix: str
    """What stands in front of the members' names in the paths of entries."""
    stamp: str
    """Changes with the tar's bytes."""

    def make_entry(self, member: TarMember, class_label: ClassLabel | None = None, problem: str = "") -> SourceEntry:
        path, stamp = self.prefix + member.name, f"{self.stamp}:{member.offset}"
        return SourceEntry(path, class_label, member.size, stamp, self.container, member.offset, problem=problem)


def list_images(
    source: TarSource, role: DatasetRole, scratch_dir: Path, passed_over: Counter[str], folder_class: str | None = None
) -> Iterator[SourceEntry]:
    """The images of a tar with the labels beside them, and labels without an image. `folder_class`: the label if there are none."""
    if role == "unlabeled":
        for member in list_members(source.tar):
            if kind := classify_document(member.name):
                passed_over[kind] += 1
            else:
                yield source.make_entry(member)
        return
    try:
        yield from _LabelMatcher(source, scratch_dir / "members", passed_over).match_labels(folder_class)
    except sqlite3.OperationalError as error:
        raise make_scratch_error(scratch_dir, f"list {source.container}", error) from error


class _LabelMatcher:
    """Images and labels of one tar in an SQLite file: a label may follow its image after any number of others."""

    def __init__(self, source: TarSource, database: Path, passed_over: Counter[str]) -> None:
        self._source, self._database, self._passed_over = source, database, passed_over

    def match_labels(self, folder_class: str | None) -> Iterator[SourceEntry]:
        self._database.unlink(missing_ok=True)
        self._connection = sqlite3.connect(self._database)
        try:
            self._connection.executescript(
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                "CREATE TABLE images (name TEXT, stem TEXT, sample TEXT, offset INT, size INT);"
                "CREATE TABLE labels (stem TEXT, rank INT, name TEXT, value, problem TEXT, offset INT, size INT)"
            )
            self._insert_members()
            self._connection.executescript("CREATE INDEX names ON images (name); CREATE INDEX stems ON labels (stem, rank)")
            labeled = self._connection.execute("SELECT COUNT(*) FROM labels").fetchone()[0] > 0
            fallback = None if labeled else folder_class
            for name, stem, sample, offset, size in self._connection.execute("SELECT * FROM images ORDER BY rowid"):
                class_label, problem = self._find_label(name, stem, sample)
                yield self._source.make_entry(
                    TarMember(name, offset, size), fallback if class_label is None else class_label, problem
                )
            orphans = self._connection.execute(
                "SELECT rank, name, offset, size FROM labels WHERE stem NOT IN"
                " (SELECT stem FROM images UNION SELECT sample FROM images UNION SELECT name FROM images) ORDER BY rowid"
            )
            for rank, name, offset, size in orphans:
                if rank:
                    self._passed_over[f".{LABEL_EXTENSIONS[rank]}"] += 1
                    continue
                yield self._source.make_entry(TarMember(name, offset, size), problem="a label without an image")
        finally:
            self._connection.close()

    def _insert_members(self) -> None:
        with os_errors_as_store_errors(self._source.tar, "read"), self._source.tar.open("rb") as file:
            for member in list_members(self._source.tar):
                # macOS writes one name in two ways.
                name = unicodedata.normalize("NFC", member.name)
                extension = get_extension(name)
                stem = name[: -len(extension) - 1] if extension else name
                if extension in LABEL_EXTENSIONS:
                    value, problem = _read_label(file, member, extension)
                    if value is not None or problem:
                        row = (stem, LABEL_EXTENSIONS.index(extension), member.name, value, problem, member.offset, member.size)
                        self._connection.execute("INSERT INTO labels VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                        continue
                if kind := classify_document(name):
                    self._passed_over[kind] += 1
                else:
                    image = (member.name, stem, split_key(name)[0], member.offset, member.size)
                    self._connection.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?)", image)

    def _find_label(self, name: str, stem: str, sample: str) -> tuple[ClassLabel | None, str]:
        """The label of an image, and why it has none if labels contradict each other."""
        labels: list[tuple[int, str, Any, str]] = []
        for candidate in dict.fromkeys((stem, unicodedata.normalize("NFC", name), sample)):
            labels = self._connection.execute(
                "SELECT rank, name, value, problem FROM labels WHERE stem = ? ORDER BY rank, rowid", (candidate,)
            ).fetchall()
            if labels:
                break
        if not labels:
            return None, ""
        best = [label for label in labels if label[0] == labels[0][0]]
        problem = next((f"{label_name}: {problem}" for _, label_name, _, problem in best if problem), "")
        if problem:
            return None, problem
        first_name, first = best[0][1:3]
        copies = self._connection.execute("SELECT COUNT(*) FROM images WHERE name = ?", (name,)).fetchone()[0]
        others = [value for _, _, value, _ in best if value != first]
        if others:
            return None, f"{first_name} says both {first!r} and {others[0]!r}"
        if copies > 1 and len(best) != copies:
            return None, f"the tar has {copies} images of this name, and {len(best)} files {first_name}: which belong together?"
        for _, other_name, other, _ in labels:
            if other != first and other is not None and isinstance(other, int) == isinstance(first, int):
                if other_name.endswith(".txt"):
                    continue  # a caption
                return None, f"{first_name} says {first!r}, {other_name} says {other!r}"
        return first, ""


def _read_label(file: IO[bytes], member: TarMember, extension: str) -> tuple[ClassLabel | None, str]:
    """A label, or why it is none; neither if the file is no label at all: JSON without a class, a caption."""
    if member.size > MAX_LABEL_BYTES:
        return None, "larger than 1 MiB" if extension == CLASS_EXTENSION else ""
    try:
        text = read_range(file, member.offset, member.size).decode("utf-8-sig")
        value = _extract_class(text) if extension == "json" else text
    except (UnicodeDecodeError, ValueError, RecursionError):
        return None, "not JSON" if extension == "json" else "not UTF-8"
    if value is None:
        return None, ""
    try:
        return parse_label(value), ""
    except DataError as error:
        return None, "" if extension == "txt" else str(error)


def _extract_class(text: str) -> Any:
    document = json.loads(text)
    if not isinstance(document, dict):
        return document
    fields = {str(field).strip().lower(): value for field, value in document.items()}
    return next((fields[field] for field in LABEL_FIELDS if fields.get(field) is not None), None)


def parse_label(value: Any) -> ClassLabel:
    """A class index, 0 or above, or a class name. Raises DataError for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = normalize_name(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if NUMBER.fullmatch(text) and len(text) <= CLASS_ID_BYTES:
        return int(text)
    if not text or len(text) > MAX_NAME_LENGTH or not text.isprintable() or re.fullmatch(r"[-+]?[0-9.]+", text):
        raise DataError(f"{str(value)[:16]!r}: must be a class index, 0 or above, or a class name")
    return text
