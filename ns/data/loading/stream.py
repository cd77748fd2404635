"""Training streams: the noised images of a step as a pure function of (seed, step), so that training can resume at any step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ns.core.errors import DataError
from ns.data.augment.transforms import TrainTransform
from ns.data.dataset import Dataset
from ns.data.loading.sampler import ShardShuffle
from ns.data.loading.shard_reader import ImageSource
from ns.storage import Store


class LabeledImages:
    """The labeled images of an experiment. Raises DataError for an image without a class index."""

    def __init__(self, store: Store, dataset: Dataset) -> None:
        self.source = ImageSource(store, dataset)
        self.class_ids = [
            self.source.read_class_ids(shard, len(dataset.classes)).astype(np.int32) for shard in range(len(dataset.shards))
        ]
        self.copies = [np.ones(shard.samples, np.uint8) for shard in dataset.shards]
        self.samples = dataset.samples


class PseudoLabeledImages:
    """The selected images of the pool with their targets."""

    def __init__(
        self,
        source: ImageSource,
        read_targets: Callable[[int], npt.NDArray[np.float32]],
        copies: Sequence[npt.NDArray[np.integer]],
    ) -> None:
        """`read_targets`: shard index → float32 [rows, classes]; `copies`: per shard int [rows]."""
        self.source = source
        self.read_targets = read_targets
        self.copies = copies


class Batch(NamedTuple):
    """One step's images: B labeled ones first, then U pseudo-labeled ones."""

    images: Tensor
    """uint8 [B+U, H, W, 3]"""
    class_ids: Tensor
    """int64 [B]"""
    targets: Tensor
    """float32 [U, C], the teacher's probabilities"""


class TrainingBatches(TorchDataset[Batch]):
    """Step → batch. All randomness depends on (seed, position in the stream), none on the process that makes the batch.

    Of `world_size` ranks, each gets its part of each step's images. All have the same number of steps, and together they see
    the images that a single process would see, in the same order.
    """

    def __init__(
        self,
        labeled: LabeledImages,
        pseudo: PseudoLabeledImages | None,
        transform: TrainTransform,
        *,
        batch_size: int,
        pseudo_batch_size: int,
        num_classes: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._labeled = labeled
        self._pseudo = pseudo
        self._num_classes = num_classes
        self._streams = [
            _ImageStream(
                images.source,
                ShardShuffle(images.copies, (seed, number)),
                transform,
                size,
                rank,
                world_size,
                seed << 1 | number,
            )
            for number, (images, size) in enumerate(((labeled, batch_size), (pseudo, pseudo_batch_size)))
            if images
        ]

    def __getitem__(self, step: int) -> Batch:
        locations = [stream.locate_images(step) for stream in self._streams]
        images = [
            image
            for stream, stream_locations in zip(self._streams, locations, strict=True)
            for image in stream.make_images(step, stream_locations)
        ]
        class_ids = np.array([self._labeled.class_ids[shard][row] for shard, row in locations[0]], np.int64)
        pseudo = locations[1] if self._pseudo else []
        targets = np.zeros((len(pseudo), self._num_classes), np.float32)
        for i, (shard, row) in enumerate(pseudo):
            targets[i] = self._pseudo.read_targets(shard)[row]  # type: ignore[union-attr]
        return Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(class_ids), torch.from_numpy(targets))

    def list_keys(self, step: int) -> list[list[str]]:
        """Keys of the images of a step on all ranks: first of the labeled images, then of the pseudo-labeled ones."""
        return [stream.list_keys(step) for stream in self._streams]


@dataclass(frozen=True)
class _ImageStream:
    """The labeled or the pseudo-labeled images of each step."""

    source: ImageSource
    shuffle: ShardShuffle
    transform: TrainTransform
    batch_size: int
    rank: int
    world_size: int
    philox_key: int

    def bound_rank(self, step: int) -> tuple[int, int]:
        """The positions in the stream [first, stop) of this rank's images."""
        return (
            step * self.batch_size + self.rank * self.batch_size // self.world_size,
            step * self.batch_size + (self.rank + 1) * self.batch_size // self.world_size,
        )

    def locate_images(self, step: int) -> list[tuple[int, int]]:
        """(shard, row) of each image of this rank. Begins to fetch the shards that come next."""
        first, stop = self.bound_rank(step)
        self.source.fetch_ahead(self.shuffle.prefetch(stop))
        return self.shuffle.positions(first, stop - first)

    def list_keys(self, step: int) -> list[str]:
        return [
            self.source.read_index(shard).keys[row]
            for shard, row in self.shuffle.positions(step * self.batch_size, self.batch_size)
        ]

    def make_images(self, step: int, locations: list[tuple[int, int]]) -> Iterator[npt.NDArray[np.uint8]]:
        first, _ = self.bound_rank(step)
        source, transform = self.source, self.transform
        read = source.read_image if transform.allows_scaled_decode else source.read_pixels
        for position, location in enumerate(locations, first):
            # Philox with a key is set up five times faster than a generator with a seed, which needs a SeedSequence.
            rng = np.random.Generator(np.random.Philox(key=np.array([self.philox_key, position], np.uint64)))
            image = read(*location)
            with source.prefix_decode_errors(*location):
                yield transform(image, rng)


def iterate_batches(batches: TrainingBatches, *, start: int, stop: int, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches of steps [start, stop) in order, prefetched by `workers` processes.

    Raises DataError, in one line, for an unreadable image, and RuntimeError with `DataLoader worker (pid`, as torch does, for a
    process that was killed.
    """
    data_loader: DataLoader[Batch] = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
    try:
        yield from data_loader
    except DataError as error:
        # A worker's exception arrives with its stack trace as the message; the actual message is at the end.
        raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from error
    except (ConnectionError, EOFError) as error:
        if str(error).startswith("Caught "):  # a worker's own
            raise
        # torch may not have noticed yet that a worker died while it sent a batch, and then raises this error instead of its own.
        raise RuntimeError("DataLoader worker (pid unknown) died while it sent a batch") from error
