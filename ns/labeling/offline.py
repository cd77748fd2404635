"""Labelling outside of a run: any model over any dataset, or over the images that a selection kept."""

from collections.abc import Iterator, Mapping
from typing import Literal

from ns.config.schema import LabellingConfig
from ns.core.digest import LABELLING, code_digest
from ns.core.errors import ConfigError, DataError
from ns.data.dataset import MANIFEST as DATASET
from ns.data.dataset import Dataset
from ns.labeling.label_set import MANIFEST, LabelSet, join, kept_classes, marker, read_rows
from ns.labeling.predict import label_shards
from ns.labeling.selection import Selection, copies
from ns.modeling.predictor import Predictor
from ns.storage import Store, open_store
from ns.storage.documents import Document

BEGUN = "labelling.json"


class Labelling(Document):
    """`labelling.json`: what the labels of a folder are made of. It is there before the first of them, so that what is done already
    is never taken for the work of another teacher."""

    format: Literal[1] = 1
    dataset: str
    teacher: str
    code: str
    """Digests."""
    views: str
    ensemble: tuple[str, ...]
    probabilities: str
    top_k: int
    kept: str | None
    """Digest of the selection whose images are labelled; None if all are."""

    def begin(self, labels: Store) -> None:
        """Raises DataError if the folder holds other labels."""
        if not labels.exists(BEGUN):
            if labels.exists(MANIFEST):
                raise DataError(f"{labels.uri}: holds a label set that was not made by `ns label`; name another folder")
            self.write(labels, BEGUN)
        begun = Labelling.read(labels, BEGUN)
        for name, own in self:
            other = getattr(begun, name)
            if other != own:
                raise DataError(f"{labels.uri}: holds labels of another {name}: {other}, not {own}; name another folder")


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
    teacher, *others = (predictor.card for predictor in predictors)
    begun = Labelling(
        dataset=dataset.digest,
        teacher=teacher.digest,
        code=code_digest(*LABELLING),
        views=config.views,
        ensemble=tuple(card.digest for card in others),
        probabilities=config.probabilities,
        top_k=kept_classes(len(teacher.classes), config.top_k),
        kept=only[2].digest if only and only[2] else None,
    )
    begun.begin(labels)
    label_shards(predictors, folder, dataset, labels, wanted, config, left_out=left_out)
    if not all(labels.exists(marker(shard.name)) for shard in dataset.shards):
        return None
    made = join(
        labels,
        dataset,
        teacher=begun.teacher,
        code=begun.code,
        classes=teacher.classes,
        top_k=config.top_k,
        views=config.views,
        ensemble=begun.ensemble,
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
