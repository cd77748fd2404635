"""Purge: a label set without some images, as another label set. The one before stays what it was."""

import io
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ns.core.digest import sha256_bytes
from ns.core.errors import DataError
from ns.labeling.label_set import BINS, HISTOGRAM, LEFT_OUT, MANIFEST, LabelSet, Rows, all_rows, histogram_name, write_histogram
from ns.storage import Store
from ns.storage.parquet import read_table

REASON = f"{LEFT_OUT}purged"


def purge(labels: Store, label_set: LabelSet, keys: Collection[str], target: Store) -> tuple[LabelSet, int]:
    """Writes into `target` the label set in which the images have nulls and a reason. Returns it, and how many images it concerned.

    Shards without any of them keep their bytes. Raises DataError for keys that the label set does not have.
    """
    wanted = set(keys)
    missing = wanted - {key for rows in all_rows(labels, label_set) for key in wanted.intersection(rows.keys)}
    if missing:
        raise DataError(f"{labels.uri}: {len(missing)} of the keys are not in this label set; the first: {min(missing)}")
    classes = len(label_set.classes)
    counts = np.zeros((classes, BINS), np.uint64)
    shards = []
    for shard, rows in zip(label_set.shards, all_rows(labels, label_set), strict=True):
        purged = np.array([key in wanted for key in rows.keys], np.bool_)
        data = labels.get(shard.name)
        facts = shard
        if purged.any():
            table = _without(read_table(data), purged)
            sink = io.BytesIO()
            pq.write_table(table, sink, compression="zstd")
            data, rows = sink.getvalue(), Rows(table)
            left_out = int(rows.left_out.sum())
            facts = shard.model_copy(
                update={
                    "left_out": left_out,
                    "unreadable": int((~rows.readable).sum()) - left_out,
                    "bytes": len(data),
                    "sha256": sha256_bytes(data),
                }
            )
        own = rows.histogram(classes)
        counts += own
        # Facts last, and the manifest after all of them: what a kill leaves is no label set.
        target.put(shard.name, data)
        write_histogram(target, histogram_name(shard.name), own)
        facts.write(target, shard.name.removesuffix(".parquet") + ".json")
        shards.append(facts)
    write_histogram(target, HISTOGRAM, counts)
    without = label_set.model_copy(update={"shards": tuple(shards)})
    without.write(target, MANIFEST)
    return without, len(wanted)


def _without(table: pa.Table, purged: npt.NDArray[np.bool_]) -> pa.Table:
    """The table with nulls in the rows of a mask, and the reason."""
    mask, kept = pa.array(purged), pa.array(np.arange(len(purged)), mask=purged)
    for number, name in enumerate(table.column_names):
        if name == "key":
            continue
        column = table[name].combine_chunks()
        values = column.take(kept) if name != "error" else pc.if_else(mask, REASON, column)
        table = table.set_column(number, table.schema.field(number), values)
    return table
