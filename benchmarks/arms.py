"""Trains and measures the arms of an experiment on the method, as many at a time as there are cores.

An arm is one training by the stages of `ns`: which labels it learns from, which weights it continues, and the experiment's settings. Its
measurements are one file per seed, `measured/SEED/ARM.npz` in the work folder. Files of other machines may be copied there: what is
measured is not trained again. Killed at any instant, the same command continues from the last checkpoints.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import yaml

from benchmarks.measure import RESULTS
from ns.config.schema import Experiment
from ns.core.digest import describe_code, digest_json
from ns.core.process import count_cores, die_with_process, identify_process
from ns.evaluation.result import Evaluation, Robustness, read_mistakes, read_predictions
from ns.modeling.manifest import ModelManifest
from ns.runs.records import find_stage_note
from ns.storage import LocalStore, Store, parent_key

REPORT_SECONDS = 60.0
FORWARD_COST = 1 / 3
"""Cost of a measured image in images of a training."""


class Arm(NamedTuple):
    """A training and its measurements."""

    document: Mapping[str, Any]
    """The experiment whose last student this arm is; generation 0: whose first teacher."""
    generation: int
    """0 for a teacher. Weights, order and noise of arms with the same seed and generation are drawn alike."""
    labels: str = ""
    """Arm that labels the pool; empty for labeled images alone."""
    start: str = ""
    """Arm whose weights it continues; empty: random ones."""

    @property
    def needs(self) -> list[str]:
        return [name for name in (self.labels, self.start) if name]

    @property
    def experiment(self) -> Experiment:
        return Experiment.model_validate(self.document)


Arms = Mapping[str, Arm]


def digest_arm(arms: Arms, name: str) -> str:
    """Digest of all settings that decide an arm, those of the arms it needs too. Paths do not count: other machines have others."""
    arm = arms[name]
    settings = {field: value for field, value in arm.document.items() if field != "data"}
    return digest_json([settings, arm.generation, *(digest_arm(arms, needed) for needed in (arm.labels, arm.start) if needed)])


def estimate_cost(arm: Arm, labeled: int) -> float:
    """Cost of an arm in images of a training; `labeled`: labeled images."""
    experiment = arm.experiment
    role = experiment.get_student(arm.generation) if arm.generation else experiment.teacher
    train = role.train
    images_per_step = train.labeled_batch + (train.pseudo_batch if arm.labels else 0)
    cost = math.ceil(train.epochs * labeled / train.labeled_batch) * float(images_per_step)
    if experiment.evaluation.needs_robustness:
        from ns.evaluation.robustness.suite import count_passes

        cost += FORWARD_COST * (experiment.evaluation.images or 0) * count_passes(experiment.evaluation)
    return cost


def add_arm_options(parser: argparse.ArgumentParser, name: str, work: str) -> None:
    """Options of an experiment whose results are called `name`. `work`: folder of its runs, if nothing else is said."""
    parser.add_argument("--work", type=Path, default=Path(work), help="folder of the runs; the same command continues")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder for {name}.json, .md and .svg")
    parser.add_argument("--cores", type=int, default=count_cores(), help="arms at a time, one thread each")


class Measured(NamedTuple):
    """What an arm with a seed did wrong, image by image, in the order of their keys."""

    about: dict[str, Any]
    """`digest` of the arm, `code`, `parameters`, `steps`, `cpu_seconds` of the attempt that came to its end."""
    heldout: npt.NDArray[np.bool_]
    """Wrong answers on the held-out images."""
    test: npt.NDArray[np.bool_]
    corruptions: npt.NDArray[np.uint8]
    """Severities at which the answer is wrong, [images, kinds]; [0, 0] if not measured, here and in the next two."""
    perturbations: npt.NDArray[np.uint8]
    """Frames whose answer differs from that of the reference frame."""
    attacks: npt.NDArray[np.uint8]
    """Wrong answers under attack."""

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in cls._fields[1:]}
            return cls(json.loads(str(file["about"])), **arrays)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez_compressed(file, **self._asdict() | {"about": json.dumps(self.about)})
        temporary.replace(path)


def locate_measured(work: Path, seed: int, name: str) -> Path:
    return work / "measured" / str(seed) / f"{name}.npz"


def find_measured(work: Path, seed: int, name: str, arms: Arms) -> Measured | None:
    """The measurements of an arm; None if there are none, or they are of other settings."""
    path = locate_measured(work, seed, name)
    measured = Measured.load(path) if path.exists() else None
    return measured if measured and measured.about["digest"] == digest_arm(arms, name) else None


def run_arm(work: Path, seed: int, name: str, arms: Arms) -> Measured:
    """Trains and measures an arm in this process. The arms that it needs must be there."""
    from ns.stages.context import RunRef
    from ns.stages.evaluate import evaluate_generation
    from ns.stages.label import label_shards, split_pool
    from ns.stages.prepare import prepare_data
    from ns.stages.select import commit_labels
    from ns.stages.train import train_generation

    arm, root, run, used_before = arms[name], work / "runs", f"{seed}-{name}", _read_cpu_seconds()
    path = work / f"{run}.yaml"
    path.write_text(yaml.safe_dump(dict(arm.document), sort_keys=False))
    ref = RunRef(str(path), str(root), run)
    data = prepare_data(ref)
    generation, selection = arm.generation, ""
    if arm.labels:
        labeler = find_arm_model(LocalStore(root), seed, arm.labels, arms)
        for shards in split_pool(ref, data=data):
            label_shards(ref, data=data, generation=generation, teacher=labeler, shards=shards)
        selection = commit_labels(ref, data=data, generation=generation, teacher=labeler)
    start = arm.start or arm.labels
    teacher = find_arm_model(LocalStore(root), seed, start, arms) if start else ""
    model = train_generation(ref, data=data, generation=generation, teacher=teacher, selection=selection)
    evaluate_generation(ref, data=data, generation=generation, model=model)
    measured = _read_measurements(LocalStore(root), run, generation)
    measured.about.update(
        digest=digest_arm(arms, name), code=describe_code(), cpu_seconds=round(_read_cpu_seconds() - used_before, 1)
    )
    measured.save(locate_measured(work, seed, name))
    return measured


def find_arm_model(root: Store, seed: int, name: str, arms: Arms) -> str:
    """Key of the folder of an arm's model. Raises SystemExit if it was not trained here."""
    note = find_stage_note(root, f"{seed}-{name}", arms[name].generation, "train")
    if note is None:
        raise SystemExit(f"seed {seed}: arm {name} is needed, and was not trained in {root.uri}; run it first")
    return parent_key(note.outputs["model"])


def _read_measurements(root: Store, run: str, generation: int) -> Measured:
    note = find_stage_note(root, run, generation, "evaluate")
    model_note = find_stage_note(root, run, generation, "train")
    assert note is not None
    assert model_note is not None
    wrong = {}
    for part, output in (("heldout", "evaluation"), ("test", "test")):
        store = root.at(parent_key(note.outputs[output]))
        rows = read_predictions(store, Evaluation.load(store)).sort_by("key")
        wrong[part] = rows["class_id"].to_numpy() != rows["predicted_class_id"].to_numpy()
    suites = [np.zeros((0, 0), np.uint8)] * 3
    if key := note.outputs.get("robustness"):
        mistakes = read_mistakes(root.at(parent_key(key)), Robustness.load_file(root, key))
        order = np.argsort(mistakes.keys)
        suites = [
            np.stack(list(counts.values()), 1)[order] if counts else np.zeros((len(order), 0), np.uint8)
            for counts in (mistakes.corruptions, mistakes.perturbations, mistakes.attacks)
        ]
    manifest = ModelManifest.load_file(root, model_note.outputs["model"])
    return Measured({"parameters": manifest.parameters, "steps": manifest.steps}, wrong["heldout"], wrong["test"], *suites)


def _read_cpu_seconds() -> float:
    """Of this process, and of its helpers that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


class Task(NamedTuple):
    seed: int
    name: str


def run_arms(work: Path, arms_by_seed: Mapping[int, Arms], names: Sequence[str], *, labeled: int, cores: int) -> None:
    """Runs what is not measured yet of the arms `names` and of those that they need, for all seeds; `labeled`: labeled images.

    Raises SystemExit if an arm fails; the others come to their end first.
    """
    tasks = list_tasks(arms_by_seed, names)
    costs = {task: estimate_cost(arms_by_seed[task.seed][task.name], labeled) for task in tasks}
    done = {task for task in tasks if find_measured(work, task.seed, task.name, arms_by_seed[task.seed])}
    progress = _Progress(costs, done)
    if len(done) == len(tasks):
        return
    log = work / "arms.log"
    # One thread: two trainings beside each other are faster than one with two threads. Read when torch is loaded.
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(
        cores, multiprocessing.get_context("spawn"), initializer=_init_worker, initargs=(log, identify_process(os.getpid()))
    )
    running: dict[Future[None], Task] = {}
    with pool:
        while len(done) < len(tasks):
            for task in tasks:
                arms = arms_by_seed[task.seed]
                needs = {Task(task.seed, needed) for needed in arms[task.name].needs}
                # No more than there are cores: what is ready next may come before the rest.
                if len(running) < cores and task not in done and task not in running.values() and needs <= done:
                    running[pool.submit(_run_task, work, task, arms)] = task
            progress.show(done, list(running.values()))
            ended, _ = wait(running, timeout=REPORT_SECONDS, return_when=FIRST_COMPLETED)
            for future in ended:
                task = running.pop(future)
                try:
                    future.result()
                except (Exception, SystemExit) as error:
                    lost = (
                        "its process was killed; the same command continues" if isinstance(error, BrokenProcessPool) else error
                    )
                    raise SystemExit(f"seed {task.seed}, arm {task.name}: {lost}; see {log}") from error
                done.add(task)


def _init_worker(log: Path, parent: str) -> None:
    """Sends what the stages log to a file, and ends this process with its parent."""
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    # A spawned process spawns its own; a stage's loaders begin as in `ns`.
    multiprocessing.set_start_method(None, force=True)
    die_with_process(parent)


def _run_task(work: Path, task: Task, arms: Arms) -> None:
    run_arm(work, task.seed, task.name, arms)


def list_tasks(arms_by_seed: Mapping[int, Arms], names: Sequence[str]) -> list[Task]:
    """The arms `names` and those that they need, seed by seed, none before what it needs."""
    tasks: dict[Task, None] = {}

    def add_arm(seed: int, name: str) -> None:
        for needed in arms_by_seed[seed][name].needs:
            add_arm(seed, needed)
        tasks[Task(seed, name)] = None

    for seed in arms_by_seed:
        for name in names:
            add_arm(seed, name)
    return list(tasks)


class _Progress:
    """Prints how far the arms are, and about how long the others take."""

    def __init__(self, costs: Mapping[Task, float], done: set[Task]) -> None:
        self._costs = costs
        self._started = time.monotonic()
        self._cost_before = sum(costs[task] for task in done)

    def show(self, done: set[Task], running: Sequence[Task]) -> None:
        total, finished = sum(self._costs.values()), sum(self._costs[task] for task in done)
        spent, gained = time.monotonic() - self._started, finished - self._cost_before
        left = f"about {format_minutes(spent / gained * (total - finished))} left; " if gained else ""
        under_way = ", ".join(f"{task.name} of seed {task.seed}" for task in running)
        print(
            f"{len(done)} of {len(self._costs)} arms, {finished / total:.0%} of the work; {left}now {under_way}",
            flush=True,
        )


def format_minutes(seconds: float) -> str:
    """`2 h 05 min`, `4 min`."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def stack_arms(work: Path, arms_by_seed: Mapping[int, Arms], names: Sequence[str]) -> dict[str, Measured]:
    """Name → the arm's measurements, with a first dimension for the seeds. Arms that a seed lacks are left out."""
    stacked = {}
    for name in names:
        by_seed = [measured for seed, arms in arms_by_seed.items() if (measured := find_measured(work, seed, name, arms))]
        if len(by_seed) == len(arms_by_seed):
            arrays = [np.stack(parts) for parts in zip(*(measured[1:] for measured in by_seed), strict=True)]
            stacked[name] = Measured({"seeds": [measured.about for measured in by_seed]}, *arrays)
    return stacked
