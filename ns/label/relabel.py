"""Labelling outside of a run: any model over any dataset, or over the images that a selection kept."""

from collections.abc import Iterator, Mapping

from ns.config import LabellingConfig
from ns.data.dataset import MANIFEST as DATASET
from ns.data.dataset import Dataset
from ns.digest import LABELLING, code_digest
from ns.errors import ConfigError, DataError
from ns.inference import Predictor
from ns.label.labelset import MANIFEST, LabelSet, join, marker, read_rows
from ns.label.predict import label_shards
from ns.label.selection import Selection, copies
from ns.store import Store, open_store


def label_dataset(
    model: str,
    pool: str,
    out: str,
    config: LabellingConfig,
    *,
    shards: str | None = None,
    only: tuple[Store, LabelSet, Selection | None] | None = None,
) -> LabelSet | None:
    """Labels shards of a dataset, and joins them into a label set if all are labelled; None if not.

    `shards`: half-open range, `3-7`. `only`: images that the selection did not keep get no label. Raises ConfigError or DataError
    for what does not fit together.
    """
    folder = open_store(pool)
    if not folder.exists(DATASET):
        raise DataError(f"{folder.uri}: no {DATASET} here; import the images first: ns data import SOURCE {pool}")
    dataset, labels = Dataset.load(folder), open_store(out)
    wanted = _range(shards, len(dataset.shards))
    left_out = _NotKept(dataset, *only) if only else None
    images = sum(dataset.shards[number].samples for number in wanted)
    predictors = [
        Predictor(open_store(place), batch=config.batch, images=images, views=config.views)
        for place in (model, *config.ensemble)
    ]
    cards = [predictor.card for predictor in predictors]
    code = code_digest(*LABELLING)
    if labels.exists(MANIFEST):
        made = LabelSet.read(labels, MANIFEST)
        if (made.dataset, made.teacher, made.code) != (dataset.digest, cards[0].digest, code):
            raise DataError(f"{labels.uri}: holds another label set, of dataset {made.dataset}; name another folder")
    label_shards(predictors, folder, dataset, labels, wanted, config, left_out=left_out)
    if not all(labels.exists(marker(shard.name)) for shard in dataset.shards):
        return None
    made = join(
        labels,
        dataset,
        teacher=cards[0].digest,
        code=code,
        classes=cards[0].classes,
        top_k=config.top_k,
        views=config.views,
        ensemble=tuple(card.digest for card in cards[1:]),
        probabilities=config.probabilities,
    )
    made.write(labels, MANIFEST)
    return made


def _range(shards: str | None, count: int) -> range:
    if shards is None:
        return range(count)
    start, dash, stop = shards.partition("-")
    if not (dash and start.isdigit() and stop.isdigit() and int(start) < int(stop) <= count):
        raise ConfigError(f"--shards: invalid value {shards!r}: must be START-STOP, within 0-{count}")
    return range(int(start), int(stop))


class _NotKept(Mapping[str, Mapping[int, str]]):
    """sha256 of a shard → rows that a selection did not keep; read when it is asked for."""

    def __init__(self, dataset: Dataset, labels: Store, label_set: LabelSet, selection: Selection | None) -> None:
        if selection is None:
            raise ConfigError(
                f"--kept: {labels.uri}: a label set by itself has no selection; name a run's generation: latest/gen-1"
            )
        if label_set.dataset != dataset.digest:
            raise DataError(f"--kept: {labels.uri}: labels of another dataset, {label_set.dataset}")
        self._labels, self._selection = labels, selection
        self._shards = {shard.source: shard for shard in label_set.shards}

    def __getitem__(self, sha256: str) -> Mapping[int, str]:
        rows = read_rows(self._labels, self._shards[sha256])
        times = copies(self._selection, rows)
        return {
            row: "not kept by the selection" for row, count in enumerate(times.tolist()) if not count and rows.readable[row]
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)
