"""Does this implementation show the effects of the paper (arXiv:1911.04252)? CIFAR-10 with few labels, five seeds, two cores, 3 hours.

    python -m benchmarks.method_cifar10 [--images FOLDER] [--work FOLDER] [--results FOLDER] [--seeds 0 1 …] [--quick | --full]

This text was written before the five seeds were run. All settings were chosen with seed 100, on its held-out images; nothing was chosen
on test images, or with the seeds 0 to 4.

Of CIFAR-10's 50,000 training images each seed draws 2,000 that keep their labels, 5,000 held out and 43,000 for the pool. The 10,000
official test images are only reported. A teacher labels an image and its mirror image, and the mean of the two is the label; everything
else sees one view.

    arm        learns from the labels and …          starts from
    T          nothing else                          random weights
    S1         T's labels of the pool                random weights
    S1-quiet   the same, no noise on the pool        random weights
    S1-longer  T's labels of the pool                S1
    S2         S1's labels of the pool               S1
    T-longer   nothing else                          T

T is the teacher, and the control of S1; T-longer is the control of S2. A control is as long as the student and what the student continues;
the training of the student's teacher is not counted. All arms have the same number of steps, of images per step, labeled or not, and the
same learning rate at every step; a continued arm begins the schedule again, with the same peak. The command begins with what it chooses
with seed 100: the peak rate, which is the one of three that is best for T, so for the control; then the kind of labels and the threshold,
which are those of three pairs that are best for S1.

Claims, tested together at 5 % (Holm):

    pool        S1 has fewer errors than T
    iteration   S2 has fewer errors than S1-longer
    noise       S1 has fewer errors than S1-quiet
    robustness  S1 has a lower mCE (15 corruptions at severities 1, 3 and 5), a lower mFR (10 kinds of sequences) and fewer errors under
                PGD (10 steps, ε = 2/255) than T, each of these, on 1,000 test images

The paper's ε of 16 is for photographs; at 32 px it brings every network to zero. Intervals are for new seeds and new images
(`benchmarks.contrasts`).

    clean_error_reduction_over_control  1 - test error of S2 ÷ that of T-longer: the last student and its control, which is trained as long
    clean_error_reduction               1 - test error of S2 ÷ T's
    mce_reduction_over_control          1 - mean over corruptions of S2's errors ÷ T-longer's; likewise for flips and for PGD

--full adds arms of one generation: smaller pools, soft and hard labels above three thresholds, a wider student with as many steps and
with as much computation, a pool of which half is foreign with and without the limit of foreign scores, and pretrained weights, also
without any pool. They are compared at 95 % each, and take a night.

Seeds and arms may be computed on several machines (--seeds, --arms): copy their `measured` into one work folder. The same command
continues after an interruption.
"""

import argparse
import itertools
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.arm_pages import (
    SUITES,
    Claim,
    contrast_arms,
    describe_results,
    draw_generations,
    reduce_error,
    render_arms,
    render_claims,
    render_cost,
    render_figures,
    render_seeds,
    write_results,
)
from benchmarks.arms import Arm, Measured, add_arm_options, run_arms, stack_arms
from benchmarks.contrasts import Contrast
from benchmarks.measure import CIFAR10, draw_tables
from benchmarks.polluted_pool import KNOWN_CLASSES, load_digit_classes, make_noise, make_textures

SEEDS = (0, 1, 2, 3, 4)
SETTINGS_SEED = 100
RATES = (0.003, 0.006, 0.012)
"""Peak learning rates that are tried."""
LABELS = (("soft", 0.5), ("hard", 0.5), ("hard", 0.8))
"""Kinds of pseudo-labels, and thresholds of the confidence, that are tried."""
MAIN_ARMS = {
    "T": "teacher; labeled images only, as long as S1",
    "S1": "student of T",
    "S1-quiet": "the same without noise on the pool",
    "S1-longer": "S1, continued on T's labels",
    "S2": "S1, continued on S1's labels",
    "T-longer": "T continued, labeled images only, as long as S2",
}
CLAIMS = {
    "pool": Claim("S1", "T"),
    "iteration": Claim("S2", "S1-longer"),
    "noise": Claim("S1", "S1-quiet"),
    "robustness": Claim("S1", "T", tuple(SUITES)),
}
LINES = {
    "noisy student": [(0, "T"), (1, "S1"), (2, "S2")],
    "continued on T's labels": [(1, "S1"), (2, "S1-longer")],
    "without noise on the pool": [(0, "T"), (1, "S1-quiet")],
    "control: labeled images only, as long": [(1, "T"), (2, "T-longer")],
}
POOL_SHARES = (16, 4)
"""Divisors of the pool."""
THRESHOLDS = (0.3, 0.5, 0.8)
FULL_ARMS = {
    **{f"S1-pool-{share}": f"S1 with a pool of 1/{share}" for share in reversed(POOL_SHARES)},
    **{
        f"S1-{kind}-{threshold}": f"S1, {kind} labels above {threshold}"
        for kind, threshold in itertools.product(("soft", "hard"), THRESHOLDS)
    },
    "S1-wide": "S1, 1.5 times as wide, as many steps",
    "S1-wide-short": "S1, 1.5 times as wide, as much computation",
    "K-T": "teacher of six classes",
    "K-S1-clean": "its student, pool of these classes",
    "K-S1-half": "its student, half of the pool foreign",
    "K-S1-limit": "the same with the limit of foreign scores",
    "W-T": "pretrained weights, labeled images only: the baseline, and a teacher",
    "W-S1": "its student, from the same weights",
}
FULL_CONTRASTS = {
    "pool of 1/4 instead of 1/16": ("S1-pool-4", "S1-pool-16"),
    "whole pool instead of 1/4": ("S1", "S1-pool-4"),
    **{
        f"hard labels instead of soft, above {threshold}": (f"S1-hard-{threshold}", f"S1-soft-{threshold}")
        for threshold in THRESHOLDS
    },
    "wider student, as many steps": ("S1-wide", "S1"),
    "wider student, as much computation": ("S1-wide-short", "S1"),
    "half of the pool foreign": ("K-S1-half", "K-S1-clean"),
    "the same with the limit": ("K-S1-limit", "K-S1-clean"),
    "limit instead of none": ("K-S1-limit", "K-S1-half"),
    "pool besides pretrained weights": ("W-S1", "W-T"),
    "pretrained weights, labeled images only, instead of S1": ("W-T", "S1"),
}


class Settings(NamedTuple):
    """What is chosen with SETTINGS_SEED."""

    peak_rate: float = RATES[1]
    pseudo_labels: str = LABELS[0][0]
    min_confidence: float = LABELS[0][1]


class ExperimentSizes(NamedTuple):
    """Sizes of an experiment; `--quick` only shows that everything works."""

    labeled: int
    """Images per class, here and in the next three."""
    heldout: int
    pool: int
    test: int
    steps: int
    """Of every arm."""
    robust_images: int
    frames: int
    """Images per perturbation sequence."""
    confidence_scale: float
    """Factor of all thresholds."""

    @property
    def labeled_images(self) -> int:
        return 10 * self.labeled


FULL = ExperimentSizes(200, 500, 4_300, 1_000, steps=1_600, robust_images=1_000, frames=5, confidence_scale=1)
QUICK = ExperimentSizes(20, 20, 60, 10, steps=12, robust_images=8, frames=3, confidence_scale=0)

BATCH = 128
"""Images per step of every arm."""
LABELED_BATCH = 16
"""Of them labeled, if there is a pool."""
WARMUP_SHARE = 0.1
"""Of the steps."""
CHANNELS, WIDE_CHANNELS = (32, 64, 128, 256), (48, 96, 192, 384)
WIDE_COST = 2.05
"""Multiply-adds of the wider network ÷ those of the other."""
PRETRAINED = "resnet10t.c3_in1k"
PRETRAINED_RATE = 0.1
"""Learning rates from pretrained weights ÷ the others."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


def make_network(channels: Sequence[int] = CHANNELS) -> dict[str, Any]:
    return {
        "arch": "resnet10t",
        "args": {"channels": list(channels), "stem_width": 16},
        "resolution": 32,
        "crop": "pad",
        "reduce_stride": 2,
        "mean": [0.491, 0.482, 0.447],
        "std": [0.247, 0.243, 0.262],
        "inference_precision": "float32",
    }


NOISE = {"randaugment_layers": 2, "randaugment_magnitude": 5, "dropout": 0.1, "stochastic_depth": 0.0}


def make_training(steps: int, labeled: int, *, labeled_batch: int, peak_rate: float) -> dict[str, Any]:
    """A training of so many steps, whatever the share of labeled images in a step. `labeled`: labeled images."""
    # The configuration counts in epochs of labeled images, and scales the rate by their number in a step. Half a step less, so that
    # rounding adds none.
    steps_per_epoch = labeled / labeled_batch
    return {
        "labeled_batch": labeled_batch,
        "unlabeled_ratio": BATCH / labeled_batch - 1,
        "epochs": (steps - 0.5) / steps_per_epoch,
        "ema_decay": 0.99,
        "precision": "float32",
        "processes": 1,
        "loader_workers": 0,
        "optimizer": {
            # At a batch of 64, half as many images as with SGD bring the teacher as far.
            "name": "muon",
            "lr": peak_rate * 256 / labeled_batch,
            "weight_decay": 0.05,
            "schedule": "cosine",
            "warmup_epochs": WARMUP_SHARE * steps / steps_per_epoch,
        },
    }


def make_cifar10_arms(seed: int, tables: Path, sizes: ExperimentSizes, settings: Settings) -> dict[str, Arm]:
    """Name → arm, those of `--full` and those that settings are chosen by too. `tables`: folder of the tables."""
    labeled, peak_rate = sizes.labeled_images, settings.peak_rate
    base: dict[str, Any] = {
        "name": "cifar10",
        "seed": seed,
        "generations": 1,
        # Arms are compared with each other, not student with teacher.
        "allow_smaller_student": True,
        "data": {
            **{part: str(tables / f"{part}-{seed}.csv") for part in ("labeled", "pool", "heldout")},
            "test": str(tables / "test.csv"),
        },
        "teacher": {
            "model": make_network(),
            "noise": NOISE,
            "train": make_training(sizes.steps, labeled, labeled_batch=BATCH, peak_rate=peak_rate),
        },
        "labeling": {"tasks": 1, "views": "flip"},
        "selection": {"min_confidence": sizes.confidence_scale * settings.min_confidence, "max_repeat": 3},
        "evaluation": {
            "images": sizes.robust_images,
            "severities": [1, 3, 5],
            "perturbation_frames": sizes.frames,
            "fgsm_epsilons": [],
            "pgd_steps": [10],
            "pgd_epsilon": 2,
        },
    }

    def make_student(steps: int = sizes.steps, *, train: Mapping[str, Any] = NOTHING, **changes: Any) -> dict[str, Any]:
        training = make_training(steps, labeled, labeled_batch=LABELED_BATCH, peak_rate=peak_rate)
        return replace_student(base, {**training, "pseudo_labels": settings.pseudo_labels, **train}, **changes)

    robust = {"suites": ["clean", *SUITES]}
    continued = {"init": "teacher"}
    control = make_training(sizes.steps, labeled, labeled_batch=BATCH, peak_rate=peak_rate)
    arms = {
        "T": Arm(replace_sections(base, {"evaluation": robust}), 0),
        "S1": Arm(make_student(evaluation=robust), 1, labels="T"),
        "S1-quiet": Arm(make_student(noise={"pool": "none"}), 1, labels="T"),
        "S1-longer": Arm(make_student(train=continued), 2, labels="T", start="S1"),
        "S2": Arm(make_student(train=continued, evaluation=robust), 2, labels="S1", start="S1"),
        "T-longer": Arm(replace_student(base, control | continued, evaluation=robust), 2, start="T"),
    }
    for rate in RATES:
        train = make_training(sizes.steps, labeled, labeled_batch=BATCH, peak_rate=rate)
        arms[f"T-{rate}"] = Arm({**base, "teacher": {**base["teacher"], "train": train}}, 0)
    for share in POOL_SHARES:
        arms[f"S1-pool-{share}"] = Arm(make_student(data={"pool": str(tables / f"pool-{share}-{seed}.csv")}), 1, labels="T")
    for kind, threshold in itertools.product(("soft", "hard"), THRESHOLDS):
        selection = {"min_confidence": sizes.confidence_scale * threshold}
        student = make_student(train={"pseudo_labels": kind}, selection=selection)
        arms[f"S1-{kind}-{threshold}"] = Arm(student, 1, labels="T")
    wide = make_network(WIDE_CHANNELS)
    arms["S1-wide"] = Arm(make_student(model=wide), 1, labels="T")
    arms["S1-wide-short"] = Arm(make_student(round(sizes.steps / WIDE_COST), model=wide), 1, labels="T")

    known_labeled = labeled * len(KNOWN_CLASSES) // 10
    known_tables = {part: str(tables / f"known-{part}-{seed}.csv") for part in ("labeled", "pool", "heldout")}
    known_tables["test"] = str(tables / "known-test.csv")
    polluted = known_tables | {"pool": str(tables / f"polluted-{seed}.csv")}
    known_base = {**base, "data": known_tables}
    known_base["teacher"] = {
        **base["teacher"],
        "train": make_training(sizes.steps, known_labeled, labeled_batch=BATCH, peak_rate=peak_rate),
    }
    known_training = make_training(sizes.steps, known_labeled, labeled_batch=LABELED_BATCH, peak_rate=peak_rate)
    arms["K-T"] = Arm(known_base, 0)
    arms["K-S1-clean"] = Arm(replace_student(known_base, known_training), 1, labels="K-T")
    arms["K-S1-half"] = Arm(replace_student(known_base, known_training, data=polluted), 1, labels="K-T")
    arms["K-S1-limit"] = Arm(
        replace_student(
            known_base,
            known_training,
            data=polluted,
            labeling={"foreign_score": "distance"},
            selection={"foreign_quantile": 0.9},
        ),
        1,
        labels="K-T",
    )

    arms["W-T"] = Arm(use_pretrained(base), 0)
    arms["W-S1"] = Arm(use_pretrained(make_student()), 1, labels="W-T")
    return arms


def replace_student(
    base: Mapping[str, Any],
    train: Mapping[str, Any],
    *,
    model: Mapping[str, Any] = NOTHING,
    noise: Mapping[str, Any] = NOTHING,
    **sections: Mapping[str, Any],
) -> dict[str, Any]:
    """The experiment with a student of the teacher's kind, changed by `model` and `noise`. `sections`: changes of other sections."""
    teacher = base["teacher"]
    student = {"model": {**teacher["model"], **model}, "noise": {**teacher["noise"], **noise}, "train": dict(train)}
    return {**replace_sections(base, sections), "students": [student]}


def replace_sections(base: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {**base, **{name: {**base[name], **changes} for name, changes in sections.items()}}


def use_pretrained(document: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment with pretrained weights in all roles, and lower rates."""

    def change_role(role: Mapping[str, Any]) -> dict[str, Any]:
        optimizer = role["train"]["optimizer"]
        return {
            **role,
            "model": {"pretrained": PRETRAINED, "resolution": 64, "crop": "pad", "inference_precision": "float32"},
            "train": {**role["train"], "optimizer": {**optimizer, "lr": PRETRAINED_RATE * optimizer["lr"]}},
        }

    changed = {**document, "teacher": change_role(document["teacher"])}
    if "students" in document:
        changed["students"] = [change_role(role) for role in document["students"]]
    return changed


def unpack_archives(images: Path, folder: Path) -> None:
    """Unpacks both archives into class folders."""
    for part in ("train", "test"):
        if not (folder / part).exists():
            with tarfile.open(images / f"{part}.tar.gz") as archive:
                archive.extractall(folder / "unpacking", filter="data")
            (folder / "unpacking" / part).rename(folder / part)


def write_tables(folder: Path, seed: int, sizes: ExperimentSizes, *, full: bool = False) -> None:
    """Writes the tables of a seed's parts, and of the test images; with `full` those of the further arms too."""
    counts = {"labeled": sizes.labeled, "heldout": sizes.heldout, "pool": sizes.pool}
    tables = {f"{part}-{seed}": table.splitlines() for part, table in draw_tables(folder / "train", counts, seed).items()}
    tables["test"] = ["path,label"]
    for category in sorted((folder / "test").iterdir()):
        tables["test"] += [f"{path},{category.name}" for path in sorted(category.iterdir())[: sizes.test]]
    if full:
        # Class after class: every so manieth image has as many of each.
        pool = tables[f"pool-{seed}"]
        tables |= {f"pool-{share}-{seed}": [pool[0], *pool[1::share]] for share in POOL_SHARES}
        for name in ("test", *(f"{part}-{seed}" for part in counts)):
            rows = tables[name][1:]
            tables[f"known-{name}"] = [tables[name][0], *(row for row in rows if _read_class(row) in KNOWN_CLASSES)]
        known_rows = tables[f"known-pool-{seed}"]
        withheld = [row for row in pool[1:] if _read_class(row) not in KNOWN_CLASSES]
        foreign = _write_foreign_images(folder / "foreign", len(known_rows) - 1 - len(withheld))
        tables[f"polluted-{seed}"] = [*known_rows, *withheld, *map(str, foreign)]
    for name, lines in tables.items():
        path, text = folder / f"{name}.csv", "\n".join(lines) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _read_class(row: str) -> str:
    return Path(row.partition(",")[0]).parent.name


def _write_foreign_images(folder: Path, count: int) -> list[Path]:
    """Digits, noise and textures, about as many of each; those that are there are kept."""
    rng = np.random.default_rng(0)
    digits = np.concatenate(list(load_digit_classes().values()))
    digits = digits[rng.permutation(len(digits))[: count // 3]]
    noise = make_noise(count // 3, rng)
    textures = make_textures(count - len(digits) - len(noise), rng)
    paths = []
    for kind, images in (("digits", digits), ("noise", noise), ("textures", textures)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(images):
            path = folder / kind / f"{number:05d}.png"
            if not path.exists():
                Image.fromarray(pixels).save(path.with_suffix(".tmp"), "PNG")
                path.with_suffix(".tmp").replace(path)
            paths.append(path)
    return paths


def choose_best(arms: Mapping[str, Measured]) -> str:
    """The arm with the fewest errors on held-out images."""
    return min(arms, key=lambda name: float(arms[name].heldout.mean()))


def choose_settings(work: Path, sizes: ExperimentSizes, cores: int) -> tuple[Settings, dict[str, Measured]]:
    """The settings of all seeds, and the arms by whose held-out errors they are chosen; trains these."""
    tried: dict[str, Measured] = {}

    def choose_arm(names: Sequence[str], settings: Settings) -> int:
        """Index of the best of these arms."""
        arms = {SETTINGS_SEED: make_cifar10_arms(SETTINGS_SEED, work, sizes, settings)}
        run_arms(work, arms, names, labeled=sizes.labeled_images, cores=cores)
        measured = stack_arms(work, arms, names)
        tried.update(measured)
        return names.index(choose_best(measured))

    settings = Settings()
    settings = settings._replace(peak_rate=RATES[choose_arm([f"T-{rate}" for rate in RATES], settings)])
    kind, threshold = LABELS[choose_arm([f"S1-{kind}-{threshold}" for kind, threshold in LABELS], settings)]
    return settings._replace(pseudo_labels=kind, min_confidence=threshold), tried


def compute_cifar10_figures(arms: Mapping[str, Measured]) -> dict[str, Contrast]:
    """The figures of the module's head, as shares."""
    last, control = arms["S2"], arms["T-longer"]
    figures = {
        "clean_error_reduction_over_control": reduce_error(last, control),
        "clean_error_reduction": reduce_error(last, arms["T"]),
    }
    for suite, name in (("corruptions", "mce"), ("perturbations", "mfr"), ("attacks", "pgd")):
        figures[f"{name}_reduction_over_control"] = contrast_arms(last, control, suite).change_unit(0.01)
    return figures


def render_cifar10_page(
    result: Mapping[str, Any], arms: Mapping[str, Measured], full_arms: Mapping[str, Measured], cost: str
) -> str:
    sizes = ExperimentSizes(**result["sizes"])
    seeds = result["seeds"]
    settings = Settings(**result["settings"])
    tried = ", ".join(f"{name} {100 * error:.1f} %" for name, error in result["tried"].items())
    parts = [
        "# Noisy Student on CIFAR-10",
        f"{sizes.labeled} labeled images of each class, {sizes.pool} unlabeled, {sizes.heldout} held out; {len(seeds)} seeds. Clean "
        f"errors on all test images, robustness on {sizes.robust_images} of them. `benchmarks/method_cifar10.py` says what the arms, "
        "claims and figures are; it was written before these seeds were run.",
        "![errors by generation](method_cifar10.svg)",
        render_arms(arms, MAIN_ARMS, "T"),
        render_claims(result["claims"]),
        render_figures(result["intervals"]),
        f"Chosen with seed {SETTINGS_SEED}: a peak rate of {settings.peak_rate}, {settings.pseudo_labels} labels above a confidence of "
        f"{settings.min_confidence}. Its held-out errors: {tried}.",
        render_seeds(arms, seeds),
    ]
    if full_arms:
        parts += [
            "## Further arms",
            render_arms({"S1": arms["S1"], **full_arms}, MAIN_ARMS | FULL_ARMS, "T"),
            render_figures(result["further"], unit="points of clean error avoided"),
        ]
    parts.append(cost)
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, default=CIFAR10.parent, help="folder of train.tar.gz and test.tar.gz, class folders of images"
    )
    add_arm_options(parser, "method_cifar10", "runs/method-cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds that are run and reported (0 1 2 3 4)")
    parser.add_argument("--arms", nargs="+", choices=[*MAIN_ARMS, *FULL_ARMS], help="run only these, and report nothing")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two minutes, tiny: shows that it works, measures nothing")
    size.add_argument("--full", action="store_true", help="further arms too, a night")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    unpack_archives(options.images, work)
    for seed in (SETTINGS_SEED, *options.seeds):
        write_tables(work, seed, sizes, full=options.full or bool(options.arms))

    settings, tried = choose_settings(work, sizes, options.cores)
    arms_by_seed = {seed: make_cifar10_arms(seed, work, sizes, settings) for seed in options.seeds}
    names = options.arms or [*MAIN_ARMS, *(FULL_ARMS if options.full else ())]
    run_arms(work, arms_by_seed, names, labeled=sizes.labeled_images, cores=options.cores)
    if options.arms:
        return

    arms, full_arms = (stack_arms(work, arms_by_seed, list(group)) for group in (MAIN_ARMS, FULL_ARMS))
    intervals = compute_cifar10_figures(arms)
    all_arms = {**arms, **full_arms}
    further = {
        about: contrast_arms(all_arms[student], all_arms[control])
        for about, (student, control) in FULL_CONTRASTS.items()
        if {student, control} <= all_arms.keys()
    }
    command = "python -m benchmarks.method_cifar10" + (" --quick" if options.quick else " --full" if options.full else "")
    result = describe_results(command, options.seeds, all_arms, intervals, CLAIMS)
    result["figures"]["teacher_error"] = float(arms["T"].test.mean())
    for name, measured in all_arms.items():
        result["arms"][name]["runs"] = measured.about["seeds"]
    result |= {
        "sizes": sizes._asdict(),
        "further": {about: contrast._asdict() for about, contrast in further.items()},
        "settings": settings._asdict(),
        "tried": {name: float(measured.heldout.mean()) for name, measured in tried.items()},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    draw_generations(arms, LINES, options.results / "method_cifar10.svg")
    cost = render_cost([*tried.values(), *all_arms.values()], result)
    write_results(options.results, "method_cifar10", result, render_cifar10_page(result, arms, full_arms, cost))


if __name__ == "__main__":
    main()
