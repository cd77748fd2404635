"""Labeling: the teacher, without noise, over shards of the pool. Tasks can be killed, and can work on one shard at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ns.config.schema import LabelingConfig
from ns.core import log, telemetry
from ns.core.digest import sha256_bytes
from ns.data.dataset import Dataset, Shard
from ns.data.loading.shard_reader import ImageSource
from ns.labeling.label_set import (
    LEFT_OUT_PREFIX,
    LabelShard,
    build_row_schema,
    compute_histogram,
    count_kept_classes,
    encode_log8,
    find_label_shard,
    histogram_key,
    label_shard_key,
    rows_key,
    write_histogram,
)
from ns.modeling.labeler import Labeler, combine_probabilities
from ns.modeling.predictor import Predictor, ShardPredictions
from ns.storage import Store
from ns.storage.parquet import encode_table

SHARDS_AHEAD = 2
"""Shards fetched from the store while the model works on the one before."""


def label_pool_shards(
    predictors: Sequence[Predictor],
    pool_store: Store,
    pool: Dataset,
    label_store: Store,
    shards: range,
    config: LabelingConfig,
    *,
    temperature: float = 1.0,
    find_left_out: Callable[[Shard], Mapping[int, str]] = lambda _: {},
    find_existing: Callable[[Shard], tuple[Store, LabelShard] | None] = lambda _: None,
) -> int:
    """Labels those of a range of shards that have no labels yet, with the mean of the predictors' probabilities. Returns the
    number of images labeled now. Two workers may label the same shard: the labels written first stay.

    `temperature`: as in `Labeler`. `find_left_out`: shard → row → the reason why that image gets no label. `find_existing`: where
    another labeling has made the same labels of a shard; they are copied. Raises ConfigError if the predictors' classes differ.
    """
    mode = Labeler(predictors).mode
    pending = [number for number in shards if not _reuse_shard_labels(label_store, pool.shards[number], find_existing)]
    pending_images = sum(pool.shards[number].samples for number in pending)
    done_images = sum(pool.shards[number].samples for number in shards) - pending_images
    progress = log.Progress(sum(pool.shards[number].samples for number in shards), "images", done=done_images)
    telemetry.SHARDS.set(len(shards))
    telemetry.SHARDS_DONE.set(len(shards) - len(pending))

    def iter_predictions(predictor: Predictor, progress: log.Progress | None) -> Iterator[ShardPredictions]:
        source = ImageSource(pool_store, pool, max_open_shards=2 + SHARDS_AHEAD)

        def iter_shards() -> Iterator[tuple[int, Mapping[int, str]]]:
            for position, number in enumerate(pending):
                source.fetch_ahead(pending[position + 1 : position + 1 + SHARDS_AHEAD])
                reasons = find_left_out(pool.shards[number])
                yield number, {row: f"{LEFT_OUT_PREFIX}{reason}" for row, reason in reasons.items()}

        return predictor.predict_shards(source, iter_shards(), progress)

    streams = [
        iter_predictions(predictor, progress if position == 0 else None) for position, predictor in enumerate(predictors)
    ]
    with ThreadPoolExecutor(1, "write labels") as writer:
        write_future: Future[None] | None = None
        for number, shard_predictions in zip(pending, zip(*streams, strict=True), strict=True):
            if write_future:
                write_future.result()
            write = partial(write_label_shard, label_store, pool.shards[number], shard_predictions, config, mode, temperature)
            if number == pending[-1]:
                # By this thread: the first table of a thread takes 30 ms longer.
                write()
            else:
                # Sorting and packing overlap with the network's work on the next shard.
                write_future = writer.submit(write)
    return pending_images


def _reuse_shard_labels(
    label_store: Store, shard: Shard, find_existing: Callable[[Shard], tuple[Store, LabelShard] | None]
) -> bool:
    """Copies the labels of a shard from another labeling if it has them. Returns whether the shard is labeled."""
    if find_label_shard(label_store, shard):
        return True
    existing = find_existing(shard)
    if existing is None:
        return False
    other_store, copied = existing
    data = other_store.get(copied.name)
    if sha256_bytes(data) != copied.sha256:
        return False
    key = rows_key(shard.name, copied.sha256)
    label_store.put(key, data)
    label_store.put(histogram_key(key), other_store.get(histogram_key(copied.name)))
    copied.model_copy(update={"name": key}).save_file(label_store, label_shard_key(shard.name))
    return True


def write_label_shard(
    label_store: Store,
    shard: Shard,
    predictions: Sequence[ShardPredictions],
    config: LabelingConfig,
    mode: str,
    temperature: float = 1.0,
) -> None:
    """Writes one labeled shard: the models' probabilities combined. A shard that another task has labeled by now stays as it is:
    on another machine labels differ in their last digits, and a label set may hold those that are there.
    """
    if find_label_shard(label_store, shard):
        telemetry.SHARDS_DONE.inc()
        return
    probabilities = combine_probabilities([output.probabilities for output in predictions], temperature)
    # The teacher comes first: the foreign scores are its own.
    merged = replace(predictions[0], probabilities=probabilities)
    k = count_kept_classes(merged.probabilities.shape[1], config.top_k)
    data, counts = pack_label_rows(merged, k, log8=config.probabilities == "log8")
    left_out = sum(reason.startswith(LEFT_OUT_PREFIX) for reason in merged.errors.values())
    sha256 = sha256_bytes(data)
    key = rows_key(shard.name, sha256)
    label_shard = LabelShard(
        name=key,
        source=shard.sha256,
        rows=len(merged.index),
        unreadable=len(merged.errors) - left_out,
        left_out=left_out,
        mode=mode,
        bytes=len(data),
        sha256=sha256,
    )
    # Rows first, record last: a shard without its record is labeled again, to the same bytes.
    label_store.put(key, data)
    write_histogram(label_store, histogram_key(key), counts)
    label_shard.save_file(label_store, label_shard_key(shard.name))
    telemetry.SHARDS_DONE.inc()
    telemetry.CONFIDENCE.add_counts(counts.sum(0).tolist())
    for row, reason in merged.errors.items():
        if not reason.startswith(LEFT_OUT_PREFIX):
            log.get_logger().warning("unreadable image", shard=shard.name, key=merged.index.keys[row], reason=reason)


def pack_label_rows(predictions: ShardPredictions, k: int, *, log8: bool = False) -> tuple[bytes, npt.NDArray[np.uint64]]:
    """A label shard as Parquet, with the k most probable classes of each image, and its histogram uint64 [classes, 1000]."""
    classes = predictions.probabilities.shape[1]
    # A stable sort ranks equal probabilities by class, so that the bytes are the same everywhere.
    order = np.argsort(-predictions.probabilities, axis=1, kind="stable")[:, :k]
    top, probabilities = order.astype(np.uint16), np.take_along_axis(predictions.probabilities, order, axis=1)
    unreadable = np.isnan(probabilities[:, 0])
    encoded = encode_log8(np.nan_to_num(probabilities)) if log8 else probabilities.astype(np.float16)
    scores = predictions.foreign_scores
    table = pa.table(
        [
            pa.array(predictions.index.keys, pa.string()),
            pa.array(probabilities[:, 0], pa.float32(), mask=unreadable),
            _pack_lists(top, pa.uint16(), unreadable),
            _pack_lists(encoded, pa.uint8() if log8 else pa.float16(), unreadable),
            pa.array([predictions.errors.get(row) for row in range(len(predictions.index))], pa.string()),
            *([] if scores is None else [pa.array(scores, pa.float32(), mask=unreadable)]),
        ],
        schema=build_row_schema(k, log8=log8, foreign_score=scores is not None),
    )
    return encode_table(table), compute_histogram(top[~unreadable, 0], probabilities[~unreadable, 0], classes)


def _pack_lists(values: npt.NDArray[np.generic], value_type: pa.DataType, mask: npt.NDArray[np.bool_]) -> pa.FixedSizeListArray:
    flat = pa.array(np.where(mask[:, None], 0, values).astype(values.dtype).reshape(-1), value_type)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(mask))
