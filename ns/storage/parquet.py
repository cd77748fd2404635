"""Small Parquet files, read and written as a whole."""

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from ns.storage.base import Store


def read_table(data: bytes, columns: Sequence[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """Decodes the bytes of a Parquet file.

    Raises pyarrow.ArrowException or OSError for bytes that are no Parquet file, or that lack a column.

    Arrow's threads are not used: pyarrow 26 aborts a process that ends while they stop (exit code 134, in half of the cases
    where nothing follows the reading).
    """
    return pq.read_table(io.BytesIO(data), columns=columns, schema=schema, use_threads=False)


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
