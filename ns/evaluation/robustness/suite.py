"""Corruptions, perturbations and attacks: one model on one dataset, in units that are each done once.

A unit is up to 512 neighbours of a shard under one kind of distortion, or one attack. Its predictions are one file, written when it is
done; a run that was killed at any instant goes on with the unit under way. The images of a block are decoded once for all kinds;
distorted images are made in processes of their own while the network works on those before.
"""

import io
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ns.config.schema import EvaluationConfig
from ns.core import log
from ns.core.digest import digest, sha256_bytes
from ns.core.errors import DataError, RunError
from ns.core.process import begin_helper
from ns.data.dataset import Dataset
from ns.data.loading.decode import Encoded
from ns.data.loading.shard_reader import ImageSource
from ns.evaluation.accuracy import images_of, model_labels, table_of
from ns.evaluation.result import ROBUSTNESS, Attack, Perturbed, Robustness, Subsample, is_imagenet
from ns.evaluation.robustness.attacks import AttackPlan, attack
from ns.evaluation.robustness.averages import flips, top5_distances
from ns.evaluation.robustness.corruptions import SMALL_PX
from ns.evaluation.robustness.render import Picture, Task, base, distorted, packed, unpacked
from ns.evaluation.subsample import drawn
from ns.modeling.predictor import DECODE_THREADS, Predictor
from ns.storage import Store
from ns.storage.parquet import read_table

BLOCK = 512
"""Images of a unit: what is lost when it is killed, and what is in memory decoded (130 MB of photographs)."""
ATTACKED_AT_ONCE = 64
"""A gradient keeps every map of the network in memory."""
BACKWARD = 2
"""A gradient of the image costs a forward pass, and about as much again and half."""
PROCESSES_FROM_SECONDS = 10
"""It takes a second or two to start processes; less work than this is done in threads."""
TOP = 5
NOISES = ("gaussian_noise", "shot_noise")
"""Perturbations whose frames are compared with the first one, not with the one before: each frame is noised anew."""

CORRUPTED = pa.schema(
    [
        ("key", pa.string()),
        ("severity", pa.uint8()),
        ("label", pa.uint16()),
        ("predicted", pa.uint16()),
        ("confidence", pa.float32()),
        ("rank", pa.uint16()),
    ]
)


class Unit(NamedTuple):
    """What is done to each image of a block."""

    suite: Literal["clean", "corruptions", "perturbations", "attacks"]
    kind: str
    each: int
    """Images that are made of one."""
    plan: AttackPlan | None = None

    @property
    def passes(self) -> int:
        """Forward passes for each image, a gradient counted as three."""
        return self.each if self.plan is None else self.plan.steps * (1 + BACKWARD) + 1


def units(config: EvaluationConfig) -> list[Unit]:
    """What a configuration asks for, the clean images first."""
    found = [Unit("clean", "clean", 1)]
    if "corruptions" in config.suites:
        found += [Unit("corruptions", kind, len(config.severities)) for kind in config.kinds]
    if "perturbations" in config.suites:
        found += [Unit("perturbations", kind, config.perturbation_frames) for kind in config.perturbations]
    if "attacks" in config.suites:
        plans = [AttackPlan.fgsm(epsilon) for epsilon in config.fgsm_epsilons]
        plans += [AttackPlan.pgd(config.pgd_epsilon, steps, config.pgd_step_size) for steps in config.pgd_steps]
        found += [Unit("attacks", str(plan), 1, plan) for plan in plans]
    return found


def passes(config: EvaluationConfig) -> int:
    """Forward passes for each image, a gradient counted as three."""
    return sum(unit.passes for unit in units(config))


class _Block(NamedTuple):
    shard: int
    start: int
    """Row of the first image."""
    rows: npt.NDArray[np.int64]


class _Images(NamedTuple):
    """The readable images of a block."""

    encoded: list[Encoded | bytes]
    bases: list[npt.NDArray[np.uint8]]
    keys: list[str]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cost:
    """What is still to be done, from a short measurement."""

    images: int
    passes: int
    """Forward passes, a gradient counted as three."""
    network_seconds: float
    distort_seconds: float
    """Of one core."""
    seconds: float
    """From begin to end."""
    made_bytes: int
    """Distorted images that are to be kept for the next model; 0 if those of the set are too many."""


class Suite:
    """Everything that is known before the first unit. `folder` keeps predictions, `made` distorted images for the next model."""

    def __init__(
        self,
        predictor: Predictor,
        data_folder: Store,
        data: Dataset,
        config: EvaluationConfig,
        folder: Store,
        made: Store | None,
    ) -> None:
        self._predictor, self._data, self._config = predictor, data, config
        self._data_folder, self._folder, self._made = data_folder, folder, made
        self._labels = model_labels(predictor, data_folder, data)
        self._source = ImageSource(data_folder, data, held=2)
        self._subsample = subsample(config)
        rows = drawn(self._source, len(data.shards), len(data.classes), self._subsample)
        self._blocks = [
            _Block(shard, int(own[at]), own[at : at + BLOCK]) for shard, own in rows.items() for at in range(0, len(own), BLOCK)
        ]
        self._images = sum(len(block.rows) for block in self._blocks)
        self._units = units(config)
        self._as_they_are = self._are_small()
        self._attacked_at_once = ATTACKED_AT_ONCE
        # Listed once: to ask a remote store for each would take minutes.
        self._done, self._kept = set(folder.list()), set(made.list() if made else ())
        # Photographs have been cropped when they are distorted; small images are cropped as the model wants it.
        self._distorted_predictor = predictor if self._as_they_are else predictor.whole()

    def run(self, target: Store) -> Robustness:
        """Does what is not done, and writes `robustness.json` into `target`.

        Raises DataError for images that cannot be evaluated on, RunError if processes are killed again and again.
        """
        started = time.monotonic()
        pending = [(block, left) for block in self._blocks if (left := [u for u in self._units if not self._is_done(block, u)])]
        if pending:
            self._work(pending)
        found = self._summary(time.monotonic() - started)
        found.write(target, ROBUSTNESS)
        return found

    def _work(self, pending: list[tuple[_Block, list[Unit]]]) -> None:
        first = self._read(pending[0][0])
        cost = self._cost(pending, first)
        log.get().info(
            "cost",
            images=cost.images,
            forward_passes=cost.passes,
            seconds=round(cost.seconds, 1),
            kept_mib=cost.made_bytes >> 20,
        )
        keep = cost.made_bytes > 0
        all_passes = self._images * sum(unit.passes for unit in self._units)
        progress = log.Progress(all_passes, "passes", done=all_passes - cost.passes)
        with ExitStack() as stack:
            executor = _executor(stack, cost.distort_seconds)
            for number, (block, left) in enumerate(pending):
                following = pending[number + 1][0].shard if number + 1 < len(pending) else block.shard
                self._source.fetch_ahead([following] if following != block.shard else [])
                images = first if number == 0 else self._read(block)
                for unit in left:
                    if unit.suite in ("clean", "attacks"):
                        self._write(block, unit, self._plain(images, unit, progress))
                try:
                    self._distort(
                        block, images, [u for u in left if u.suite not in ("clean", "attacks")], executor, keep, progress
                    )
                except BrokenProcessPool as error:
                    raise RunError(
                        "a process that makes corrupted images was killed, most often for want of memory; free some, and run the "
                        "same command again: it goes on where it stopped"
                    ) from error

    def _are_small(self) -> bool:
        """Whether images are distorted as they are, by the first of them."""
        for block in self._blocks:
            for image in images_of(self._source, block.shard, block.rows[:16]):
                try:
                    return bool(max(base(image, as_they_are=True).shape[:2]) <= SMALL_PX)
                except DataError:
                    continue
        raise DataError(f"{self._data_folder.uri}: no readable image to evaluate on")

    def _read(self, block: _Block) -> _Images:
        def read(image: Encoded | bytes) -> npt.NDArray[np.uint8] | None:
            try:
                return base(image, as_they_are=self._as_they_are)
            except DataError:
                return None

        encoded = images_of(self._source, block.shard, block.rows)
        with ThreadPoolExecutor(DECODE_THREADS) as threads:
            bases = list(threads.map(read, encoded))
        readable = [place for place, image in enumerate(bases) if image is not None]
        keys = self._source.index(block.shard).keys
        labels = self._labels[self._source.labels(block.shard, len(self._data.classes))[block.rows]]
        return _Images(
            [encoded[place] for place in readable],
            [image for image in bases if image is not None],
            [keys[int(block.rows[place])] for place in readable],
            labels[readable],
        )

    def _plain(self, images: _Images, unit: Unit, progress: log.Progress) -> pa.Table:
        """Predictions of the images as they are, or attacked."""
        if unit.plan is None:
            probabilities, _ = self._predictor.images(images.encoded)
            progress.advance(len(images.keys))
            return table_of(images.keys, images.labels, probabilities)
        parts = [np.empty((0, len(self._predictor.card.classes)), np.float32)]
        at = 0
        while at < len(images.keys):
            part = slice(at, at + min(self._predictor.batch, self._attacked_at_once))
            try:
                parts.append(self._attacked(images, part, unit.plan))
            except torch.OutOfMemoryError:
                if self._attacked_at_once == 1:
                    raise
                self._attacked_at_once = max(1, self._attacked_at_once // 2)
                log.get().warning("out of memory; attacks go on with fewer images at once", images=self._attacked_at_once)
                continue
            at += len(parts[-1])
            progress.advance(len(parts[-1]) * unit.passes)
        return table_of(images.keys, images.labels, np.concatenate(parts))

    def _attacked(self, images: _Images, part: slice, plan: AttackPlan) -> npt.NDArray[np.float32]:
        """Probabilities of images that were attacked."""
        pixels = self._predictor.pixels(images.encoded[part])
        labels = torch.from_numpy(images.labels[part]).to(pixels.device)
        changed = attack(self._predictor.logits, pixels, labels, plan, images.keys[part], self._config.seed)
        with torch.inference_mode():
            found: npt.NDArray[np.float32] = self._predictor.logits(changed).softmax(1).cpu().numpy()
        return found

    def _distort(
        self, block: _Block, images: _Images, left: list[Unit], executor: Executor, keep: bool, progress: log.Progress
    ) -> None:
        """Evaluates the distorted images of one block, kind after kind."""
        at_once: deque[tuple[Unit, slice, list[Picture]]] = deque()

        def pictures() -> Iterator[list[Picture]]:
            for unit, part, found in self._distorted(block, images, left, executor):
                at_once.append((unit, part, found))
                yield found

        parts: list[pa.Table] = []
        made: list[Picture] = []
        for probabilities in self._distorted_predictor.groups(pictures()):
            unit, part, found = at_once.popleft()
            keys, labels = images.keys[part], images.labels[part]
            if unit.suite == "corruptions":
                parts.append(corrupted_rows(keys, labels, probabilities, self._config.severities))
            else:
                parts.append(top_classes(keys, labels, probabilities, unit.each))
            progress.advance(len(found))
            if keep and unit.suite == "corruptions":
                made += found
            if part.stop >= len(images.keys):
                if made and self._made is not None and not self._is_made(block, unit):
                    self._made.put(self._name(block, unit), packed(made))
                self._write(block, unit, pa.concat_tables(parts))
                parts, made = [], []

    def _distorted(
        self, block: _Block, images: _Images, left: list[Unit], executor: Executor
    ) -> Iterator[tuple[Unit, slice, list[Picture]]]:
        """Distorted images, a few at a time, made ahead of need; or those that were made for another model."""

        def tasks() -> Iterator[tuple[Unit, slice, Future[list[Picture]]]]:
            for unit in left:
                ready = self._made_before(block, unit)
                size = max(1, self._predictor.batch // unit.each)
                for at in range(0, max(1, len(images.keys)), size):
                    part = slice(at, at + size)
                    if ready is not None:
                        future: Future[list[Picture]] = Future()
                        future.set_result(ready[at * unit.each : (at + size) * unit.each])
                    else:
                        future = executor.submit(distorted, self._task(unit, images, part))
                    yield unit, part, future

        waiting = tasks()
        ahead = deque(islice(waiting, 2 + _cores()))
        while ahead:
            unit, part, future = ahead.popleft()
            found = future.result()
            ahead.extend(islice(waiting, 1))
            yield unit, part, found

    def _task(self, unit: Unit, images: _Images, part: slice) -> Task:
        severities = self._config.severities if unit.suite == "corruptions" else ()
        return Task(
            images.bases[part], images.keys[part], unit.kind, severities, unit.each, self._config.seed, self._as_they_are
        )

    def _is_made(self, block: _Block, unit: Unit) -> bool:
        return unit.suite == "corruptions" and self._name(block, unit) in self._kept

    def _made_before(self, block: _Block, unit: Unit) -> list[Picture] | None:
        if self._made is None or not self._is_made(block, unit):
            return None
        return unpacked(self._made.get(self._name(block, unit)), as_they_are=self._as_they_are)

    def _name(self, block: _Block, unit: Unit) -> str:
        name = unit.kind
        if unit.suite == "corruptions":
            name += "-" + "".join(map(str, self._config.severities))
        elif unit.suite == "perturbations":
            name += f"-x{unit.each}"
        shard = self._data.shards[block.shard].name.removesuffix(".tar")
        return f"{shard}-{block.start:05d}/{name}.parquet"

    def _is_done(self, block: _Block, unit: Unit) -> bool:
        return self._name(block, unit) in self._done

    def _write(self, block: _Block, unit: Unit, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self._folder.put(self._name(block, unit), sink.getvalue())

    def _cost(self, pending: list[tuple[_Block, list[Unit]]], images: _Images) -> Cost:
        """Of what is pending: each kind is tried on one image, the network on a batch."""
        counts = {unit: sum(len(block.rows) for block, some in pending if unit in some) for unit in self._units}
        left = {unit: count for unit, count in counts.items() if count}
        if not images.keys:
            return Cost(self._images, sum(unit.passes * count for unit, count in left.items()), 0, 0, 0, 0)
        batch = images.encoded[: self._predictor.batch]
        self._predictor.images(batch)  # the first time allocates
        forward = _seconds(lambda: self._predictor.images(batch)) / len(batch)
        network = forward * sum(unit.passes * count for unit, count in left.items())
        making, size, fresh_bytes = 0.0, 0, 0
        one = slice(0, 1)
        for unit in left:
            if unit.suite not in ("corruptions", "perturbations"):
                continue
            # Those that were made for another model are only read.
            fresh = sum(len(block.rows) for block, some in pending if unit in some and not self._is_made(block, unit))
            found: list[Picture] = []
            seconds = _seconds(lambda unit=unit, found=found: found.extend(distorted(self._task(unit, images, one))))
            making += seconds * fresh
            if unit.suite == "corruptions":
                each = sum(len(p.data) if isinstance(p, Encoded) else p.nbytes for p in found)
                size, fresh_bytes = size + each * self._images, fresh_bytes + each * fresh
        fits = self._made is not None and size <= self._config.keep_gib * 2**30
        # On a processor without a GPU, what makes images is taken from what the network has.
        cores = _cores()
        shared = not torch.cuda.is_available()
        seconds = network + making / cores if shared else max(network, making / cores)
        total = sum(unit.passes * count for unit, count in left.items())
        return Cost(self._images, total, network, making, seconds, fresh_bytes if fits else 0)

    def _summary(self, seconds: float) -> Robustness:
        """Counts what the units hold, one in memory at a time."""
        config = self._config
        wrong = {unit.kind: np.zeros(len(config.severities), np.int64) for unit in self._units if unit.suite == "corruptions"}
        turned = {unit.kind: np.zeros(2) for unit in self._units if unit.suite == "perturbations"}
        right = dict.fromkeys((unit.kind for unit in self._units if unit.suite in ("clean", "attacks")), 0)
        images = 0
        files = []
        for block in self._blocks:
            for unit in self._units:
                data = self._folder.get(self._name(block, unit))
                files.append([self._name(block, unit), sha256_bytes(data)])
                table = read_table(data)
                if unit.suite == "corruptions":
                    failed = table["rank"].to_numpy().reshape(-1, unit.each) > 0
                    wrong[unit.kind] += failed.sum(0)
                elif unit.suite == "perturbations":
                    top = np.array(table["top"].combine_chunks().flatten()).reshape(-1, unit.each, _top(self._predictor))
                    noise = unit.kind in NOISES
                    turned[unit.kind] += (flips(top[:, :, 0], noise).sum(), top5_distances(top, noise).sum())
                else:
                    right[unit.kind] += int((table["rank"].to_numpy() == 0).sum())
                    images += len(table) if unit.suite == "clean" else 0
        if not images:
            raise DataError(f"{self._data_folder.uri}: no readable image to evaluate on")
        plans = [(unit.plan, right[unit.kind]) for unit in self._units if unit.plan]
        return Robustness(
            model=self._predictor.card.digest,
            dataset=self._data.digest,
            name=self._data.name,
            classes=len(self._predictor.card.classes),
            imagenet=is_imagenet(self._predictor.card.classes),
            images=images,
            unreadable=self._images - images,
            subsample=self._subsample,
            seed=config.seed,
            mode=str(self._predictor.mode),
            top1=right["clean"] / images,
            severities=config.severities,
            corruptions={kind: tuple(float(count) / images for count in counts) for kind, counts in wrong.items()},
            frames=config.perturbation_frames if turned else 0,
            perturbations={
                kind: Perturbed(flip_probability=float(flipped / images), top5_distance=float(distance / images))
                for kind, (flipped, distance) in turned.items()
            },
            attacks=tuple(
                Attack(name=plan.name, epsilon=plan.epsilon, steps=plan.steps, step_size=plan.step_size, top1=count / images)
                for plan, count in plans
            ),
            predictions_sha256=digest(files),
            seconds=seconds,
        )


def subsample(config: EvaluationConfig) -> Subsample | None:
    """Which images a configuration wants looked at; None for all."""
    return None if config.images is None else Subsample(images=config.images, seed=config.seed)


def asked(config: EvaluationConfig) -> dict[str, Any]:
    """What the numbers depend on, of a configuration: settings of suites that are not asked for do not count."""
    return {
        "units": [[unit.suite, unit.kind, unit.each] for unit in units(config)],
        "severities": config.severities,
        "images": config.images,
        "seed": config.seed,
    }


def corrupted_rows(
    keys: Sequence[str], labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32], severities: Sequence[int]
) -> pa.Table:
    """Predictions of all severities of the first image, then of the next. `probabilities`: [N · severities, classes]."""
    each = len(severities)
    table = table_of([key for key in keys for _ in severities], np.repeat(labels, each), probabilities)
    levels = pa.array(np.tile(np.array(severities, np.uint8), len(keys)))
    columns = {name: table[name] for name in table.column_names} | {"severity": levels}
    return pa.table([columns[name] for name in CORRUPTED.names], schema=CORRUPTED)


def top_classes(
    keys: Sequence[str], labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32], frames: int
) -> pa.Table:
    """The best classes of all frames of the first sequence, then of the next. `probabilities`: [N · frames, classes]."""
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP].astype(np.uint16)
    return pa.table(
        {
            "key": pa.array([key for key in keys for _ in range(frames)], pa.string()),
            "frame": pa.array(np.tile(np.arange(frames, dtype=np.uint8), len(keys))),
            "label": pa.array(np.repeat(labels, frames).astype(np.uint16)),
            "top": pa.FixedSizeListArray.from_arrays(pa.array(top.reshape(-1)), top.shape[1]),
        }
    )


def _top(predictor: Predictor) -> int:
    return min(TOP, len(predictor.card.classes))


def _executor(stack: ExitStack, seconds: float) -> Executor:
    """Who makes distorted images: processes, if there is enough to make, since not all of it lets other threads run."""
    cores = _cores()
    if seconds < PROCESSES_FROM_SECONDS or cores == 1:
        return stack.enter_context(ThreadPoolExecutor(2, "distort"))
    # Not forked: torch has threads.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(cores, context, begin_helper, (os.getpid(),))
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
