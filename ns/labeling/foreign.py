"""What foreign images are told by: statistics of the labeled images, and the scores of the calibration images, once per teacher.

foreign.json                digests; written last
statistics-SHA.safetensors  two `StageStatistics` of each stage; only for `distance`
calibration-SHA.parquet     key string, foreign_score float32: a row per readable calibration image
"""

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ns.config.schema import ForeignScore, LabelingConfig
from ns.core.digest import sha256_bytes
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.loading.shard_reader import ImageSource
from ns.data.subsample import Subsample, draw_rows
from ns.storage import Store
from ns.storage.documents import HashedDocument, name_by_content
from ns.storage.parquet import encode_table, read_table

if TYPE_CHECKING:
    from ns.modeling.foreign import ForeignScorer
    from ns.modeling.predictor import Predictor

STATISTICS = "statistics.safetensors"
CALIBRATION_SCORES = "calibration.parquet"
MAX_LABELED = 20_000
"""Labeled images that statistics are made of, drawn evenly over the classes; more change little."""


class ForeignReference(HashedDocument):
    """`foreign.json`: what an image is compared with to tell whether it is foreign."""

    filename: ClassVar[str] = "foreign.json"

    format: Literal[1] = 1
    kind: ForeignScore
    teacher: str
    """Digest of the teacher."""
    labeled: str | None
    """Digest of the labeled dataset that the statistics are of; None if the score needs none."""
    labeled_images: int
    """Images of it that they were made of."""
    calibration: str
    """Digest of the calibration images."""
    calibration_images: int
    """Readable images among them."""
    statistics_sha256: str | None
    scores_sha256: str


class OpenDataset(NamedTuple):
    store: Store
    dataset: Dataset


def make_foreign_reference(
    teacher: Store, labeled: OpenDataset, calibration: OpenDataset, config: LabelingConfig, target: Store
) -> ForeignReference:
    """Writes a reference into `target`: scores the calibration images as the teacher will score the pool.

    Raises DataError if no calibration image is readable, ConfigError for a network without stages.
    """
    from ns.modeling.predictor import Predictor

    statistics, labeled_images = None, 0
    if config.foreign_score == "distance":
        statistics, labeled_images = _encode_statistics(Predictor(teacher, batch=config.batch), *labeled)
        target.put(name_by_content(STATISTICS, sha256_bytes(statistics)), statistics)
    scorer = _make_scorer(statistics)
    images = calibration.dataset.samples
    predictor = Predictor(teacher, batch=config.batch, images=images, views=config.views, foreign_scorer=scorer)
    keys: list[str] = []
    scores: list[npt.NDArray[np.float32]] = []
    source = ImageSource(calibration.store, calibration.dataset, max_open_shards=2)
    for shard in predictor.predict_shards(source, [(number, {}) for number in range(len(calibration.dataset.shards))]):
        assert shard.foreign_scores is not None
        readable = np.flatnonzero(~np.isnan(shard.foreign_scores))
        keys += [shard.index.keys[row] for row in readable.tolist()]
        scores.append(shard.foreign_scores[readable])
    if not keys:
        raise DataError(f"{calibration.store.uri}: no readable image to find the limit of foreign images on")
    table = encode_table(pa.table({"key": pa.array(keys, pa.string()), "foreign_score": np.concatenate(scores)}))
    target.put(name_by_content(CALIBRATION_SCORES, sha256_bytes(table)), table)
    reference = ForeignReference(
        kind=config.foreign_score,
        teacher=predictor.manifest.digest,
        labeled=labeled.dataset.digest if statistics else None,
        labeled_images=labeled_images,
        calibration=calibration.dataset.digest,
        calibration_images=len(keys),
        statistics_sha256=sha256_bytes(statistics) if statistics else None,
        scores_sha256=sha256_bytes(table),
    )
    return reference.commit(target)


def load_foreign_scorer(store: Store) -> "ForeignScorer":
    """The scorer of a reference. Raises DataError if its statistics are not the recorded ones."""
    reference = ForeignReference.load(store)
    statistics = None
    if reference.statistics_sha256:
        statistics = _read_checked(store, STATISTICS, reference.statistics_sha256)
    return _make_scorer(statistics)


def find_foreign_limit(store: Store, quantile: float) -> float:
    """The foreign score that a share `quantile` (0 to 1) of the calibration images does not exceed, from a reference.

    Raises DataError if the scores are not the recorded ones.
    """
    data = _read_checked(store, CALIBRATION_SCORES, ForeignReference.load(store).scores_sha256)
    scores = read_table(data)["foreign_score"].to_numpy()
    return float(np.quantile(scores, quantile, method="higher"))


def _make_scorer(statistics: bytes | None) -> "ForeignScorer":
    """By distance if there are statistics, else by energy."""
    from safetensors.torch import load as load_tensors

    from ns.modeling.foreign import DistanceScorer, EnergyScorer

    return EnergyScorer() if statistics is None else DistanceScorer.from_tensors(load_tensors(statistics))


def _encode_statistics(predictor: "Predictor", store: Store, dataset: Dataset) -> tuple[bytes, int]:
    """The statistics of the labeled images as a safetensors file, and the number of images that they were made of."""
    import torch
    from safetensors.torch import save as save_tensors

    from ns.modeling.foreign import DistanceScorer

    source = ImageSource(store, dataset, max_open_shards=2)
    rows_by_shard = draw_rows(source, len(dataset.shards), len(dataset.classes), Subsample(images=MAX_LABELED, seed=0))
    batches, class_ids = [], []
    for shard, rows in rows_by_shard.items():
        for start in range(0, len(rows), predictor.batch):
            images = [next(source.read_encoded(shard, row, row + 1)) for row in rows[start : start + predictor.batch].tolist()]
            batches.append(predictor.extract_stages(images))
        class_ids.append(torch.from_numpy(source.read_class_ids(shard, len(dataset.classes))[rows]))
    stages = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    scorer = DistanceScorer.fit_stages(stages, torch.cat(class_ids))
    return save_tensors(scorer.state_dict()), len(stages[0])


def _read_checked(store: Store, name: str, sha256: str) -> bytes:
    key = name_by_content(name, sha256)
    data = store.get(key)
    if sha256_bytes(data) != sha256:
        raise DataError(
            f"{store.uri}/{key}: sha256 differs from {ForeignReference.filename}; the file is damaged or was replaced"
        )
    return data
