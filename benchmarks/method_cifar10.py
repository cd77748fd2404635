"""Does this implementation show the effects of the paper (arXiv:1911.04252)? CIFAR-10 with few labels, three seeds, two cores.

    python -m benchmarks.method_cifar10 [--images FOLDER] [--work FOLDER] [--results FOLDER] [--quick]

Of CIFAR-10's 50,000 training images each seed draws 2,000 that keep their labels and 5,000 held out for the gate; the others are the
pool. The official test images are only reported: all 10,000 for clean error, the same 300 of them in all 15 corruptions at 5 severities,
in 10 kinds of sequences of 8 frames, and under FGSM. The experiments of the seeds run with `ns run CONFIG`, with one thread each and one
per core at a time; the same command continues after an interruption.

Teacher and students have one size, and each student starts from its teacher's weights: 1,800 steps are too few to start from random ones.
So students have more training than their teacher, and a **control** separates its effect: it starts from the same teacher, and takes as
many steps as both students together, with their noise, schedule and images per step, on the labeled images alone. The difference between
student and control is due to the pseudo-labels.

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

from benchmarks.measure import CIFAR10, RESULTS, describe_benchmark_machine, draw_tables, format_markdown_table
from ns.evaluation.result import Evaluation, Robustness, read_predictions
from ns.evaluation.robustness.scores import relative_score
from ns.runs.records import find_stage_note, list_stage_notes
from ns.storage import LocalStore, Store, parent_key

SEEDS = (0, 1, 2)
FGSM = (1, 2, 4)
"""In 1/255. The paper's 8 and 16 are for photographs of 224 px and more; at 32 px they bring every network to zero."""
GENERATIONS = 2
CONTROL = "control"
LAST_STUDENT = f"student {GENERATIONS}"

ABOUT = (
    "{labeled} labeled images per class, {pool} unlabeled, {heldout} held out for the gate; {seeds} seeds. Clean error on all test "
    "images, robustness on {robust_images} of them. ± is half of a 95 % interval over the seeds. mCE and mFR are relative to the teacher. "
    "The control starts from the teacher and takes the steps of both students, with their noise, on labeled images alone."
)


class ExperimentSizes(NamedTuple):
    """Sizes of an experiment; `--quick` only shows that everything works."""

    labeled: int
    """Images per class, here and in the next three."""
    heldout: int
    pool: int
    test: int
    teacher_epochs: float
    student_epochs: float
    robust_images: int
    frames: int
    min_confidence: float = 0.5


FULL = ExperimentSizes(200, 500, 4_300, 1_000, teacher_epochs=150, student_epochs=57, robust_images=300, frames=8)
QUICK = ExperimentSizes(20, 20, 60, 10, teacher_epochs=10, student_epochs=3, robust_images=8, frames=3, min_confidence=0.1)


def make_method_experiment(seed: int, tables: Path, sizes: ExperimentSizes) -> dict[str, Any]:
    """The experiment of a seed, as `ns run` reads it."""
    network: dict[str, Any] = {
        "model": {
            "arch": "resnet18",
            "args": {"channels": [16, 32, 64, 128]},
            "resolution": 32,
            "crop": "pad",
            "reduce_stride": 2,
            "inference_precision": "float32",
        },
        "noise": {"randaugment_layers": 2, "randaugment_magnitude": 4, "dropout": 0.1, "stochastic_depth": 0.1},
    }
    training: dict[str, Any] = {
        "precision": "bfloat16",
        "processes": 1,
        "ema_decay": 0.99,
        "optimizer": {"name": "adamw", "lr": 0.004, "weight_decay": 0.05, "schedule": "cosine", "warmup_epochs": 2},
    }
    student_training = {
        "labeled_batch": 64,
        "unlabeled_ratio": 3,
        "pseudo_labels": "hard",
        "init": "teacher",
        "epochs": sizes.student_epochs,
    }
    return {
        "name": "cifar10",
        "seed": seed,
        "generations": GENERATIONS,
        "data": {
            **{part: str(tables / f"{part}-{seed}.csv") for part in ("labeled", "pool", "heldout")},
            "test": str(tables / "test.csv"),
        },
        "teacher": {**network, "train": {**training, "labeled_batch": 128, "epochs": sizes.teacher_epochs}},
        "students": [{**network, "train": {**training, **student_training}}],
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


def make_control_experiment(document: Mapping[str, Any], teacher: str) -> dict[str, Any]:
    """The experiment whose first teacher is the control: the students' role with labeled images only, for the steps of all students.

    `teacher`: URI of the model from which they start.
    """
    student = document["students"][0]
    train = dict(student["train"])
    del train["pseudo_labels"]
    batch_multiple = 1 + train.pop("unlabeled_ratio")
    epochs = train["epochs"] * batch_multiple * document["generations"]
    del train["init"]
    train |= {"labeled_batch": train["labeled_batch"] * batch_multiple, "epochs": epochs}
    # Warm-up is counted in epochs of labeled images.
    train["optimizer"] = {**train["optimizer"], "warmup_epochs": train["optimizer"]["warmup_epochs"] * batch_multiple}
    return {
        **document,
        "name": CONTROL,
        "teacher": {**student, "model": {**student["model"], "pretrained": teacher}, "train": train},
    }


def unpack_archives(images: Path, folder: Path) -> None:
    """Unpacks both archives into class folders."""
    for part in ("train", "test"):
        if not (folder / part).exists():
            with tarfile.open(images / f"{part}.tar.gz") as archive:
                archive.extractall(folder / "unpacking", filter="data")
            (folder / "unpacking" / part).rename(folder / part)


def write_seed_tables(folder: Path, seed: int, sizes: ExperimentSizes) -> None:
    """Writes the tables of a seed's parts, and of the test images."""
    counts = {"labeled": sizes.labeled, "heldout": sizes.heldout, "pool": sizes.pool}
    for part, table in draw_tables(folder / "train", counts, seed).items():
        (folder / f"{part}-{seed}.csv").write_text(table)
    categories = sorted((folder / "test").iterdir())
    test = [f"{path},{image_path.name}" for image_path in categories for path in sorted(image_path.iterdir())[: sizes.test]]
    (folder / "test.csv").write_text("\n".join(["path,label", *test]) + "\n")


class ModelMeasurement(NamedTuple):
    """Results of a model on the test images."""

    correct: npt.NDArray[np.bool_]
    """[test images], in the order of their keys."""
    robustness: Robustness

    @property
    def error(self) -> float:
        return 1 - float(self.correct.mean())

    @property
    def flips(self) -> dict[str, float]:
        return {kind: perturbation.flip_probability for kind, perturbation in self.robustness.perturbations.items()}

    @property
    def attacked(self) -> dict[str, float]:
        return {str(attack): attack.top1 for attack in self.robustness.attacks}


def measure_model(root: Store, run: str, generation: int) -> ModelMeasurement | None:
    """Reads the results of a generation; None if the run ended before it."""
    note = find_stage_note(root, run, generation, "evaluate")
    if note is None:
        return None
    folder = root.at(parent_key(note.outputs["test"]))
    rows = read_predictions(folder, Evaluation.load(folder)).sort_by("key")
    correct = np.asarray(rows["class_id"]) == np.asarray(rows["predicted_class_id"])
    return ModelMeasurement(correct, Robustness.load_file(root, note.outputs["robustness"]))


def run_method(work: Path, seed: int, sizes: ExperimentSizes) -> None:
    """Trains teacher and students of a seed."""
    path = work / f"seed-{seed}.yaml"
    path.write_text(yaml.safe_dump(make_method_experiment(seed, work, sizes), sort_keys=False))
    # A refusal by the gate is a result too: the evaluations exist.
    command = [sys.executable, "-m", "ns", "run", str(path), "--root", str(work / "runs"), "--run", path.stem]
    _run_single_threaded(command, path.with_suffix(".log"))


def run_control(work: Path, seed: int, sizes: ExperimentSizes) -> None:
    """Trains the control of a seed whose teacher exists. It has no student, so its stages are called one by one."""
    root = work / "runs"
    note = find_stage_note(LocalStore(root), f"seed-{seed}", 0, "train")
    assert note is not None
    teacher = str(root / parent_key(note.outputs["model"]))
    document = make_control_experiment(make_method_experiment(seed, work, sizes), teacher)
    path = work / f"{CONTROL}-{seed}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    script = (
        "import sys; from ns.stages import context, evaluate, prepare, train; ref = context.RunRef(*sys.argv[1:]); "
        "data = prepare.prepare_data(ref); model = train.train_generation(ref, data=data, generation=0); "
        "evaluate.evaluate_generation(ref, data=data, generation=0, model=model)"
    )
    command = [sys.executable, "-c", script, str(path), str(root), path.stem]
    _run_single_threaded(command, path.with_suffix(".log"))


def _run_single_threaded(command: Sequence[str], log: Path) -> None:
    """Runs a command with one thread. If it fails, ends with the log's last lines."""
    with log.open("ab") as file:
        process = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
    if process.returncode:
        last = log.read_text(errors="replace").splitlines()[-5:]
        raise SystemExit("\n".join([f"{' '.join(command)} failed, see {log}:", *last]))


def run_all(work: Path, seeds: Sequence[int], sizes: ExperimentSizes) -> None:
    """Runs the experiments of all seeds, then the controls, which start from their teachers; one per core."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
        controls = []
        for seed, method in [(seed, workers.submit(run_method, work, seed, sizes)) for seed in seeds]:
            method.result()
            controls.append(workers.submit(run_control, work, seed, sizes))
        for control in controls:
            control.result()


def measure_seed(work: Path, seed: int) -> dict[str, ModelMeasurement]:
    store = LocalStore(work / "runs")
    measurements = {"teacher": measure_model(store, f"seed-{seed}", 0)}
    student = None
    for generation in range(1, GENERATIONS + 1):
        # A refused student ends its run: it stands for those that were not trained.
        student = measure_model(store, f"seed-{seed}", generation) or student
        measurements[f"student {generation}"] = student
    measurements[CONTROL] = measure_model(store, f"{CONTROL}-{seed}", 0)
    return {name: measurement for name, measurement in measurements.items() if measurement is not None}


def sum_stage_seconds(work: Path, seed: int) -> float:
    """Seconds of all stages of a seed, over all runs of this command."""
    store = LocalStore(work / "runs")
    return sum(note.seconds for run in (f"seed-{seed}", f"{CONTROL}-{seed}") for note in list_stage_notes(store, run))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t over the seeds; 0 for one seed."""
    if len(values) < 2:
        return values[0], 0.0
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(half)


def paired_interval(teacher: npt.NDArray[np.bool_], student: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """95 % interval of the gain in accuracy, 0-1, over the same images."""
    differences = student.astype(float) - teacher.astype(float)
    half = 1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5
    return float(differences.mean()) - half, float(differences.mean()) + half


def compute_model_figures(models: Mapping[str, ModelMeasurement]) -> dict[str, dict[str, float]]:
    """Model → measure → value of one seed. Errors and accuracies in %, mCE and mFR relative to the teacher at 100.

    mCE or mFR is missing if the teacher makes no error, or never flips.
    """
    teacher = models["teacher"]
    by_model = {}
    for name, model in models.items():
        errors = model.robustness.mean_corruption_errors()
        measures = {
            "clean error": 100 * model.error,
            "corrupted error": 100 * statistics.fmean(errors.values()),
            "mCE": relative_score(errors, teacher.robustness.mean_corruption_errors()),
            "flips": 100 * statistics.fmean(model.flips.values()),
            "mFR": relative_score(model.flips, teacher.flips),
            **{attack: 100 * top1 for attack, top1 in model.attacked.items()},
        }
        by_model[name] = {measure: value for measure, value in measures.items() if value is not None}
    return by_model


def compute_seed_figures(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, list[float]]:
    """Figure → its value for each seed."""
    fgsm = [f"fgsm-{epsilon:g}" for epsilon in FGSM]
    by_figure: dict[str, list[float]] = {}
    for models in seeds:
        student = models[LAST_STUDENT]
        for than, over in (("teacher", ""), (CONTROL, f"_over_{CONTROL}")):
            other = models[than]
            seed_figures = {f"clean_error_reduction{over}": 1 - student["clean error"] / other["clean error"]}
            seed_figures |= {
                f"{measure.lower()}_ratio{over}": student[measure] / other[measure]
                for measure in ("mCE", "mFR")
                if measure in student
            }
            seed_figures[f"fgsm_gain{over}"] = statistics.fmean(student[attack] - other[attack] for attack in fgsm)
            for name, value in seed_figures.items():
                by_figure.setdefault(name, []).append(value)
    return by_figure


def render_method_markdown(result: Mapping[str, Any]) -> str:
    seeds = [seed["models"] for seed in result["seeds"]]
    rows = []
    for measure in seeds[0][LAST_STUDENT]:
        means = [mean_interval([seed[model][measure] for seed in seeds]) for model in seeds[0]]
        rows.append([f"{measure}, %", *(f"{middle:.1f} ± {half:.1f}" for middle, half in means)])
    parts = ["# Noisy Student on CIFAR-10", result["about"], format_markdown_table(["", *seeds[0]], rows)]
    rows = []
    for name, figure in result["intervals"].items():
        low, high = figure["interval"]
        seed_values = ", ".join(f"{value:.3f}" for value in figure["seeds"])
        rows.append([name, f"{figure['mean']:.3f}", f"{low:.3f} … {high:.3f}", seed_values])
    parts.append(format_markdown_table(["figure", "mean", "95 % interval", "seeds"], rows))
    for seed in result["seeds"]:
        low, high = seed["paired_gain"]
        parts.append(f"Seed {seed['seed']}: gain on all test images, paired: {100 * low:.1f} … {100 * high:.1f} points.")
    machine_facts = result["machine"]
    # One experiment per core, each with one thread.
    minutes = result["seconds"] / 60 / machine_facts["cores"]
    machine_text = f"{machine_facts['cores']} cores ({machine_facts['cpu']}), torch {machine_facts['torch']}"
    parts.append(f"{minutes:.0f} minutes on {machine_text}. Made by `{result['command']}`.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, default=CIFAR10.parent, help="folder of train.tar.gz and test.tar.gz, class folders of images"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/method-cifar10"), help="folder of the runs; the same command continues"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for method_cifar10.json and .md")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="one experiment each (0 1 2)")
    parser.add_argument("--quick", action="store_true", help="a minute, tiny, one seed: shows that it works, measures nothing")
    options = parser.parse_args()
    seeds, sizes = (options.seeds[:1], QUICK) if options.quick else (options.seeds, FULL)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    unpack_archives(options.images, work)
    for seed in seeds:
        write_seed_tables(work, seed, sizes)
    run_all(work, seeds, sizes)
    seed_results = []
    for seed in seeds:
        models = measure_seed(work, seed)
        gain = paired_interval(models["teacher"].correct, models[LAST_STUDENT].correct)
        seed_results.append({"seed": seed, "models": compute_model_figures(models), "paired_gain": gain})
    by_figure = compute_seed_figures([seed["models"] for seed in seed_results])
    intervals = {}
    for name, values in by_figure.items():
        middle, half = mean_interval(values)
        intervals[name] = {"mean": middle, "interval": [middle - half, middle + half], "seeds": values}
    result = {
        "about": ABOUT.format(seeds=len(seed_results), **sizes._asdict()),
        "command": "python -m benchmarks.method_cifar10" + (" --quick" if options.quick else ""),
        "figures": {name: entry["mean"] for name, entry in intervals.items()},
        "intervals": intervals,
        "seeds": seed_results,
        "seconds": sum(sum_stage_seconds(work, seed) for seed in seeds),
        "machine": describe_benchmark_machine(),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "method_cifar10.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    text = render_method_markdown(result)
    (options.results / "method_cifar10.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
