"""Training streams: the noised images of a step as a pure function of (seed, step), so that training can resume at any step."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import SimpleQueue
from multiprocessing.queues import Queue
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ns.core.errors import NsError, TrainingError
from ns.data.augment.transforms import TrainTransform
from ns.data.dataset import Dataset
from ns.data.loading.sampler import ShardShuffle
from ns.data.loading.shard_reader import ImageSource
from ns.data.loading.shared_memory import SHARED_MEMORY, StepSplit
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


class ShardTargets(Protocol):
    """The targets of a shard; an array [rows, classes] is one."""

    def __getitem__(self, row: int, /) -> npt.NDArray[np.float32]:
        """float32 [classes] of a row that has copies."""


class PseudoLabeledImages:
    """The selected images of the pool with their targets."""

    def __init__(
        self,
        source: ImageSource,
        read_targets: Callable[[int], ShardTargets],
        copies: Sequence[npt.NDArray[np.integer]],
    ) -> None:
        """`read_targets`: shard index → targets of its rows; `copies`: per shard int [rows]."""
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
    """float32 [U, C], the teacher's probabilities times the image's weight in the loss"""


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
                ShardShuffle(images.copies, (seed, number), images.source.window_shards),
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
        return self.make_part(step, 0, 1)

    def make_part(self, step: int, part: int, parts: int) -> Batch:
        """One of the equal parts of this rank's images of a step: its labeled ones, then its pseudo-labeled ones."""
        locations = [stream.locate_images(step, part, parts) for stream in self._streams]
        images = [
            image
            for stream, stream_locations in zip(self._streams, locations, strict=True)
            for image in stream.make_images(stream.bound_part(step, part, parts)[0], stream_locations)
        ]
        class_ids = np.array([self._labeled.class_ids[shard][row] for shard, row in locations[0]], np.int64)
        pseudo = locations[1] if self._pseudo else []
        targets = np.zeros((len(pseudo), self._num_classes), np.float32)
        for i, (shard, row) in enumerate(pseudo):
            targets[i] = self._pseudo.read_targets(shard)[row]  # type: ignore[union-attr]
        return Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(class_ids), torch.from_numpy(targets))

    def count_images(self) -> tuple[int, int]:
        """Labeled and pseudo-labeled images of a step on this rank."""
        sizes = [stop - first for first, stop in (stream.bound_part(0, 0, 1) for stream in self._streams)]
        return sizes[0], sum(sizes[1:])

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

    def bound_part(self, step: int, part: int, parts: int) -> tuple[int, int]:
        """The positions in the stream [first, stop) of a part of this rank's images."""
        first = step * self.batch_size + self.rank * self.batch_size // self.world_size
        size = step * self.batch_size + (self.rank + 1) * self.batch_size // self.world_size - first
        return first + part * size // parts, first + (part + 1) * size // parts

    def locate_images(self, step: int, part: int = 0, parts: int = 1) -> list[tuple[int, int]]:
        """(shard, row) of each image of a part of this rank's images. Begins to fetch the shards that come next."""
        first, stop = self.bound_part(step, part, parts)
        self.source.fetch_ahead(self.shuffle.prefetch(stop))
        return self.shuffle.positions(first, stop - first)

    def list_keys(self, step: int) -> list[str]:
        return [
            self.source.read_index(shard).keys[row]
            for shard, row in self.shuffle.positions(step * self.batch_size, self.batch_size)
        ]

    def make_images(self, first: int, locations: list[tuple[int, int]]) -> Iterator[npt.NDArray[np.uint8]]:
        """The noised images at the positions from `first` on."""
        source, transform = self.source, self.transform
        read = source.read_image if transform.allows_scaled_decode else source.read_pixels
        for position, location in enumerate(locations, first):
            # Philox with a key is set up five times faster than a generator with a seed, which needs a SeedSequence.
            rng = np.random.Generator(np.random.Philox(key=np.array([self.philox_key, position], np.uint64)))
            image = read(*location)
            with source.prefix_decode_errors(*location):
                yield transform(image, rng)


class _StepParts(TorchDataset[Batch]):
    """Number → part of a step, in shared memory. Loaders make these."""

    def __init__(self, batches: TrainingBatches, parts: int) -> None:
        self._batches = batches
        self._parts = parts

    def __getitem__(self, number: int) -> Batch:
        batch = self._batches.make_part(*divmod(number, self._parts), self._parts)
        # torch would do this while it sends the batch, in a thread whose errors nobody hears of: the training would wait for good.
        try:
            return Batch(*(tensor.share_memory_() for tensor in batch))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            needed = sum(tensor.nbytes for tensor in batch)
            raise TrainingError(
                f"{SHARED_MEMORY} has no room for {needed:,} bytes of images, because other programs use it too: give the container "
                "more (docker run --shm-size), or lower train.loader_workers (0 needs none)"
            ) from error


def iterate_batches(
    batches: TrainingBatches,
    *,
    start: int,
    stop: int,
    workers: int,
    pin_memory: bool,
    split: StepSplit | None = None,
) -> Iterator[Batch]:
    """Batches of steps [start, stop) in order, prefetched by `workers` processes, which make the parts of a step as `split` says.

    Raises a loader's own error (DataError for an unreadable image, StoreError, TrainingError) in one line, and RuntimeError with
    `DataLoader worker (pid`, as torch does, for a process that was killed.
    """
    split = split or StepSplit()
    parts = split.parts if workers else 1
    send_errors: SimpleQueue[str] = SimpleQueue()
    data_loader: DataLoader[Batch] = DataLoader(
        _StepParts(batches, parts) if workers else batches,
        batch_size=None,
        sampler=range(start * parts, stop * parts),
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=split.ahead if workers else None,
        worker_init_fn=partial(_report_send_errors, send_errors),
    )
    try:
        if parts == 1:
            yield from data_loader
        else:
            loaded = iter(data_loader)
            for _ in range(start, stop):
                yield _join_parts(loaded, *batches.count_images(), pin_memory=pin_memory)
    except NsError as error:
        # A worker's exception arrives with its stack trace as the message; the actual message is at the end.
        raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from error
    except (ConnectionError, EOFError) as error:
        if str(error).startswith("Caught "):  # a worker's own
            raise
        # torch may not have noticed yet that a worker died while it sent a batch, and then raises this error instead of its own.
        raise RuntimeError("DataLoader worker (pid unknown) died while it sent a batch") from error
    except RuntimeError as error:
        if send_errors.empty():
            raise
        raise TrainingError(f"a data loader cannot hand over its images: {send_errors.get()}") from error


def _join_parts(loaded: Iterator[Batch], labeled: int, pseudo: int, *, pin_memory: bool) -> Batch:
    """The batch of a step from its parts. Each part is let go as soon as it is copied: its memory is needed for the next one."""
    batch, labeled_done, pseudo_done = None, 0, 0
    while labeled_done < labeled or pseudo_done < pseudo:
        part = next(loaded)
        if batch is None:
            batch = Batch(
                torch.empty((labeled + pseudo, *part.images.shape[1:]), dtype=torch.uint8, pin_memory=pin_memory),
                torch.empty(labeled, dtype=torch.int64, pin_memory=pin_memory),
                torch.empty((pseudo, part.targets.shape[1]), pin_memory=pin_memory),
            )
        labeled_end, pseudo_end = labeled_done + len(part.class_ids), pseudo_done + len(part.targets)
        batch.images[labeled_done:labeled_end] = part.images[: len(part.class_ids)]
        batch.images[labeled + pseudo_done : labeled + pseudo_end] = part.images[len(part.class_ids) :]
        batch.class_ids[labeled_done:labeled_end] = part.class_ids
        batch.targets[pseudo_done:pseudo_end] = part.targets
        labeled_done, pseudo_done = labeled_end, pseudo_end
    assert batch is not None
    return batch


def _report_send_errors(errors: "SimpleQueue[str]", _worker: int) -> None:
    """Lets a loader's process end, with its reason in `errors`, if it cannot send a batch. Python would print a stack trace and drop
    the batch, for which the training would wait for good."""

    def end_process(error: Exception, _batch: object) -> None:
        errors.put(f"{type(error).__name__}: {error}")
        os._exit(0)  # with another code, torch would raise its own error somewhere in the training

    Queue._on_queue_feeder_error = staticmethod(end_process)  # type: ignore[attr-defined]
