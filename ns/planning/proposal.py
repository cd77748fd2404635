"""A first experiment, proposed from a look at a folder of images: network, resolution, batch, and epochs that fit a time budget."""

import csv
import hashlib
import io
import itertools
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ns.config.loader import parse_experiment
from ns.config.schema import Experiment
from ns.core.errors import ConfigError, DataError
from ns.core.printable import escape_formula
from ns.data.class_names import shorten_names
from ns.data.importing.ingest import resolve_classes
from ns.data.importing.listing import Listing
from ns.data.loading.decode import EncodedJpeg
from ns.data.locate import open_data
from ns.data.prepared import PART_ROLES, DataPart
from ns.modeling.factory import get_best_device
from ns.planning.cost import PlanRequest, RunPlan, estimate_run
from ns.planning.data_stats import KnownCounts, SampleImage, inspect_data

BRITISH_LABELED = "label" + "led"
PART_FOLDERS: dict[DataPart, tuple[str, ...]] = {
    "labeled": ("labeled", BRITISH_LABELED, "train", "training"),
    "pool": ("pool", "unlabeled", f"un{BRITISH_LABELED}", "extra"),
    "heldout": ("heldout", "held-out", "val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names by which a part's folder is told, in any case."""
LAYOUTS: dict[DataPart, str] = {
    "labeled": "one subfolder for each class",
    "pool": "loose images without labels, at any depth",
}
"""The parts that must be there, and how."""
HELDOUT_SHARE, MAX_HELDOUT = 0.25, 5_000
"""What is held out of the labeled images where there is no folder for it."""
MIN_LABELED = 8
"""Fewer images to train on than the smallest batch are no training."""
MIN_EPOCHS, MAX_EPOCHS = 40, 200
"""A network that can be trained for fewer epochs in the time is left for a cheaper one; more hardly help from random weights."""
TRIAL_EPOCHS = 10
"""Epochs of the estimate: its time grows with them in proportion."""
USED_SHARE = 0.8
"""Share of the time budget that is planned: the start of stages is not counted, and other programs run too."""
GENERATIONS = 2
PEAK_RATE = 0.001
"""AdamW's learning rate, whatever the batch; the experiment's is for a batch of 256."""
MEASURE_SECONDS = 4.0


class NetworkChoice(NamedTuple):
    """A network that a proposal may have."""

    arch: str
    resolution: int
    """px"""
    crop: str = "resized"
    args: Mapping[str, Any] = {}
    reduce_stride: int = 1


NARROW = {"channels": [16, 32, 64, 128]}
# From the most to the least multiply-adds.
NETWORKS: dict[int, tuple[NetworkChoice, ...]] = {
    48: (
        NetworkChoice("resnet18", 32, "pad", reduce_stride=4),
        NetworkChoice("resnet18", 32, "pad", NARROW, reduce_stride=2),
    ),
    96: (
        NetworkChoice("resnet18", 64, "pad", reduce_stride=2),
        NetworkChoice("resnet18", 64, "pad", NARROW, reduce_stride=2),
        NetworkChoice("resnet18", 64, "pad", NARROW),
    ),
    1 << 16: (
        NetworkChoice("efficientnet_b0", 224),
        NetworkChoice("efficientnet_b0", 160),
        NetworkChoice("efficientnet_b0", 128),
        NetworkChoice("mobilenetv3_small_100", 128),
        NetworkChoice("mobilenetv3_small_100", 96),
    ),
}
"""Largest short side of the images, px → networks for them."""


class Proposal(NamedTuple):
    """An experiment and what it was made from."""

    experiment: Experiment
    document: dict[str, Any]
    """The experiment as a file has it: the fields that are not defaults."""
    plan: RunPlan
    """Of TRIAL_EPOCHS per training."""
    hours: float
    """Time of the experiment."""
    short_side: int
    """Median of the images' shorter sides, px."""
    class_counts: dict[str, int]
    """Labeled images of each class."""
    tables: dict[str, str]
    """Name of a file → text: tables of a split of the labeled images, beside the experiment."""
    remarks: list[str]
    """What a person should know before the run, one sentence each."""


def find_parts(folder: Path, given: Mapping[DataPart, Path]) -> dict[DataPart, Path]:
    """The folders of the parts of the data, those that are given and those with a known name in `folder`.

    A folder of class folders alone is the labeled images. Raises DataError if labeled images or the pool are not there, or if a part lies
    in another one's folder.
    """
    try:
        paths = sorted(folder.iterdir())
        folders = {path.name.casefold(): path for path in paths if path.is_dir()}
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; name a folder that holds your images") from error
    parts = dict(given)
    for part, names in PART_FOLDERS.items():
        matches = [folders[name] for name in names if name in folders]
        if part not in parts and len(matches) > 1:
            options = " and ".join(path.name for path in matches)
            raise DataError(f"{folder}: {options} may both be the {part} images; say which: --{part} {matches[0]}")
        if part not in parts and matches:
            parts[part] = matches[0]
    if "labeled" not in parts and "pool" in given and folders:
        parts["labeled"] = folder
    for needed, layout in LAYOUTS.items():
        if needed not in parts:
            options = " or ".join(PART_FOLDERS[needed])
            tables = [path for path in paths if path.suffix.lower() in (".csv", ".tsv", ".parquet")]
            example = tables[0] if tables and needed == "labeled" else "FOLDER"
            raise DataError(f"{folder}: has no folder {options}; make one ({layout}), or name it: --{needed} {example}")
    for part, other in itertools.permutations(parts, 2):
        if parts[part].resolve().is_relative_to(parts[other].resolve()):
            raise DataError(
                f"{parts[part]}: lies in {parts[other]}, the folder of the {other} images, and would count as theirs; "
                "move it out of that folder"
            )
    return parts


def propose_experiment(
    parts: Mapping[DataPart, Path], *, name: str, hours: float, output_dir: Path, measure_seconds: float
) -> Proposal:
    """Proposes an experiment that takes about `hours` on this machine; its data stand as they are seen from `output_dir`.

    Raises DataError for images that cannot be read, ConfigError if no network can be trained in the time.
    """
    stats = {part: inspect_data(part, str(path)) for part, path in parts.items()}
    for part, part_stats in stats.items():
        if not part_stats.sample_images:
            raise DataError(
                f"{parts[part]}: none of the images that were tried can be read; `ns data import {parts[part]} DATASET` lists why"
            )
    class_counts, groups = count_classes(parts)
    uris: dict[str, str] = {part: os.path.relpath(path, output_dir) for part, path in parts.items()}
    counts: dict[DataPart, int] = {part: part_stats.images for part, part_stats in stats.items()}
    tables = {}
    if "heldout" not in parts:
        rows_by_part = split_labeled(parts["labeled"])
        for part, rows in rows_by_part.items():
            uris[part] = f"{name}-{part}.csv"
            tables[uris[part]] = format_image_table(rows, parts["labeled"], output_dir)
            counts[part] = len(rows)
    if counts["labeled"] < MIN_LABELED or not counts["heldout"]:
        raise DataError(
            f"{parts['labeled']}: {stats['labeled'].images} labeled images are too few: label at least {MIN_LABELED} to train on, "
            "and in some class two or more, so that one can be held out"
        )
    unnamed = stats["labeled"].images - counts["labeled"] - counts["heldout"] if tables else 0
    short_side = measure_short_side([image for part_stats in stats.values() for image in part_stats.sample_images])
    networks = next(networks for limit, networks in NETWORKS.items() if short_side <= limit)
    known_counts = KnownCounts(counts, stats["pool"].image_bytes, len(class_counts), stats["pool"].sample_images)
    request = PlanRequest(known_counts, seconds=measure_seconds)

    def try_network(network: NetworkChoice) -> tuple[RunPlan, int]:
        document = make_document(name, uris, network, counts["labeled"], TRIAL_EPOCHS)
        plan = estimate_run(parse_experiment(document, name), request)
        return plan, min(MAX_EPOCHS, fit_epochs(plan, hours))

    trials = ((network, *try_network(network)) for network in networks)
    network, plan, epochs = next(trial for trial in trials if trial[2] >= MIN_EPOCHS or trial[0] is networks[-1])
    epoch_hours, other_hours = split_hours(plan)
    if epochs < 1:
        raise ConfigError(
            f"--hours {hours:g}: too short for {counts['labeled']:,} labeled images and a pool of {counts['pool']:,} on this machine: "
            f"labeling and evaluation take {other_hours:.2g} hours, and an epoch {epoch_hours:.2g}; give more hours, fewer images, or a "
            "machine with a GPU"
        )
    document = make_document(name, uris, network, counts["labeled"], epochs)
    return Proposal(
        experiment=parse_experiment(document, name),
        document=document,
        plan=plan,
        hours=other_hours + epochs * epoch_hours,
        short_side=short_side,
        class_counts=class_counts,
        tables=tables,
        remarks=[*remark_folder_groups(parts["labeled"], groups), *_remark(counts, class_counts, epochs, unnamed)],
    )


def count_classes(parts: Mapping[DataPart, Path]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Class → labeled images, the largest first; and the groups of class folders, as `find_folder_groups` says.

    Raises DataError for classes that an import would refuse, also those of the parts that are evaluated.
    """
    class_counts: dict[str, int] = {}
    groups: dict[str, list[str]] = {}
    class_names: tuple[str, ...] | None = None
    for part in ("labeled", *(part for part in parts if PART_ROLES[part] == "evaluation")):
        with open_data(str(parts[part]), PART_ROLES[part]) as data:
            if isinstance(data, Listing):
                label_counts = data.count_class_labels()
                names, _ = resolve_classes(str(parts[part]), label_counts, class_names, len(data), data.find_first_problem())
                if class_names is None:
                    class_names = names
                    class_counts = {str(label): count for label, count in label_counts.items()}
                    groups = find_folder_groups(data) if parts[part].is_dir() else {}
            elif part == "labeled":
                raise DataError(f"{parts[part]}: is an imported dataset; name the folder of images that it was made from")
    return dict(sorted(class_counts.items(), key=lambda item: -item[1])), groups


def find_folder_groups(listing: Listing) -> dict[str, list[str]]:
    """Class folder without images of its own → its folders, if it has several: each may have been meant as a class."""
    folders: dict[str, set[str]] = {}
    for entry in listing.read_entries(0, len(listing)):
        class_folder, *inner = Path(entry.path).parts[:-1] or ("",)
        if not entry.container:
            folders.setdefault(class_folder, set()).add(inner[0] if inner else "")
    return {name: sorted(inner) for name, inner in sorted(folders.items()) if len(inner) > 1 and "" not in inner}


def remark_folder_groups(labeled: Path, groups: Mapping[str, Sequence[str]]) -> Iterable[str]:
    """Only the user knows what the classes are."""
    for name, inner in list(groups.items())[:1]:
        yield (
            f"all images below {labeled / name} are of class {name}; if its folders {shorten_names(inner, 3)} are the classes, "
            f"move them into {labeled}"
        )


def split_labeled(labeled: Path) -> dict[DataPart, list[tuple[str, str]]]:
    """Splits labeled images into those that are trained on and those that are held out: (path in the folder or as the table has it, class).

    Of each class the same share is held out, drawn by a hash of the path: the same images whenever it is asked for.
    """
    with open_data(str(labeled), "labeled") as data:
        assert isinstance(data, Listing)
        entries = []
        for entry in data.read_entries(0, len(data)):
            if entry.container:
                raise DataError(
                    f"{labeled}: images in tars and archives are not split; name images that are held out: --heldout FOLDER"
                )
            if entry.class_label is not None and _fits_table(entry.path):
                entries.append((entry.path, str(entry.class_label)))
    by_class: dict[str, list[str]] = {}
    for path, class_name in entries:
        by_class.setdefault(class_name, []).append(path)
    share = min(HELDOUT_SHARE, MAX_HELDOUT / len(entries))
    parts: dict[DataPart, list[tuple[str, str]]] = {"labeled": [], "heldout": []}
    for class_name, paths in sorted(by_class.items()):
        drawn = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
        held_out = min(len(drawn) - 1, max(1, round(share * len(drawn))))
        parts["heldout"] += [(path, class_name) for path in sorted(drawn[:held_out])]
        parts["labeled"] += [(path, class_name) for path in sorted(drawn[held_out:])]
    return parts


def _fits_table(path: str) -> bool:
    """Whether a table can name the file: in UTF-8, on one line."""
    return len(path.splitlines()) == 1 and path == path.encode(errors="replace").decode()


def format_image_table(rows: Iterable[tuple[str, str]], labeled: Path, output_dir: Path) -> str:
    """A table of images as `ns data import` reads it, with paths as they are seen from `output_dir`.

    The rows' paths are relative to `labeled`, or, if that is a table, to its folder.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label"])
    base = Path(os.path.relpath(labeled if labeled.is_dir() else labeled.parent, output_dir))
    for path, class_name in rows:
        writer.writerow((escape_formula(path if "://" in path else str(base / path)), escape_formula(class_name)))
    return text.getvalue()


def measure_short_side(images: Sequence[SampleImage]) -> int:
    """Median of the shorter sides, px."""
    sides = [min(image.width, image.height) if isinstance(image, EncodedJpeg) else min(image.shape[:2]) for image in images]
    return int(statistics.median(sides))


def make_document(name: str, uris: Mapping[str, str], network: NetworkChoice, labeled: int, epochs: int) -> dict[str, Any]:
    """The experiment's fields that are not defaults."""
    largest = 256 if get_best_device().type != "cpu" else 64
    batch = max(8, min(largest, 1 << int(math.log2(max(8, labeled / 8)))))
    model: dict[str, Any] = {"arch": network.arch, "resolution": network.resolution}
    if network.crop != "resized":
        model["crop"] = network.crop
    if network.args:
        model["args"] = dict(network.args)
    if network.reduce_stride > 1:
        model["reduce_stride"] = network.reduce_stride
    optimizer = {"name": "adamw", "lr": round(PEAK_RATE * 256 / batch, 6), "weight_decay": 0.05, "schedule": "cosine"}
    # Averages over a tenth of a short training's steps, and the paper's over those of a long one.
    steps = epochs * labeled / batch
    ema_decay = min(0.9999, round(1 - 10 / max(100.0, steps), 4))
    train = {"labeled_batch": batch, "epochs": epochs, "optimizer": optimizer, "ema_decay": ema_decay}
    # So few steps are not enough to start from random weights again.
    student_train = {**train, "unlabeled_ratio": 3, "init": "teacher"}
    return {
        "name": name,
        "generations": GENERATIONS,
        "data": dict(uris) | ({"max_side": 2 * network.resolution} if network.crop == "resized" else {}),
        "teacher": {"model": model, "noise": {"randaugment_magnitude": 5}, "train": train},
        "students": [{"model": model, "noise": {"randaugment_magnitude": 9}, "train": student_train}],
        "selection": {"min_confidence": 0.5},
    }


def fit_epochs(plan: RunPlan, hours: float) -> int:
    """Labeled epochs of each training that fit into the hours. `plan`: of TRIAL_EPOCHS."""
    epoch_hours, other_hours = split_hours(plan)
    return max(0, int((USED_SHARE * hours - other_hours) / epoch_hours))


def split_hours(plan: RunPlan) -> tuple[float, float]:
    """Hours of an epoch of all trainings, and of all other work. `plan`: of TRIAL_EPOCHS."""
    training_hours = sum(work.seconds for work in plan.work if work.task == "train") / 3600
    return training_hours / TRIAL_EPOCHS, plan.hours - training_hours


def _remark(counts: Mapping[DataPart, int], class_counts: Mapping[str, int], epochs: int, unnamed: int) -> Iterable[str]:
    """`unnamed`: labeled images that no table can name."""
    classes = len(class_counts)
    if unnamed > 0:
        yield f"{unnamed:,} labeled images are left out: a table cannot hold their names, which are not UTF-8 or have line breaks"
    smallest = min(class_counts, key=lambda name: class_counts[name])
    if class_counts[smallest] < 10:
        yield f"{smallest} has {class_counts[smallest]} labeled images: label more, if you can; below 10 a class is hardly learned"
    if counts["heldout"] < 10 * classes or counts["heldout"] < 500:
        check = f"ns config check EXPERIMENT --heldout {counts['heldout']} --classes {classes}"
        yield f"{counts['heldout']:,} held-out images show large changes only; `{check}` says how large"
    if counts["pool"] < counts["labeled"]:
        yield f"the pool has {counts['pool']:,} images, fewer than are labeled: a gain comes from far more"
    if epochs < MIN_EPOCHS:
        yield f"only {epochs} of {MIN_EPOCHS} epochs fit, even with the cheapest network: give more hours, or use a GPU"


def format_experiment(proposal: Proposal, hours: float) -> str:
    """The experiment as a commented YAML file."""
    counts = proposal.class_counts
    largest, smallest = next(iter(counts)), list(counts)[-1]
    plan, document = proposal.plan, proposal.document
    comments = {
        "data": f"{plan.labeled:,} labeled images of {len(counts)} classes ({largest}: {counts[largest]:,} … {smallest}: "
        f"{counts[smallest]:,}), {plan.pool:,} in the pool, {plan.heldout:,} held out; median of the shorter sides: "
        f"{proposal.short_side} px",
        "teacher": f"about {proposal.hours:.2g} hours on {plan.machine}; network and epochs were chosen for {hours:g} hours",
        "students": "equal to the teacher, with more noise, on labeled and pseudo-labeled images (3 for each labeled one)",
        "selection": "pseudo-labels above this confidence; `ns labels select RUN/gen-1 --dry-run` shows what others would keep",
        "generations": "the gate ends the run earlier when a student is not better",
    }
    parts = ["# Proposed by `ns init`. Every field: `ns config schema`."]
    for field, value in document.items():
        if field in comments:
            parts.append(f"# {comments[field][0].upper()}{comments[field][1:]}.")
        # Sections are blocks, and what they hold stands in one line.
        flow = None if isinstance(value, dict | list) else False
        text = yaml.safe_dump({field: value}, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=120)
        parts.append(text.rstrip())
    return "\n".join(parts) + "\n"
