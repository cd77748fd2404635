"""Training streams: the noised images of a step as a pure function of (seed, step), so that training can resume at any step."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import SimpleQueue
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any, NamedTuple, Protocol

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
from ns.storage.scratch import place_sockets


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


class MixedLabels(NamedTuple):
    """What the images of a batch were mixed with, and how far: an image shows `shares` of itself, and the rest of its partner."""

    class_ids: Tensor
    """int64 [B], of the partners of the labeled images"""
    targets: Tensor
    """float32 [U, C], of the partners of the pseudo-labeled images"""
    shares: Tensor
    """float32 [B+U], 0…1"""


class Batch(NamedTuple):
    """One step's images: B labeled ones first, then U pseudo-labeled ones."""

    images: Tensor
    """uint8 [B+U, H, W, 3]"""
    class_ids: Tensor
    """int64 [B]"""
    targets: Tensor
    """float32 [U, C], the teacher's probabilities times the image's weight in the loss"""
    mixed: MixedLabels | None = None
    """None if no images are mixed"""

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` of each of its tensors."""
        mixed = self.mixed and MixedLabels(*map(function, self.mixed))
        return Batch(function(self.images), function(self.class_ids), function(self.targets), mixed)

    def list_columns(self) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors with a row for each labeled image, and those with a row for each pseudo-labeled one; some are views."""
        labeled = len(self.class_ids)
        columns = [self.images[:labeled], self.class_ids], [self.images[labeled:], self.targets]
        if self.mixed:
            columns[0].extend((self.mixed.shares[:labeled], self.mixed.class_ids))
            columns[1].extend((self.mixed.shares[labeled:], self.mixed.targets))
        return columns


class _StreamPart(NamedTuple):
    """What belongs to the images of a step, of one stream."""

    locations: list[tuple[int, int]]
    """(shard, row) of each image."""
    partners: list[tuple[int, int]]
    """(shard, row) of what each image is mixed with; the image itself if it is not mixed."""
    shares: npt.NDArray[np.float32]
    """Share that each image shows of itself."""


def _allocate_pixels(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def _allocate_shared_pixels(shape: tuple[int, ...]) -> Tensor:
    # share_memory_() would copy what is in no shared memory yet.
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


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
        pseudo_transform: TrainTransform | None = None,
        batch_size: int,
        pseudo_batch_size: int,
        num_classes: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`pseudo_transform`: for the pseudo-labeled images; `transform` if not given."""
        self._labeled = labeled
        self._pseudo = pseudo
        self._num_classes = num_classes
        transforms = (transform, pseudo_transform or transform)
        self._streams = [
            _ImageStream(
                images.source,
                ShardShuffle(images.copies, (seed, number), images.source.window_shards),
                transforms[number],
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

    def make_part(
        self, step: int, part: int, parts: int, allocate: Callable[[tuple[int, ...]], Tensor] = _allocate_pixels
    ) -> Batch:
        """One of the equal parts of this rank's images of a step: its labeled ones, then its pseudo-labeled ones.

        `allocate`: shape → uint8 tensor that the images are written into.
        """
        counts = [stop - first for first, stop in (stream.bound_part(step, part, parts) for stream in self._streams)]
        size = self._streams[0].transform.resolution
        images = allocate((sum(counts), size, size, 3))
        rows = np.split(images.numpy(), counts[:1])
        labeled, *rest = [stream.make_part(step, part, parts, out) for stream, out in zip(self._streams, rows, strict=False)]
        pseudo = rest[0] if rest else _StreamPart([], [], np.ones(0, np.float32))
        batch = Batch(images, self._read_class_ids(labeled.locations), self._read_targets(pseudo.locations))
        if not any(stream.transform.mixer for stream in self._streams):
            return batch
        shares = torch.from_numpy(np.concatenate([labeled.shares, pseudo.shares]))
        mixed = MixedLabels(self._read_class_ids(labeled.partners), self._read_targets(pseudo.partners), shares)
        return batch._replace(mixed=mixed)

    def _read_class_ids(self, locations: list[tuple[int, int]]) -> Tensor:
        return torch.from_numpy(np.array([self._labeled.class_ids[shard][row] for shard, row in locations], np.int64))

    def _read_targets(self, locations: list[tuple[int, int]]) -> Tensor:
        targets = np.zeros((len(locations), self._num_classes), np.float32)
        for i, (shard, row) in enumerate(locations):
            targets[i] = self._pseudo.read_targets(shard)[row]  # type: ignore[union-attr]
        return torch.from_numpy(targets)

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

    def make_part(self, step: int, part: int, parts: int, out: npt.NDArray[np.uint8]) -> _StreamPart:
        """Writes a part of this rank's images of a step into `out`, mixed if the transform has a mixer."""
        first, stop = self.bound_part(step, part, parts)
        locations = self.locate_images(step, part, parts)
        mixer = self.transform.mixer
        if mixer is None:
            for row, image in zip(out, self.make_images(first, locations), strict=True):
                row[:] = image
            return _StreamPart(locations, locations, np.ones(len(out), np.float32))
        # Whole pairs. The other image of the first or the last one may belong elsewhere, and is made here once more.
        begin, end = first - first % 2, stop + stop % 2
        locations = self.shuffle.positions(begin, end - begin)
        partners = [locations[index ^ 1] for index in range(len(locations))]
        images = list(self.make_images(begin, locations))
        shares = np.ones(len(images), np.float32)
        for index in range(0, len(images), 2):
            rng = self._make_generator(begin + index, purpose=1)
            images[index], images[index + 1], share = mixer(images[index], images[index + 1], rng)
            shares[index : index + 2] = share
        kept = slice(first - begin, stop - begin)
        for row, image in zip(out, images[kept], strict=True):
            row[:] = image
        return _StreamPart(locations[kept], partners[kept], shares[kept])

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
            rng = self._make_generator(position)
            image = read(*location)
            with source.prefix_decode_errors(*location):
                yield transform(image, rng)

    def _make_generator(self, position: int, purpose: int = 0) -> np.random.Generator:
        """Draws for the image at a position, or, with purpose 1, for the pair that begins there."""
        # Philox with a key is set up five times faster than a generator with a seed, which needs a SeedSequence.
        key = np.array([self.philox_key, position], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=purpose << 192))


class _StepParts(TorchDataset[Batch]):
    """Number → part of a step, in shared memory. Loaders make these."""

    def __init__(self, batches: TrainingBatches, parts: int) -> None:
        self._batches = batches
        self._parts = parts

    def __getitem__(self, number: int) -> Batch:
        # torch would do this while it sends the batch, in a thread whose errors nobody hears of: the training would wait for good.
        batch = self._batches.make_part(*divmod(number, self._parts), self._parts, allocate=_use_room(_allocate_shared_pixels))
        return batch.map_tensors(_use_room(lambda tensor: tensor.share_memory_()))


def _use_room(share: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """`share`, which takes room in shared memory, with an error that says so if there is none."""

    def share_or_explain(what: Any) -> Tensor:
        try:
            return share(what)
        except RuntimeError as error:
            needed = what.nbytes if isinstance(what, Tensor) else math.prod(what)
            raise TrainingError(
                f"{SHARED_MEMORY} has no room for {needed:,} bytes of images, because other programs use it too: give the container "
                "more (docker run --shm-size), or lower train.loader_workers (0 needs none)"
            ) from error

    return share_or_explain


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
    if workers:
        place_sockets()
    send_errors: SimpleQueue[str] = SimpleQueue()
    data_loader: DataLoader[Batch] = DataLoader(
        _StepParts(batches, parts) if workers else batches,
        batch_size=None,
        sampler=range(start * parts, stop * parts),
        num_workers=workers,
        # Parts are copied into a pinned batch anyway.
        pin_memory=pin_memory and parts == 1,
        prefetch_factor=split.ahead if workers else None,
        worker_init_fn=partial(_init_loader, send_errors),
    )
    loaded: Any = iter(data_loader)
    try:
        if parts == 1:
            yield from loaded
        else:
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
    finally:
        # An error's traceback keeps the iterator. torch waits 5 s for each of its processes where it is found as garbage.
        if workers:
            loaded._shutdown_workers()


def copy_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on the device. To a GPU, pinned ones are copied on a stream of their own, while the network still works on the
    batch before."""
    if device.type != "cuda":
        yield from (batch.map_tensors(lambda tensor: tensor.to(device)) for batch in batches)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(copying):
            copied = batch.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        working = torch.cuda.current_stream(device)
        working.wait_stream(copying)
        for tensor in (*copied[:3], *(copied.mixed or ())):
            tensor.record_stream(working)  # its memory is not used for the next copy before the network is done with it
        yield copied


def _join_parts(loaded: Iterator[Batch], labeled: int, pseudo: int, *, pin_memory: bool) -> Batch:
    """The batch of a step from its parts. Each part is let go as soon as it is copied: its memory is needed for the next one."""
    batch, labeled_done, pseudo_done = None, 0, 0
    while labeled_done < labeled or pseudo_done < pseudo:
        part = next(loaded)
        if batch is None:
            batch = _allocate_batch(part, labeled, pseudo, pin_memory=pin_memory)
        for whole_columns, columns, done in zip(
            batch.list_columns(), part.list_columns(), (labeled_done, pseudo_done), strict=True
        ):
            for whole_column, column in zip(whole_columns, columns, strict=True):
                whole_column[done : done + len(column)] = column
        labeled_done, pseudo_done = labeled_done + len(part.class_ids), pseudo_done + len(part.targets)
    assert batch is not None
    return batch


def _allocate_batch(part: Batch, labeled: int, pseudo: int, *, pin_memory: bool) -> Batch:
    """A batch of that many images, with tensors like those of a part of it."""

    def allocate_rows(like: Tensor, rows: int) -> Tensor:
        return torch.empty((rows, *like.shape[1:]), dtype=like.dtype, pin_memory=pin_memory)

    mixed = part.mixed and MixedLabels(
        allocate_rows(part.mixed.class_ids, labeled),
        allocate_rows(part.mixed.targets, pseudo),
        allocate_rows(part.mixed.shares, labeled + pseudo),
    )
    images = allocate_rows(part.images, labeled + pseudo)
    return Batch(images, allocate_rows(part.class_ids, labeled), allocate_rows(part.targets, pseudo), mixed)


def _init_loader(errors: "SimpleQueue[str]", _worker: int) -> None:
    """Lets a loader's process end, with its reason in `errors`, if it cannot send a batch. Python would print a stack trace and drop
    the batch, for which the training would wait for good. A training that is killed while it takes a batch is no error of its loaders."""

    def end_process(error: Exception, _batch: object) -> None:
        errors.put(f"{type(error).__name__}: {error}")
        os._exit(0)  # with another code, torch would raise its own error somewhere in the training

    Queue._on_queue_feeder_error = staticmethod(end_process)  # type: ignore[attr-defined]
    sys.excepthook = partial(_print_unless_reader_ended, sys.excepthook)


def _print_unless_reader_ended(
    print_error: Callable[[type[BaseException], BaseException, TracebackType | None], object],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    # From the thread that hands over shared memory: it goes on, and who asked is gone.
    if not isinstance(error, ConnectionError | EOFError):
        print_error(kind, error, trace)
