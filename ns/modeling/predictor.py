"""Un-noised inference over shards: decode and crop in threads while the network works on the batch before."""

import contextlib
import copy
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ns.config.schema import ModelConfig, Precision, Views
from ns.core import log, telemetry
from ns.core.errors import DataError
from ns.core.malloc import keep_freed_memory
from ns.data.augment.transforms import EvalTransform
from ns.data.index import ShardIndex
from ns.data.loading.decode import Encoded, room
from ns.data.loading.shard_reader import ImageSource
from ns.modeling import factory as models
from ns.modeling.precision import Mode, Workload, choose
from ns.storage import Store

Picture = Encoded | bytes | npt.NDArray[np.uint8]
"""An image to be looked at: encoded, or uint8 [H, W, 3]."""

DECODE_THREADS = 4
"""Decoders release the interpreter lock; more threads than this wait for memory, not for each other."""


CHUNKS_AHEAD = 2
"""Batches of encoded images that are read before a decoder is free for them."""

DECODE_NICENESS = 10
"""Of decoders that share their cores with the network: a network whose threads wait for one of them that a decoder has put off does
nothing at all meanwhile (ResNet-18, 64 px, two cores: 0.90 of the network's own speed without this, 0.93 with it)."""


COMPILE_FROM_IMAGES = 50_000
"""With fewer, not even the second that it takes to find out whether compiling pays is well spent."""


WINDOWS = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
"""Where the windows of `five` and `ten` views lie in the margin: the centre and the corners."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of each image of a shard, in the shard's order."""

    index: ShardIndex
    probabilities: npt.NDArray[np.float32]
    """[N, classes]; rows of unreadable images are NaN."""
    errors: dict[int, str]
    """Row → why the image could not be read."""


def inference_workload(network: nn.Module, model: ModelConfig, batch: int) -> Workload:
    """What a network does in labelling and evaluation, to be measured."""
    return Workload(
        "infer", network, batch, model.inference_resolution, next(network.parameters()).device, models.description(model)
    )


class _Chunk(NamedTuple):
    """Images of a shard that make a batch."""

    images: list[Picture]
    start: int
    """Row of the first one."""
    total: int
    """Rows of the shard."""
    whole: Any


class _Decoded(NamedTuple):
    images: npt.NDArray[np.uint8]
    errors: dict[int, str]


class Predictor:
    """A model in evaluation mode at its test resolution: no augmentation, no dropout, no stochastic depth.

    It runs in the precision that its card names. It is compiled if that makes the work on about `images` images shorter. With `scored`,
    the answer is one of these classes: the outputs of all others are left out before the softmax, and get no probability.
    """

    def __init__(
        self, folder: Store, *, batch: int, images: int = 0, views: Views = "one", scored: Collection[str] | None = None
    ) -> None:
        self._place = folder.uri
        network, self.card = models.load(folder)
        self._device = models.best_device()
        if self._device.type == "cpu":
            keep_freed_memory()
        self._network = network.to(self._device).requires_grad_(False)
        named = self.card.model.inference_precision
        # A card that no training wrote names none.
        precision: Precision = "float32" if named == "auto" else named
        self.mode = Mode(precision)
        if images >= COMPILE_FROM_IMAGES:
            self.mode = choose(inference_workload(self._network, self.card.model, batch), images=images, precisions=[precision])
        self.forward_pass = self.mode.prepare(self._network)
        self._normalize = models.Normalize(self.card.mean, self.card.std).to(self._device)
        self._resolution = self.card.model.inference_resolution
        crop = self.card.noise.crop
        margin = self.card.model.test_margin_px if crop == "resized" else self._resolution // 8
        whole = views in ("five", "ten") and margin > 0
        self._transform = EvalTransform(self._resolution, crop, margin, whole=whole)
        self._pixels = self._resolution + margin * whole
        self._windows = WINDOWS if whole else ((0.0, 0.0),)
        self._mirrored = views in ("flip", "ten")
        self.batch = batch
        # In the model's order, whatever order they were named in.
        self.scored = None if scored is None else tuple(name for name in self.card.classes if name in set(scored))
        self._masked: Tensor | None = None
        if self.scored is not None:
            if unknown := set(scored or ()) - set(self.card.classes):
                raise DataError(f"{folder.uri}: class {min(unknown)!r} is none of the model's; name those that it has")
            masked = [name not in self.scored for name in self.card.classes]
            self._masked = torch.tensor(masked, device=self._device)

    def shard(
        self, source: ImageSource, shard: int, progress: log.Progress | None = None, skipped: Mapping[int, str] | None = None
    ) -> Predictions:
        """Predictions for one shard; see `shards`."""
        return next(self.shards(source, [(shard, skipped or {})], progress))

    def shards(
        self, source: ImageSource, wanted: Iterable[tuple[int, Mapping[int, str]]], progress: log.Progress | None = None
    ) -> Iterator[Predictions]:
        """Predictions for whole shards, one after the other; the next one is being decoded while the network works on the last.

        Unreadable images get NaN and a reason, never an exception; so do the rows that come with a shard, with theirs. What a shard
        gets does not depend on those around it. Raises DataError for a shard that is not what the manifest says, and for outputs
        that are not finite.
        """

        def chunks() -> Iterator[_Chunk]:
            for shard, skipped in wanted:
                index = source.index(shard)
                images = (b"" if row in skipped else image for row, image in enumerate(source.encoded(shard)))
                yield from self._cut(images, len(index), (index, skipped))

        for (index, skipped), probabilities, errors in self._run(_ahead(chunks()), progress):
            yield Predictions(index, probabilities, {**errors, **skipped})

    @torch.inference_mode()
    def features(self, images: Sequence[Picture]) -> npt.NDArray[np.float32]:
        """float32 [N, D]: what the classifier sees of each image; of unreadable ones, what it sees of a black one."""
        pixels = torch.from_numpy(self._decode(list(images)).images)
        network: Any = self._network
        maps = network.forward_features(self._normalize(pixels.to(self._device)))
        found: npt.NDArray[np.float32] = network.forward_head(maps, pre_logits=True).float().cpu().numpy()
        return found

    def images(
        self, blobs: Sequence[Picture], progress: log.Progress | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[int, str]]:
        """Probabilities [N, classes] of images, and reasons for rows that are NaN."""
        _, probabilities, errors = next(self._run(self._cut(iter(blobs), len(blobs), None), progress))
        return probabilities, errors

    def groups(
        self, blobs: Iterable[Sequence[Picture]], progress: log.Progress | None = None
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Probabilities [N, classes] of one group of images after the other; the next ones are being decoded while the
        network works on the last. Unreadable images are NaN."""
        chunks = (chunk for group in blobs for chunk in self._cut(iter(group), len(group), None))
        for _, probabilities, _ in self._run(chunks, progress):
            yield probabilities

    def whole(self) -> "Predictor":
        """The same model, fed with images that are resized as they are: they have been cropped before."""
        other = copy.copy(self)
        other._transform, other._pixels = EvalTransform(self._resolution, "none", 0), self._resolution
        other._windows, other._mirrored = ((0.0, 0.0),), False
        return other

    def pixels(self, images: Sequence[Picture]) -> Tensor:
        """uint8 [N, resolution, resolution, 3] on the model's device: what it sees of images, of unreadable ones black."""
        return torch.from_numpy(self._decode(list(images)).images).to(self._device)

    def logits(self, pixels: Tensor) -> Tensor:
        """float32 [N, classes] of images as `pixels` gives them, of any type: in float32, and differentiable in them."""
        with torch.autocast(self._device.type, enabled=False):
            found: Tensor = self._network(self._normalize(pixels))
        return self._answers(found)

    def _cut(self, images: Iterator[Picture], total: int, whole: Any) -> Iterator[_Chunk]:
        """A shard's images in batches, the last one smaller; of none, one that is empty."""
        for start in range(0, max(1, total), self.batch):
            stop = min(total, start + self.batch)
            yield _Chunk([image for _, image in zip(range(start, stop), images, strict=False)], start, total, whole)

    def _run(
        self, chunks: Iterator[_Chunk], progress: log.Progress | None
    ) -> Iterator[tuple[Any, npt.NDArray[np.float32], dict[int, str]]]:
        """For each shard what its chunks carry, its probabilities, and row → reason of what is NaN."""
        classes = len(self.card.classes)
        probabilities = np.empty((0, classes), np.float32)
        errors: dict[int, str] = {}
        with ThreadPoolExecutor(DECODE_THREADS, initializer=_step_back if self._device.type == "cpu" else None) as threads:
            ahead: deque[tuple[_Chunk, Future[_Decoded]]] = deque()

            def submit() -> None:
                for chunk in islice(chunks, 1):
                    ahead.append((chunk, threads.submit(self._decode, chunk.images)))

            for _ in range(DECODE_THREADS):
                submit()
            while ahead:
                chunk, future = ahead.popleft()
                waiting = time.monotonic()
                decoded = future.result()
                telemetry.DATA_WAIT.inc(time.monotonic() - waiting)
                submit()
                if chunk.start == 0:
                    probabilities, errors = np.full((chunk.total, classes), np.nan, np.float32), {}
                count = len(decoded.images)
                if count:
                    result = self._forward(torch.from_numpy(decoded.images))
                    readable = np.setdiff1d(np.arange(count), list(decoded.errors))
                    probabilities[chunk.start + readable] = self._finite(result[readable])
                    errors |= {chunk.start + row: reason for row, reason in decoded.errors.items()}
                if progress:
                    progress.advance(count)
                if chunk.start + count == chunk.total:
                    yield chunk.whole, probabilities, errors

    def _finite(self, probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Refuses NaN, which would pass for images that cannot be read."""
        if np.isnan(probabilities).any():
            cure = "train it again with a lower train.optimizer.lr"
            if self.mode.precision == "float16":
                cure = f"set model.inference_precision to bfloat16 or float32, or {cure}"
            raise DataError(f"{self._place}: the model's outputs are not finite in {self.mode}; {cure}")
        return probabilities

    def _decode(self, chunk: list[Picture]) -> _Decoded:
        # Unreadable images stay as black ones: batches, and so results, do not depend on which images are damaged.
        images = room(len(chunk), self._pixels)
        return _Decoded(images, self._transform.batch(chunk, images))

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> npt.NDArray[np.float32]:
        count, network = len(images), self.forward_pass
        if self.mode.compiled and count < self.batch:
            # A batch of another size would be compiled anew. Filling up what is nearly whole costs less than doing without the compiler.
            if count > self.batch // 2:
                images = F.pad(images, (0, 0) * 3 + (0, self.batch - count))
            else:
                network = self._network
        normalized = self._normalize(images.to(self._device, non_blocking=True))
        seen = [self._probabilities(network, view)[:count] for view in self._views(normalized)]
        probabilities = seen[0] if len(seen) == 1 else torch.stack(seen).mean(0)
        result: npt.NDArray[np.float32] = probabilities.cpu().numpy()
        return result

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        """What is averaged over, [N, 3, resolution, resolution] each."""
        margin, size = self._pixels - self._resolution, self._resolution
        for down, right in self._windows:
            y, x = round(down * margin), round(right * margin)
            view = images[:, :, y : y + size, x : x + size]
            if margin:
                view = view.contiguous(memory_format=torch.channels_last)
            yield view
            if self._mirrored:
                yield view.flip(3).contiguous(memory_format=torch.channels_last)

    def _probabilities(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with self.mode.autocast(self._device):
            logits = network(images)
        return self._answers(logits).softmax(1)

    def _answers(self, logits: Tensor) -> Tensor:
        # Outputs beyond the classes (model.outputs) have no name and get no probability.
        answers = logits.float()[:, : len(self.card.classes)]
        return answers if self._masked is None else answers.masked_fill(self._masked, float("-inf"))


def _ahead(chunks: Iterator[_Chunk]) -> Iterator[_Chunk]:
    """The same, made by a thread of their own before they are asked for: to check a shard's digest takes a second, in which a GPU would
    have nothing to do."""
    with ThreadPoolExecutor(1, "read") as reader:
        coming = deque(reader.submit(next, chunks, None) for _ in range(CHUNKS_AHEAD))
        while (chunk := coming.popleft().result()) is not None:
            coming.append(reader.submit(next, chunks, None))
            yield chunk


def _step_back() -> None:
    """Makes the calling thread less urgent than the process. Where threads have no niceness of their own, nothing happens."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            urgency = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), urgency + DECODE_NICENESS)
