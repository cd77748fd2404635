"""Small Parquet files, read and written as a whole."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ns.core.errors import DataError
from ns.storage.base import Store


def read_table(data: bytes, columns: Sequence[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """Decodes the bytes of a Parquet file.

    Raises pyarrow.ArrowException or OSError for bytes that are no Parquet file, or that lack a column.
    """
    table = _read_columns(pa.BufferReader(data), schema.names if schema else columns)
    return table.select(schema.names).cast(schema) if schema else table


def read_table_file(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file on this machine. Raises what `read_table` raises."""
    return _read_columns(path, columns)


def _read_columns(source: pa.NativeFile | Path, columns: Sequence[str] | None) -> pa.Table:
    """Arrow starts no thread for it: pyarrow 26 aborts a process that ends while one stops (exit code 134). `pq.read_table` always
    starts some, for reading ahead."""
    with pq.ParquetFile(source) as file:
        missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if missing:
            raise pa.ArrowInvalid(f"no column {missing[0]!r}")
        return file.read(columns, use_threads=False)


def parse_table(data: bytes, uri: str, schema: pa.Schema, cure: str) -> pa.Table:
    """Decodes the bytes of a Parquet file that has at least the columns of `schema`. Raises DataError naming the file and the column."""
    with explain_table_errors(uri, cure):
        table = read_table(data)
    check_columns(table, uri, schema, cure)
    return table


def check_columns(table: pa.Table, uri: str, schema: pa.Schema, cure: str) -> None:
    """Raises DataError unless the table has the columns of `schema` with their types, and values where they must not be null."""
    for field in schema:
        if table.column_names.count(field.name) != 1:
            raise DataError(f"{uri}: has no column {field.name}; {cure}")
        column = table[field.name]
        if column.type != field.type:
            raise DataError(f"{uri}: {field.name}: is of the type {column.type}, must be {field.type}; {cure}")
        if column.null_count and not field.nullable:
            raise DataError(f"{uri}: {field.name}: has cells without a value; {cure}")


@contextmanager
def explain_table_errors(uri: str, cure: str) -> Iterator[None]:
    """Turns what Arrow raises for a damaged file into a DataError of one line."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{uri}: not a readable table: {reason}; {cure}") from error


def write_table(store: Store, key: str, table: pa.Table) -> None:
    """Writes a table as a Parquet file compressed by zstd. Raises StoreError."""
    store.put(key, encode_table(table))


def encode_table(table: pa.Table, *, use_dictionary: bool = True) -> bytes:
    """The bytes that `write_table` writes, for callers that need their digest.

    `use_dictionary=False` saves the time of looking for repeated values where there are none, as in encoded images.
    """
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=use_dictionary)
    return sink.getvalue()
