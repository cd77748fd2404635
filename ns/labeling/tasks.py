"""Labeling tasks: images of a pool with what the teacher says of them, for people to check in Label Studio.

OUT/tasks.json       tasks with predictions, to import
OUT/interface.xml    the project's labeling interface
OUT/images.csv       key, path, class, confidence: the same as a table
OUT/images/…         the pictures, under their keys
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from ns.core.printable import escape_formula
from ns.data.dataset import Dataset
from ns.data.importing.label_studio import build_interface, build_task
from ns.data.index import ShardIndex
from ns.data.loading.decode import EncodedJpeg
from ns.data.loading.shard_reader import ImageSource
from ns.labeling.label_set import LabelRows, LabelSet, iter_label_rows
from ns.labeling.selection import CopyReader, Selection
from ns.storage import Store
from ns.storage.scratch import explain_scratch_errors, make_scratch_dir

LABEL_TABLE = pa.schema([("key", pa.string()), ("class", pa.string()), ("confidence", pa.float32())])
LOCAL_FILES = "/data/local-files/?d="
"""Where Label Studio serves the files below its document root."""


class LabelingTask(NamedTuple):
    shard: int
    row: int
    class_id: int
    """The teacher's class."""
    confidence: float


def write_tasks(
    out: Store,
    tasks: Sequence[LabelingTask],
    pool: tuple[Store, Dataset],
    classes: tuple[str, ...],
    *,
    model: str,
    images_uri: str = LOCAL_FILES,
) -> None:
    """Writes the folder of tasks. `model`: the predictions' version. `images_uri`: what the pictures' addresses begin with.

    The tasks are written last: a folder without them is not whole.
    """
    source = ImageSource(*pool, max_open_shards=2)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["key", "path", "class", "confidence"])
    documents = []
    indices: dict[int, ShardIndex] = {}
    paths: dict[LabelingTask, str] = {}
    for task in sorted(tasks, key=lambda task: (task.shard, task.row)):
        if task.shard not in indices:
            indices = {task.shard: source.read_index(task.shard)}
        key, extension = indices[task.shard].keys[task.row], indices[task.shard].table["extension"][task.row].as_py()
        image = next(source.read_encoded(task.shard, task.row, task.row + 1))
        paths[task] = f"images/{key}.{extension}"
        out.put(paths[task], bytes(image.data if isinstance(image, EncodedJpeg) else image))
    for task in tasks:
        key = paths[task].removeprefix("images/").rpartition(".")[0]
        name = classes[task.class_id]
        rows.writerow([escape_formula(key), escape_formula(paths[task]), escape_formula(name), f"{task.confidence:.4f}"])
        documents.append(build_task(key, images_uri + quote(paths[task]), name, task.confidence, model))
    out.put("images.csv", table.getvalue().encode())
    out.put("interface.xml", build_interface(classes).encode())
    out.put("tasks.json", json.dumps(documents, indent=1, ensure_ascii=False).encode() + b"\n")


def find_least_confident(
    label_store: Store, label_set: LabelSet, selection: Selection | None, count: int
) -> list[LabelingTask]:
    """The `count` images with a label of the lowest confidence, the lowest first; of those that `selection` keeps, if it is given."""
    tasks: list[LabelingTask] = []
    for shard, rows, kept in _iter_kept_rows(label_store, label_set, selection):
        order = kept[np.argsort(rows.confidence[kept], kind="stable")][:count]
        tasks += [LabelingTask(shard, row, int(rows.top_class[row, 0]), float(rows.confidence[row])) for row in order.tolist()]
        tasks = sorted(tasks, key=lambda task: task.confidence)[:count]
    return tasks


def write_label_table(
    out: Store, key: str, label_store: Store, label_set: LabelSet, selection: Selection | None, form: Literal["csv", "parquet"]
) -> int:
    """Writes key, class and confidence of all images with a label, or of those that `selection` keeps. Returns their number.

    Shard by shard: the table of a large pool does not fit into memory.
    """
    count = 0
    with make_scratch_dir("labels") as scratch_dir, explain_scratch_errors(scratch_dir, "write the table"):
        path = scratch_dir / "table"
        writer: Any
        prepare_text: Callable[[str], str]
        if form == "parquet":
            writer, prepare_text = pq.ParquetWriter(path, LABEL_TABLE, compression="zstd"), str
        else:
            writer, prepare_text = pacsv.CSVWriter(path, LABEL_TABLE), escape_formula
        with writer:
            for _, rows, kept in _iter_kept_rows(label_store, label_set, selection):
                names = [prepare_text(label_set.classes[class_id]) for class_id in rows.top_class[kept, 0].tolist()]
                keys = [prepare_text(rows.keys[row]) for row in kept.tolist()]
                writer.write_table(pa.table([keys, names, rows.confidence[kept]], schema=LABEL_TABLE))
                count += len(kept)
        out.put_file(key, path)
    return count


def _iter_kept_rows(
    label_store: Store, label_set: LabelSet, selection: Selection | None
) -> Iterator[tuple[int, LabelRows, npt.NDArray[np.int64]]]:
    """Shard number, its rows, and the indices of those that count."""
    copies = CopyReader(label_store, selection) if selection else None
    for number, rows in enumerate(iter_label_rows(label_store, label_set)):
        kept = rows.readable if copies is None else copies.count_shard_copies(number, rows) > 0
        yield number, rows, np.flatnonzero(kept)
