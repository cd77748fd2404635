"""The arithmetic of a plan: from counts and speeds to hours, bytes and cores. docs/scale.md explains it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pydantic import computed_field

from ns.config.schema import Experiment, OptimizerConfig, RoleConfig, SelectionConfig, Views
from ns.core import log
from ns.core.errors import ConfigError
from ns.core.process import count_cores
from ns.data.augment.transforms import EvalTransform
from ns.data.loading.shared_memory import StepShape, split_step
from ns.data.prepared import PART_ROLES, DataPart
from ns.evaluation.robustness.suite import count_passes
from ns.labeling.foreign import MAX_LABELED
from ns.labeling.label_set import count_kept_classes
from ns.labeling.thresholds import count_required_images
from ns.modeling.factory import (
    build_on_meta,
    check_models,
    count_model_multiply_adds,
    count_parameters,
    describe_architecture,
    get_best_device,
)
from ns.modeling.predictor import DECODE_THREADS
from ns.planning.data_stats import DataStats, KnownCounts, SampleImage, count_evaluation_images
from ns.planning.measure import (
    DECODE_SECONDS,
    DeviceSpeed,
    describe_machine,
    measure_decode_seconds,
    measure_inference_speed,
    measure_noise_seconds,
    measure_training_speed,
)
from ns.storage.documents import JsonDocument
from ns.training.plan import TrainingPlan, make_finetuning_role, plan_training

FLOAT_BYTES = 4
"""Weights, gradients, averages and the optimizer's state are float32 in every precision; so are foreign scores."""
PASSES = 3
"""Passes of a training step. A backward pass costs two forward passes: one for the weights' gradient, one for the maps'."""
LABEL_ROW_BYTES = 15
"""Size of a label row without its classes: key and confidence. Measured with zstd: 3 bytes where keys are numbers of ten digits, 15
where they are paths that end in a hash."""
LABEL_CLASS_BYTES = 4
"""A uint16 class and a float16 probability."""

VIEWS: dict[Views, int] = {"one": 1, "flip": 2, "five": 5, "ten": 10}
"""Forward passes over an image."""

TaskKind = Literal["train", "finetune", "label", "evaluate", "robustness"]


@dataclass(frozen=True)
class PlanRequest:
    """What a plan depends on besides the experiment."""

    counts: KnownCounts = field(default_factory=KnownCounts)
    devices: int = 1
    """Number of devices that train together, each like this machine's."""
    seconds: float = 30
    """Time to measure for."""
    multiply_adds_per_second: float | None = None
    """Speed of a device. If given, only decoding and noise are measured."""
    price: float | None = None
    """Price per device-hour, in any currency."""


class WorkEstimate(JsonDocument):
    """The estimate for one training, labeling or evaluation."""

    generation: int
    task: TaskKind
    field: str
    """Field of the experiment that configures the network: `teacher`, `students.0`."""
    arch: str
    resolution: int
    """px"""
    parameters: int
    multiply_adds: int
    """Multiply-adds of a forward pass over one image; 0 if they cannot be counted."""
    mode: str
    """Precision of the network; `assumed` if its speed was not measured."""
    steps: int
    """Training steps; 0 for labeling and evaluation."""
    labeled_batch: int
    """Labeled images per step; 0 for labeling and evaluation."""
    images: int
    """Images that pass through the network."""
    images_per_second: float
    """Images per second of one device, with everything counted."""
    seconds: float
    """Duration."""
    devices: int
    limited_by: Literal["network", "loader"]
    loader_cores: float | None
    """Cores per device that must decode and add noise so that the device never waits. None if no image could be read."""
    read_bytes_per_second: float | None
    """Bytes of images that each device reads per second. None if the size of images is unknown."""
    network_bytes_per_step: int
    """Bytes of gradients that each device sends, and receives, in a ring all-reduce: 2 (N - 1) / N times the weights."""
    checkpoint_bytes: int
    """Size of a training checkpoint; 0 for labeling and evaluation."""
    shared_memory_bytes: int
    """Shared memory, part of the memory, that each device's data loaders take; 0 for labeling and evaluation."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def device_hours(self) -> float:
        return self.seconds * self.devices / 3600


class RunPlan(JsonDocument):
    """What an experiment takes if every generation is run."""

    experiment: str
    machine: str
    devices: int
    labeled: int
    pool: int
    heldout: int
    """Held-out images that the gate decides on."""
    calibration: int
    """Images that thresholds and the like are found on."""
    classes: int
    work: tuple[WorkEstimate, ...]
    label_set_bytes: int
    """Largest size of a label set, of which each generation has one. With few classes it compresses well."""
    model_bytes: int
    """Size of all models together."""
    checkpoint_bytes: int
    """Largest size of all checkpoints at a time."""
    price: float | None
    selection_remarks: tuple[str, ...] = ()
    """What the counts of images say of the selection before there are labels."""

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


class _PlannedJob(NamedTuple):
    generation: int
    task: TaskKind
    field: str
    role: RoleConfig
    training_plan: TrainingPlan | None
    """None for labeling and evaluation."""
    labeled: int
    """Training: labeled images per step. Evaluation: images; for robustness, forward passes over distorted or attacked images."""
    pool: int
    """Training: pseudo-labeled images per step. Labeling: images of the pool."""
    passes: int = 1
    """Forward passes per image: more than one in labeling with several views or models."""

    @property
    def images(self) -> int:
        """Images per step in training, else all."""
        return self.labeled + self.pool

    @property
    def resolution(self) -> int:
        model = self.role.model
        return model.resolution if self.training_plan else model.inference_resolution


def estimate_run(experiment: Experiment, request: PlanRequest) -> RunPlan:
    """Counts, measures, and adds up.

    Raises ConfigError for networks that cannot be built, DataError or StoreError for data that cannot be read and has no known
    count, TrainingError if two images do not fit into this machine's memory.
    """
    uris: dict[DataPart, str | None] = {part: getattr(experiment.data, part) for part in PART_ROLES}
    stats = {part: request.counts.get_stats(part, uri) for part, uri in uris.items() if uri is not None}
    if experiment.needs_calibration and "calibration" not in stats:
        heldout = stats["heldout"]
        set_apart = round(experiment.data.calibration_share * heldout.images)
        stats["heldout"] = heldout._replace(images=heldout.images - set_apart)
        stats["calibration"] = heldout._replace(images=set_apart)
    classes = stats["labeled"].classes or request.counts.classes
    sets = {
        name: count_evaluation_images(name, set_config, experiment.evaluation)
        for name, set_config in experiment.evaluation.sets.items()
    }
    check_models(experiment, stats["labeled"].classes or None)
    jobs = list(_list_jobs(experiment, {part: part_stats.images for part, part_stats in stats.items()}, sets))
    # Most images are read from the pool.
    sample_images = stats["pool"].sample_images or stats["labeled"].sample_images or stats["heldout"].sample_images
    speeds = _SpeedMeter(jobs, request, classes, experiment.labeling.batch, sample_images)
    work = tuple(_estimate_work(job, stats, speeds, request, experiment.labeling.tasks) for job in jobs)
    row_bytes = LABEL_ROW_BYTES + LABEL_CLASS_BYTES * count_kept_classes(classes, experiment.labeling.top_k)
    if experiment.labeling.foreign_score != "none":
        row_bytes += FLOAT_BYTES
    if request.multiply_adds_per_second is None:
        machine = describe_machine(get_best_device())
    else:
        machine = f"assumed: {request.multiply_adds_per_second / 1e12:g} · 10¹² multiply-adds per second"
    return RunPlan(
        experiment=experiment.name,
        machine=machine,
        devices=request.devices,
        labeled=stats["labeled"].images,
        pool=stats["pool"].images,
        heldout=stats["heldout"].images,
        calibration=stats["calibration"].images if "calibration" in stats else 0,
        classes=classes,
        work=work,
        label_set_bytes=stats["pool"].images * row_bytes,
        model_bytes=sum(FLOAT_BYTES * estimate.parameters for estimate in work if estimate.checkpoint_bytes),
        # One is being written while the others are kept.
        checkpoint_bytes=max(
            (job.role.train.checkpoints_kept + 1) * estimate.checkpoint_bytes for job, estimate in zip(jobs, work, strict=True)
        ),
        price=request.price,
        selection_remarks=tuple(
            _describe_selection(experiment.selection, classes, {part: part_stats.images for part, part_stats in stats.items()})
        ),
    )


def _describe_selection(policy: SelectionConfig, classes: int, images: dict[DataPart, int]) -> Iterator[str]:
    pool = images["pool"] / classes
    if policy.policy != "all" and policy.per_class != "auto" and policy.repeat and policy.per_class >= 2 * pool:
        times = min(policy.max_repeat, math.floor(policy.per_class / pool))
        yield (
            f"selection.per_class: {policy.per_class:,}, but the pool has {pool:,.0f} images per class: the student sees each at least "
            f"{times} times per epoch, so classes are not balanced; `auto` balances them"
        )
    if policy.precision is not None:
        required = count_required_images(policy.precision, policy.confidence)
        calibration = images["calibration"] / classes
        if calibration < required:
            yield (
                f"selection.precision: a class needs {required:,} calibration images for a threshold of its own, and has about "
                f"{calibration:,.0f}: such classes share one"
            )


def _list_jobs(experiment: Experiment, images: dict[DataPart, int], sets: dict[str, int]) -> Iterator[_PlannedJob]:
    """The work of every generation, in the order of a run. `sets`: images of the further evaluation sets."""
    evaluation = experiment.evaluation
    clean = images["heldout"] + images.get("test", 0)
    labeling = experiment.labeling
    views, models = VIEWS[labeling.views], 1 + len(labeling.ensemble)
    rounds = models * (1 + (labeling.temperature == "fitted")) + (labeling.foreign_score != "none")
    labeled_for_calibration = images.get("calibration", 0) * views * rounds
    if labeling.foreign_score == "distance":
        labeled_for_calibration += min(MAX_LABELED, images["labeled"])
    plain = sum(count for name, count in sets.items() if evaluation.sets[name].kind == "images")
    robust = sum(sets.values()) - plain
    if evaluation.needs_robustness:
        reported = images.get("test", images["heldout"])
        robust += count_passes(evaluation) * min(reported, evaluation.images or reported)
    if experiment.gate.required_suites and "test" in images:
        robust += count_passes(experiment.gate_evaluation) * min(images["heldout"], evaluation.images or images["heldout"])

    def select_role(generation: int) -> tuple[str, RoleConfig]:
        if generation == 0:
            return "teacher", experiment.teacher
        return f"students.{min(generation, len(experiment.students)) - 1}", experiment.get_student(generation)

    def list_training_jobs(generation: int, field: str, role: RoleConfig) -> Iterator[_PlannedJob]:
        training_plan = plan_training(role, images["labeled"])
        pseudo_batch = role.train.pseudo_batch if generation else 0
        yield _PlannedJob(generation, "train", field, role, training_plan, role.train.labeled_batch, pseudo_batch)
        yield _PlannedJob(generation, "evaluate", field, role, None, clean + plain + labeled_for_calibration, 0)
        if robust:
            yield _PlannedJob(generation, "robustness", field, role, None, robust, 0)
        if role.train.finetune:
            tuned_role = make_finetuning_role(role, role.train.finetune)
            batch = tuned_role.train.labeled_batch
            steps = max(1, math.ceil(tuned_role.train.epochs * images["labeled"] / batch))
            finetune_plan = TrainingPlan(tuned_role, training_plan.transform, steps, training_plan.lr_at)
            yield _PlannedJob(generation, "finetune", field, tuned_role, finetune_plan, batch, 0)
            yield _PlannedJob(generation, "evaluate", field, tuned_role, None, clean, 0)

    yield from list_training_jobs(0, *select_role(0))
    for generation in range(1, 1 + experiment.generations):
        if generation > 1 or not labeling.label_set:
            yield _PlannedJob(generation, "label", *select_role(generation - 1), None, 0, images["pool"], views * models)
        yield from list_training_jobs(generation, *select_role(generation))
        if generation == 1 and experiment.baseline == "labeled_only":
            field, role = select_role(1)
            training_plan = plan_training(role, images["labeled"])
            yield _PlannedJob(1, "train", field, role, training_plan, role.train.labeled_batch, 0)
            yield _PlannedJob(1, "evaluate", field, role, None, clean + plain, 0)


_operations: dict[str, tuple[int, int, int]] = {}
"""What `count_operations` found, in the life of this process: building a large network takes half a second."""


class _SpeedMeter:
    """Speeds, each measured once for all jobs that do the same."""

    def __init__(
        self, jobs: list[_PlannedJob], request: PlanRequest, classes: int, batch: int, sample_images: tuple[SampleImage, ...]
    ) -> None:
        self._request = request
        self._classes = classes
        self._batch = batch
        self._sample_images = sample_images
        self._speed_by_key: dict[str, DeviceSpeed] = {}
        self._core_seconds_by_key: dict[str, float] = {}
        self._seconds = request.seconds / len({self._speed_key(job) for job in jobs})
        self._decode_seconds = min(self._seconds, DECODE_SECONDS)

    def _speed_key(self, job: _PlannedJob) -> str:
        training = job.training_plan and (job.images, job.role.train)
        return f"{job.resolution, training, describe_architecture(job.role.model)}"

    def count_outputs(self, job: _PlannedJob) -> int:
        return job.role.model.outputs or self._classes

    def count_operations(self, job: _PlannedJob) -> tuple[int, int, int]:
        """Parameters, values of the state, and multiply-adds per image."""
        outputs = self.count_outputs(job)
        key = f"{describe_architecture(job.role.model), job.resolution, outputs}"
        if key not in _operations:
            network = build_on_meta(job.role.model, job.role.noise, outputs)
            state = sum(value.numel() for value in network.state_dict().values())
            multiply_adds = count_model_multiply_adds(network, job.role.model, outputs, job.resolution)
            _operations[key] = count_parameters(network), state, multiply_adds
        return _operations[key]

    def measure_speed(self, job: _PlannedJob, multiply_adds: int) -> DeviceSpeed:
        assumed = self._request.multiply_adds_per_second
        if assumed is not None:
            if multiply_adds == 0:
                raise ConfigError(
                    f"{job.field}.model: the multiply-adds of {job.role.model.arch} cannot be counted; plan without --speed"
                )
            return DeviceSpeed("assumed", assumed / multiply_adds / (PASSES if job.training_plan else 1), 0.0)
        key = self._speed_key(job)
        if key not in self._speed_by_key:
            log.get_logger().info("measuring", task=job.task, arch=job.role.model.arch, resolution=job.resolution)
            outputs, seconds = self.count_outputs(job), self._seconds
            if job.training_plan:
                batch = math.ceil(job.images / job.role.train.accumulate / self._request.devices)
                speed = measure_training_speed(job.training_plan, outputs=outputs, batch=batch, seconds=seconds)
            else:
                speed = measure_inference_speed(job.role, outputs=outputs, batch=self._batch, seconds=seconds)
            self._speed_by_key[key] = speed
        return self._speed_by_key[key]

    def measure_core_seconds(self, job: _PlannedJob) -> float | None:
        """Seconds that a core spends on an image before the network sees it; None if no image could be read."""
        if not self._sample_images:
            return None
        pseudo_transform = job.training_plan.pseudo_transform if job.training_plan else None
        pseudo_share = job.pool / job.images if pseudo_transform else 0
        key = f"{job.resolution, job.role.noise, job.training_plan is not None, pseudo_share}"
        if key not in self._core_seconds_by_key:
            if job.training_plan and job.task == "train":
                images, decode_seconds = self._sample_images, self._decode_seconds
                seconds = measure_noise_seconds(job.training_plan.transform, images, decode_seconds)
                if pseudo_transform and pseudo_share:
                    seconds += pseudo_share * (measure_noise_seconds(pseudo_transform, images, decode_seconds) - seconds)
                self._core_seconds_by_key[key] = seconds
            else:
                transform = EvalTransform.for_model(job.role.model, resolution=job.resolution)
                self._core_seconds_by_key[key] = measure_decode_seconds(
                    transform, job.resolution, self._sample_images, self._decode_seconds
                )
        return self._core_seconds_by_key[key]


def _estimate_work(
    job: _PlannedJob, stats: dict[DataPart, DataStats], speeds: _SpeedMeter, request: PlanRequest, tasks: int
) -> WorkEstimate:
    role = job.role
    parameters, state, multiply_adds = speeds.count_operations(job)
    speed = speeds.measure_speed(job, multiply_adds)
    core_seconds = speeds.measure_core_seconds(job)
    devices = request.devices if job.training_plan else min(request.devices, tasks if job.task == "label" else 1)
    rounds = job.training_plan.steps if job.training_plan else 1
    images = job.images / devices  # per device and round
    network_seconds = job.passes * images / speed.images_per_second + speed.update_seconds
    runs_here_on_cpu = request.multiply_adds_per_second is None and get_best_device().type == "cpu"
    decode_threads = count_cores() if runs_here_on_cpu else DECODE_THREADS
    decoders = max(1, role.train.loader_workers) if job.training_plan else decode_threads
    loader_seconds = images * (core_seconds or 0.0) / decoders
    # On a CPU, the network uses all cores while it runs: decoding takes turns with it, or slows it down.
    shared_seconds = images * (core_seconds or 0.0) / count_cores() if runs_here_on_cpu else 0.0
    seconds = max(network_seconds + shared_seconds, loader_seconds)
    return WorkEstimate(
        generation=job.generation,
        task=job.task,
        field=job.field,
        arch=role.model.arch,
        resolution=job.resolution,
        parameters=parameters,
        multiply_adds=multiply_adds,
        mode=speed.mode,
        steps=rounds if job.training_plan else 0,
        labeled_batch=job.labeled if job.training_plan else 0,
        images=rounds * job.images,
        images_per_second=images / seconds,
        seconds=rounds * seconds,
        devices=devices,
        limited_by="loader" if seconds == loader_seconds else "network",
        loader_cores=None if core_seconds is None else images * core_seconds / network_seconds,
        read_bytes_per_second=_read_bytes_per_second(job, stats, seconds * devices),
        network_bytes_per_step=2 * (devices - 1) * parameters * FLOAT_BYTES // devices if job.training_plan else 0,
        checkpoint_bytes=estimate_checkpoint_bytes(parameters, state, role.train.optimizer) if job.training_plan else 0,
        shared_memory_bytes=_count_shared_memory(job, devices, speeds.count_outputs(job)) if job.training_plan else 0,
    )


def _count_shared_memory(job: _PlannedJob, devices: int, classes: int) -> int:
    labeled, pool = math.ceil(job.labeled / devices), math.ceil(job.pool / devices)
    shape = StepShape(labeled, pool, job.role.model.resolution, classes, job.role.noise.mixes_images)
    return split_step(shape, job.role.train.loader_workers).bytes_in_flight


def _read_bytes_per_second(job: _PlannedJob, stats: dict[DataPart, DataStats], seconds: float) -> float | None:
    labeled = stats["labeled" if job.training_plan else "heldout"].image_bytes
    pool = stats["pool"].image_bytes
    if (job.labeled and labeled is None) or (job.pool and pool is None):
        return None
    return (job.labeled * (labeled or 0) + job.pool * (pool or 0)) / seconds


def estimate_checkpoint_bytes(parameters: int, state: int, optimizer: OptimizerConfig) -> int:
    """Bytes of weights and statistics, their averages, and the optimizer's state. `state`: values of the network's state dict."""
    # Most of timm's keep two values per weight, as AdamW does.
    slots = {"rmsprop": 1 + (optimizer.momentum > 0), "sgd": int(optimizer.momentum > 0)}.get(optimizer.name, 2)
    return FLOAT_BYTES * (2 * state + slots * parameters)
