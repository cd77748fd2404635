"""Training streams: the images of a step, noised, as a pure function of (seed, step), so that any step can be made again."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from ns.core.errors import DataError
from ns.data.augment.transforms import TrainTransform
from ns.data.dataset import Dataset
from ns.data.loading.sampler import Order
from ns.data.loading.shard_reader import ImageSource
from ns.storage import Store


class Labelled:
    """The labelled images of an experiment."""

    def __init__(self, folder: Store, dataset: Dataset) -> None:
        self.source = ImageSource(folder, dataset)
        self.labels = [self.source.labels(shard, len(dataset.classes)).astype(np.int32) for shard in range(len(dataset.shards))]
        self.copies = [np.ones(shard.samples, np.uint8) for shard in dataset.shards]
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
    """Step → batch. All randomness follows from (seed, position in the stream), none from who makes the batch.

    With `world` processes, the one of `rank` gets its part of each step's images: all get as many steps, and together they see
    what one process alone would see, in the same order.
    """

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
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._labelled = labelled
        self._pseudo = pseudo
        self._classes = classes
        streams = [_Stream(labelled.source, Order(labelled.copies, (seed, 0)), transform, batch, rank, world, key=seed << 1)]
        if pseudo:
            order = Order(pseudo.copies, (seed, 1))
            streams.append(_Stream(pseudo.source, order, transform, pseudo_batch, rank, world, key=seed << 1 | 1))
        self._streams = streams

    def __getitem__(self, step: int) -> Batch:
        places = [stream.places(step) for stream in self._streams]
        images = [image for stream, own in zip(self._streams, places, strict=True) for image in stream.images(step, own)]
        labels = np.array([self._labelled.labels[shard][row] for shard, row in places[0]], np.int64)
        pseudo = places[1] if self._pseudo else []
        targets = np.zeros((len(pseudo), self._classes), np.float32)
        for i, (shard, row) in enumerate(pseudo):
            targets[i] = self._pseudo.targets[shard][row]  # type: ignore[union-attr]
        return Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(labels), torch.from_numpy(targets))

    def keys(self, step: int) -> list[list[str]]:
        """Keys of the images of a step, all processes' together: of the labelled ones, and of the pseudo-labelled ones."""
        return [stream.keys(step) for stream in self._streams]


class _Stream:
    """The images of one part of each step."""

    def __init__(
        self, source: ImageSource, order: Order, transform: TrainTransform, batch: int, rank: int, world: int, *, key: int
    ) -> None:
        self._source = source
        self._order = order
        self._transform = transform
        self._batch = batch
        self._part = rank * batch // world, (rank + 1) * batch // world
        self._key = key

    def places(self, step: int) -> list[tuple[int, int]]:
        """(shard, row) of each image. Begins to fetch the shards that come next."""
        first, stop = (step * self._batch + bound for bound in self._part)
        self._source.fetch_ahead(self._order.ahead(stop))
        return self._order.take(first, stop - first)

    def keys(self, step: int) -> list[str]:
        return [self._source.index(shard).keys[row] for shard, row in self._order.take(step * self._batch, self._batch)]

    def images(self, step: int, places: list[tuple[int, int]]) -> Iterator[npt.NDArray[np.uint8]]:
        first = step * self._batch + self._part[0]
        source, transform = self._source, self._transform
        read = source.image if transform.scales else source.pixels
        for position, place in enumerate(places, first):
            # Philox takes its key as it is: five times cheaper to set up than seeding through SeedSequence.
            rng = np.random.Generator(np.random.Philox(key=np.array([self._key, position], np.uint64)))
            image = read(*place)
            with source.blaming(*place):
                yield transform(image, rng)


class _Steps(Sampler[int]):
    def __init__(self, start: int, stop: int) -> None:
        self._range = range(start, stop)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._range)

    def __len__(self) -> int:
        return len(self._range)


def loader(batches: Batches, *, start: int, stop: int, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches of steps [start, stop) in order, made ahead by `workers` processes.

    Raises DataError, in one line, for an image that cannot be read, and, as torch does, RuntimeError with `DataLoader worker (pid`
    for a process that was killed.
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
    except (ConnectionError, EOFError) as error:
        if str(error).startswith("Caught "):  # a worker's own
            raise
        # A worker that dies while it hands a batch over may not be known to be dead yet, and then torch does not say it.
        raise RuntimeError("DataLoader worker (pid unknown) went away while it handed over a batch") from error
