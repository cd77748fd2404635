"""Tables of images: CSV, TSV or Parquet, with a column of paths and, in labeled data, one of classes; and exports of Label Studio."""

import os
import posixpath
import stat
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from ns.core import log
from ns.core.errors import DataError
from ns.core.printable import unescape_formula
from ns.data.class_names import normalize_name
from ns.data.dataset import DatasetRole
from ns.data.importing.file_kinds import escape_path
from ns.data.importing.label_studio import TABLE_COLUMNS, TaskLabel, parse_tasks, read_task_labels
from ns.data.importing.listing import SourceEntry
from ns.data.importing.tars import LABEL_FIELDS
from ns.storage import open_parent, split_uri

TABLES = (".csv", ".tsv", ".parquet", ".json")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
SPLIT_COLUMNS = ("split", "subset", "set", "partition")
MAX_CELL_BYTES = 1 << 16
"""A path has at most 4,096 bytes, a class's name fewer."""
MAX_ROWS_PER_BYTE, MIN_ROW_LIMIT = 100, 1_000_000
"""A Parquet file may have so many rows per byte, and in any case a million: one value that is repeated takes no room in it."""
BATCH_ROWS = 10_000
"""Rows of a table in memory at a time."""


def list_table(source: str, role: DatasetRole, split: str | None) -> Iterator[SourceEntry]:
    """The rows of a table, or those of a split. Raises DataError for a table that cannot be read, or that lacks a column or split."""
    _list_spellings.cache_clear()
    store, name = open_parent(source)
    table_path = store.path(name)
    base = split_uri(source)[0] if "://" in source and not source.startswith("file://") else table_path.parent
    try:
        tasks = read_tasks(table_path, source)
        batches = open_batches(table_path, source) if tasks is None else _open_tasks(tasks, source)
        columns = map_columns(source, batches.schema.names, (*PATH_COLUMNS, *LABEL_FIELDS, *SPLIT_COLUMNS))
        path_column = find_column(source, columns, PATH_COLUMNS, "the path of each image")
        label_column = None if role == "unlabeled" else find_column(source, columns, LABEL_FIELDS, "its class")
        split_column = next((columns[candidate] for candidate in SPLIT_COLUMNS if candidate in columns), None)
        if split is not None and split_column is None:
            raise DataError(f"--split {split}: {source} has no column named one of {', '.join(SPLIT_COLUMNS)}")
        seen: set[str] = set()
        row = 0
        for batch in batches:
            table = batch.to_pydict()
            count = batch.num_rows
            splits = [normalize_name(read_cell(value)) for value in table[split_column]] if split_column else [""] * count
            class_labels = table[label_column] if label_column else [None] * count
            seen.update(filter(None, splits))
            if split is None and len(seen) > 1:
                raise DataError(
                    f"{source}: has the splits {escape_path(', '.join(sorted(seen)))}; import one of them, and name the dataset: "
                    f"ns data import {source} DATASET --role {role} --split {escape_path(min(seen))}"
                )
            for path, class_label, row_split in zip(table[path_column], class_labels, splits, strict=True):
                row += 1
                if split is None or row_split == normalize_name(split):
                    yield _make_entry(base, path, normalize_name(read_cell(class_label)) or None, row)
        if split is not None and normalize_name(split) not in seen:
            raise DataError(
                f"--split {split}: {source} has no such split; it has {escape_path(', '.join(sorted(seen))) or 'none'}"
            )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow raises its own errors for some damage, OSError for other, and UnicodeDecodeError for text that is not UTF-8.
        reason = escape_path((str(error) or "damaged").splitlines()[0])
        raise DataError(f"{source}: not a readable table: {reason}; {_describe_layout(table_path)}") from error


def open_batches(path: Path, source: str) -> Any:
    """A reader of the record batches of a table, whose cells are text if it is CSV or TSV. `source` names it in messages.

    Raises DataError for a Parquet file that says the same again and again or has texts that are no names, an ArrowException for a damaged
    file.
    """
    if path.suffix.lower() == ".parquet":
        return _open_parquet(path, source)
    parse_options = pacsv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    names = pacsv.open_csv(path, parse_options=parse_options).schema.names
    # All columns are read as text: the class 007 is not the class 7.
    as_text = pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""])
    return pacsv.open_csv(path, parse_options=parse_options, convert_options=as_text)


def _open_parquet(path: Path, source: str) -> Any:
    # Loads pandas where it is installed, which takes half a second.
    import pyarrow.dataset as pads

    schema = pads.dataset(path, format="parquet").schema
    texts = {field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_binary(field.type)}
    # As dictionaries, values that are repeated are there once.
    dataset = pads.dataset(path, format=pads.ParquetFileFormat(dictionary_columns=texts))
    rows, size = dataset.count_rows(), path.stat().st_size
    if rows > max(MIN_ROW_LIMIT, MAX_ROWS_PER_BYTE * size):
        raise DataError(f"{source}: has {rows:,} rows in {size:,} bytes, so they say the same again; name each image once")
    # Columns of other kinds may hold whole images.
    columns = [field.name for field in dataset.schema if not pa.types.is_nested(field.type)]
    reader = dataset.scanner(columns=columns, batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1).to_reader()
    return pa.RecordBatchReader.from_batches(reader.schema, (_check_cells(batch, texts, source) for batch in reader))


def _check_cells(batch: pa.RecordBatch, texts: set[str], source: str) -> pa.RecordBatch:
    for name in texts & set(batch.schema.names):
        longest = max(filter(None, pc.binary_length(batch[name].dictionary).to_pylist()), default=0)
        if longest > MAX_CELL_BYTES:
            raise DataError(f"{source}: {name}: has a text of {longest:,} bytes; paths and names of classes are shorter")
    return batch


def read_tasks(path: Path, source: str) -> list[TaskLabel] | None:
    """The labels of an export of Label Studio; None if the file is another table. Raises as `open_batches` and `read_task_labels`."""
    kind = path.suffix.lower()
    if kind == ".json":
        return list(read_task_labels(parse_tasks(path.read_bytes(), source), source))
    if kind == ".parquet" or not set((batches := open_batches(path, source)).schema.names) >= TABLE_COLUMNS:
        return None
    return list(read_task_labels((row for batch in batches for row in batch.to_pylist()), source))


def _open_tasks(labels: Sequence[TaskLabel], source: str) -> Any:
    """The tasks for which a person chose a class, as batches with the columns path and label."""
    annotated = [label for label in labels if label.annotated]
    if len(annotated) < len(labels):
        log.get_logger().info("passed over tasks without an annotation", tasks=len(labels) - len(annotated), file=source)
    if unnamed := next((label.key for label in annotated if not label.path), None):
        raise DataError(f"{source}: task of {unnamed}: has no address of a file; give the folder of the images to Label Studio")
    table = pa.table({"path": [label.path for label in annotated], "label": [label.class_name for label in annotated]})
    return table.to_reader(BATCH_ROWS)


def map_columns(source: str, names: Sequence[str], used: Collection[str]) -> dict[str, str]:
    """Normalized name → name of each column. Raises DataError for two columns of one name, if it is one of `used`."""
    columns: dict[str, str] = {}
    for name in names:
        normalized = normalize_name(name).lower()
        if normalized in columns and normalized in {normalize_name(other).lower() for other in used}:
            raise DataError(f"{source}: has two columns {escape_path(name)}; remove one, or rename it")
        columns[normalized] = name
    return columns


def find_column(source: str, columns: dict[str, str], candidates: tuple[str, ...], description: str) -> str:
    """The first of `candidates` among the columns. `columns`: normalized name → name. Raises DataError if there is none."""
    for name in candidates:
        if name in columns:
            return columns[name]
    raise DataError(
        f"{source}: has no column for {description}: its columns are {escape_path(', '.join(columns.values()))}; "
        f"name one {' or '.join(candidates)}" + (f"; {_describe_layout(Path(source))}" if len(columns) == 1 else "")
    )


def _describe_layout(path: Path) -> str:
    """The cure for a table that cannot be read: spreadsheets write semicolons and other encodings in many countries."""
    if path.suffix.lower() == ".parquet":
        return "write it again"
    return f"save it as UTF-8, with columns separated by {'tabs' if path.suffix.lower() == '.tsv' else 'commas'}"


def read_cell(value: Any) -> str:
    """A cell as text: empty for none; pandas makes numbers of a column with gaps floating-point, and we escape formulas."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return unescape_formula(text.strip("\ufeff \t\r\n"))


def _make_entry(base: Path | str, cell: Any, class_label: str | None, row: int) -> SourceEntry:
    """`base`: the folder of the table, or its URI."""
    text = read_cell(cell)
    if not text:
        return SourceEntry(f"row {row}", None, 0, problem="names no image")
    path = unquote(urlsplit(text).path) if text.startswith("file://") else text
    if isinstance(base, str):
        path = path.removeprefix(f"{base}/")
    if "://" in path:
        return SourceEntry(path, class_label, 0)
    if isinstance(base, str):
        # Tables from Windows. A request for each row would tell whether a key has a backslash, which is far rarer.
        key = posixpath.normpath(path.replace("\\", "/"))
        problem = "lies outside the table's folder; give a path below it, or a URI" if key.startswith(("/", "../")) else ""
        return SourceEntry(key, class_label, 0, problem=problem)
    # A missing file is listed too, so that reading it rejects it with its reason.
    for spelling in dict.fromkeys((str(cell), path, path.replace("\\", "/"), _find_spelling(base, path.replace("\\", "/")))):
        relative = _make_relative(base, spelling)
        with suppress(OSError, ValueError):
            status = (base / relative).stat()
            return SourceEntry(
                relative, class_label, status.st_size if stat.S_ISREG(status.st_mode) else 0, str(status.st_mtime_ns)
            )
    return SourceEntry(_make_relative(base, unicodedata.normalize("NFC", path)), class_label, 0)


def _find_spelling(base: Path, path: str) -> str:
    """The path as the disk spells it: a letter with an accent may be one or two characters, in each part of the path."""
    if path.isascii():
        return path
    folder = base / "/" if path.startswith("/") else base
    for part in path.split("/"):
        exists = not part or os.path.lexists(folder / part)
        folder /= part if exists else _list_spellings(folder).get(unicodedata.normalize("NFC", part), part)
    return str(folder)


@lru_cache(maxsize=8)
def _list_spellings(folder: Path) -> dict[str, str]:
    """Composed name of each file and folder → its name."""
    with suppress(OSError):
        return {unicodedata.normalize("NFC", entry.name): entry.name for entry in os.scandir(folder)}
    return {}


def _make_relative(base: Path, path: str) -> str:
    """One spelling for each file: without `./` and `a/../`, and relative if it lies beside the table or below."""
    absolute = os.path.normpath(base / path)
    return os.path.relpath(absolute, base) if not path.startswith("/") or absolute.startswith(f"{base}/") else absolute
