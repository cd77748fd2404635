"""Does the method do here what the paper says it does? Noisy Student on CIFAR-10 with few labels, three seeds, on two cores.

    python -m benchmarks.method_cifar10 [--images FOLDER] [--work FOLDER] [--results FOLDER] [--quick]

Of CIFAR-10's 50,000 training images each seed draws 2,000 that keep their labels and 5,000 held out for the gate; the others are the
pool. The official test images are only reported: all 10,000 for clean error, the same 300 of them in all 15 corruptions at 5 severities,
in 10 kinds of sequences of 8 frames, and under FGSM. The seeds' experiments run as anyone's would, `ns run CONFIG`, with one thread
each and as many at once as there are cores; the same command continues where it was stopped.

Teacher and students are of one size, and each student starts from its teacher's weights: 1,800 steps are too few to start from nothing.
So all that students do is more training than their teacher had, and a **control** stands beside them: it starts from the same teacher, and
takes as many steps as both students together, with their noise, schedule and images in a step, on the labelled images alone. What the
student has over it is due to the pseudo-labels.

    clean_error_reduction   1 - last student's test error ÷ teacher's, mean over the seeds
    mce_ratio               mean over corruptions of student's error ÷ teacher's
    mfr_ratio               mean over perturbations of student's flip probability ÷ teacher's
    fgsm_gain               student's accuracy - teacher's under FGSM, mean over the strengths, in points
    …_over_control          the same against the control
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml
from scipy import stats

from benchmarks.measure import CIFAR10, RESULTS, draw_tables, machine
from ns.evaluation.result import MANIFEST, Evaluation, Robustness, read_predictions
from ns.evaluation.robustness.averages import relative
from ns.runs import records as runs
from ns.storage import LocalStore, Store

SEEDS = (0, 1, 2)
LABELLED, HELDOUT = 200, 500
"""Images of a class."""
FGSM = (1, 2, 4)
"""Of 255. At 32 px the paper's 8 and 16, meant for photographs of 224 px and more, leave nothing of any network."""
GENERATIONS = 2
CONTROL = "control"
LAST = f"student {GENERATIONS}"

ABOUT = (
    "{labelled} labelled images of each class, {pool} unlabelled, {heldout} held out for the gate; {seeds} seeds. Clean error on all test "
    "images, robustness on {robust_images} of them. ± is half of a 95 % interval over the seeds. mCE and mFR are relative to the teacher. "
    "The control starts from the teacher and takes the steps of both students, with their noise, on labelled images alone."
)


class Sizes(NamedTuple):
    """How much is done; `--quick` only shows that all of it works."""

    labelled: int
    heldout: int
    pool: int
    test: int
    teacher_epochs: float
    student_epochs: float
    robust_images: int
    frames: int
    min_confidence: float = 0.5


WHOLE = Sizes(LABELLED, HELDOUT, 4_300, 1_000, teacher_epochs=150, student_epochs=57, robust_images=300, frames=8)
QUICK = Sizes(20, 20, 60, 10, teacher_epochs=10, student_epochs=3, robust_images=8, frames=3, min_confidence=0.1)


def experiment(seed: int, tables: Path, sizes: Sizes) -> dict[str, Any]:
    """The experiment of a seed, as `ns run` reads it."""
    network: dict[str, Any] = {
        "model": {
            "arch": "resnet18",
            "args": {"channels": [16, 32, 64, 128]},
            "resolution": 32,
            "reduce_stride": 2,
            "inference_precision": "float32",
        },
        "noise": {"crop": "pad", "randaugment_layers": 2, "randaugment_magnitude": 4, "dropout": 0.1, "stochastic_depth": 0.1},
    }
    training: dict[str, Any] = {
        "precision": "bfloat16",
        "processes": 1,
        "ema_decay": 0.99,
        "optimizer": {"name": "adamw", "lr": 0.004, "weight_decay": 0.05, "schedule": "cosine", "warmup_epochs": 2},
    }
    return {
        "name": "cifar10",
        "seed": seed,
        "generations": GENERATIONS,
        "data": {
            **{part: str(tables / f"{part}-{seed}.csv") for part in ("labelled", "pool", "heldout")},
            "test": str(tables / "test.csv"),
        },
        "teacher": {**network, "train": {**training, "labelled_batch": 128, "epochs": sizes.teacher_epochs}},
        "students": [
            {
                **network,
                "train": {
                    **training,
                    "labelled_batch": 64,
                    "unlabelled_ratio": 3,
                    "pseudo_labels": "hard",
                    "init": "teacher",
                    "epochs": sizes.student_epochs,
                },
            }
        ],
        "selection": {"min_confidence": sizes.min_confidence, "per_class": sizes.pool, "max_repeat": 3},
        "evaluation": {
            "suites": ["clean", "corruptions", "perturbations", "attacks"],
            "images": sizes.robust_images,
            "perturbation_frames": sizes.frames,
            "fgsm_epsilons": list(FGSM),
            "pgd_steps": [10],
            "pgd_epsilon": 2,
        },
    }


def control_of(document: Mapping[str, Any], teacher: str) -> dict[str, Any]:
    """The experiment whose first teacher is the control: the students' role, all images of a step labelled, for as many steps as all
    students take. `teacher`: the place of the model that they start from."""
    student = document["students"][0]
    train = dict(student["train"])
    del train["pseudo_labels"]
    each = 1 + train.pop("unlabelled_ratio")
    epochs = train["epochs"] * each * document["generations"]
    train |= {"labelled_batch": train["labelled_batch"] * each, "epochs": epochs, "init": teacher}
    # Warming up is counted in epochs of labelled images.
    train["optimizer"] = {**train["optimizer"], "warmup_epochs": train["optimizer"]["warmup_epochs"] * each}
    return {**document, "name": CONTROL, "teacher": {**student, "train": train}}


def unpack(images: Path, folder: Path) -> None:
    """Both archives, as class folders."""
    for part in ("train", "test"):
        if not (folder / part).exists():
            with tarfile.open(images / f"{part}.tar.gz") as archive:
                archive.extractall(folder / "unpacking", filter="data")
            (folder / "unpacking" / part).rename(folder / part)


def write_tables(folder: Path, seed: int, sizes: Sizes) -> None:
    """The tables of a seed's images, and that of the test images."""
    counts = {"labelled": sizes.labelled, "heldout": sizes.heldout, "pool": sizes.pool}
    for part, table in draw_tables(folder / "train", counts, seed).items():
        (folder / f"{part}-{seed}.csv").write_text(table)
    categories = sorted((folder / "test").iterdir())
    test = [f"{path},{one.name}" for one in categories for path in sorted(one.iterdir())[: sizes.test]]
    (folder / "test.csv").write_text("\n".join(["path,label", *test]) + "\n")


class Measured(NamedTuple):
    """A model on the test images."""

    correct: npt.NDArray[np.bool_]
    """[test images], in the order of their keys."""
    robustness: Robustness

    @property
    def error(self) -> float:
        return 1 - float(self.correct.mean())

    @property
    def flips(self) -> dict[str, float]:
        return {kind: one.flip_probability for kind, one in self.robustness.perturbations.items()}

    @property
    def attacked(self) -> dict[str, float]:
        return {str(one): one.top1 for one in self.robustness.attacks}


def measured(root: Store, run: str, generation: int) -> Measured | None:
    """None if the run ended before this generation."""
    notes = (note for note in runs.notes(root, run) if (note.step, note.generation) == ("evaluate", generation))
    if (note := next(notes, None)) is None:
        return None
    folder = root.at(note.outputs["test"].rpartition("/")[0])
    rows = read_predictions(folder, Evaluation.read(folder, MANIFEST)).sort_by("key")
    correct = np.asarray(rows["label"]) == np.asarray(rows["predicted"])
    return Measured(correct, Robustness.read(root, note.outputs["robustness"]))


def run_method(work: Path, seed: int, sizes: Sizes) -> None:
    """Teacher and students of a seed."""
    path = work / f"seed-{seed}.yaml"
    path.write_text(yaml.safe_dump(experiment(seed, work, sizes), sort_keys=False))
    # A gate that refuses is a result too: the evaluations are there.
    command = [sys.executable, "-m", "ns", "run", str(path), "--root", str(work / "runs"), "--run", f"seed-{seed}"]
    _alone(command, work / f"seed-{seed}.log")


def run_control(work: Path, seed: int, sizes: Sizes) -> None:
    """The control of a seed, whose teacher is there. It has no generation of its own, so that its steps are called one by one."""
    root = work / "runs"
    teacher = runs.summarise(LocalStore(root), f"seed-{seed}").steps
    model = next(note.outputs["model"] for note in teacher if (note.step, note.generation) == ("train", 0)).rpartition("/")[0]
    path = work / f"{CONTROL}-{seed}.yaml"
    path.write_text(yaml.safe_dump(control_of(experiment(seed, work, sizes), str(root / model)), sort_keys=False))
    program = (
        "import sys; from ns.stages import steps; place = sys.argv[1:]; data = steps.prepare_data(*place); "
        "steps.evaluate(*place, data, 0, steps.train(*place, data, 0))"
    )
    _alone([sys.executable, "-c", program, str(path), str(root), f"{CONTROL}-{seed}"], work / f"{CONTROL}-{seed}.log")


def _alone(command: Sequence[str], log: Path) -> None:
    """Runs a command with one thread. Raises CalledProcessError with the log's last lines."""
    with log.open("ab") as file:
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
    if done.returncode:
        last = log.read_text(errors="replace").splitlines()[-5:]
        raise SystemExit("\n".join([f"{' '.join(command)} failed, see {log}:", *last]))


def run_all(work: Path, seeds: Sequence[int], sizes: Sizes) -> None:
    """The experiments of all seeds, then the controls, which start from their teachers; one on each core."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
        methods = {seed: workers.submit(run_method, work, seed, sizes) for seed in seeds}
        waiting = []
        for seed, method in methods.items():
            method.result()
            waiting.append(workers.submit(run_control, work, seed, sizes))
        for control in waiting:
            control.result()


def measured_seed(work: Path, seed: int) -> dict[str, Measured]:
    store = LocalStore(work / "runs")
    found = {"teacher": measured(store, f"seed-{seed}", 0)}
    # A gate that refuses a student ends its run; the student before it is then the last, and stands for those that were not trained.
    for generation in range(1, GENERATIONS + 1):
        before = found[f"student {generation - 1}"] if generation > 1 else None
        found[f"student {generation}"] = measured(store, f"seed-{seed}", generation) or before
    found[CONTROL] = measured(store, f"{CONTROL}-{seed}", 0)
    return {name: one for name, one in found.items() if one is not None}


def worked(work: Path, seed: int) -> float:
    """Seconds of all steps of a seed, whenever they were done."""
    store = LocalStore(work / "runs")
    return sum(note.seconds for run in (f"seed-{seed}", f"{CONTROL}-{seed}") for note in runs.notes(store, run))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t over the seeds; 0 for one seed, of which nothing is known."""
    if len(values) < 2:
        return values[0], 0.0
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(half)


def paired_interval(teacher: npt.NDArray[np.bool_], student: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """95 % interval of the gain in accuracy, 0-1, over the same images."""
    differences = student.astype(float) - teacher.astype(float)
    half = 1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5
    return float(differences.mean()) - half, float(differences.mean()) + half


def numbers(models: Mapping[str, Measured]) -> dict[str, dict[str, float]]:
    """Of one seed: what the table shows of each model. Errors and accuracies in %, mCE and mFR with the teacher at 100, which a teacher
    that is never wrong, or never wavers, does not have."""
    teacher = models["teacher"]
    found = {}
    for name, model in models.items():
        mce = relative(model.robustness.corruption_error(), teacher.robustness.corruption_error())
        mfr = relative(model.flips, teacher.flips)
        errors = model.robustness.corruption_error().values()
        measures = {
            "clean error": 100 * model.error,
            "corrupted error": 100 * statistics.fmean(errors),
            "mCE": mce,
            "flips": 100 * statistics.fmean(model.flips.values()),
            "mFR": mfr,
            **{attack: 100 * top1 for attack, top1 in model.attacked.items()},
        }
        found[name] = {measure: value for measure, value in measures.items() if value is not None}
    return found


def figures(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, list[float]]:
    """Each figure of each seed."""
    fgsm = [f"fgsm-{epsilon:g}" for epsilon in FGSM]
    found: dict[str, list[float]] = {}
    for models in seeds:
        student = models[LAST]
        for than, over in (("teacher", ""), (CONTROL, f"_over_{CONTROL}")):
            other = models[than]
            one = {f"clean_error_reduction{over}": 1 - student["clean error"] / other["clean error"]}
            one |= {
                f"{measure.lower()}_ratio{over}": student[measure] / other[measure]
                for measure in ("mCE", "mFR")
                if measure in student
            }
            one[f"fgsm_gain{over}"] = statistics.fmean(student[attack] - other[attack] for attack in fgsm)
            for name, value in one.items():
                found.setdefault(name, []).append(value)
    return found


def markdown(result: Mapping[str, Any]) -> str:
    seeds = [seed["models"] for seed in result["seeds"]]
    measures = list(seeds[0][LAST])
    lines = [
        "# Noisy Student on CIFAR-10",
        "",
        result["about"],
        "",
        "| | " + " | ".join(seeds[0]) + " |",
        "|---|" + "---|" * len(seeds[0]),
    ]
    for measure in measures:
        cells = []
        for model in seeds[0]:
            middle, half = interval([seed[model][measure] for seed in seeds])
            cells.append(f"{middle:.1f} ± {half:.1f}")
        lines.append(f"| {measure}, % | " + " | ".join(cells) + " |")
    lines += ["", "| figure | mean | 95 % interval | seeds |", "|---|---|---|---|"]
    for name, one in result["intervals"].items():
        low, high = one["interval"]
        each = ", ".join(f"{value:.3f}" for value in one["seeds"])
        lines.append(f"| {name} | {one['mean']:.3f} | {low:.3f} … {high:.3f} | {each} |")
    for seed in result["seeds"]:
        low, high = seed["paired_gain"]
        lines += [
            "",
            f"Seed {seed['seed']}: gain on all test images, paired: {100 * low:.1f} … {100 * high:.1f} points.",
        ]
    facts = result["machine"]
    # One experiment a core, each with one thread.
    minutes = result["seconds"] / 60 / facts["cores"]
    where = f"{facts['cores']} cores ({facts['cpu']}), torch {facts['torch']}"
    lines += ["", f"{minutes:.0f} minutes on {where}. Made by `{result['command']}`."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, default=CIFAR10.parent, help="folder of train.tar.gz and test.tar.gz, class folders of images"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/method-cifar10"), help="what is kept; the same command continues"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for method_cifar10.json and .md")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="an experiment each; 0, 1 and 2 if not given")
    parser.add_argument("--quick", action="store_true", help="a minute, tiny, one seed: shows that it works, measures nothing")
    options = parser.parse_args()
    seeds, sizes = (options.seeds[:1], QUICK) if options.quick else (options.seeds, WHOLE)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    unpack(options.images, work)
    for seed in seeds:
        write_tables(work, seed, sizes)
    run_all(work, seeds, sizes)
    found = []
    for seed in seeds:
        models = measured_seed(work, seed)
        gain = paired_interval(models["teacher"].correct, models[LAST].correct)
        found.append({"seed": seed, "models": numbers(models), "paired_gain": gain})
    each = figures([seed["models"] for seed in found])
    intervals = {}
    for name, values in each.items():
        middle, half = interval(values)
        intervals[name] = {"mean": middle, "interval": [middle - half, middle + half], "seeds": values}
    result = {
        "about": ABOUT.format(seeds=len(found), **sizes._asdict()),
        "command": "python -m benchmarks.method_cifar10" + (" --quick" if options.quick else ""),
        "figures": {name: one["mean"] for name, one in intervals.items()},
        "intervals": intervals,
        "seeds": found,
        "seconds": sum(worked(work, seed) for seed in seeds),
        "machine": machine(),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "method_cifar10.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    text = markdown(result)
    (options.results / "method_cifar10.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
