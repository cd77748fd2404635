"""The training loop: batch → noise → forward → loss → backward → step → EMA → record."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ns.config.schema import RoleConfig, TrainConfig
from ns.core import log
from ns.core.errors import ConfigError, Interrupted, TrainingError
from ns.core.malloc import keep_freed_memory
from ns.core.process import handle_signals
from ns.data.loading.shared_memory import StepShape, StepSplit, measure_available, split_step
from ns.data.loading.stream import (
    Batch,
    LabeledImages,
    MixedLabels,
    PseudoLabeledImages,
    TrainingBatches,
    copy_ahead,
    iterate_batches,
)
from ns.modeling import factory as models
from ns.modeling.distributed import SINGLE, World
from ns.modeling.network_noise import FirstImagesNoise, confine_drop_paths
from ns.modeling.precision import PrecisionMode, can_compile, resolve_mode, warn_if_emulated
from ns.storage import Store
from ns.training import checkpoint
from ns.training.checkpoint import TrainingState
from ns.training.ema import Ema
from ns.training.loss import Losses, compute_losses, find_main_labels, sum_loss_weights
from ns.training.monitor import Monitor
from ns.training.optim import compute_peak_rate, make_optimizer
from ns.training.plan import TrainingPlan, freeze_layers

HISTORY_POINTS = 200


@dataclass(frozen=True)
class TrainingResult:
    weights: dict[str, Tensor]
    """The averaged weights, on the CPU."""
    steps: int
    history: list[dict[str, float]]
    """At most HISTORY_POINTS points, each a mean over the steps since the point before."""
    seconds: float
    """Seconds of training, interruptions left out."""
    waited_seconds: float
    """Seconds spent waiting for images since the last start."""
    mode: str
    """`str` of the `PrecisionMode` that the network ran in."""


def train_model(
    network: nn.Module,
    plan: TrainingPlan,
    labeled: LabeledImages,
    pseudo: PseudoLabeledImages | None,
    *,
    classes: int,
    seed: int,
    checkpoints: Store,
    world: World = SINGLE,
    monitor: Monitor | None = None,
) -> TrainingResult:
    """Trains `network`, fresh or warm, on labeled images and, for a student, on pseudo-labeled ones.

    Continues from the newest checkpoint in `checkpoints`, on the CPU bit for bit, and leaves a checkpoint behind when asked to stop.
    All processes of `world` call this with the same arguments; the main one writes.

    Raises TrainingError if the loss is not finite or memory does not suffice, Interrupted after SIGTERM or SIGINT.
    """
    device = models.get_best_device()
    if device.type == "cpu":
        keep_freed_memory()
    config, steps = plan.train_config, plan.steps
    pseudo_batch = config.pseudo_batch if pseudo else 0
    images_per_step = config.labeled_batch + pseudo_batch
    _check_rank_parts(config, world, is_student=pseudo_batch > 0)

    network = network.to(device)
    confines_noise = plan.role.noise.pool == "none" and pseudo_batch > 0
    if confines_noise:
        confine_drop_paths(network)
    # Before layers are frozen: it must know all of them when they learn again.
    optimizer = make_optimizer(network, config.optimizer, compute_peak_rate(config.optimizer, config.labeled_batch))
    state = TrainingState(network, Ema(network, config.ema_decay), optimizer)
    _restore_or_begin(state, checkpoints, world, config=config, steps=steps, device=device)
    is_frozen = plan.frozen_share > 0 and (plan.unfreeze_step is None or state.step < plan.unfreeze_step)
    frozen_batchnorms = freeze_layers(network, plan.frozen_share) if is_frozen else ()
    forward = world.wrap_ddp(network, state.mode.prepare_network)
    normalize = models.Normalize(plan.role.model.mean, plan.role.model.std).to(device)
    batches = TrainingBatches(
        labeled,
        pseudo if pseudo_batch else None,
        plan.transform,
        pseudo_transform=plan.pseudo_transform,
        batch_size=config.labeled_batch,
        pseudo_batch_size=pseudo_batch,
        num_classes=classes,
        seed=seed,
        rank=world.rank,
        world_size=world.world_size,
    )
    loaded_batches = iterate_batches(
        batches,
        start=state.step,
        stop=steps,
        workers=config.loader_workers,
        pin_memory=device.type == "cuda",
        split=_split_steps(batches, plan, classes, world),
    )
    timed_batches = _TimedBatches(copy_ahead(loaded_batches, device))
    metrics = _MetricAccumulator(
        state,
        world,
        log_every=max(1, math.ceil(steps / HISTORY_POINTS)),
        images_per_step=images_per_step,
        is_student=pseudo_batch > 0,
    )

    network.train()
    for name in frozen_batchnorms:
        network.get_submodule(name).eval()
    stop = threading.Event()
    with (
        # Outermost: torch may raise it once more while the others end.
        _explain_dead_loaders(stop),
        handle_signals(lambda *_: stop.set()),  # training stops between steps, with a checkpoint
        _explain_out_of_memory(plan.role),
        monitor or Monitor() as active_monitor,
        checkpoint.CheckpointWriter(checkpoints, config.checkpoints_kept) as writer,
    ):
        active_monitor.on_train_start(
            step=state.step, steps=steps, images_per_step=images_per_step, checkpoint_seconds=config.checkpoint_seconds
        )
        recorder = _StepRecorder(state, plan, world, metrics, batches, active_monitor, writer, stop, seed)
        for batch in timed_batches:
            # Dropout and stochastic depth follow from (seed, step), like the data: a resumed step draws the same noise.
            # Each rank draws its own.
            torch.manual_seed(seed * 1_000_003 + state.step + (world.rank << 48))
            lr = plan.lr_at(state.step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1)
            if is_frozen and state.step == plan.unfreeze_step:
                network.requires_grad_(True).train()
                # Gradients are summed over the processes for what needed them when it was wrapped.
                forward, is_frozen = world.wrap_ddp(network, state.mode.prepare_network), False

            optimizer.zero_grad(set_to_none=True)
            for is_last, part in split_batch(batch, config.accumulate):
                images = normalize(part.images)  # [B+U, 3, H, W] float32
                class_ids, targets, mixed = part.class_ids, part.targets, part.mixed  # [B] int64, [U, C] float32
                with world.sync_grads_on(forward, is_last):
                    noise = FirstImagesNoise(len(class_ids), len(images)) if confines_noise else nullcontext()
                    with state.mode.autocast(device), noise:
                        logits = forward(images)
                    logits = logits.float()[:, :classes]  # [B+U, C] float32
                    loss = compute_losses(logits, class_ids, targets, config, mixed)
                    state.scaler.scale(loss.total / config.accumulate).backward()  # type: ignore[no-untyped-call]
                metrics.update(loss, logits, *find_main_labels(class_ids, targets, mixed), share=1 / config.accumulate)
            if config.optimizer.clip_norm is not None:
                state.scaler.unscale_(optimizer)
                # The limit is that of a mean over images: teachers and students are clipped alike.
                scale = sum_loss_weights(config, pseudo_batch / config.labeled_batch)
                nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_norm * scale)
            state.scaler.step(optimizer)
            state.scaler.update()
            state.ema.update(state.step)
            state.step += 1
            recorder.end_step(lr, timed_batches.seconds)
        recorder.check_finite()

    weights = {name: value.detach().cpu() for name, value in state.ema.shadow.items()}
    return TrainingResult(weights, state.step, state.history, state.seconds, timed_batches.seconds, str(state.mode))


def _restore_or_begin(
    state: TrainingState, checkpoints: Store, world: World, *, config: TrainConfig, steps: int, device: torch.device
) -> None:
    """Loads the newest checkpoint, or chooses the precision of a training that begins.

    Raises TrainingError if the processes found different checkpoints.
    """
    if checkpoint.restore_state(checkpoints, state):
        warn_if_emulated(state.mode.precision, device)
        state.mode = state.mode._replace(compiled=state.mode.compiled and can_compile(device))
        log.get_logger().info("training continues", step=state.step, of=steps, mode=str(state.mode))
    else:
        state.set_mode(PrecisionMode.parse(world.broadcast(lambda: str(_resolve_training_mode(config, device)))))
    if len(set(rank_steps := world.all_gather(state.step))) > 1:
        raise TrainingError(f"processes found different checkpoints in {checkpoints.uri}: of steps {rank_steps}; start again")


@dataclass
class _StepRecorder:
    """What follows a step: its record, and a checkpoint when one is due."""

    state: TrainingState
    plan: TrainingPlan
    world: World
    metrics: "_MetricAccumulator"
    batches: TrainingBatches
    monitor: Monitor
    writer: checkpoint.CheckpointWriter
    stop: threading.Event
    seed: int

    def __post_init__(self) -> None:
        self._started = self._saved_at = time.monotonic()
        self._seconds_before = self.state.seconds

    def end_step(self, lr: float, waited_seconds: float) -> None:
        """Records the step. Raises TrainingError if a loss was not finite, Interrupted after a signal to stop."""
        if self.metrics.end_step():
            self.check_finite()
            self.metrics.log_point(lr)
            self.monitor.on_log(self.state.history)
        now = time.monotonic()
        self.state.seconds = self._seconds_before + now - self._started
        self.monitor.on_step_end(self.state.step, waited_seconds)
        is_due = now - self._saved_at >= self.plan.train_config.checkpoint_seconds
        must_stop, must_save = self.world.any_rank(self.stop.is_set(), is_due)
        if must_stop or must_save:
            self._save_checkpoint()
        if must_stop:
            if self.world.is_main:
                self.writer.wait_for_write()
            self.world.barrier()
            raise Interrupted(f"stopped at step {self.state.step} of {self.plan.steps}; the same command continues there")

    def check_finite(self) -> None:
        """Raises TrainingError if the loss of a step so far was not finite, and writes down the images of that step."""
        step = self.metrics.first_nonfinite()
        if step is None:
            return
        lr = self.plan.lr_at(step)
        keys_by_kind = dict(zip(("labeled", "pseudo_labeled"), self.batches.list_keys(step), strict=False))
        # Images, noise and order follow from (seed, step): the step comes again whenever training continues before it.
        document = {"step": step, "learning_rate": lr, "seed": self.seed, **keys_by_kind}
        uri = self.monitor.write_document("not-finite.json", document)
        raise TrainingError(
            f"the loss was not finite in step {step} at learning rate {lr:.3g}; "
            + (f"its images are listed in {uri}; " if uri else "")
            + "lower train.optimizer.lr, or set train.optimizer.clip_norm"
        )

    def _save_checkpoint(self) -> None:
        # A checkpoint of a broken state would break every later attempt.
        self.check_finite()
        if self.world.is_main:
            self.writer.save(self.state)
        self._saved_at = time.monotonic()
        self.monitor.on_checkpoint()


class _TimedBatches:
    """Passes batches on, and adds up the seconds that the loop waits for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.monotonic()
            batch = next(self._batches, None)
            self.seconds += time.monotonic() - started
            if batch is None:
                return
            yield batch


def _resolve_training_mode(config: TrainConfig, device: torch.device) -> PrecisionMode:
    if config.precision == "float16" and device.type != "cuda":
        raise ConfigError(f"train.precision: invalid value 'float16' on {device.type}: float16 needs a GPU")
    return resolve_mode(config.precision, compiled=config.compile, task="train", device=device)


def _check_rank_parts(config: TrainConfig, world: World, *, is_student: bool) -> None:
    """Raises ConfigError unless the images of each step can be divided equally, also those of the fine-tuning, which comes last."""
    parts = config.accumulate * world.world_size
    labeled, tuned = config.labeled_batch, config.finetune and config.finetune.labeled_batch
    batches = [("labeled_batch", labeled, labeled, "labeled")]
    if is_student:
        batches.append(("labeled_batch", labeled, config.pseudo_batch, "pseudo-labeled"))
    if tuned:
        batches.append(("finetune.labeled_batch", tuned, tuned, "labeled"))
    for field, value, images, kind in batches:
        if images % parts:
            raise ConfigError(
                f"train.{field}: invalid value {value}: a step's {images} {kind} images must be a multiple "
                f"of processes × train.accumulate, {world.world_size} × {config.accumulate}, so that all have equal parts"
            )


def _split_steps(batches: TrainingBatches, plan: TrainingPlan, classes: int, world: World) -> StepSplit:
    """How the loaders of this process make the images of a step, so that `/dev/shm` suffices for all processes of this machine."""
    shape = StepShape(*batches.count_images(), plan.role.model.resolution, classes, plan.role.noise.mixes_images)
    workers = plan.train_config.loader_workers
    full_split, available = split_step(shape, workers), measure_available() // world.local_processes
    if full_split.bytes_in_flight <= available:
        return full_split
    split = split_step(shape, workers, available)
    log.get_logger().warning(
        "little shared memory: fewer images are made ahead",
        usable_mb=round(available / 1e6),
        full_mb=round(full_split.bytes_in_flight / 1e6),
        cure="give the container more /dev/shm (docker run --shm-size) and memory",
    )
    return split


def split_batch(batch: Batch, parts: int) -> Iterator[tuple[bool, Batch]]:
    """Yields the equal parts of a batch, each with its labeled images first, and whether it is the last one.

    The mean over the parts' losses is the mean over the batch. Both numbers of images must be multiples of `parts`.
    """
    if parts == 1:
        yield True, batch
        return
    labeled_columns, pseudo_columns = (
        zip(*(column.tensor_split(parts) for column in columns), strict=True) for columns in batch.list_columns()
    )
    for number, (labeled, pseudo) in enumerate(zip(labeled_columns, pseudo_columns, strict=True), 1):
        (labeled_images, class_ids, *shares), (pseudo_images, targets, *pseudo_shares) = labeled, pseudo
        mixed = None
        if batch.mixed:
            mixed = MixedLabels(shares[1], pseudo_shares[1], torch.cat([shares[0], pseudo_shares[0]]))
        yield number == parts, Batch(torch.cat([labeled_images, pseudo_images]), class_ids, targets, mixed)


class _MetricAccumulator:
    """Means of what a step measures over all processes. They are added up on the device and read back once per point."""

    def __init__(self, state: TrainingState, world: World, *, log_every: int, images_per_step: int, is_student: bool) -> None:
        self._state = state
        self._world = world
        self._is_student = is_student
        self._log_every = log_every
        self._images_per_step = images_per_step
        self._step_sums: Tensor | None = None
        self._bad_step: Tensor | None = None

    def update(self, loss: Losses, logits: Tensor, class_ids: Tensor, targets: Tensor, *, share: float) -> None:
        """Adds the measurements of one part of a batch. logits float32 [B+U, C], class_ids int64 [B], targets float32 [U, C]."""
        with torch.no_grad():
            predicted = logits.argmax(1)
            correct = (predicted[: len(class_ids)] == class_ids).float().mean()
            agree = predicted[len(class_ids) :] == targets.argmax(1)
            agreement = agree.float().mean() if len(targets) else torch.zeros_like(correct)
            values = torch.stack([loss.total.detach(), loss.labeled, loss.pseudo, correct, agreement]) * share
        self._step_sums = values if self._step_sums is None else self._step_sums + values

    def end_step(self) -> bool:
        """Ends a step. Returns whether a point of the history is due."""
        state = self._state
        assert self._step_sums is not None
        values, self._step_sums = self._world.all_reduce_mean(self._step_sums), None
        if self._bad_step is None:
            self._bad_step = torch.tensor(-1, device=values.device)
        # The first bad step is remembered on the device: to read it at every step would make a GPU wait.
        self._bad_step = torch.where((self._bad_step < 0) & ~values[0].isfinite(), state.step - 1, self._bad_step)
        state.metric_sums = values if state.metric_sums is None else state.metric_sums.to(values.device) + values
        state.summed_steps += 1
        return state.step % self._log_every == 0

    def first_nonfinite(self) -> int | None:
        """The first step, counted from 0, whose loss was not finite; None if all were."""
        step = -1 if self._bad_step is None else int(self._bad_step)
        return step if step >= 0 else None

    def log_point(self, lr: float) -> None:
        """Adds a point to the history: the means over the steps since the point before."""
        state = self._state
        assert state.metric_sums is not None
        total, labeled, pseudo, correct, agreement = (state.metric_sums / state.summed_steps).tolist()
        state.metric_sums, state.summed_steps = None, 0
        point = {
            "step": float(state.step),
            "images": float(state.step * self._images_per_step),
            "processes": float(self._world.world_size),
            "loss": total,
            "loss_labeled": labeled,
            "accuracy_labeled": correct,
            "lr": lr,
        }
        if self._is_student:
            point |= {"loss_pseudo": pseudo, "agreement": agreement}
        state.history.append(point)


@contextmanager
def _explain_out_of_memory(role: RoleConfig) -> Iterator[None]:
    """Names the settings to lower if memory does not suffice for a step."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        train = role.train
        raise TrainingError(
            f"out of memory with {train.labeled_batch} labeled images per step, unlabeled_ratio {train.unlabeled_ratio:g}, "
            f"{role.model.resolution} px, in {train.accumulate} part{'s' * (train.accumulate > 1)}: "
            f"raise train.accumulate (to {2 * train.accumulate}), or lower train.labeled_batch or model.resolution"
        ) from error


@contextmanager
def _explain_dead_loaders(stop: threading.Event) -> Iterator[None]:
    """Explains in one line that a data loader's process was killed; torch raises that at any point of the loop."""
    try:
        yield
    except RuntimeError as error:
        # An error that a worker raised reads "Caught … in DataLoader worker process".
        if "DataLoader worker (pid" not in str(error):
            raise
        if stop.is_set():
            # A signal to the whole process group. The step under way is lost, so there is no state to save.
            raise Interrupted(
                "stopped together with its data loaders; the same command continues from the last checkpoint"
            ) from error
        shared = "for want of shared memory: give the container more /dev/shm"
        memory = shared if "Bus error" in str(error) else "most often for want of memory"
        raise TrainingError(f"a data loader's process was killed, {memory}; lower train.loader_workers or the batch") from error
