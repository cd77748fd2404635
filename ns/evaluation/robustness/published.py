"""Evaluates on published sets of corrupted and perturbed images: folders of ImageNet-C, ImageNet-P and CIFAR-10-C, read in place.

imagenet-c     KIND/SEVERITY/CLASS/IMAGE.JPEG   classes are WordNet ids, which must be the model's class names
cifar10-c      KIND.npy, labels.npy             uint8 [50000, 32, 32, 3], 10,000 images per severity, in ascending order
imagenet-p     KIND/CLASS/SEQUENCE.mp4          needs PyAV: pip install 'noisy-student[video]'

Photographs are 224 px already: they are resized to the model's test resolution without a further crop.
"""

import hashlib
import io
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice, product
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ns.config.schema import EvaluationConfig
from ns.core import log
from ns.core.digest import digest_json, sha256_bytes
from ns.core.errors import ConfigError, DataError
from ns.data.subsample import draw_evenly
from ns.evaluation.result import PerturbationResult, Robustness, is_imagenet
from ns.evaluation.robustness.suite import (
    BLOCK_IMAGES,
    build_corruption_table,
    build_subsample,
    build_top_table,
    measure_flips,
)
from ns.modeling.predictor import ImageInput, Predictor
from ns.storage import Store
from ns.storage.parquet import read_table, write_table

PublishedKind = Literal["imagenet-c", "cifar10-c", "imagenet-p"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
READER_THREADS = 8
PUBLISHED_FRAMES = 31
"""Frames of a published sequence, approximately."""


class PublishedEntries(NamedTuple):
    """The images or sequences of one kind and severity."""

    keys: list[str]
    class_ids: npt.NDArray[np.int64]
    """int64 [N], classes of the model."""
    load: Callable[[int], list[ImageInput]]
    """Loads an entry: one image, or all frames of a sequence."""


class PublishedSet:
    """A published set; entries are in the order of their names."""

    def __init__(self, store: Store, kind: PublishedKind, classes: tuple[str, ...]) -> None:
        self._store, self._kind = store, kind
        self._class_ids = {name: number for number, name in enumerate(classes)}

    @property
    def has_sequences(self) -> bool:
        return self._kind == "imagenet-p"

    def find_entries(self, kind: str, severity: int) -> PublishedEntries | None:
        """None if the folder has no such kind. Raises DataError for classes that the model does not know."""
        if self._kind == "cifar10-c":
            return self._find_array_entries(kind, severity)
        prefix = f"{kind}/" if self.has_sequences else f"{kind}/{severity}/"
        endings = (".mp4",) if self.has_sequences else IMAGE_SUFFIXES
        keys = [key for key in self._store.list(prefix) if key.lower().endswith(endings)]
        if not keys:
            return None
        names = [key.split("/")[-2] for key in keys]
        unknown = sorted(set(names) - self._class_ids.keys())
        if unknown:
            raise DataError(
                f"{self._store.uri}/{prefix}{unknown[0]}: the model has no class of this name; its class names must be those of the set"
            )
        class_ids = np.array([self._class_ids[name] for name in names], np.int64)
        return PublishedEntries(keys, class_ids, lambda row: self._load_images(keys[row]))

    def _load_images(self, key: str) -> list[ImageInput]:
        data = self._store.get(key)
        return list(_decode_frames(data, f"{self._store.uri}/{key}")) if self.has_sequences else [data]

    def _find_array_entries(self, kind: str, severity: int) -> PublishedEntries | None:
        key = f"{kind}.npy"
        if not self._store.exists(key):
            return None
        images, all_class_ids = self._load_array(key, 4), self._load_array("labels.npy", 1)
        images_each = len(images) // 5
        if len(images) != len(all_class_ids) or len(images) % 5 or images.dtype != np.uint8 or images.shape[3] != 3:
            raise DataError(
                f"{self._store.uri}/{key}: {images.dtype} {images.shape} for {len(all_class_ids)} labels: must be uint8 [5 N, H, W, 3] "
                "with 5 N labels"
            )
        start = (severity - 1) * images_each
        class_ids = np.asarray(all_class_ids[start : start + images_each], np.int64)
        if len(class_ids) and not 0 <= class_ids.min() <= class_ids.max() < len(CIFAR10_CLASSES):
            raise DataError(
                f"{self._store.uri}/labels.npy: {class_ids.min()} … {class_ids.max()}: must be class indices below {len(CIFAR10_CLASSES)}"
            )
        # labels.npy holds numbers: the model's classes may have CIFAR-10's names, or be named 0 to 9.
        names = CIFAR10_CLASSES if set(CIFAR10_CLASSES) <= self._class_ids.keys() else tuple(map(str, range(10)))
        if not set(names) <= self._class_ids.keys():
            raise DataError(
                f"{self._store.uri}: the model's classes are not CIFAR-10's, {', '.join(CIFAR10_CLASSES)}, nor 0 … 9"
            )
        model_class_ids = np.array([self._class_ids[class_name] for class_name in names], np.int64)
        return PublishedEntries(
            [f"{row:05d}" for row in range(images_each)],
            model_class_ids[class_ids],
            lambda row: [np.asarray(images[start + row])],
        )

    @lru_cache(maxsize=2)  # noqa: B019 - the object lives as long as the evaluation
    def _load_array(self, key: str, dimensions: int) -> npt.NDArray[np.generic]:
        try:
            array: npt.NDArray[np.generic] = np.load(self._store.path(key), mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{self._store.uri}/{key}: not a NumPy array: {error}") from error
        if array.ndim != dimensions:
            raise DataError(f"{self._store.uri}/{key}: has {array.ndim} dimensions, must have {dimensions}")
        return array


def digest_listing(store: Store) -> str:
    """Digest of the names and sizes of all files: tells whether the set has changed since an evaluation."""
    hasher = hashlib.sha256()
    for entry in store.entries():
        hasher.update(f"{entry.key}\0{entry.size}\n".encode())
    return hasher.hexdigest()


def count_published_passes(store: Store, kind: PublishedKind, config: EvaluationConfig) -> int:
    """Forward passes of `measure_published_set`, from the names and sizes of the files. Raises DataError for a folder that is no such
    set."""
    counts: Counter[str] = Counter()
    for entry in store.entries():
        parts = entry.key.split("/")
        if kind == "cifar10-c" and parts[0].endswith(".npy"):
            # uint8 [5 N, 32, 32, 3]
            images_each = entry.size // (5 * 32 * 32 * 3)
            counts.update({f"{parts[0].removesuffix('.npy')}/{severity}": images_each for severity in config.severities})
        elif kind == "imagenet-c" and parts[-1].lower().endswith(IMAGE_SUFFIXES):
            counts["/".join(parts[:2])] += 1
        elif kind == "imagenet-p" and parts[-1].lower().endswith(".mp4"):
            counts[parts[0]] += 1
    sizes = [
        counts[distortion if kind == "imagenet-p" else f"{distortion}/{severity}"]
        for distortion, severity in _list_distortions(kind, config)
    ]
    images = sum(min(size, config.images or size) for size in sizes)
    if not images:
        raise DataError(f"{store.uri}: is no {kind} set: has none of its kinds")
    return images * (PUBLISHED_FRAMES if kind == "imagenet-p" else 1)


def _list_distortions(kind: PublishedKind, config: EvaluationConfig) -> list[tuple[str, int]]:
    """The kinds of a published set that a configuration names, with their severities; 1 for sequences, which have none."""
    if kind == "imagenet-p":
        return [(distortion, 1) for distortion in config.perturbations]
    return list(product(config.all_corruptions, config.severities))


def measure_published_set(
    predictor: Predictor,
    store: Store,
    kind: PublishedKind,
    name: str,
    dataset: str,
    config: EvaluationConfig,
    unit_store: Store,
    target: Store,
) -> Robustness:
    """Evaluates a model on the kinds of a published set that `config` names, and writes `robustness.json` into `target`.

    `dataset` is the set's `digest_listing`. Units that `unit_store` holds are not repeated. Raises DataError for a folder that is no
    such set, ConfigError if PyAV is missing.
    """
    started = time.monotonic()
    published = PublishedSet(store, kind, predictor.manifest.classes)
    set_predictor = predictor if kind == "cifar10-c" else predictor.without_crop()
    severities = (1,) if published.has_sequences else config.severities
    errors: dict[str, list[float]] = {}
    perturbations: dict[str, PerturbationResult] = {}
    files: list[list[str]] = []
    images = unreadable = frames = 0
    for distortion, severity in _list_distortions(kind, config):
        entries = published.find_entries(distortion, severity)
        if entries is None:
            continue
        rows = draw_evenly(entries.keys, entries.class_ids, build_subsample(config))
        tables = []
        progress = log.Progress(len(rows), distortion if published.has_sequences else f"{distortion} {severity}")
        for start in range(0, len(rows), BLOCK_IMAGES):
            unit_key = f"{distortion}-{severity}/{start:06d}.parquet"
            block_rows = rows[start : start + BLOCK_IMAGES]
            if not unit_store.exists(unit_key):
                table = _evaluate_unit(set_predictor, entries, block_rows, severity, published.has_sequences)
                write_table(unit_store, unit_key, table)
            progress.update(len(block_rows))
            data = unit_store.get(unit_key)
            files.append([unit_key, sha256_bytes(data)])
            tables.append(read_table(data))
        predictions = pa.concat_tables(tables)
        if published.has_sequences:
            num_frames = int(predictions["frame"].to_numpy().max()) + 1
            flips, distances = measure_flips(predictions, distortion, num_frames)
            perturbations[distortion] = PerturbationResult(
                flip_probability=float(flips.mean()), top5_distance=float(distances.mean())
            )
            images, frames = max(images, len(flips)), max(frames, num_frames)
        else:
            errors.setdefault(distortion, []).append(float((predictions["rank"].to_numpy() > 0).mean()))
            images, unreadable = max(images, len(predictions)), max(unreadable, len(rows) - len(predictions))
    complete_kinds = {distortion: tuple(rates) for distortion, rates in errors.items() if len(rates) == len(severities)}
    if not complete_kinds and not perturbations:
        raise DataError(f"{store.uri}: is no {kind} set: none of its kinds is there with all severities {severities}")
    robustness = Robustness(
        model=predictor.manifest.digest,
        dataset=dataset,
        name=name,
        kind=kind,
        num_classes=len(predictor.manifest.classes),
        imagenet=is_imagenet(predictor.manifest.classes),
        images=images,
        unreadable=unreadable,
        subsample=build_subsample(config),
        seed=config.seed,
        mode=str(predictor.mode),
        top1=None,
        severities=severities,
        corruptions=complete_kinds,
        frames=frames,
        perturbations=perturbations,
        attacks=(),
        predictions_sha256=digest_json(files),
        seconds=time.monotonic() - started,
    )
    robustness.save(target)
    return robustness


def _evaluate_unit(
    predictor: Predictor, entries: PublishedEntries, rows: npt.NDArray[np.int64], severity: int, are_sequences: bool
) -> pa.Table:
    """Predictions of one unit; unreadable images are left out."""
    parts = []
    size = max(1, predictor.batch // (PUBLISHED_FRAMES if are_sequences else 1))
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    with ThreadPoolExecutor(READER_THREADS, "read") as threads:
        loaded: deque[tuple[npt.NDArray[np.int64], list[list[ImageInput]]]] = deque()

        def iter_batches() -> Iterator[Sequence[ImageInput]]:
            waiting = ([threads.submit(entries.load, row) for row in group.tolist()] for group in groups)
            ahead = deque(islice(waiting, 2))
            for group in groups:
                row_images = [future.result() for future in ahead.popleft()]
                ahead.extend(islice(waiting, 1))
                loaded.append((group, row_images))
                yield [image for images in row_images for image in images]

        for probabilities in predictor.predict_groups(iter_batches()):
            group, row_images = loaded.popleft()
            keys, class_ids = [entries.keys[row] for row in group.tolist()], entries.class_ids[group]
            if are_sequences:
                num_frames = len(row_images[0])
                if any(len(images) != num_frames for images in row_images):
                    raise DataError(f"{keys[0]}: sequences have different lengths, from {num_frames} images; must be equal")
                parts.append(build_top_table(keys, class_ids, probabilities, num_frames))
            else:
                readable = ~np.isnan(probabilities[:, 0])
                kept = [key for key, is_readable in zip(keys, readable, strict=True) if is_readable]
                parts.append(build_corruption_table(kept, class_ids[readable], probabilities[readable], (severity,)))
    return pa.concat_tables(parts)


def _decode_frames(data: bytes, uri: str) -> Iterator[npt.NDArray[np.uint8]]:
    try:
        import av
    except ImportError as error:
        raise ConfigError("imagenet-p: reading its videos needs PyAV: pip install 'noisy-student[video]'") from error
    try:
        with av.open(io.BytesIO(data)) as video:
            for frame in video.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise DataError(f"{uri}: damaged: {error}") from error
