"""Training streams: the images of a step, noised, as a pure function of (seed, step), so that any step can be made again."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from ns.data.augment import TrainTransform
from ns.data.dataset import Dataset
from ns.data.decode import decode
from ns.data.order import WINDOW, Order
from ns.data.shards import Sample, read_index
from ns.errors import DataError, TrainingError
from ns.store import Store

DECODED_BYTES = 256 << 20
"""Decoded images that a worker may keep: small datasets are decoded once."""


class ImageSource:
    """Decoded images of a dataset by (shard, row)."""

    def __init__(self, folder: Store, dataset: Dataset) -> None:
        self._folder = folder
        self._dataset = dataset
        self._decoded: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
        self._decoded_bytes = 0
        self.index = lru_cache(maxsize=2 * WINDOW)(self._read_index)

    def _read_index(self, shard: int) -> list[Sample]:
        entry = self._dataset.shards[shard]
        samples = read_index(self._folder.path(entry.name))
        if len(samples) != entry.samples:
            raise DataError(
                f"{self._folder.uri}/{entry.name}: {len(samples)} images, dataset.json says {entry.samples}; "
                "import the data again"
            )
        return samples

    def image(self, shard: int, row: int) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3] RGB."""
        known = self._decoded.get((shard, row))
        if known is not None:
            return known
        sample = self.index(shard)[row]
        name = self._dataset.shards[shard].name
        try:
            image = decode(self._folder.get_range(name, sample.offset, sample.size))
        except DataError as error:
            raise DataError(f"{self._folder.uri}/{name}: {sample.key}: {error}; import the data again") from error
        if self._decoded_bytes + image.nbytes <= DECODED_BYTES:
            self._decoded[shard, row] = image
            self._decoded_bytes += image.nbytes
        return image

    def labels(self, shard: int) -> list[int]:
        """Class indices of a labelled shard."""
        labels = []
        for sample in self.index(shard):
            if sample.label is None or sample.label >= len(self._dataset.classes):
                raise DataError(
                    f"{self._folder.uri}/{self._dataset.shards[shard].name}: {sample.key}: label {sample.label}: "
                    f"must be a class index below {len(self._dataset.classes)}"
                )
            labels.append(sample.label)
        return labels


class Labelled:
    """The labelled images of an experiment."""

    def __init__(self, folder: Store, dataset: Dataset) -> None:
        self.source = ImageSource(folder, dataset)
        self.labels = [np.array(self.source.labels(shard), np.int64) for shard in range(len(dataset.shards))]
        self.copies = [np.ones(shard.samples, np.int64) for shard in dataset.shards]
        self.samples = dataset.samples


class PseudoLabelled:
    """The selected images of the pool with their soft labels."""

    def __init__(
        self,
        source: ImageSource,
        targets: Sequence[npt.NDArray[np.float32]],
        copies: Sequence[npt.NDArray[np.integer]],
    ) -> None:
        """`targets`: for each shard float32 [rows, classes]; `copies`: for each shard int [rows]."""
        self.source = source
        self.targets = targets
        self.copies = copies


class Batch(NamedTuple):
    """One step's images: B labelled ones first, then U pseudo-labelled ones."""

    images: Tensor
    """uint8 [B+U, H, W, 3]"""
    labels: Tensor
    """int64 [B]"""
    targets: Tensor
    """float32 [U, C], the teacher's probabilities"""


class Batches(TorchDataset[Batch]):
    """Step → batch. All randomness follows from (seed, position in the stream), none from who makes the batch."""

    def __init__(
        self,
        labelled: Labelled,
        pseudo: PseudoLabelled | None,
        transform: TrainTransform,
        *,
        batch: int,
        pseudo_batch: int,
        classes: int,
        seed: int,
    ) -> None:
        self._labelled = labelled
        self._pseudo = pseudo
        self._transform = transform
        self._batch = batch
        self._pseudo_batch = pseudo_batch if pseudo else 0
        self._classes = classes
        self._seed = seed
        self._labelled_order = Order(labelled.copies, (seed, 0))
        self._pseudo_order = Order(pseudo.copies, (seed, 1)) if pseudo else None

    def __getitem__(self, step: int) -> Batch:
        first = step * self._batch
        places = self._labelled_order.take(first, self._batch)
        images = [self._noised(self._labelled.source, place, 0, first + i) for i, place in enumerate(places)]
        labels = np.array([self._labelled.labels[shard][row] for shard, row in places], np.int64)
        targets = np.zeros((self._pseudo_batch, self._classes), np.float32)
        if self._pseudo and self._pseudo_order:
            first = step * self._pseudo_batch
            places = self._pseudo_order.take(first, self._pseudo_batch)
            images += [self._noised(self._pseudo.source, place, 1, first + i) for i, place in enumerate(places)]
            for i, (shard, row) in enumerate(places):
                targets[i] = self._pseudo.targets[shard][row]
        return Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(labels), torch.from_numpy(targets))

    def _noised(self, source: ImageSource, place: tuple[int, int], stream: int, position: int) -> npt.NDArray[np.uint8]:
        # Philox takes its key as it is: five times cheaper to set up than seeding through SeedSequence.
        key = np.array([self._seed << 1 | stream, position], np.uint64)
        return self._transform(source.image(*place), np.random.Generator(np.random.Philox(key=key)))


class _Steps(Sampler[int]):
    def __init__(self, start: int, stop: int) -> None:
        self._range = range(start, stop)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._range)

    def __len__(self) -> int:
        return len(self._range)


def loader(batches: Batches, *, start: int, stop: int, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches of steps [start, stop) in order, made ahead by `workers` processes.

    Raises DataError, in one line, for an image that cannot be read, and TrainingError when a worker is killed.
    """
    made: DataLoader[Batch] = DataLoader(
        batches,
        batch_size=None,
        sampler=_Steps(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
    try:
        yield from made
    except DataError as error:
        # A worker's exception arrives with its stack trace as the message, the message proper at the end.
        raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            "a data loader's process was killed, most often for want of memory; lower train.loader_workers or the batch"
        ) from error
