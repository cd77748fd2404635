import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ns.storage.parquet import read_table

PROGRAM = """
import io, pyarrow as pa, pyarrow.parquet as pq
from ns.storage.parquet import read_table
sink = io.BytesIO()
pq.write_table(pa.table({"key": ["a"] * 300, "value": list(range(300))}), sink)
assert read_table(sink.getvalue()).num_rows == 300
"""


def test_read_table_refuses_other_bytes():
    table = pa.table({"key": ["a", "b"], "value": [1, 2]})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    assert read_table(sink.getvalue()) == table
    assert read_table(sink.getvalue(), columns=["value"]).column_names == ["value"]
    with pytest.raises(pa.ArrowException):
        read_table(b"no table")


def test_read_table_lets_a_process_end_at_once():
    # Read in pyarrow's own threads, half of these are aborted.
    processes = [subprocess.Popen([sys.executable, "-c", PROGRAM]) for _ in range(6)]
    assert [process.wait() for process in processes] == [0] * 6
