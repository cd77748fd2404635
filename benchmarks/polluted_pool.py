"""Does the foreign score keep a polluted pool clean? A teacher of some classes labels a pool of which half belongs to none of them.

    python -m benchmarks.polluted_pool [--quick] [--json FILE] [--keep] [--score distance|energy] [--quantile 0.95]

The teacher learns six classes of CIFAR-10 from 1,000 images each; --quick: seven digits from 60 images each. The pool has 250 (--quick: 60)
further images of each class. Foreign images of four kinds, of each as many as there are images of the classes: the classes that were
withheld, digits (not with --quick), noise, and textures. All that the teacher labels with a confidence above 0.5 is kept once, so that
one labeling gives the precision of every mixture of pool and kinds.

    kept_precision_clean      share of right labels among the kept images of the classes, without a limit
    kept_precision_polluted   the same if half of the pool are digits, noise and textures in equal parts, all of which count as wrong
    kept_precision_filtered   the same with the limit
    precision_lost            kept_precision_clean - kept_precision_filtered, in points
    foreign_share_kept        share of those foreign images that the limit lets through; the confidence may still leave them out
    kept_share                share of the images of the classes that the limit lets through
    ….KIND                    the same if the half is of one kind
"""

import io
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image
from rich.table import Table

from benchmarks.measure import CIFAR10, make_parser, write_benchmark
from ns.config.loader import load_experiment
from ns.data.dataset import Dataset, DatasetRole
from ns.data.importing.writer import ShardWriter
from ns.labeling.label_set import iter_label_rows
from ns.labeling.selection import count_copies, make_selection
from ns.runs.lifecycle import open_run
from ns.runs.lookup import open_run_label_set
from ns.stages.context import RunRef
from ns.stages.label import label_shards, split_pool
from ns.stages.prepare import prepare_data
from ns.stages.select import commit_labels
from ns.stages.train import train_generation
from ns.storage import LocalStore

PIXELS = 32
MIN_CONFIDENCE = 0.5
WITHHELD = "withheld"
KNOWN_CLASSES = ("airplane", "automobile", "cat", "deer", "horse", "truck")
"""Classes of CIFAR-10 that the teacher learns; bird, dog, frog and ship are withheld."""
KNOWN_DIGITS = 7

Images = npt.NDArray[np.uint8]
"""[N, 32, 32, 3]"""


class PoolSizes(NamedTuple):
    """Images per class, and training."""

    labeled: int
    calibration: int
    heldout: int
    pool: int
    epochs: float
    channels: tuple[int, int, int, int]


FULL = PoolSizes(labeled=1000, calibration=250, heldout=50, pool=250, epochs=12, channels=(16, 32, 64, 128))
QUICK = PoolSizes(labeled=60, calibration=40, heldout=10, pool=60, epochs=60, channels=(8, 16, 32, 64))


def read_cifar_classes(archive: Path, per_class: int) -> dict[str, Images]:
    """Class name → its first `per_class` images in the archive."""
    images: dict[str, list[Images]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name).parent.name
            if member.isfile() and len(images.setdefault(name, [])) < per_class:
                file = tar.extractfile(member)
                assert file is not None
                images[name].append(np.asarray(Image.open(file).convert("RGB")))
    return {name: np.stack(images[name]) for name in sorted(images)}


def load_digit_classes() -> dict[str, Images]:
    """Digit → its images, enlarged from 8 px."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    enlarged = [
        np.asarray(
            Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
        )
        for image in bunch["images"]
    ]
    pixels = np.repeat(np.stack(enlarged)[..., None], 3, axis=3)
    return {str(digit): pixels[bunch["target"] == digit] for digit in range(10)}


def make_noise(count: int, rng: np.random.Generator) -> Images:
    """Images whose pixels are independent and uniform."""
    return rng.integers(0, 256, (count, PIXELS, PIXELS, 3), np.uint8)


def make_textures(count: int, rng: np.random.Generator) -> Images:
    """Waves of random direction, frequency and colors, with some noise."""
    y, x = np.mgrid[:PIXELS, :PIXELS]
    frequency, angle = rng.uniform(0.1, 1.2, (count, 1, 1, 1)), rng.uniform(0, np.pi, (count, 1, 1, 1))
    phases = rng.uniform(0, 2 * np.pi, (count, 1, 1, 3))
    position = x[..., None] * np.cos(angle) + y[..., None] * np.sin(angle)
    waves = 128 + 60 * np.sin(frequency * position + phases) + 20 * rng.normal(size=(count, PIXELS, PIXELS, 3))
    textures: Images = np.clip(waves, 0, 255).astype(np.uint8)
    return textures


def make_foreign_images(withheld: Sequence[Images], digits: Images | None, count: int, seed: int) -> dict[str, Images]:
    """Kind → `count` foreign images. `withheld`: images of each withheld class, of which equally many are taken; `digits`: none if None."""
    rng = np.random.default_rng(seed)
    shares = np.array_split(np.arange(count), len(withheld))
    kinds = {WITHHELD: np.concatenate([images[: len(share)] for images, share in zip(withheld, shares, strict=True)])}
    if digits is not None:
        kinds["digits"] = digits[rng.permutation(len(digits))[:count]]
    return kinds | {"noise": make_noise(count, rng), "textures": make_textures(count, rng)}


def write_image_dataset(store: LocalStore, role: DatasetRole, images: Mapping[str, Images], classes: Sequence[str]) -> None:
    """Writes a dataset whose keys are `NAME/NUMBER`; names that are classes are labels, unless it is a pool."""
    with ShardWriter(store, max_samples=2000, max_bytes=256 << 20) as writer:
        for name, group in images.items():
            for number, pixels in enumerate(group):
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                class_id = None if role == "unlabeled" else classes.index(name)
                writer.add_image(f"{name}/{number:05d}", "png", png.getvalue(), class_id)
    labels = () if role == "unlabeled" else tuple(classes)
    Dataset(name=role, role=role, classes=labels, shards=writer.shards).save(store)


def write_experiment_data(
    folder: Path, class_images: Mapping[str, Images], foreign: Mapping[str, Images], sizes: PoolSizes
) -> dict[str, str]:
    """Writes the datasets of the experiment; returns part → folder. The images of a class are dealt to the parts in their order."""
    classes, start = list(class_images), 0
    roles: dict[str, DatasetRole] = {
        "labeled": "labeled",
        "calibration": "evaluation",
        "heldout": "evaluation",
        "pool": "unlabeled",
    }
    for part, role in roles.items():
        count = getattr(sizes, part)
        images = {name: group[start : start + count] for name, group in class_images.items()}
        write_image_dataset(LocalStore(folder / part), role, images | (dict(foreign) if part == "pool" else {}), classes)
        start += count
    return {part: str(folder / part) for part in roles}


def make_experiment(data: Mapping[str, str], sizes: PoolSizes, score: str, quantile: float) -> dict[str, Any]:
    """The experiment, as `ns run` reads it; only its teacher is trained."""
    network = {
        "model": {
            "arch": "resnet18",
            "args": {"channels": list(sizes.channels)},
            "resolution": PIXELS,
            "crop": "pad",
            "reduce_stride": 2,
            "inference_precision": "float32",
        },
        "noise": {"randaugment_layers": 1, "randaugment_magnitude": 4, "dropout": 0.1, "stochastic_depth": 0.1},
    }
    optimizer = {"name": "adamw", "lr": 0.004, "weight_decay": 0.05, "schedule": "cosine", "warmup_epochs": 1}
    train = {"precision": "bfloat16", "processes": 1, "ema_decay": 0.99, "labeled_batch": 128, "optimizer": optimizer}
    return {
        "name": "polluted-pool",
        "generations": 1,
        "data": {**data, "leak_guard": "off"},
        "teacher": {**network, "train": {**train, "epochs": sizes.epochs}},
        "students": [network],
        "labeling": {"foreign_score": score, "tasks": 1},
        "selection": {"policy": "all", "min_confidence": MIN_CONFIDENCE, "foreign_quantile": quantile},
    }


class PoolLabels(NamedTuple):
    """What the teacher says of each image of the pool; arrays [N]."""

    names: npt.NDArray[np.str_]
    """Class, or kind of foreign images."""
    is_right: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    """Whether it is above the confidence, without a limit."""
    filtered: npt.NDArray[np.bool_]
    """Whether it is kept with the limit."""
    familiar: npt.NDArray[np.bool_]
    """Whether its score is not above the limit."""


def label_polluted_pool(work: Path, document: Mapping[str, Any]) -> PoolLabels:
    """Trains the teacher, labels the pool, and selects with and without the limit."""
    path, root, run = work / "experiment.yaml", LocalStore(work / "runs"), "polluted"
    path.write_text(yaml.safe_dump(dict(document)))
    open_run(root, run, load_experiment(str(path)), "benchmark")
    ref = RunRef(str(path), root.uri, run)
    data = prepare_data(ref)
    teacher = train_generation(ref, data=data, generation=0)
    for shards in split_pool(ref, data=data):
        label_shards(ref, data=data, generation=1, teacher=teacher, shards=shards)
    commit_labels(ref, data=data, generation=1, teacher=teacher)
    labels = open_run_label_set(root, run, 1)
    filtered, label_set = labels.selection, labels.label_set
    assert filtered is not None
    assert filtered.foreign_limit is not None
    unlimited = make_selection(labels.store, label_set, filtered.policy, seed=0, label_set_key="")
    names, columns = [], []
    for rows in iter_label_rows(labels.store, label_set):
        assert rows.foreign_score is not None
        shard_names = [key.rpartition("/")[0] for key in rows.keys]
        predicted = np.array(label_set.classes)[rows.top_class[:, 0]]
        copies = (count_copies(selection, rows) > 0 for selection in (unlimited, filtered))
        columns.append((predicted == np.array(shard_names), *copies, rows.foreign_score <= np.float32(filtered.foreign_limit)))
        names += shard_names
    return PoolLabels(np.array(names), *(np.concatenate(column) for column in zip(*columns, strict=True)))


def compute_pool_figures(labels: PoolLabels, classes: Sequence[str]) -> dict[str, float]:
    """The figures of the module's head. All kinds have as many images as the classes together."""
    is_known = np.isin(labels.names, list(classes))
    kinds = [kind for kind in dict.fromkeys(labels.names.tolist()) if kind not in classes]
    far_kinds = [kind for kind in kinds if kind != WITHHELD]

    def measure_precision(kept: npt.NDArray[np.bool_], pollution: Sequence[str]) -> float:
        wrong = np.mean([np.count_nonzero(kept & (labels.names == kind)) for kind in pollution]) if pollution else 0.0
        return float(np.count_nonzero(kept & is_known & labels.is_right) / (np.count_nonzero(kept & is_known) + wrong))

    figures = {
        "kept_precision_clean": measure_precision(labels.kept, []),
        "kept_share": float(labels.familiar[is_known].mean()),
    }
    for suffix, pollution in (("", far_kinds), *((f".{kind}", [kind]) for kind in kinds)):
        figures[f"kept_precision_polluted{suffix}"] = measure_precision(labels.kept, pollution)
        figures[f"kept_precision_filtered{suffix}"] = measure_precision(labels.filtered, pollution)
        lost = figures["kept_precision_clean"] - figures[f"kept_precision_filtered{suffix}"]
        figures[f"precision_lost{suffix}"] = 100 * lost
        figures[f"foreign_share_kept{suffix}"] = float(labels.familiar[np.isin(labels.names, pollution)].mean())
    return {name: round(value, 4) for name, value in figures.items()}


def make_pool_table(figures: Mapping[str, float]) -> Table:
    table = Table("half of the pool", "precision without the limit", "with the limit", "foreign images let through")
    for name in figures:
        measure, _, kind = name.partition(".")
        if measure == "kept_precision_polluted":
            suffix = f".{kind}" if kind else ""
            columns = ("kept_precision_polluted", "kept_precision_filtered", "foreign_share_kept")
            table.add_row(
                kind or "all but withheld classes", *(f"{100 * figures[column + suffix]:.1f} %" for column in columns)
            )
    table.caption = (
        f"precision of the clean pool {100 * figures['kept_precision_clean']:.1f} %; the limit lets "
        f"{100 * figures['kept_share']:.1f} % of the images of the classes through"
    )
    return table


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="digits alone, a minute; not with --keep")
    parser.add_argument("--score", choices=["distance", "energy"], default="distance", help="kind of the foreign score")
    parser.add_argument("--quantile", type=float, default=0.95, help="selection.foreign_quantile")
    options = parser.parse_args()
    if options.keep and options.quick:
        parser.error("--keep: a quick run is too small; leave --quick out")
    sizes, digits = (QUICK if options.quick else FULL), load_digit_classes()
    per_class = sizes.labeled + sizes.calibration + sizes.heldout + sizes.pool
    images = digits if options.quick else read_cifar_classes(CIFAR10.with_name("train.tar.gz"), per_class)
    known_names = list(images)[:KNOWN_DIGITS] if options.quick else KNOWN_CLASSES
    class_images = {name: images[name] for name in known_names}
    withheld = [group for name, group in images.items() if name not in class_images]
    other_digits = None if options.quick else np.concatenate(list(digits.values()))
    foreign = make_foreign_images(withheld, other_digits, sizes.pool * len(class_images), seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        data = write_experiment_data(Path(scratch), class_images, foreign, sizes)
        labels = label_polluted_pool(Path(scratch), make_experiment(data, sizes, options.score, options.quantile))
    figures = compute_pool_figures(labels, known_names)
    write_benchmark("polluted_pool", figures, options, make_pool_table(figures))


if __name__ == "__main__":
    main()
