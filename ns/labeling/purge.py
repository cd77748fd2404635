"""Purge: a copy of a label set without some images. The original stays as it is."""

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ns.core.digest import sha256_bytes
from ns.core.errors import DataError
from ns.labeling.label_set import (
    HISTOGRAM,
    HISTOGRAM_BINS,
    LEFT_OUT_PREFIX,
    LabelRows,
    LabelSet,
    LabelShard,
    histogram_key,
    iter_label_rows,
    label_shard_key,
    read_label_rows,
    rows_key,
    write_histogram,
)
from ns.storage import Store
from ns.storage.parquet import encode_table, read_table

PURGED_REASON = f"{LEFT_OUT_PREFIX}purged"


def purge_images(label_store: Store, label_set: LabelSet, keys: Collection[str], target: Store) -> tuple[LabelSet, int]:
    """Writes into `target` the label set in which these images have nulls and a reason. Returns it, and the number of images.

    Shards without any of them keep their bytes. Raises DataError for keys that the label set does not have.
    """
    purged_keys = set(keys)
    missing = purged_keys - {
        key for rows in iter_label_rows(label_store, label_set) for key in purged_keys.intersection(rows.keys)
    }
    if missing:
        raise DataError(f"{label_store.uri}: {len(missing)} of the keys are not in this label set; the first: {min(missing)}")
    classes = len(label_set.classes)
    counts = np.zeros((classes, HISTOGRAM_BINS), np.uint64)
    shards = []
    for shard, rows in zip(label_set.shards, iter_label_rows(label_store, label_set), strict=True):
        reasons = {row: PURGED_REASON for row, key in enumerate(rows.keys) if key in purged_keys}
        purged_shard, shard_counts = copy_label_shard(label_store, shard, target, classes, reasons)
        counts += shard_counts
        shards.append(purged_shard)
    write_histogram(target, HISTOGRAM, counts)
    purged_set = label_set.model_copy(update={"shards": tuple(shards)})
    purged_set.save(target)
    return purged_set, len(purged_keys)


def copy_label_shard(
    label_store: Store, shard: LabelShard, target: Store, classes: int, reasons: Mapping[int, str]
) -> tuple[LabelShard, npt.NDArray[np.uint64]]:
    """Copies a labeled shard; rows with a reason why they get no label have nulls and the reason in the copy.

    Returns the record of the copy, and its histogram, uint64 [classes, HISTOGRAM_BINS]. Raises what `read_label_rows` raises.
    """
    rows, data = read_label_rows(label_store, shard), label_store.get(shard.name)
    copied = shard
    if reasons:
        table = _blank_rows(read_table(data), len(rows.keys), reasons)
        data, rows = encode_table(table), LabelRows(table)
        left_out = int(rows.left_out.sum())
        sha256 = sha256_bytes(data)
        copied = shard.model_copy(
            update={
                "name": rows_key(shard.name, sha256),
                "left_out": left_out,
                "unreadable": int((~rows.readable).sum()) - left_out,
                "bytes": len(data),
                "sha256": sha256,
            }
        )
    counts = rows.build_histogram(classes)
    # The record last: a shard without it is none.
    target.put(copied.name, data)
    write_histogram(target, histogram_key(copied.name), counts)
    copied.save_file(target, label_shard_key(shard.name))
    return copied, counts


def _blank_rows(table: pa.Table, rows: int, reasons: Mapping[int, str]) -> pa.Table:
    """The table with nulls and the reason in the rows that have one."""
    blank = np.isin(np.arange(rows), list(reasons))
    mask, kept = pa.array(blank), pa.array(np.arange(rows), mask=blank)
    told = pa.array([reasons.get(row) for row in range(rows)], pa.string())
    for number, name in enumerate(table.column_names):
        if name == "key":
            continue
        column = table[name].combine_chunks()
        values = column.take(kept) if name != "error" else pc.if_else(mask, told, column)
        table = table.set_column(number, table.schema.field(number), values)
    return table
