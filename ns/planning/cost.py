"""The arithmetic of a plan (docs/scale.md explains it): from counts and speeds to hours, bytes and cores."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from pydantic import computed_field
from rich.filesize import decimal

from ns.config.schema import Experiment, OptimizerConfig, RoleConfig
from ns.core import log
from ns.core.errors import ConfigError
from ns.core.log import duration
from ns.data.augment.transforms import EvalTransform
from ns.data.prepared import Part
from ns.evaluation.robustness.suite import passes
from ns.labeling.label_set import kept_classes
from ns.modeling import factory as models
from ns.modeling.precision import machine
from ns.modeling.predictor import DECODE_THREADS
from ns.planning.data_stats import Counts, Looked, Picture, evaluation_set
from ns.planning.measure import Speed, decode_seconds, inference_speed, noise_seconds, training_speed
from ns.storage.documents import Document
from ns.training.plan import Course, finetuned_role, training

FLOAT_BYTES = 4
"""Weights, gradients, averages and the optimiser's state are float32 in every precision."""
PASSES = 3
"""A backward pass costs two forward passes: one for the gradient of the weights, one for that of the maps."""
LABEL_ROW_BYTES = 15
"""Of a label row without its classes: the key and the confidence. Measured with zstd: 3 where keys are numbers of ten digits, 15
where they are paths that end in a hash."""
LABEL_CLASS_BYTES = 4
"""uint16 class and float16 probability."""

Task = Literal["train", "finetune", "label", "evaluate", "robustness"]


@dataclass(frozen=True)
class Asked:
    """What is to be planned beside the experiment."""

    counts: Counts = field(default_factory=Counts)
    devices: int = 1
    """That train together, each like this machine's."""
    seconds: float = 30
    """To measure for."""
    multiply_adds_per_second: float | None = None
    """Of a device; then nothing is measured but decoding and noise."""
    price: float | None = None
    """Of a device for an hour."""
    begun: int | None = None
    """Generation of a student that the run goes on from; None if it trains its first teacher."""


class Work(Document):
    """One training, labelling or evaluation."""

    generation: int
    task: Task
    field: str
    """Where the network stands in the configuration."""
    arch: str
    resolution: int
    """px"""
    parameters: int
    multiply_adds: int
    """Of a forward pass over one image; 0 if they could not be counted."""
    mode: str
    """How the network is run; `assumed` if that was not measured."""
    steps: int
    """0 for labelling and evaluation."""
    labelled_batch: int
    """Labelled images a step; 0 for labelling and evaluation."""
    images: int
    """That pass through the network."""
    images_per_second: float
    """Of one device, with all that is counted here."""
    seconds: float
    """From begin to end."""
    devices: int
    limited_by: Literal["network", "loader"]
    loader_cores: float | None
    """Cores that have to decode and add noise for each device, so that it never waits. None if no image could be looked at."""
    read_bytes_per_second: float | None
    """Of images, by each device."""
    network_bytes_per_step: int
    """Gradients that each device sends, and receives: a ring all-reduce, 2 (N - 1) / N times the weights."""
    checkpoint_bytes: int
    """One training checkpoint; 0 for labelling and evaluation."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def device_hours(self) -> float:
        return self.seconds * self.devices / 3600


class Plan(Document):
    """What an experiment will cost if every generation is run."""

    experiment: str
    machine: str
    devices: int
    labelled: int
    pool: int
    heldout: int
    classes: int
    work: tuple[Work, ...]
    label_set_bytes: int
    """Of each generation's label set, at most: with few classes it compresses well."""
    model_bytes: int
    """Of all models together."""
    checkpoint_bytes: int
    """The most that checkpoints take at a time."""
    price: float | None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def hours(self) -> float:
        return sum(work.seconds for work in self.work) / 3600

    @computed_field  # type: ignore[prop-decorator]
    @property
    def device_hours(self) -> float:
        return sum(work.device_hours for work in self.work)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.price * self.device_hours


class _Job(NamedTuple):
    generation: int
    task: Task
    field: str
    role: RoleConfig
    course: Course | None
    """None for labelling and evaluation."""
    labelled: int
    """Labelled images a step; images of evaluation sets in an evaluation, forward passes where they are distorted or attacked."""
    pool: int
    """Pseudo-labelled images a step; images of the pool in labelling."""

    @property
    def images(self) -> int:
        """A step's, or all."""
        return self.labelled + self.pool

    @property
    def resolution(self) -> int:
        model = self.role.model
        return model.resolution if self.course else model.inference_resolution


def plan(experiment: Experiment, asked: Asked) -> Plan:
    """Counts, measures, and adds up. Raises ConfigError for networks that cannot be, DataError or StoreError for data that cannot
    be looked at and was not said to be of some size, TrainingError if the memory here does not suffice for one image.
    """
    data = experiment.data
    places: dict[Part, str] = {"labelled": data.labelled, "pool": data.pool, "heldout": data.heldout}
    if data.test is not None:
        places["test"] = data.test
    looked = {part: asked.counts.of(part, place) for part, place in places.items()}
    classes = looked["labelled"].classes or asked.counts.classes
    sets = {name: evaluation_set(name, wanted, experiment.evaluation) for name, wanted in experiment.evaluation.sets.items()}
    models.check(experiment, looked["labelled"].classes or None)
    jobs = list(_jobs(experiment, {part: found.images for part, found in looked.items()}, sets, asked.begun))
    speeds = _Speeds(jobs, asked, classes, experiment.labelling.batch, _pictures(looked))
    work = tuple(_work(job, looked, speeds, asked, experiment.labelling.tasks) for job in jobs)
    top = kept_classes(classes, experiment.labelling.top_k)
    return Plan(
        experiment=experiment.name,
        machine=machine(models.best_device()) if asked.multiply_adds_per_second is None else _assumed(asked),
        devices=asked.devices,
        labelled=looked["labelled"].images,
        pool=looked["pool"].images,
        heldout=looked["heldout"].images,
        classes=classes,
        work=work,
        label_set_bytes=looked["pool"].images * (LABEL_ROW_BYTES + LABEL_CLASS_BYTES * top),
        model_bytes=sum(FLOAT_BYTES * one.parameters for one in work if one.checkpoint_bytes),
        # The one that is being written, beside those that are kept.
        checkpoint_bytes=max(
            (job.role.train.checkpoints_kept + 1) * one.checkpoint_bytes for job, one in zip(jobs, work, strict=True)
        ),
        price=asked.price,
    )


def remarks(made: Plan) -> list[str]:
    """What the tables do not say, a sentence each."""
    said = [
        f"{made.device_hours:,.1f} device-hours in {duration(3600 * made.hours)}, if every generation is run"
        + (f": {made.cost:,.2f}" if made.cost is not None else ""),
        f"label sets: {decimal(made.label_set_bytes)} for each of the generations, at most · "
        f"models: {decimal(made.model_bytes)} · checkpoints: at most {decimal(made.checkpoint_bytes)} at a time",
    ]
    for work in made.work:
        if work.task == "train" and work.steps * work.images and made.pool and work.generation:
            pseudo = work.images - work.steps * work.labelled_batch
            said.append(
                f"{work.field}, generation {work.generation}: sees each image of the pool {pseudo / made.pool:.1f} times"
            )
    labelling = [work for work in made.work if work.task == "label"]
    if max((work.devices for work in labelling), default=made.devices) < made.devices:
        said.append(f"labelling has {labelling[0].devices} of {made.devices} devices: raise labelling.tasks")
    waiting = {work.field: work for work in made.work if work.limited_by == "loader" and work.task == "train"}
    for name, work in waiting.items():
        said.append(
            f"{name}: waits for images; set {name}.train.loader_workers to {math.ceil(work.loader_cores or 1)} or more, "
            "on nodes with as many cores for each device"
        )
    return said


def _jobs(experiment: Experiment, images: dict[Part, int], sets: dict[str, int], begun: int | None) -> Iterator[_Job]:
    """Every generation's work, in the order of a run. `sets`: as of `evaluation_set`; `begun`: as in `Asked`."""
    asked = experiment.evaluation
    clean = images["heldout"] + images.get("test", 0)
    reported = images.get("test", images["heldout"])
    robust = passes(asked) * min(reported, asked.images or reported) if asked.robust else 0
    if experiment.gate.suites and "test" in images:
        robust += passes(experiment.guarded) * min(images["heldout"], asked.images or images["heldout"])
    plain = sum(count for name, count in sets.items() if asked.sets[name].kind == "images")
    robust += sum(sets.values()) - plain

    def role_of(generation: int) -> tuple[str, RoleConfig]:
        if generation == 0:
            return "teacher", experiment.teacher
        return f"students.{min(generation, len(experiment.students)) - 1}", experiment.student(generation)

    def evaluated(generation: int, field: str, role: RoleConfig) -> Iterator[_Job]:
        yield _Job(generation, "evaluate", field, role, None, clean + plain, 0)
        if robust:
            yield _Job(generation, "robustness", field, role, None, robust, 0)

    def trained(generation: int, field: str, role: RoleConfig) -> Iterator[_Job]:
        course = training(role, images["labelled"])
        yield _Job(
            generation, "train", field, role, course, role.train.labelled_batch, role.train.pseudo_batch if generation else 0
        )
        yield from evaluated(generation, field, role)
        if role.train.finetune:
            tuned = finetuned_role(role, role.train.finetune)
            batch = tuned.train.labelled_batch
            short = Course(
                tuned, course.transform, max(1, math.ceil(tuned.train.epochs * images["labelled"] / batch)), course.rate
            )
            yield _Job(generation, "finetune", field, tuned, short, batch, 0)
            yield _Job(generation, "evaluate", field, tuned, None, clean, 0)

    first = begun or 0
    # A student that is there already is only evaluated, on the images that decide now.
    yield from (trained if begun is None else evaluated)(first, *role_of(first))
    for generation in range(first + 1, first + 1 + experiment.generations):
        yield _Job(generation, "label", *role_of(generation - 1), None, 0, images["pool"])
        yield from trained(generation, *role_of(generation))


class _Speeds:
    """What was measured, once for all jobs that do the same."""

    def __init__(self, jobs: list[_Job], asked: Asked, classes: int, batch: int, pictures: tuple[Picture, ...]) -> None:
        self._asked = asked
        self._classes = classes
        self._batch = batch
        self._pictures = pictures
        self._known: dict[str, Speed] = {}
        self._cores: dict[str, float] = {}
        self._counted: dict[str, tuple[int, int, int]] = {}
        self._seconds = asked.seconds / len({self._key(job) for job in jobs})

    def _key(self, job: _Job) -> str:
        about = models.description(job.role.model)
        return f"{job.course is not None, job.resolution, job.course and (job.images, job.role.train), about}"

    def outputs(self, job: _Job) -> int:
        return job.role.model.outputs or self._classes

    def counted(self, job: _Job) -> tuple[int, int, int]:
        """Parameters, values of the state, and multiply-adds of one image."""
        key = f"{models.description(job.role.model), job.resolution}"
        if key not in self._counted:
            with torch.device("meta"):
                network = models.build(job.role.model, job.role.noise, self.outputs(job))
            state = sum(value.numel() for value in network.state_dict().values())
            self._counted[key] = models.parameter_count(network), state, models.multiply_adds(network, job.resolution)
        return self._counted[key]

    def of(self, job: _Job, multiply_adds: int) -> Speed:
        assumed = self._asked.multiply_adds_per_second
        if assumed is not None:
            if multiply_adds == 0:
                raise ConfigError(
                    f"{job.field}.model: the multiply-adds of {job.role.model.arch} cannot be counted; plan without --speed"
                )
            return Speed("assumed", assumed / multiply_adds / (PASSES if job.course else 1), 0.0)
        key = self._key(job)
        if key not in self._known:
            log.get().info("measuring", task=job.task, arch=job.role.model.arch, resolution=job.resolution)
            outputs, seconds = self.outputs(job), self._seconds
            if job.course:
                at_a_time = math.ceil(job.images / job.role.train.accumulate / self._asked.devices)
                self._known[key] = training_speed(job.course, outputs=outputs, batch=at_a_time, seconds=seconds)
            else:
                self._known[key] = inference_speed(job.role, outputs=outputs, batch=self._batch, seconds=seconds)
        return self._known[key]

    def core_seconds(self, job: _Job) -> float | None:
        """What an image costs a core before the network sees it."""
        if not self._pictures:
            return None
        key = f"{job.resolution, job.role.noise, job.course is not None}"
        if key not in self._cores:
            if job.course and job.task == "train":
                self._cores[key] = noise_seconds(job.course.transform, self._pictures)
            else:
                transform = EvalTransform(job.resolution, job.role.noise.crop, job.role.model.test_margin_px)
                self._cores[key] = decode_seconds(transform, job.resolution, self._pictures)
        return self._cores[key]


def _work(job: _Job, looked: dict[Part, Looked], speeds: _Speeds, asked: Asked, tasks: int) -> Work:
    role = job.role
    parameters, state, multiply_adds = speeds.counted(job)
    speed = speeds.of(job, multiply_adds)
    core_seconds = speeds.core_seconds(job)
    devices = asked.devices if job.course else min(asked.devices, tasks if job.task == "label" else 1)
    rounds = job.course.steps if job.course else 1
    images = job.images / devices  # of each device, in each round
    network_seconds = images / speed.images_per_second + speed.update_seconds
    loader_seconds = 0.0
    if core_seconds is not None:
        loader_seconds = images * core_seconds / (max(1, role.train.loader_workers) if job.course else DECODE_THREADS)
    if asked.multiply_adds_per_second is None and models.best_device().type == "cpu":
        # The network has all cores while it runs, so what is decoded meanwhile is taken from it.
        cores = len(os.sched_getaffinity(0))
        seconds = max(network_seconds + images * (core_seconds or 0) / cores, loader_seconds)
    else:
        seconds = max(network_seconds, loader_seconds)
    return Work(
        generation=job.generation,
        task=job.task,
        field=job.field,
        arch=role.model.arch,
        resolution=job.resolution,
        parameters=parameters,
        multiply_adds=multiply_adds,
        mode=speed.mode,
        steps=rounds if job.course else 0,
        labelled_batch=job.labelled if job.course else 0,
        images=rounds * job.images,
        images_per_second=images / seconds,
        seconds=rounds * seconds,
        devices=devices,
        limited_by="loader" if seconds == loader_seconds else "network",
        loader_cores=None if core_seconds is None else images * core_seconds / network_seconds,
        read_bytes_per_second=_bytes_a_round(job, looked, seconds * devices),
        network_bytes_per_step=_ring(parameters, devices) if job.course else 0,
        checkpoint_bytes=checkpoint_size(parameters, state, role.train.optimizer) if job.course else 0,
    )


def _bytes_a_round(job: _Job, looked: dict[Part, Looked], seconds: float) -> float | None:
    labelled = looked["labelled" if job.course else "heldout"].image_bytes
    pool = looked["pool"].image_bytes
    if (job.labelled and labelled is None) or (job.pool and pool is None):
        return None
    return (job.labelled * (labelled or 0) + job.pool * (pool or 0)) / seconds


def _ring(parameters: int, devices: int) -> int:
    return 2 * (devices - 1) * parameters * FLOAT_BYTES // devices


def checkpoint_size(parameters: int, state: int, optimizer: OptimizerConfig) -> int:
    """Bytes of weights and statistics, their averages, and the optimiser's state."""
    slots = {"rmsprop": 1 + (optimizer.momentum > 0), "sgd": int(optimizer.momentum > 0), "adamw": 2}[optimizer.name]
    return FLOAT_BYTES * (2 * state + slots * parameters)


def _pictures(looked: dict[Part, Looked]) -> tuple[Picture, ...]:
    """The pool's, of which most are read; the labelled ones if it could not be looked at."""
    return looked["pool"].pictures or looked["labelled"].pictures or looked["heldout"].pictures


def _assumed(asked: Asked) -> str:
    return f"assumed: {(asked.multiply_adds_per_second or 0) / 1e12:g} · 10¹² multiply-adds a second"
