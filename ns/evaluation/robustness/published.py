"""Corrupted and perturbed images as they were published: folders of ImageNet-C, ImageNet-P and CIFAR-10-C, read where they are.

imagenet-c     KIND/SEVERITY/CLASS/IMAGE.JPEG   classes are WordNet ids, by which the model must name its own
cifar10-c      KIND.npy, labels.npy             uint8 [50000, 32, 32, 3], 10,000 of each severity in turn
imagenet-p     KIND/CLASS/SEQUENCE.mp4          needs PyAV: pip install 'noisy-student[video]'

Photographs are 224 px already: the model gets them resized to its test resolution, and crops nothing more.
"""

import hashlib
import io
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ns.config.schema import EvaluationConfig
from ns.core import log
from ns.core.digest import digest, sha256_bytes
from ns.core.errors import ConfigError, DataError
from ns.evaluation.result import ROBUSTNESS, Perturbed, Robustness, is_imagenet
from ns.evaluation.robustness.averages import flips, top5_distances
from ns.evaluation.robustness.suite import BLOCK, NOISES, corrupted_rows, subsample, top_classes
from ns.evaluation.subsample import evenly
from ns.modeling.predictor import Picture, Predictor
from ns.storage import Store
from ns.storage.parquet import read_table

Kind = Literal["imagenet-c", "cifar10-c", "imagenet-p"]

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGES = (".jpeg", ".jpg", ".png")
READERS = 8
FRAMES = 31
"""Of a published sequence, about."""


class Entries(NamedTuple):
    """Images, or sequences, of one kind and severity."""

    keys: list[str]
    labels: npt.NDArray[np.int64]
    """Of the model's classes."""
    load: Callable[[int], list[Picture]]
    """Of an entry: one image, or all of a sequence."""


class ReadyMade:
    """A published set, in the order of its names."""

    def __init__(self, folder: Store, kind: Kind, classes: tuple[str, ...]) -> None:
        self._folder, self._kind = folder, kind
        self._place = {name: number for number, name in enumerate(classes)}

    @property
    def sequences(self) -> bool:
        return self._kind == "imagenet-p"

    def entries(self, kind: str, severity: int) -> Entries | None:
        """None if the folder has no such kind. Raises DataError for classes that the model does not know."""
        if self._kind == "cifar10-c":
            return self._arrays(kind, severity)
        prefix = f"{kind}/" if self.sequences else f"{kind}/{severity}/"
        endings = (".mp4",) if self.sequences else IMAGES
        keys = [key for key in self._folder.list(prefix) if key.lower().endswith(endings)]
        if not keys:
            return None
        names = [key.split("/")[-2] for key in keys]
        unknown = sorted(set(names) - self._place.keys())
        if unknown:
            raise DataError(
                f"{self._folder.uri}/{prefix}{unknown[0]}: the model has no class of this name; it must name its classes as the set does"
            )
        labels = np.array([self._place[name] for name in names], np.int64)
        return Entries(keys, labels, lambda row: self._load(keys[row]))

    def _load(self, key: str) -> list[Picture]:
        data = self._folder.get(key)
        return list(_frames(data, f"{self._folder.uri}/{key}")) if self.sequences else [data]

    def _arrays(self, kind: str, severity: int) -> Entries | None:
        name = f"{kind}.npy"
        if not self._folder.exists(name):
            return None
        images, labels = self._array(name, 4), self._array("labels.npy", 1)
        each = len(images) // 5
        if len(images) != len(labels) or len(images) % 5 or images.dtype != np.uint8 or images.shape[3] != 3:
            raise DataError(
                f"{self._folder.uri}/{name}: {images.dtype} {images.shape} for {len(labels)} labels: must be uint8 [5 N, H, W, 3], and as "
                "many labels"
            )
        start = (severity - 1) * each
        own = np.asarray(labels[start : start + each], np.int64)
        if len(own) and not 0 <= own.min() <= own.max() < len(CIFAR10):
            raise DataError(
                f"{self._folder.uri}/labels.npy: {own.min()} … {own.max()}: must be class indices below {len(CIFAR10)}"
            )
        # Numbers stand for names; where the model's classes are numbers, for these.
        names = CIFAR10 if set(CIFAR10) <= self._place.keys() else tuple(map(str, range(10)))
        if not set(names) <= self._place.keys():
            raise DataError(f"{self._folder.uri}: the model's classes are not CIFAR-10's, {', '.join(CIFAR10)}, nor 0 … 9")
        place = np.array([self._place[one] for one in names], np.int64)
        return Entries([f"{row:05d}" for row in range(each)], place[own], lambda row: [np.asarray(images[start + row])])

    @lru_cache(maxsize=2)  # noqa: B019 - as long as the evaluation
    def _array(self, name: str, dimensions: int) -> npt.NDArray[np.generic]:
        try:
            found: npt.NDArray[np.generic] = np.load(self._folder.path(name), mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{self._folder.uri}/{name}: not a NumPy array: {error}") from error
        if found.ndim != dimensions:
            raise DataError(f"{self._folder.uri}/{name}: has {found.ndim} dimensions, must have {dimensions}")
        return found


def listing_digest(folder: Store) -> str:
    """Of the names and sizes of all files: whether a set is still the one that was evaluated on."""
    found = hashlib.sha256()
    for entry in folder.entries():
        found.update(f"{entry.key}\0{entry.size}\n".encode())
    return found.hexdigest()


def passes(folder: Store, kind: Kind, config: EvaluationConfig) -> int:
    """Forward passes that `measure` makes, from the names and sizes of the files. Raises DataError for a folder that is no such set."""
    counts: Counter[str] = Counter()
    for entry in folder.entries():
        parts = entry.key.split("/")
        if kind == "cifar10-c" and parts[0].endswith(".npy"):
            # uint8 [5 N, 32, 32, 3]
            each = entry.size // (5 * 32 * 32 * 3)
            counts.update({f"{parts[0].removesuffix('.npy')}/{severity}": each for severity in config.severities})
        elif kind == "imagenet-c" and parts[-1].lower().endswith(IMAGES):
            counts["/".join(parts[:2])] += 1
        elif kind == "imagenet-p" and parts[-1].lower().endswith(".mp4"):
            counts[parts[0]] += 1
    wanted: list[str] = [f"{one}/{severity}" for one in config.kinds for severity in config.severities]
    if kind == "imagenet-p":
        wanted = [*config.perturbations]
    images = sum(min(counts[name], config.images or counts[name]) for name in wanted)
    if not images:
        raise DataError(f"{folder.uri}: is no {kind} set: has none of its kinds")
    return images * (FRAMES if kind == "imagenet-p" else 1)


def measure(
    predictor: Predictor,
    folder: Store,
    kind: Kind,
    name: str,
    dataset: str,
    config: EvaluationConfig,
    units: Store,
    target: Store,
) -> Robustness:
    """Evaluates a model on all kinds that a published set has, of those that `config` names, and writes `robustness.json` into `target`.
    `dataset`: its `listing_digest`. What `units` has is not done again.

    Raises DataError for a folder that is no such set, ConfigError if a library is missing.
    """
    started = time.monotonic()
    made = ReadyMade(folder, kind, predictor.card.classes)
    seeing = predictor if kind == "cifar10-c" else predictor.whole()
    severities = (1,) if made.sequences else config.severities
    errors: dict[str, list[float]] = {}
    perturbations: dict[str, Perturbed] = {}
    files: list[list[str]] = []
    images = unreadable = frames = 0
    for one in config.perturbations if made.sequences else config.kinds:
        for severity in severities:
            entries = made.entries(one, severity)
            if entries is None:
                continue
            rows = evenly(entries.keys, entries.labels, subsample(config))
            tables = []
            progress = log.Progress(len(rows), f"{one} {severity}" if not made.sequences else one)
            for start in range(0, len(rows), BLOCK):
                unit = f"{one}-{severity}/{start:06d}.parquet"
                if not units.exists(unit):
                    table = _evaluated(seeing, entries, rows[start : start + BLOCK], severity, made.sequences)
                    sink = io.BytesIO()
                    pq.write_table(table, sink, compression="zstd")
                    units.put(unit, sink.getvalue())
                progress.advance(len(rows[start : start + BLOCK]))
                data = units.get(unit)
                files.append([unit, sha256_bytes(data)])
                tables.append(read_table(data))
            whole = pa.concat_tables(tables)
            if made.sequences:
                each = int(whole["frame"].to_numpy().max()) + 1
                top = np.array(whole["top"].combine_chunks().flatten()).reshape(-1, each, len(whole["top"][0]))
                noise = one in NOISES
                perturbations[one] = Perturbed(
                    flip_probability=float(flips(top[:, :, 0], noise).mean()),
                    top5_distance=float(top5_distances(top, noise).mean()),
                )
                images, frames = max(images, len(top)), max(frames, each)
            else:
                errors.setdefault(one, []).append(float((whole["rank"].to_numpy() > 0).mean()))
                images, unreadable = max(images, len(whole)), max(unreadable, len(rows) - len(whole))
    whole_kinds = {one: tuple(rates) for one, rates in errors.items() if len(rates) == len(severities)}
    if not whole_kinds and not perturbations:
        raise DataError(f"{folder.uri}: is no {kind} set: none of its kinds is there with all severities {severities}")
    found = Robustness(
        model=predictor.card.digest,
        dataset=dataset,
        name=name,
        kind=kind,
        classes=len(predictor.card.classes),
        imagenet=is_imagenet(predictor.card.classes),
        images=images,
        unreadable=unreadable,
        subsample=subsample(config),
        seed=config.seed,
        mode=str(predictor.mode),
        top1=None,
        severities=severities,
        corruptions=whole_kinds,
        frames=frames,
        perturbations=perturbations,
        attacks=(),
        predictions_sha256=digest(files),
        seconds=time.monotonic() - started,
    )
    found.write(target, ROBUSTNESS)
    return found


def _evaluated(predictor: Predictor, entries: Entries, rows: npt.NDArray[np.int64], severity: int, sequences: bool) -> pa.Table:
    """Predictions of one unit; images that cannot be read are left out."""
    parts = []
    size = max(1, predictor.batch // (FRAMES if sequences else 1))
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    with ThreadPoolExecutor(READERS, "read") as threads:
        loaded: deque[tuple[npt.NDArray[np.int64], list[list[Picture]]]] = deque()

        def pictures() -> Iterator[Sequence[Picture]]:
            waiting = ([threads.submit(entries.load, row) for row in own.tolist()] for own in groups)
            ahead = deque(islice(waiting, 2))
            for own in groups:
                found = [future.result() for future in ahead.popleft()]
                ahead.extend(islice(waiting, 1))
                loaded.append((own, found))
                yield [picture for one in found for picture in one]

        for probabilities in predictor.groups(pictures()):
            own, found = loaded.popleft()
            keys, labels = [entries.keys[row] for row in own.tolist()], entries.labels[own]
            if sequences:
                each = len(found[0])
                if any(len(one) != each for one in found):
                    raise DataError(f"{keys[0]}: sequences have different lengths, from {each} images; must be equal")
                parts.append(top_classes(keys, labels, probabilities, each))
            else:
                readable = ~np.isnan(probabilities[:, 0])
                kept = [key for key, one in zip(keys, readable, strict=True) if one]
                parts.append(corrupted_rows(kept, labels[readable], probabilities[readable], (severity,)))
    return pa.concat_tables(parts)


def _frames(data: bytes, place: str) -> Iterator[npt.NDArray[np.uint8]]:
    try:
        import av
    except ImportError as error:
        raise ConfigError("imagenet-p: reading its films needs PyAV: pip install 'noisy-student[video]'") from error
    try:
        with av.open(io.BytesIO(data)) as film:
            for frame in film.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise DataError(f"{place}: damaged: {error}") from error
