"""Measures one model on one dataset under corruptions, perturbations and attacks, in units that are each done once.

A unit is up to 512 consecutive images of a shard under one kind of distortion or one attack. Its predictions are one file, written when
it is done, so a killed run continues with the unit that was under way. The images of a block are decoded once for all kinds; helper
processes render distorted images while the network classifies earlier ones.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ns.config.schema import EvaluationConfig
from ns.core import log
from ns.core.digest import digest_json, sha256_bytes
from ns.core.errors import DataError, RunError
from ns.core.process import count_cores
from ns.core.process_pool import ProcessPool
from ns.data.dataset import Dataset
from ns.data.loading.decode import EncodedJpeg
from ns.data.loading.shard_reader import ImageSource
from ns.data.subsample import Subsample, draw_rows
from ns.evaluation.accuracy import build_predictions_table, map_class_ids, read_encoded_images
from ns.evaluation.result import AttackResult, ImageMistakes, PerturbationResult, Robustness, is_imagenet
from ns.evaluation.robustness.attacks import AttackPlan, attack_images
from ns.evaluation.robustness.corruptions import SMALL_PX
from ns.evaluation.robustness.render import (
    CURE,
    DistortedImage,
    DistortionTask,
    distort_images,
    pack_images,
    render_base,
    unpack_images,
)
from ns.evaluation.robustness.scores import flip_rates, top5_distances
from ns.modeling.predictor import DECODE_THREADS, Predictor
from ns.storage import Store
from ns.storage.parquet import parse_table, write_table
from ns.storage.scratch import place_sockets

BLOCK_IMAGES = 512
"""Images of a unit: the work that a kill loses, and the images that are decoded in memory (130 MB of photographs)."""
ATTACKED_AT_ONCE = 64
"""Batch size of attacks: a gradient keeps all feature maps of the network in memory."""
BACKWARD_COST = 2
"""Cost of the backward pass to the image in forward passes: about 1.5, counted as 2."""
PROCESSES_FROM_SECONDS = 10
"""Less rendering than this is done in threads: processes take a second or two to start."""
UNIT_SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("rank", pa.uint16(), nullable=False)])
"""What of a unit's predictions is counted."""
TOP_K = 5
NOISE_PERTURBATIONS = ("gaussian_noise", "shot_noise")
"""Perturbations whose frames are compared with the first frame, not with the one before: each frame has noise of its own."""


class SuiteUnit(NamedTuple):
    """A measurement that is made of each image of a block."""

    suite: Literal["clean", "corruptions", "perturbations", "attacks"]
    kind: str
    images_each: int
    """Distorted images per image."""
    plan: AttackPlan | None = None

    @property
    def passes(self) -> int:
        """Forward passes per image; an attack step counts as three."""
        return self.images_each if self.plan is None else self.plan.steps * (1 + BACKWARD_COST) + 1

    @property
    def is_rendered(self) -> bool:
        """Whether its images are rendered before the network sees them."""
        return self.suite in ("corruptions", "perturbations")


def list_units(config: EvaluationConfig) -> list[SuiteUnit]:
    """The units that a configuration asks for, the clean images first."""
    suite_units = [SuiteUnit("clean", "clean", 1)]
    if "corruptions" in config.suites:
        suite_units += [SuiteUnit("corruptions", kind, len(config.severities)) for kind in config.all_corruptions]
    if "perturbations" in config.suites:
        suite_units += [SuiteUnit("perturbations", kind, config.perturbation_frames) for kind in config.perturbations]
    if "attacks" in config.suites:
        plans = [AttackPlan.fgsm(epsilon) for epsilon in config.fgsm_epsilons]
        plans += [AttackPlan.pgd(config.pgd_epsilon, steps, config.pgd_step_size) for steps in config.pgd_steps]
        suite_units += [SuiteUnit("attacks", str(plan), 1, plan) for plan in plans]
    return suite_units


def count_passes(config: EvaluationConfig) -> int:
    """Forward passes per image; an attack step counts as three."""
    return sum(unit.passes for unit in list_units(config))


class _Block(NamedTuple):
    shard: int
    start: int
    """Row of its first image."""
    rows: npt.NDArray[np.int64]


class _BlockImages(NamedTuple):
    """The readable images of a block."""

    encoded: list[EncodedJpeg | bytes]
    bases: list[npt.NDArray[np.uint8]]
    keys: list[str]
    class_ids: npt.NDArray[np.int64]


class SuiteCost(NamedTuple):
    """The pending work, estimated by a short measurement."""

    passes: int
    """Forward passes; an attack step counts as three."""
    distort_seconds: float
    """Time of one core."""
    seconds: float
    """Wall-clock time."""
    kept_bytes: int
    """Size of the distorted images that will be kept for the next model; 0 if all of the set are larger than `keep_gib`."""


class RobustnessSuite:
    """The measurement of one model on one dataset.

    `prediction_store` keeps the units' predictions, `distorted_store` distorted images for the next model, if any.
    """

    def __init__(
        self,
        predictor: Predictor,
        data_store: Store,
        data: Dataset,
        config: EvaluationConfig,
        prediction_store: Store,
        distorted_store: Store | None,
    ) -> None:
        self._predictor, self._data, self._config = predictor, data, config
        self._data_store, self._prediction_store, self._distorted_store = data_store, prediction_store, distorted_store
        self._class_ids = map_class_ids(predictor, data_store, data)
        self._source = ImageSource(data_store, data, max_open_shards=2)
        self._subsample = build_subsample(config)
        rows = draw_rows(self._source, len(data.shards), len(data.classes), self._subsample)
        self._blocks = [
            _Block(shard, int(shard_rows[start]), shard_rows[start : start + BLOCK_IMAGES])
            for shard, shard_rows in rows.items()
            for start in range(0, len(shard_rows), BLOCK_IMAGES)
        ]
        self._images = sum(len(block.rows) for block in self._blocks)
        self._units = list_units(config)
        self._keep_size = self._are_small()
        self._attacked_at_once = ATTACKED_AT_ONCE
        # Listed once: asking a remote store for each key would take minutes.
        self._done_keys = set(prediction_store.list())
        self._distorted_keys = set(distorted_store.list() if distorted_store else ())
        # Distorted photographs are cropped already; small images still get the model's crop.
        self._distorted_predictor = predictor if self._keep_size else predictor.without_crop()

    def run_suite(self, target: Store) -> Robustness:
        """Does the units that are not done, and writes `robustness.json` into `target`.

        Raises DataError if no image is readable, RunError if a helper process was killed.
        """
        started = time.monotonic()
        pending = [
            (block, pending_units)
            for block in self._blocks
            if (pending_units := [unit for unit in self._units if self._unit_key(block, unit) not in self._done_keys])
        ]
        if pending:
            self._run_pending(pending)
        robustness, mistakes = self._summarize_units(time.monotonic() - started)
        target.put(robustness.mistakes_key, mistakes)
        return robustness.commit(target)

    def _run_pending(self, pending: list[tuple[_Block, list[SuiteUnit]]]) -> None:
        first_images = self._read_block(pending[0][0])
        cost = self._estimate_cost(pending, first_images)
        log.get_logger().info(
            "cost",
            images=self._images,
            forward_passes=cost.passes,
            seconds=round(cost.seconds, 1),
            kept_mib=cost.kept_bytes >> 20,
        )
        all_passes = self._images * sum(unit.passes for unit in self._units)
        progress = log.Progress(all_passes, "passes", done=all_passes - cost.passes)
        with ExitStack() as stack:
            executor = _make_executor(stack, cost.distort_seconds)
            for number, (block, pending_units) in enumerate(pending):
                following = pending[number + 1][0].shard if number + 1 < len(pending) else block.shard
                self._source.fetch_ahead([following] if following != block.shard else [])
                images = first_images if number == 0 else self._read_block(block)
                for unit in pending_units:
                    if not unit.is_rendered:
                        self._write_unit(block, unit, self._predict_plain(images, unit, progress))
                rendered_units = [unit for unit in pending_units if unit.is_rendered]
                try:
                    self._predict_distorted(block, images, rendered_units, executor, cost.kept_bytes > 0, progress)
                except BrokenProcessPool as error:
                    raise RunError(
                        f"a process that renders corrupted images {error}, most often because memory ran out; free some and run "
                        "the same command again: it continues where it stopped"
                    ) from error

    def _are_small(self) -> bool:
        """Whether images are distorted at their size, decided by the first readable one."""
        for block in self._blocks:
            for image in read_encoded_images(self._source, block.shard, block.rows[:16]):
                try:
                    return bool(max(render_base(image, keep_size=True).shape[:2]) <= SMALL_PX)
                except DataError:
                    continue
        raise DataError(f"{self._data_store.uri}: no readable image to evaluate on")

    def _read_block(self, block: _Block) -> _BlockImages:
        def decode_base(image: EncodedJpeg | bytes) -> npt.NDArray[np.uint8] | None:
            try:
                return render_base(image, keep_size=self._keep_size)
            except DataError:
                return None

        encoded = read_encoded_images(self._source, block.shard, block.rows)
        with ThreadPoolExecutor(DECODE_THREADS) as threads:
            bases = list(threads.map(decode_base, encoded))
        readable = [position for position, image in enumerate(bases) if image is not None]
        keys = self._source.read_index(block.shard).keys
        class_ids = self._class_ids[self._source.read_class_ids(block.shard, len(self._data.classes))[block.rows]]
        return _BlockImages(
            [encoded[position] for position in readable],
            [image for image in bases if image is not None],
            [keys[int(block.rows[position])] for position in readable],
            class_ids[readable],
        )

    def _predict_plain(self, images: _BlockImages, unit: SuiteUnit, progress: log.Progress) -> pa.Table:
        """Predictions of the images, clean or attacked."""
        if unit.plan is None:
            probabilities, _ = self._predictor.predict_images(images.encoded)
            progress.update(len(images.keys))
            return build_predictions_table(images.keys, images.class_ids, probabilities)
        parts = [np.empty((0, len(self._predictor.manifest.classes)), np.float32)]
        start = 0
        while start < len(images.keys):
            part = slice(start, start + min(self._predictor.batch, self._attacked_at_once))
            try:
                parts.append(self._predict_attacked(images, part, unit.plan))
            except torch.OutOfMemoryError:
                if self._attacked_at_once == 1:
                    raise
                self._attacked_at_once = max(1, self._attacked_at_once // 2)
                log.get_logger().warning(
                    "out of memory; attacks go on with fewer images at once", images=self._attacked_at_once
                )
                continue
            start += len(parts[-1])
            progress.update(len(parts[-1]) * unit.passes)
        return build_predictions_table(images.keys, images.class_ids, np.concatenate(parts))

    def _predict_attacked(self, images: _BlockImages, part: slice, plan: AttackPlan) -> npt.NDArray[np.float32]:
        """Probabilities of the attacked images, [n, classes]."""
        pixels = self._predictor.decode_pixels(images.encoded[part])
        class_ids = torch.from_numpy(images.class_ids[part]).to(pixels.device)
        adversarial = attack_images(
            self._predictor.compute_logits, pixels, class_ids, plan, images.keys[part], self._config.seed
        )
        with torch.inference_mode():
            probabilities: npt.NDArray[np.float32] = self._predictor.compute_logits(adversarial).softmax(1).cpu().numpy()
        return probabilities

    def _predict_distorted(
        self,
        block: _Block,
        images: _BlockImages,
        pending_units: list[SuiteUnit],
        executor: Executor,
        keep: bool,
        progress: log.Progress,
    ) -> None:
        """Evaluates the distorted images of a block, one kind after the other."""
        queued: deque[tuple[SuiteUnit, slice, list[DistortedImage]]] = deque()

        def iter_batches() -> Iterator[list[DistortedImage]]:
            for unit, part, distorted in self._iter_distorted(block, images, pending_units, executor):
                queued.append((unit, part, distorted))
                yield distorted

        parts: list[pa.Table] = []
        kept_images: list[DistortedImage] = []
        for probabilities in self._distorted_predictor.predict_groups(iter_batches()):
            unit, part, distorted = queued.popleft()
            keys, class_ids = images.keys[part], images.class_ids[part]
            if unit.suite == "corruptions":
                parts.append(build_corruption_table(keys, class_ids, probabilities, self._config.severities))
            else:
                parts.append(build_top_table(keys, class_ids, probabilities, unit.images_each))
            progress.update(len(distorted))
            if keep and unit.suite == "corruptions":
                kept_images += distorted
            if part.stop >= len(images.keys):
                if kept_images and self._distorted_store is not None and not self._is_stored(block, unit):
                    self._distorted_store.put(self._unit_key(block, unit), pack_images(kept_images))
                self._write_unit(block, unit, pa.concat_tables(parts))
                parts, kept_images = [], []

    def _iter_distorted(
        self, block: _Block, images: _BlockImages, pending_units: list[SuiteUnit], executor: Executor
    ) -> Iterator[tuple[SuiteUnit, slice, list[DistortedImage]]]:
        """Distorted images in batches, rendered ahead of time, or read if an earlier model left them."""

        def iter_tasks() -> Iterator[tuple[SuiteUnit, slice, Future[list[DistortedImage]]]]:
            for unit in pending_units:
                ready = self._load_stored(block, unit, len(images.keys))
                size = max(1, self._predictor.batch // unit.images_each)
                for start in range(0, max(1, len(images.keys)), size):
                    part = slice(start, start + size)
                    if ready is not None:
                        future: Future[list[DistortedImage]] = Future()
                        future.set_result(ready[start * unit.images_each : (start + size) * unit.images_each])
                    else:
                        future = executor.submit(distort_images, self._build_task(unit, images, part))
                    yield unit, part, future

        task_futures = iter_tasks()
        ahead = deque(islice(task_futures, 2 + count_cores()))
        while ahead:
            unit, part, future = ahead.popleft()
            distorted = future.result()
            ahead.extend(islice(task_futures, 1))
            yield unit, part, distorted

    def _build_task(self, unit: SuiteUnit, images: _BlockImages, part: slice) -> DistortionTask:
        severities = self._config.severities if unit.suite == "corruptions" else ()
        return DistortionTask(
            images.bases[part], images.keys[part], unit.kind, severities, unit.images_each, self._config.seed, self._keep_size
        )

    def _is_stored(self, block: _Block, unit: SuiteUnit) -> bool:
        return unit.suite == "corruptions" and self._unit_key(block, unit) in self._distorted_keys

    def _load_stored(self, block: _Block, unit: SuiteUnit, count: int) -> list[DistortedImage] | None:
        if self._distorted_store is None or not self._is_stored(block, unit):
            return None
        key = self._unit_key(block, unit)
        uri = f"{self._distorted_store.uri}/{key}"
        images = unpack_images(self._distorted_store.get(key), uri, keep_size=self._keep_size)
        if len(images) != count * unit.images_each:
            raise DataError(f"{uri}: has {len(images)} images, must have {count * unit.images_each}; {CURE}")
        return images

    def _unit_key(self, block: _Block, unit: SuiteUnit) -> str:
        name = unit.kind
        if unit.suite == "corruptions":
            name += "-" + "".join(map(str, self._config.severities))
        elif unit.suite == "perturbations":
            name += f"-x{unit.images_each}"
        shard = self._data.shards[block.shard].name.removesuffix(".tar")
        return f"{shard}-{block.start:05d}/{name}.parquet"

    def _write_unit(self, block: _Block, unit: SuiteUnit, table: pa.Table) -> None:
        write_table(self._prediction_store, self._unit_key(block, unit), table)

    def _load_unit(self, block: _Block, unit: SuiteUnit, keys: list[str] | None) -> tuple[bytes, pa.Table]:
        """Bytes and table of a unit that is done. `keys`: of the images of the block, as the first unit has them. Raises DataError
        naming a file that is damaged or of other images."""
        key = self._unit_key(block, unit)
        uri, data = f"{self._prediction_store.uri}/{key}", self._prediction_store.get(key)
        top_k = min(TOP_K, len(self._predictor.manifest.classes))
        table = parse_table(data, uri, _make_top_schema(top_k) if unit.suite == "perturbations" else UNIT_SCHEMA, CURE)
        if keys is None:
            shard_keys = self._source.read_index(block.shard).keys
            possible_keys = {shard_keys[row] for row in block.rows.tolist()}
            is_whole = possible_keys.issuperset(table["key"].to_pylist()) and len(pc.unique(table["key"])) == len(table)
        else:
            repeated = np.repeat(np.arange(len(keys)), unit.images_each)
            is_whole = table["key"].combine_chunks().equals(pa.array(keys, pa.string()).take(pa.array(repeated)))
        if "top" in table.column_names and pc.list_flatten(table["top"]).null_count:
            raise DataError(f"{uri}: top: has cells without a value; {CURE}")
        if not is_whole:
            raise DataError(f"{uri}: key: these are not the images of the other measurements; {CURE}")
        return data, table

    def _estimate_cost(self, pending: list[tuple[_Block, list[SuiteUnit]]], images: _BlockImages) -> SuiteCost:
        """Cost of the pending units: each kind is tried on one image, the network on a batch."""
        counts = {unit: sum(len(block.rows) for block, block_units in pending if unit in block_units) for unit in self._units}
        pending_counts = {unit: count for unit, count in counts.items() if count}
        passes = sum(unit.passes * count for unit, count in pending_counts.items())
        if not images.keys:
            return SuiteCost(passes, 0, 0, 0)
        batch = images.encoded[: self._predictor.batch]
        self._predictor.predict_images(batch)  # the first call allocates memory
        started = time.perf_counter()
        self._predictor.predict_images(batch)
        network_seconds = (time.perf_counter() - started) / len(batch) * passes
        distort_seconds, size, fresh_bytes = 0.0, 0, 0
        for unit in pending_counts:
            if not unit.is_rendered:
                continue
            # Images that an earlier model left are only read.
            fresh = sum(
                len(block.rows) for block, block_units in pending if unit in block_units and not self._is_stored(block, unit)
            )
            started = time.perf_counter()
            distorted = distort_images(self._build_task(unit, images, slice(0, 1)))
            distort_seconds += (time.perf_counter() - started) * fresh
            if unit.suite == "corruptions":
                image_bytes = sum(len(image.data) if isinstance(image, EncodedJpeg) else image.nbytes for image in distorted)
                size, fresh_bytes = size + image_bytes * self._images, fresh_bytes + image_bytes * fresh
        fits = self._distorted_store is not None and size <= self._config.keep_gib * 2**30
        render_seconds = distort_seconds / count_cores()
        # Without a GPU, rendering takes its cores away from the network.
        together = max(network_seconds, render_seconds)
        seconds = together if torch.cuda.is_available() else network_seconds + render_seconds
        return SuiteCost(passes, distort_seconds, seconds, fresh_bytes if fits else 0)

    def _summarize_units(self, seconds: float) -> tuple[Robustness, bytes]:
        """Counts the units' predictions, one unit in memory at a time. Returns the totals and the encoded mistakes by image."""
        config = self._config
        keys: list[str] = []
        image_mistakes: dict[SuiteUnit, list[npt.NDArray[np.uint8]]] = {
            unit: [] for unit in self._units if unit.suite != "clean"
        }
        wrong = {unit.kind: np.zeros(len(config.severities), np.int64) for unit in self._units if unit.suite == "corruptions"}
        flip_sums = {unit.kind: np.zeros(2) for unit in self._units if unit.suite == "perturbations"}
        right = {unit.kind: 0 for unit in self._units if not unit.is_rendered}
        images = 0
        files = []
        for block in self._blocks:
            block_keys: list[str] | None = None
            for unit in self._units:
                data, table = self._load_unit(block, unit, block_keys)
                files.append([self._unit_key(block, unit), sha256_bytes(data)])
                if block_keys is None:
                    block_keys = table["key"].to_pylist()
                if unit.suite == "corruptions":
                    failed = table["rank"].to_numpy().reshape(-1, unit.images_each) > 0
                    wrong[unit.kind] += failed.sum(0)
                    image_mistakes[unit].append(failed.sum(1, dtype=np.uint8))
                elif unit.suite == "perturbations":
                    flip_shares, distances = measure_flips(table, unit.kind, unit.images_each)
                    flip_sums[unit.kind] += [flip_shares.sum(), distances.sum()]
                    image_mistakes[unit].append(np.round(flip_shares * (unit.images_each - 1)).astype(np.uint8))
                else:
                    failed = table["rank"].to_numpy() > 0
                    right[unit.kind] += int((~failed).sum())
                    if unit.suite == "attacks":
                        image_mistakes[unit].append(failed.astype(np.uint8))
                    else:
                        images += len(table)
                        keys += block_keys
        if not images:
            raise DataError(f"{self._data_store.uri}: no readable image to evaluate on")
        attacks = {unit: AttackResult(**asdict(unit.plan), top1=right[unit.kind] / images) for unit in self._units if unit.plan}
        # An attack is named as in the result, without the size of its steps.
        names = {unit: str(attacks.get(unit, unit.kind)) for unit in image_mistakes}
        mistakes_by_suite = (
            {names[unit]: np.concatenate(parts) for unit, parts in image_mistakes.items() if unit.suite == suite}
            for suite in ("corruptions", "perturbations", "attacks")
        )
        mistakes = ImageMistakes(keys, *mistakes_by_suite).encode()
        robustness = Robustness(
            model=self._predictor.manifest.digest,
            dataset=self._data.digest,
            name=self._data.name,
            num_classes=len(self._predictor.manifest.classes),
            imagenet=is_imagenet(self._predictor.manifest.classes),
            images=images,
            unreadable=self._images - images,
            subsample=self._subsample,
            seed=config.seed,
            mode=str(self._predictor.mode),
            top1=right["clean"] / images,
            severities=config.severities,
            corruptions={kind: tuple(float(count) / images for count in counts) for kind, counts in wrong.items()},
            frames=config.perturbation_frames if flip_sums else 0,
            perturbations={
                kind: PerturbationResult(flip_probability=float(flipped / images), top5_distance=float(distance / images))
                for kind, (flipped, distance) in flip_sums.items()
            },
            attacks=tuple(attacks.values()),
            predictions_sha256=digest_json(files),
            mistakes_sha256=sha256_bytes(mistakes),
            seconds=seconds,
        )
        return robustness, mistakes


def _make_top_schema(top_k: int) -> pa.Schema:
    top = pa.list_(pa.field("item", pa.uint16()), top_k)
    return pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("top", top, nullable=False)])


def build_subsample(config: EvaluationConfig) -> Subsample | None:
    """The part of a dataset that a configuration asks for; None for all of it."""
    return None if config.images is None else Subsample(images=config.images, seed=config.seed)


def measurement_inputs(config: EvaluationConfig) -> dict[str, Any]:
    """The settings that the numbers depend on; settings of suites that are not asked for do not count."""
    return {
        "units": [[unit.suite, unit.kind, unit.images_each] for unit in list_units(config)],
        "severities": config.severities,
        "images": config.images,
        "seed": config.seed,
    }


def build_corruption_table(
    keys: Sequence[str], class_ids: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32], severities: Sequence[int]
) -> pa.Table:
    """Predictions at all severities of the first image, then of the next. `probabilities`: [N · severities, classes]."""
    num_severities = len(severities)
    table = build_predictions_table(
        [key for key in keys for _ in severities], np.repeat(class_ids, num_severities), probabilities
    )
    return table.append_column("severity", pa.array(np.tile(np.array(severities, np.uint8), len(keys))))


def build_top_table(
    keys: Sequence[str], class_ids: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32], frames: int
) -> pa.Table:
    """The best classes of all frames of the first sequence, then of the next. `probabilities`: [N · frames, classes]."""
    top_class_ids = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP_K].astype(np.uint16)
    return pa.table(
        {
            "key": pa.array([key for key in keys for _ in range(frames)], pa.string()),
            "frame": pa.array(np.tile(np.arange(frames, dtype=np.uint8), len(keys))),
            "class_id": pa.array(np.repeat(class_ids, frames).astype(np.uint16)),
            "top": pa.FixedSizeListArray.from_arrays(pa.array(top_class_ids.reshape(-1)), top_class_ids.shape[1]),
        }
    )


def measure_flips(table: pa.Table, kind: str, frames: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Flip rate and top-5 distance of each sequence in a table of `build_top_table`, each float64 [N]."""
    top = table["top"].combine_chunks()
    top_class_ids = np.array(top.flatten()).reshape(-1, frames, top.type.list_size)
    is_noise = kind in NOISE_PERTURBATIONS
    return flip_rates(top_class_ids[:, :, 0], is_noise), top5_distances(top_class_ids, is_noise)


def _make_executor(stack: ExitStack, seconds: float) -> Executor:
    """Renders distorted images: in processes if that takes long, because some of the work holds the interpreter lock."""
    cores = count_cores()
    if seconds < PROCESSES_FROM_SECONDS or cores == 1:
        return stack.enter_context(ThreadPoolExecutor(2, "distort"))
    place_sockets()
    pool = ProcessPool(cores)
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool
