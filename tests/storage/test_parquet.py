import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ns.storage.parquet import read_table

PROGRAM = """
import io, os, pyarrow as pa, pyarrow.parquet as pq
from ns.storage.parquet import read_table
sink = io.BytesIO()
pq.write_table(pa.table({"key": ["a"] * 300, "value": list(range(300))}), sink)
threads = len(os.listdir("/proc/self/task"))
assert read_table(sink.getvalue()).num_rows == 300
assert len(os.listdir("/proc/self/task")) == threads
"""


def test_read_table_refuses_other_bytes():
    table = pa.table({"key": ["a", "b"], "value": [1, 2]})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    assert read_table(sink.getvalue()) == table
    assert read_table(sink.getvalue(), columns=["value"]).column_names == ["value"]
    with pytest.raises(pa.ArrowException):
        read_table(b"no table")
    with pytest.raises(pa.ArrowException, match="no column 'other'"):
        read_table(sink.getvalue(), columns=["key", "other"])
    schema = pa.schema([("value", pa.int32()), ("key", pa.string())])
    assert read_table(sink.getvalue(), schema=schema).schema == schema
    with pytest.raises(pa.ArrowException):
        read_table(sink.getvalue(), schema=pa.schema([("key", pa.int32())]))


@pytest.mark.integration
def test_read_table_starts_no_thread_that_could_abort_the_process_at_its_end():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


@pytest.mark.integration
@pytest.mark.long
def test_200_processes_that_read_a_table_end_well():
    ends = [subprocess.run([sys.executable, "-c", PROGRAM]).returncode for _ in range(200)]
    assert ends == [0] * 200
