"""Inference without noise over shards. Threads decode and crop images: while a GPU works on the batch before, or before a CPU does."""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ns.config.schema import Precision, Views
from ns.core import log, telemetry
from ns.core.errors import ConfigError, DataError
from ns.core.iteration import iter_ahead
from ns.core.malloc import keep_freed_memory
from ns.data.augment.transforms import EvalTransform
from ns.data.index import ShardIndex
from ns.data.loading.decode import EncodedJpeg, allocate_images
from ns.data.loading.jpeg_processes import JpegProcesses
from ns.data.loading.shard_reader import ImageSource
from ns.modeling import factory as models
from ns.modeling.foreign import FeatureNetwork, ForeignScorer, NetworkOutputs, average_positions
from ns.modeling.precision import PrecisionMode, can_compile, warn_if_emulated
from ns.storage import Store

ImageInput = EncodedJpeg | bytes | npt.NDArray[np.uint8]
"""An image: encoded, or uint8 [H, W, 3]."""

DECODE_THREADS = 4
"""Decoders while no network takes the cores. They release the interpreter lock; more threads wait for memory, not for each other."""

TURNS_AHEAD = 2
"""Turns of encoded images that are read before a decoder is free for them."""

TURN_BYTES = 1 << 25
"""Bytes of images, encoded and decoded, that are decoded in one turn, at least: each change between decoders and network costs both of
them about a millisecond, as long as it takes to decode 100 images of 32 px."""

SMALL_BYTES = 1000
"""Images of fewer bytes on average are decoded by processes. Those of 32 px take 8 µs each: two threads wait for each other's interpreter
lock for longer than they work."""

MOST_DECODERS = 4
"""Processes that decode such images: this one, and others of 30 MB each."""

PART_BYTES = 1 << 16
"""Encoded bytes of other images that a thread decodes at a time, at least: it takes time to wake a thread up."""

PARTS_PER_THREAD = 4
"""Parts of a batch for each thread, so that all end at nearly the same time."""

COMPILE_FROM_IMAGES = 50_000
"""Compiling takes up to a minute: with fewer images it does not pay. Nor do processes that decode."""

WINDOWS = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
"""Positions of the windows of `five` and `ten` views in the margin: the center and the corners."""


@dataclass(frozen=True)
class ShardPredictions:
    """A model's predictions for the images of a shard, in the shard's order."""

    index: ShardIndex
    probabilities: npt.NDArray[np.float32]
    """[N, classes]; rows of unreadable images are NaN."""
    errors: dict[int, str]
    """Row → why the image could not be read."""
    foreign_scores: npt.NDArray[np.float32] | None = None
    """[N], higher for images that are less like the labeled ones; NaN for unreadable images. None if they were not asked for."""


class _BatchOutputs(NamedTuple):
    """What the network says of a batch, or of a group of images."""

    probabilities: npt.NDArray[np.float32]
    """[N, classes]"""
    foreign_scores: npt.NDArray[np.float32] | None
    """[N]; None if they were not asked for."""


class _Chunk(NamedTuple):
    """A batch of images of a shard."""

    images: list[ImageInput]
    start: int
    """Row of the first image."""
    total: int
    """Number of rows of the shard."""
    payload: Any


class _DecodedChunk(NamedTuple):
    images: npt.NDArray[np.uint8]
    errors: dict[int, str]


class Predictor:
    """A model in evaluation mode at its test resolution: no augmentation, no dropout, no stochastic depth.

    It runs in the precision of its manifest, and is compiled if the manifest says so and there are at least COMPILE_FROM_IMAGES
    `images`. `scored_classes`: the classes that an answer is chosen from; the outputs of all others are left out before the softmax.
    `foreign_scorer`: scores each image too; the score of an image is the mean over its views.
    """

    def __init__(
        self,
        store: Store,
        *,
        batch: int,
        images: int = 0,
        views: Views = "one",
        scored_classes: Collection[str] | None = None,
        foreign_scorer: ForeignScorer | None = None,
    ) -> None:
        self._uri = store.uri
        network, self.manifest = models.load_model(store)
        self._device = models.get_best_device()
        if self._device.type == "cpu":
            keep_freed_memory()
        # A network on a CPU takes all cores. Decoding beside it displaces one of its threads, for which the others wait: taking turns is
        # 1 to 4 % faster with photographs (ResNet-18 and EfficientNet-B0, 64 … 224 px, two cores), and no slower with images of 32 px.
        self._takes_turns = self._device.type == "cpu"
        many = images >= COMPILE_FROM_IMAGES
        self._helpers = min(torch.get_num_threads(), MOST_DECODERS) - 1 if self._takes_turns and many else 0
        self._network = network.to(self._device).requires_grad_(False)
        configured = self.manifest.model.inference_precision
        # A trained model has a precision; a manifest made by hand may have none.
        precision: Precision = "float32" if configured == "auto" else configured
        warn_if_emulated(precision, self._device)
        compiles = self.manifest.model.inference_compile and many
        self.mode = PrecisionMode(precision, compiled=compiles and can_compile(self._device))
        self._foreign_scorer = foreign_scorer and foreign_scorer.to(self._device)
        self._normalize = models.Normalize(self.manifest.mean, self.manifest.std).to(self._device)
        self._resolution = self.manifest.model.inference_resolution
        # What a forward pass runs: the scorer needs more than the logits.
        needs_stages = foreign_scorer is not None and foreign_scorer.needs_stages
        network = self._make_feature_network() if needs_stages else self._network
        # Compiled with the network, normalizing takes no pass over memory of its own.
        normalize = models.Normalize(self.manifest.mean, self.manifest.std, self._resolution).to(self._device)
        self._plain_pass = nn.Sequential(normalize, network)
        self.forward_pass = self.mode.prepare_network(self._plain_pass)
        model = self.manifest.model
        margin = model.test_margin_px if model.crop == "resized" else self._resolution // 8
        keeps_margin = views in ("five", "ten") and margin > 0
        self._transform = EvalTransform.for_model(model, margin_px=margin, whole=keeps_margin)
        self._pixels = self._resolution + margin * keeps_margin
        self._windows = WINDOWS if keeps_margin else ((0.0, 0.0),)
        self._mirrored = views in ("flip", "ten")
        self.batch = batch
        is_gpu = self._device.type == "cuda"
        self._copying = torch.cuda.Stream(self._device) if is_gpu else None  # type: ignore[no-untyped-call]
        self.scored_classes: tuple[str, ...] | None = None
        self._class_mask: Tensor | None = None
        if scored_classes is not None:
            classes, scored = self.manifest.classes, set(scored_classes)
            if unknown := scored - set(classes):
                raise DataError(f"{store.uri}: class {min(unknown)!r} is none of the model's; name those that it has")
            # In the model's order, whatever order they were named in.
            self.scored_classes = tuple(name for name in classes if name in scored)
            self._class_mask = torch.tensor([name not in scored for name in classes], device=self._device)

    def predict_shard(self, source: ImageSource, shard: int, progress: log.Progress | None = None) -> ShardPredictions:
        """Predictions for one shard; see `predict_shards`."""
        return next(self.predict_shards(source, [(shard, {})], progress))

    def predict_shards(
        self, source: ImageSource, requests: Iterable[tuple[int, Mapping[int, str]]], progress: log.Progress | None = None
    ) -> Iterator[ShardPredictions]:
        """Predictions for whole shards, in order; the next shard is decoded while the network works on the current one.

        `requests`: shard index, and row → reason of rows to skip. Skipped rows and unreadable images get NaN and a reason, not an
        exception. The predictions for a shard do not depend on the other shards. Raises DataError for a shard that differs from the
        manifest, and for outputs that are not finite.
        """

        def make_chunks() -> Iterator[_Chunk]:
            for shard, skipped in requests:
                index = source.read_index(shard)
                images = (b"" if row in skipped else image for row, image in enumerate(source.read_encoded(shard)))
                yield from self._cut_batches(images, len(index), (index, skipped))

        for (index, skipped), outputs, errors in self._run_turns(_read_ahead(self._cut_turns(make_chunks())), progress):
            yield ShardPredictions(index, outputs.probabilities, {**errors, **skipped}, outputs.foreign_scores)

    @torch.inference_mode()
    def extract_features(self, images: Sequence[ImageInput]) -> npt.NDArray[np.float32]:
        """float32 [N, D]: the input of the classifier for each image; unreadable images count as black ones."""
        pixels = torch.from_numpy(self._decode_chunk(list(images)).images)
        network: Any = self._network
        maps = network.forward_features(self._normalize(pixels.to(self._device)))
        features: npt.NDArray[np.float32] = network.forward_head(maps, pre_logits=True).float().cpu().numpy()
        return features

    @torch.inference_mode()
    def extract_stages(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """float32 [N, D], on the CPU, for each stage of the network: its output for each image, averaged over the positions. Unreadable
        images count as black ones. Raises ConfigError for a network without stages."""
        network = self._make_feature_network()
        normalized = self._normalize(self.decode_pixels(images))
        with self.mode.autocast(self._device):
            stages, _ = network(normalized)
        return [average_positions(stage).cpu() for stage in stages]

    def _make_feature_network(self) -> FeatureNetwork:
        if not hasattr(self._network, "forward_intermediates"):
            raise ConfigError(
                f"labeling.foreign_score: distance: timm knows no stages of {self.manifest.model.arch}; set energy, or another model.arch"
            )
        return FeatureNetwork(self._network)

    def predict_images(self, images: Sequence[ImageInput]) -> tuple[npt.NDArray[np.float32], dict[int, str]]:
        """Probabilities [N, classes] of images, and row → reason of the rows that are NaN."""
        _, outputs, errors = next(self._run_turns(self._cut_turns(self._cut_batches(iter(images), len(images), None))))
        return outputs.probabilities, errors

    def predict_groups(
        self, groups: Iterable[Sequence[ImageInput]], progress: log.Progress | None = None
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Probabilities [N, classes] of each group of images, in order; the next group is decoded while the network works on the current
        one. Unreadable images are NaN."""
        chunks = (chunk for group in groups for chunk in self._cut_batches(iter(group), len(group), None))
        for _, outputs, _ in self._run_turns(self._cut_turns(chunks), progress):
            yield outputs.probabilities

    def without_crop(self) -> "Predictor":
        """The same model for images that have been cropped before: they are only resized."""
        predictor = copy.copy(self)
        predictor._transform = EvalTransform(self._resolution, "none", 0, interpolation=self.manifest.model.interpolation)
        predictor._pixels = self._resolution
        predictor._windows, predictor._mirrored = ((0.0, 0.0),), False
        return predictor

    def decode_pixels(self, images: Sequence[ImageInput]) -> Tensor:
        """uint8 [N, resolution, resolution, 3] on the model's device: the model's view of the images; unreadable ones are black."""
        return torch.from_numpy(self._decode_chunk(list(images)).images).to(self._device)

    def compute_logits(self, pixels: Tensor) -> Tensor:
        """float32 [N, classes], computed in float32 and differentiable in `pixels`, images as `decode_pixels` returns them, of any type."""
        with torch.autocast(self._device.type, enabled=False):
            outputs: Tensor = self._network(self._normalize(pixels))
        return self._mask_logits(outputs)

    def _cut_batches(self, images: Iterator[ImageInput], total: int, payload: Any) -> Iterator[_Chunk]:
        """Batches of a shard's images, the last one smaller; one empty batch if there are no images."""
        for start in range(0, max(1, total), self.batch):
            stop = min(total, start + self.batch)
            yield _Chunk([image for _, image in zip(range(start, stop), images, strict=False)], start, total, payload)

    def _cut_turns(self, chunks: Iterator[_Chunk]) -> Iterator[list[_Chunk]]:
        """Batches that are decoded together: of at least TURN_BYTES, or one, if decoding does not take turns with the network."""
        turn: list[_Chunk] = []
        turn_bytes = 0
        for chunk in chunks:
            turn.append(chunk)
            turn_bytes += sum(map(_count_bytes, chunk.images)) + len(chunk.images) * self._pixels**2 * 3
            if turn_bytes >= TURN_BYTES or not self._takes_turns:
                yield turn
                turn, turn_bytes = [], 0
        if turn:
            yield turn

    def _run_turns(
        self, turns: Iterator[list[_Chunk]], progress: log.Progress | None = None
    ) -> Iterator[tuple[Any, _BatchOutputs, dict[int, str]]]:
        """For each shard the payload of its chunks, its outputs, and row → reason of the rows that are NaN."""
        outputs = self._make_outputs(0)
        errors: dict[int, str] = {}
        for chunk, pixels, unreadable in self._iter_decoded(turns):
            if chunk.start == 0:
                outputs, errors = self._make_outputs(chunk.total), {}
            count = len(pixels)
            if count:
                is_readable = np.ones(count, np.bool_)
                is_readable[list(unreadable)] = False
                for target, values in zip(outputs, self._forward_batch(pixels), strict=True):
                    if target is not None and values is not None:
                        target[chunk.start : chunk.start + count][is_readable] = self._check_finite(values[is_readable])
                errors |= {chunk.start + row: reason for row, reason in unreadable.items()}
            if progress:
                progress.update(count)
            if chunk.start + count == chunk.total:
                yield chunk.payload, outputs, errors

    def _iter_decoded(self, turns: Iterator[list[_Chunk]]) -> Iterator[tuple[_Chunk, Tensor, dict[int, str]]]:
        """The chunks with their images, uint8 [N, H, W, 3], and row → reason of unreadable ones."""
        if self._takes_turns:
            with ThreadPoolExecutor(torch.get_num_threads(), "decode") as threads:
                for turn in turns:
                    started = time.monotonic()
                    decoded = self._decode_in_parts([image for chunk in turn for image in chunk.images], threads)
                    telemetry.DATA_WAIT.inc(time.monotonic() - started)
                    start = 0
                    for chunk in turn:
                        stop = start + len(chunk.images)
                        errors = {row - start: reason for row, reason in decoded.errors.items() if start <= row < stop}
                        yield chunk, torch.from_numpy(decoded.images[start:stop]), errors
                        start = stop
            return
        with ThreadPoolExecutor(DECODE_THREADS, "decode") as threads:
            submitted = ((chunk, threads.submit(self._load_chunk, chunk.images)) for turn in turns for chunk in turn)
            for chunk, future in iter_ahead(submitted, DECODE_THREADS):
                started = time.monotonic()
                pixels, errors = future.result()
                telemetry.DATA_WAIT.inc(time.monotonic() - started)
                yield chunk, pixels, errors

    def _make_outputs(self, count: int) -> _BatchOutputs:
        """Outputs of `count` images that were not seen yet: all NaN."""
        probabilities = np.full((count, len(self.manifest.classes)), np.nan, np.float32)
        return _BatchOutputs(probabilities, np.full(count, np.nan, np.float32) if self._foreign_scorer else None)

    def _check_finite(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Refuses NaN, which would be taken for unreadable images."""
        if np.isnan(values).any():
            cure = "train it again with a lower train.optimizer.lr"
            if self.mode.precision == "float16":
                cure = f"set model.inference_precision to bfloat16 or float32, or {cure}"
            raise DataError(f"{self._uri}: the model's outputs are not finite in {self.mode}; {cure}")
        return values

    def _load_chunk(self, chunk: list[ImageInput]) -> tuple[Tensor, dict[int, str]]:
        """As `_iter_decoded`. To a GPU, images are copied while it works on the batch before."""
        images, errors = self._decode_chunk(chunk)
        pixels = torch.from_numpy(images)
        if self._copying is None:
            return pixels, errors
        with torch.cuda.stream(self._copying):
            copied = pixels.to(self._device, non_blocking=True)
        self._copying.synchronize()
        return copied, errors

    def _decode_chunk(self, chunk: list[ImageInput]) -> _DecodedChunk:
        # Unreadable images stay in the batch as black ones: batches, and so results, do not depend on which images are damaged.
        images = allocate_images(len(chunk), self._pixels, _allocate_pinned if self._copying else None)
        return _DecodedChunk(images, self._transform.transform_batch(chunk, images))

    @cached_property
    def _jpeg_processes(self) -> JpegProcesses:
        return JpegProcesses(self._helpers)

    def _decode_in_parts(self, chunk: list[ImageInput], threads: ThreadPoolExecutor) -> _DecodedChunk:
        """The same as `_decode_chunk`, on all cores."""
        images = allocate_images(len(chunk), self._pixels)
        encoded_bytes = sum(map(_count_bytes, chunk))
        is_small = encoded_bytes < SMALL_BYTES * len(chunk)
        if is_small and self._helpers and self._transform.shows_all and JpegProcesses.can_decode(chunk):
            decoded, unreadable = self._jpeg_processes.decode_images(cast(list[EncodedJpeg], chunk))
            self._transform.resize_batch(decoded, images, threads)
            images[list(unreadable)] = 0
            return _DecodedChunk(images, unreadable)
        smallest = PART_BYTES * len(chunk) // max(1, encoded_bytes)
        step = max(1, smallest, -(-len(chunk) // (PARTS_PER_THREAD * torch.get_num_threads())))

        def decode_part(start: int) -> dict[int, str]:
            errors = self._transform.transform_batch(chunk[start : start + step], images[start : start + step])
            return {start + row: reason for row, reason in errors.items()}

        errors: dict[int, str] = {}
        for part_errors in threads.map(decode_part, range(0, len(chunk), step)):
            errors |= part_errors
        return _DecodedChunk(images, errors)

    @torch.inference_mode()
    def _forward_batch(self, images: Tensor) -> _BatchOutputs:
        count, network = len(images), self.forward_pass
        if self.mode.compiled and count < self.batch:
            # torch would compile again for another batch size. Filling up more than half a batch costs less than running uncompiled.
            if count > self.batch // 2:
                images = F.pad(images, (0, 0) * 3 + (0, self.batch - count))
            else:
                network = self._plain_pass
        if self._copying is not None:
            images.record_stream(torch.cuda.current_stream(self._device))
        on_device = images.to(self._device, non_blocking=True)
        views = [self._predict_view(network, view) for view in self._iter_views(on_device)]
        probabilities = _average_views([view_probabilities for view_probabilities, _ in views])[:count].cpu().numpy()
        scores = [view_scores for _, view_scores in views if view_scores is not None]
        return _BatchOutputs(probabilities, _average_views(scores)[:count].cpu().numpy() if scores else None)

    def _iter_views(self, images: Tensor) -> Iterator[Tensor]:
        """The views of uint8 images that are averaged over, [N, resolution, resolution, 3] each."""
        margin, size = self._pixels - self._resolution, self._resolution
        for down, right in self._windows:
            y, x = round(down * margin), round(right * margin)
            view = images[:, y : y + size, x : x + size].contiguous()
            yield view
            if self._mirrored:
                yield view.flip(2)

    def _predict_view(self, network: Callable[[Tensor], Any], images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities [N, classes] and, if asked for, foreign scores [N] of one view of the images."""
        with self.mode.autocast(self._device):
            outputs = network(images)
        stages, logits = outputs if isinstance(outputs, tuple) else ((), outputs)
        logits = self._mask_logits(logits)
        scores = self._foreign_scorer(NetworkOutputs(stages, logits)) if self._foreign_scorer else None
        return logits.softmax(1), scores

    def _mask_logits(self, logits: Tensor) -> Tensor:
        # Outputs beyond the classes (model.outputs) have no name, and get no probability.
        class_logits = logits.float()[:, : len(self.manifest.classes)]
        return class_logits if self._class_mask is None else class_logits.masked_fill(self._class_mask, float("-inf"))


def _allocate_pinned(length: int) -> npt.NDArray[np.uint8]:
    """Memory that a GPU copies from by itself."""
    memory: npt.NDArray[np.uint8] = torch.empty(length, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def _count_bytes(image: ImageInput) -> int:
    if isinstance(image, np.ndarray):
        return image.nbytes
    return len(image.data if isinstance(image, EncodedJpeg) else image)


def _average_views(views: Sequence[Tensor]) -> Tensor:
    return views[0] if len(views) == 1 else torch.stack(list(views)).mean(0)


def _read_ahead(turns: Iterator[list[_Chunk]]) -> Iterator[list[_Chunk]]:
    """The same turns, prepared ahead by a thread: checking a shard's digest takes a second, in which a GPU would be idle."""
    with ThreadPoolExecutor(1, "read") as reader:
        for future in iter_ahead((reader.submit(next, turns, None) for _ in repeat(None)), TURNS_AHEAD):
            turn = future.result()
            if turn is None:
                return
            yield turn
