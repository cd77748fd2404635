import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ns.core.digest import sha256_bytes
from ns.core.errors import DataError
from ns.labeling.label_set import (
    LabelSet,
    LabelShard,
    build_histogram_table,
    build_row_schema,
    compute_histogram,
    verify_label_set,
)
from ns.runs.lookup import open_label_set
from ns.storage import LocalStore

CLASSES = ("a", "b", "c")


def written(folder, rows, **changes):
    """A label set of one shard; rows: (key, classes, probabilities, error)."""
    store = LocalStore(folder)
    table = pa.table(
        [
            [row[0] for row in rows],
            [None if row[3] else float(row[2][0]) for row in rows],
            pa.array([None if row[3] else list(row[1]) for row in rows], pa.list_(pa.uint16(), 3)),
            pa.array([None if row[3] else np.array(row[2], np.float16) for row in rows], pa.list_(pa.float16(), 3)),
            [row[3] for row in rows],
        ],
        schema=build_row_schema(3),
    )
    if "confidence" in changes:
        table = table.set_column(1, "confidence", pa.array(changes.pop("confidence"), pa.float32()))
    pq.write_table(table, folder / "s.parquet")
    data = (folder / "s.parquet").read_bytes()
    good = [row for row in rows if not row[3]]
    predicted = np.array([row[1][0] for row in good], np.uint16)
    counts = compute_histogram(predicted % 3, np.array([row[2][0] for row in good], np.float32), 3)
    pq.write_table(build_histogram_table(counts), folder / "histogram.parquet")
    facts = {"name": "s.parquet", "source": "0" * 64, "rows": len(rows), "bytes": len(data), "sha256": sha256_bytes(data)}
    shard = LabelShard(**facts, unreadable=changes.pop("unreadable", len(rows) - len(good)))
    made = LabelSet(dataset="0" * 64, teacher="0" * 64, code="0" * 64, classes=CLASSES, top_k=3, shards=(shard,))
    made.save_file(store, "labelset.json")
    return store, made


GOOD = [("x", (0, 1, 2), (0.7, 0.2, 0.1), None), ("y", (2, 1, 0), (0.5, 0.3, 0.2), None), ("z", None, None, "truncated")]


def test_verify_accepts_good_label_set(tmp_path):
    assert verify_label_set(*written(tmp_path, GOOD)) == 3


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ([("x", (0, 1, 7), (0.7, 0.2, 0.1), None)], {}, r"row 0 \(x\): a class that does not exist"),
        ([("x", (0, 1, 2), (0.7, 0.1, 0.2), None)], {}, "do not fall"),
        ([("x", (0, 1, 2), (0.9, 0.2, 0.1), None)], {}, "sum to more than 1"),
        ([("x", (0, 1, 2), (0.4, 0.2, 0.1), None)], {}, "do not sum to 1"),
        ([("x", (0, 1, 2), (0.7, 0.2, 0.1), None)], {"confidence": [0.6]}, "not its first probability"),
        ([("x", (0, 1, 2), (1.5, 0.2, 0.1), None)], {"confidence": [0.9]}, "outside 0 … 1"),
        (GOOD, {"unreadable": 0}, "0 images left out and 1 unreadable"),
    ],
)
def test_verify_names_row_and_problem(tmp_path, rows, changes, said):
    with pytest.raises(DataError, match=said):
        verify_label_set(*written(tmp_path, rows, **changes))


def test_verify_compares_histograms_with_rows(tmp_path):
    store, made = written(tmp_path, GOOD)
    pq.write_table(build_histogram_table(np.ones((3, 1000), np.uint64)), tmp_path / "histogram.parquet")
    with pytest.raises(DataError, match=r"histogram.parquet: its counts are not those of the rows"):
        verify_label_set(store, made)


def test_verify_finds_changed_bytes(tmp_path):
    store, made = written(tmp_path, GOOD)
    (tmp_path / "s.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="sha256 differs"):
        verify_label_set(store, made)


def test_open_label_set_by_folder(tmp_path):
    _, made = written(tmp_path, GOOD)
    found = open_label_set(LocalStore(tmp_path), str(tmp_path))
    assert found.label_set == made
    with pytest.raises(DataError, match="name a label set's folder, or a run's generation"):
        open_label_set(LocalStore(tmp_path), str(tmp_path.parent))
