"""Labeling outside a run: any model over any dataset, or over the images that a selection kept."""

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import numpy as np

from ns.config.schema import LabelingConfig
from ns.core.digest import LABELING_SOURCES, digest_code
from ns.core.errors import ConfigError, DataError
from ns.data.dataset import Dataset, Shard
from ns.labeling.label_set import (
    LEFT_OUT_PREFIX,
    LabelSet,
    count_kept_classes,
    join_label_shards,
    label_shard_key,
    read_label_rows,
)
from ns.labeling.predict import label_pool_shards
from ns.labeling.selection import CopyReader, Selection
from ns.modeling.predictor import Predictor
from ns.storage import Store, open_store
from ns.storage.documents import JsonDocument


class LabelingInputs(JsonDocument):
    """`labeling.json`: what the labels in a folder are made of. It is written before the first of them, so that finished shards are
    never taken for the work of another teacher."""

    filename: ClassVar[str] = "labeling.json"

    format: Literal[1] = 1
    dataset: str
    teacher: str
    code: str
    """Digests."""
    views: str
    ensemble: tuple[str, ...]
    probabilities: str
    temperature: float = 1.0
    top_k: int
    selection: str | None
    """Digest of the selection whose images are labeled; None if all images are."""

    def claim_store(self, label_store: Store) -> None:
        """Raises DataError if the folder holds other labels."""
        if not label_store.exists(self.filename) and label_store.exists(LabelSet.filename):
            raise DataError(
                f"{label_store.uri}: holds a label set that was not made by `ns label` or `ns labels import`; name another folder"
            )
        # Of two that begin at the same instant, one has the folder.
        recorded = self.commit(label_store)
        for name, value in self:
            recorded_value = getattr(recorded, name)
            if recorded_value != value:
                raise DataError(
                    f"{label_store.uri}: holds labels of another {name}: {recorded_value}, not {value}; name another folder"
                )


def label_dataset(
    model_uri: str,
    pool_uri: str,
    out_uri: str,
    config: LabelingConfig,
    *,
    shards: str | None = None,
    kept_by: tuple[Store, LabelSet, Selection | None] | None = None,
) -> LabelSet | None:
    """Labels shards of a dataset, and joins them into a label set if all are labeled; returns None if not.

    `shards`: half-open range, `3-7`. `kept_by`: a label set and its selection; only images that the selection kept are labeled.
    Raises ConfigError or DataError for a wrong range, for models of different classes, and for a folder with other labels.
    """
    pool_store = open_store(pool_uri)
    if not pool_store.exists(Dataset.filename):
        raise DataError(
            f"{pool_store.uri}: no {Dataset.filename} here; import the images first: ns data import SOURCE {pool_uri}"
        )
    temperature = config.temperature
    if temperature == "fitted":
        raise ConfigError(
            "temperature: fitted needs the calibration images of a run; give the number that the run's report shows"
        )
    if config.foreign_score != "none":
        raise ConfigError(f"foreign_score: {config.foreign_score} needs the labeled images of a run; leave it out")
    dataset, label_store = Dataset.load(pool_store), open_store(out_uri)
    shard_range = _parse_shard_range(shards, len(dataset.shards))
    images = sum(dataset.shards[number].samples for number in shard_range)
    predictors = [
        Predictor(open_store(uri), batch=config.batch, images=images, views=config.views)
        for uri in (model_uri, *config.ensemble)
    ]
    teacher, *others = (predictor.manifest for predictor in predictors)
    inputs = LabelingInputs(
        dataset=dataset.digest,
        teacher=teacher.digest,
        code=digest_code(*LABELING_SOURCES),
        views=config.views,
        ensemble=tuple(manifest.digest for manifest in others),
        probabilities=config.probabilities,
        temperature=temperature,
        top_k=count_kept_classes(len(teacher.classes), config.top_k),
        selection=kept_by[2].digest if kept_by and kept_by[2] else None,
    )
    inputs.claim_store(label_store)
    find_left_out = _find_unselected_rows(dataset, *kept_by) if kept_by else lambda _: {}
    label_pool_shards(
        predictors, pool_store, dataset, label_store, shard_range, config, temperature=temperature, find_left_out=find_left_out
    )
    if not all(label_store.exists(label_shard_key(shard.name)) for shard in dataset.shards):
        return None
    label_set = join_label_shards(
        label_store,
        dataset,
        teacher=inputs.teacher,
        code=inputs.code,
        classes=teacher.classes,
        top_k=config.top_k,
        views=config.views,
        ensemble=inputs.ensemble,
        probabilities=config.probabilities,
        temperature=temperature,
    )
    label_set.save(label_store)
    return label_set


def _parse_shard_range(shards: str | None, count: int) -> range:
    if shards is None:
        return range(count)
    start, dash, stop = shards.partition("-")
    if not (dash and shards.isascii() and start.isdigit() and stop.isdigit() and int(start) < int(stop) <= count):
        raise ConfigError(f"--shards: invalid value {shards!r}: must be START-STOP, within 0-{count}")
    return range(int(start), int(stop))


def _find_unselected_rows(
    dataset: Dataset, label_store: Store, label_set: LabelSet, selection: Selection | None
) -> Callable[[Shard], Mapping[int, str]]:
    """A function from a shard to its rows that the selection did not keep, with the reason."""
    if selection is None:
        raise ConfigError(
            f"--kept: {label_store.uri}: a label set by itself has no selection; name a run's generation: latest/gen-1"
        )
    if label_set.dataset != dataset.digest:
        raise DataError(f"--kept: {label_store.uri}: labels of another dataset, {label_set.dataset}")
    shard_numbers = {label_shard.source: number for number, label_shard in enumerate(label_set.shards)}
    copy_reader = CopyReader(label_store, selection)

    def find_rows(shard: Shard) -> Mapping[int, str]:
        number = shard_numbers[shard.sha256]
        rows = read_label_rows(label_store, label_set.shards[number])
        copies = copy_reader.count_shard_copies(number, rows)
        # Images that are held out, excluded or purged stay so; unreadable ones are read again.
        unselected = np.flatnonzero((copies == 0) & (rows.readable | rows.left_out)).tolist()
        reasons = ((row, rows.reasons[row] or "not kept by the selection") for row in unselected)
        return {row: reason.removeprefix(LEFT_OUT_PREFIX) for row, reason in reasons}

    return find_rows
