"""Un-noised inference over shards: decode and crop in threads while the network works on the batch before."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ns import log, models
from ns.config import ModelConfig, Precision
from ns.data.augment import EvalTransform
from ns.data.decode import Encoded, room
from ns.data.images import ImageSource
from ns.data.index import ShardIndex
from ns.memory import keep_freed_memory
from ns.precision import Mode, Workload, choose
from ns.store import Store

DECODE_THREADS = 4
"""Decoders release the interpreter lock; more threads than this wait for memory, not for each other."""


COMPILE_FROM_IMAGES = 50_000
"""With fewer, not even the second that it takes to find out whether compiling pays is well spent."""


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


class _Decoded(NamedTuple):
    images: npt.NDArray[np.uint8]
    errors: dict[int, str]


class Predictor:
    """A model in evaluation mode at its test resolution: no augmentation, no dropout, no stochastic depth.

    It runs in the precision that its card names. It is compiled if that makes the work on about `images` images shorter.
    """

    def __init__(self, folder: Store, *, batch: int, images: int = 0) -> None:
        network, self.card = models.load(folder)
        self._device = models.best_device()
        if self._device.type == "cpu":
            keep_freed_memory()
        self._network = network.to(self._device)
        named = self.card.model.inference_precision
        # A card that no training wrote names none.
        precision: Precision = "float32" if named == "auto" else named
        self.mode = Mode(precision)
        if images >= COMPILE_FROM_IMAGES:
            self.mode = choose(inference_workload(self._network, self.card.model, batch), images=images, precisions=[precision])
        self._forward_pass = self.mode.prepare(self._network)
        self._normalize = models.Normalize(self.card.mean, self.card.std).to(self._device)
        self._resolution = self.card.model.inference_resolution
        self._transform = EvalTransform(self._resolution, self.card.noise.crop)
        self._batch = batch

    def shard(
        self, source: ImageSource, shard: int, progress: log.Progress | None = None, skipped: Mapping[int, str] | None = None
    ) -> Predictions:
        """Predictions for a whole shard. Unreadable images get NaN and a reason, never an exception; so do rows in `skipped`.

        Raises DataError for a shard that is not what the manifest says.
        """
        index = source.index(shard)
        skipped = skipped or {}
        images = (b"" if row in skipped else image for row, image in enumerate(source.encoded(shard)))
        probabilities, errors = self._run(images, len(index), progress)
        return Predictions(index, probabilities, {**errors, **skipped})

    @torch.inference_mode()
    def features(self, images: Sequence[Encoded | bytes]) -> npt.NDArray[np.float32]:
        """float32 [N, D]: what the classifier sees of each image; of unreadable ones, what it sees of a black one."""
        pixels = torch.from_numpy(self._decode(list(images)).images)
        network: Any = self._network
        maps = network.forward_features(self._normalize(pixels.to(self._device)))
        found: npt.NDArray[np.float32] = network.forward_head(maps, pre_logits=True).float().cpu().numpy()
        return found

    def images(self, blobs: Sequence[bytes]) -> tuple[npt.NDArray[np.float32], dict[int, str]]:
        """Probabilities [N, classes] of encoded images, and reasons for rows that are NaN."""
        return self._run(iter(blobs), len(blobs), None)

    def _run(
        self, blobs: Iterator[Encoded | bytes], total: int, progress: log.Progress | None
    ) -> tuple[npt.NDArray[np.float32], dict[int, str]]:
        classes = len(self.card.classes)
        probabilities = np.full((total, classes), np.nan, np.float32)
        errors: dict[int, str] = {}
        with ThreadPoolExecutor(DECODE_THREADS) as threads:
            ahead: list[Future[_Decoded]] = []
            done = 0

            def submit() -> None:
                chunk = [blob for _, blob in zip(range(self._batch), blobs, strict=False)]
                if chunk:
                    ahead.append(threads.submit(self._decode, chunk))

            for _ in range(DECODE_THREADS):
                submit()
            while ahead:
                decoded = ahead.pop(0).result()
                submit()
                count = len(decoded.images)
                result = self._forward(torch.from_numpy(decoded.images))
                readable = np.setdiff1d(np.arange(count), list(decoded.errors))
                probabilities[done + readable] = result[readable]
                errors |= {done + row: reason for row, reason in decoded.errors.items()}
                done += count
                if progress:
                    progress.advance(count)
        return probabilities, errors

    def _decode(self, chunk: list[Encoded | bytes]) -> _Decoded:
        # Unreadable images stay as black ones: batches, and so results, do not depend on which images are damaged.
        images = room(len(chunk), self._resolution)
        return _Decoded(images, self._transform.batch(chunk, images))

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> npt.NDArray[np.float32]:
        count = len(images)
        if self.mode.compiled and count < self._batch:
            # A batch of another size would be compiled anew.
            images = F.pad(images, (0, 0) * 3 + (0, self._batch - count))
        normalized = self._normalize(images.to(self._device, non_blocking=True))
        with self.mode.autocast(self._device):
            logits = self._forward_pass(normalized)
        # Outputs beyond the classes (model.outputs) have no name and get no probability.
        probabilities = logits.float()[:count, : len(self.card.classes)].softmax(1)
        result: npt.NDArray[np.float32] = probabilities.cpu().numpy()
        return result
