"""Labelling: the un-noised teacher over shards of the pool, each shard once, safe to kill and to race."""

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ns import log
from ns.data.dataset import Dataset
from ns.data.images import ImageSource
from ns.digest import sha256_bytes
from ns.inference import Predictions, Predictor
from ns.label.labelset import LEFT_OUT, LabelShard, kept_classes, marker, row_schema
from ns.store import Store

LeftOut = Mapping[str, Mapping[int, str]]
SHARDS_AHEAD = 2
"""Fetched from the store while the model is busy with the one before."""


def label_shards(
    predictor: Predictor,
    pool_folder: Store,
    pool: Dataset,
    labels: Store,
    shards: range,
    *,
    top_k: int,
    left_out: LeftOut | None = None,
) -> int:
    """Labels a range of shards, leaving out those that are done. Returns the images labelled now.

    `left_out`: sha256 of a shard → row → why that image gets no label.
    """
    waiting = [index for index in shards if not labels.exists(marker(pool.shards[index].name))]
    fresh = sum(pool.shards[index].samples for index in waiting)
    done = sum(pool.shards[index].samples for index in shards) - fresh
    progress = log.Progress(sum(pool.shards[index].samples for index in shards), "images", done=done)
    k = kept_classes(len(predictor.card.classes), top_k)
    source = ImageSource(pool_folder, pool, held=2)
    for place, number in enumerate(waiting):
        source.fetch_ahead(waiting[place + 1 : place + 1 + SHARDS_AHEAD])
        shard = pool.shards[number]
        skipped = {row: f"{LEFT_OUT}{reason}" for row, reason in (left_out or {}).get(shard.sha256, {}).items()}
        predictions = predictor.shard(source, number, progress, skipped)
        rows = _parquet(predictions, k)
        name = shard.name.removesuffix(".tar") + ".parquet"
        facts = LabelShard(
            name=name,
            source=shard.sha256,
            rows=len(predictions.index),
            unreadable=len(predictions.errors) - len(skipped),
            left_out=len(skipped),
            mode=str(predictor.mode),
            bytes=len(rows),
            sha256=sha256_bytes(rows),
        )
        # Rows first, facts last: a shard without facts is labelled again, to the same bytes.
        labels.put(name, rows)
        facts.write(labels, marker(shard.name))
        for row, reason in predictions.errors.items() - skipped.items():
            log.get().warning("unreadable image", shard=shard.name, key=predictions.index.keys[row], reason=reason)
    return fresh


def _parquet(predictions: Predictions, k: int) -> bytes:
    probabilities = predictions.probabilities
    # Stable, so that equal probabilities rank by class and the bytes are the same everywhere.
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    top = np.take_along_axis(probabilities, order, axis=1)
    unreadable = np.isnan(probabilities[:, 0])
    table = pa.table(
        [
            pa.array(predictions.index.keys, pa.string()),
            pa.array(top[:, 0], pa.float32(), mask=unreadable),
            _fixed(order.astype(np.uint16), pa.uint16(), unreadable),
            _fixed(top.astype(np.float16), pa.float16(), unreadable),
            pa.array([predictions.errors.get(row) for row in range(len(predictions.index))], pa.string()),
        ],
        schema=row_schema(k),
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _fixed(values: npt.NDArray[np.generic], kind: pa.DataType, null: npt.NDArray[np.bool_]) -> pa.FixedSizeListArray:
    flat = pa.array(np.where(null[:, None], 0, values).astype(values.dtype).reshape(-1), kind)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(null))
