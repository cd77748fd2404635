"""Labelling: the un-noised teacher over shards of the pool, each shard once, safe to kill and to race."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ns.config.schema import LabellingConfig
from ns.core import log, telemetry
from ns.core.digest import sha256_bytes, short
from ns.core.errors import ConfigError
from ns.data.dataset import Dataset, Shard
from ns.data.loading.shard_reader import ImageSource
from ns.labeling.label_set import (
    LEFT_OUT,
    LabelShard,
    histogram,
    histogram_name,
    kept_classes,
    marker,
    row_schema,
    write_histogram,
)
from ns.labeling.label_set import log8 as to_log8
from ns.modeling.predictor import Predictions, Predictor
from ns.storage import Store

LeftOut = Mapping[str, Mapping[int, str]]
SHARDS_AHEAD = 2
"""Fetched from the store while the model is busy with the one before."""


def label_shards(
    predictors: Sequence[Predictor],
    pool_folder: Store,
    pool: Dataset,
    labels: Store,
    shards: range,
    config: LabellingConfig,
    *,
    left_out: LeftOut | None = None,
    known: Callable[[Shard], tuple[Store, LabelShard] | None] = lambda _: None,
) -> int:
    """Labels a range of shards with the mean of the predictors' probabilities, leaving out shards that are done. Returns the images
    labelled now. Two workers may do the same shard: the first one's labels stay.

    Raises ConfigError if the predictors' classes differ.

    `left_out`: sha256 of a shard → row → why that image gets no label. `known`: where another labelling has made the same labels of a
    shard already; they are copied.
    """
    for other in predictors[1:]:
        if other.card.classes != predictors[0].card.classes:
            raise ConfigError(
                f"labelling.ensemble: model {short(other.card.digest)} has other classes, or another order of them, than the "
                "teacher; all must have the same"
            )
    waiting = [number for number in shards if not _is_done(labels, pool.shards[number], known)]
    fresh = sum(pool.shards[number].samples for number in waiting)
    done = sum(pool.shards[number].samples for number in shards) - fresh
    progress = log.Progress(sum(pool.shards[number].samples for number in shards), "images", done=done)
    telemetry.SHARDS.set(len(shards))
    telemetry.SHARDS_DONE.set(len(shards) - len(waiting))

    def predictions(predictor: Predictor, progress: log.Progress | None) -> Iterator[Predictions]:
        source = ImageSource(pool_folder, pool, held=2 + SHARDS_AHEAD)

        def wanted() -> Iterator[tuple[int, Mapping[int, str]]]:
            for place, number in enumerate(waiting):
                source.fetch_ahead(waiting[place + 1 : place + 1 + SHARDS_AHEAD])
                reasons = (left_out or {}).get(pool.shards[number].sha256, {})
                yield number, {row: f"{LEFT_OUT}{reason}" for row, reason in reasons.items()}

        return predictor.shards(source, wanted(), progress)

    each = [predictions(predictor, progress if place == 0 else None) for place, predictor in enumerate(predictors)]
    mode = "+".join(dict.fromkeys(str(predictor.mode) for predictor in predictors))
    with ThreadPoolExecutor(1, "write labels") as writer:
        writing: Future[None] | None = None
        for number, found in zip(waiting, zip(*each, strict=True), strict=True):
            if writing:
                writing.result()
            # Sorting and packing go on beside the network's work on the next shard.
            writing = writer.submit(write, labels, pool.shards[number], found, config, mode)
        if writing:
            writing.result()
    return fresh


def _is_done(labels: Store, shard: Shard, known: Callable[[Shard], tuple[Store, LabelShard] | None]) -> bool:
    """Whether a shard is labelled; labels that another labelling has are copied first."""
    if (own := _labelled(labels, shard)) is not None:
        return own.source == shard.sha256
    found = known(shard)
    if found is None:
        return False
    other, facts = found
    rows = other.get(facts.name)
    if sha256_bytes(rows) != facts.sha256:
        return False
    name = _rows_name(shard)
    labels.put(name, rows)
    labels.put(histogram_name(name), other.get(histogram_name(facts.name)))
    facts.model_copy(update={"name": name}).write(labels, marker(shard.name))
    return True


def _labelled(labels: Store, shard: Shard) -> LabelShard | None:
    """The facts of a shard, if it is labelled."""
    own = marker(shard.name)
    return LabelShard.read(labels, own) if labels.exists(own) else None


def write(labels: Store, shard: Shard, found: Sequence[Predictions], config: LabellingConfig, mode: str) -> None:
    """Writes one labelled shard: the mean of what each model found. One that was labelled meanwhile stays as it is: on another machine
    labels differ in their last digits, and a label set may have been made of what is there."""
    if (own := _labelled(labels, shard)) is not None and own.source == shard.sha256:
        telemetry.SHARDS_DONE.inc()
        return
    first = found[0]
    if len(found) > 1:
        first = Predictions(first.index, np.mean([one.probabilities for one in found], axis=0), first.errors)
    k = kept_classes(first.probabilities.shape[1], config.top_k)
    rows, counts = packed(first, k, log8=config.probabilities == "log8")
    skipped = sum(reason.startswith(LEFT_OUT) for reason in first.errors.values())
    name = _rows_name(shard)
    facts = LabelShard(
        name=name,
        source=shard.sha256,
        rows=len(first.index),
        unreadable=len(first.errors) - skipped,
        left_out=skipped,
        mode=mode,
        bytes=len(rows),
        sha256=sha256_bytes(rows),
    )
    # Rows first, facts last: a shard without facts is labelled again, to the same bytes.
    labels.put(name, rows)
    write_histogram(labels, histogram_name(name), counts)
    facts.write(labels, marker(shard.name))
    telemetry.SHARDS_DONE.inc()
    telemetry.CONFIDENCE.add(counts.sum(0).tolist())
    for row, reason in first.errors.items():
        if not reason.startswith(LEFT_OUT):
            log.get().warning("unreadable image", shard=shard.name, key=first.index.keys[row], reason=reason)


def _rows_name(shard: Shard) -> str:
    return shard.name.removesuffix(".tar") + ".parquet"


def packed(predictions: Predictions, k: int, *, log8: bool = False) -> tuple[bytes, npt.NDArray[np.uint64]]:
    """A label shard as Parquet, with the k most probable classes of each image, and its histogram [classes, BINS]."""
    classes = predictions.probabilities.shape[1]
    # Stable, so that equal probabilities rank by class and the bytes are the same everywhere.
    order = np.argsort(-predictions.probabilities, axis=1, kind="stable")[:, :k]
    top, probabilities = order.astype(np.uint16), np.take_along_axis(predictions.probabilities, order, axis=1)
    unreadable = np.isnan(probabilities[:, 0])
    kept = to_log8(np.nan_to_num(probabilities)) if log8 else probabilities.astype(np.float16)
    table = pa.table(
        [
            pa.array(predictions.index.keys, pa.string()),
            pa.array(probabilities[:, 0], pa.float32(), mask=unreadable),
            _fixed(top, pa.uint16(), unreadable),
            _fixed(kept, pa.uint8() if log8 else pa.float16(), unreadable),
            pa.array([predictions.errors.get(row) for row in range(len(predictions.index))], pa.string()),
        ],
        schema=row_schema(k, log8=log8),
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue(), histogram(top[~unreadable, 0], probabilities[~unreadable, 0], classes)


def _fixed(values: npt.NDArray[np.generic], kind: pa.DataType, null: npt.NDArray[np.bool_]) -> pa.FixedSizeListArray:
    flat = pa.array(np.where(null[:, None], 0, values).astype(values.dtype).reshape(-1), kind)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(null))
