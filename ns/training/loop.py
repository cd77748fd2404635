"""The training loop: batch → noise → forward → loss → backward → step → EMA → record."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ns.config.schema import RoleConfig, TrainConfig
from ns.core import log
from ns.core.errors import ConfigError, Interrupted, TrainingError
from ns.core.malloc import keep_freed_memory
from ns.core.process import handle_signals
from ns.data.loading.stream import Batch, LabeledImages, PseudoLabeledImages, TrainingBatches, iterate_batches
from ns.modeling import factory as models
from ns.modeling.distributed import SINGLE, World
from ns.modeling.manifest import MEAN, STD
from ns.modeling.precision import PrecisionMode, Workload, choose, list_supported_precisions, workable
from ns.storage import Store
from ns.training import checkpoint
from ns.training.checkpoint import TrainingState
from ns.training.ema import Ema
from ns.training.loss import Losses, compute_losses
from ns.training.monitor import Monitor
from ns.training.optim import make_optimizer
from ns.training.plan import TrainingPlan

HISTORY_POINTS = 200


@dataclass(frozen=True)
class TrainingResult:
    weights: dict[str, Tensor]
    """The averaged weights, on the CPU."""
    steps: int
    history: list[dict[str, float]]
    """At most HISTORY_POINTS points; each is a mean since the one before."""
    seconds: float
    waited_seconds: float
    """Of these, since the last start, spent waiting for images."""
    mode: str
    """How the network was run (`ns.modeling.precision.Mode`)."""


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
    """Trains `network` (fresh or warm) on labeled and, for a student, pseudo-labeled images. Continues from the newest
    checkpoint in `checkpoints`, bit for bit on the CPU, and leaves a checkpoint behind when asked to stop.

    All processes of `world` call this with the same arguments; the first one writes. `monitor` shows how it goes.

    Raises TrainingError when the loss is not finite or memory does not suffice, Interrupted after SIGTERM or SIGINT.
    """
    device = models.get_best_device()
    if device.type == "cpu":
        keep_freed_memory()
    config, steps = plan.train_config, plan.steps
    pseudo_batch = config.pseudo_batch if pseudo else 0
    images_per_step = config.labeled_batch + pseudo_batch
    _check_rank_parts(config, pseudo_batch, world)

    network = network.to(device)
    normalize = models.Normalize(MEAN, STD).to(device)
    optimizer = make_optimizer(network, config.optimizer)
    state = TrainingState(network, Ema(network, config.ema_decay), optimizer)
    workload = make_training_workload(network, plan.role, images_per_step // config.accumulate // world.world_size)
    if checkpoint.restore_state(checkpoints, state):
        saved_mode = state.mode
        state.mode = PrecisionMode.parse(world.broadcast(lambda: str(workable(workload, saved_mode))))
        log.get_logger().info("training continues", step=state.step, of=steps, mode=str(state.mode))
        if state.mode != saved_mode:
            log.get_logger().warning(
                "cannot compile here: what comes out is equal to rounding only", mode=str(state.mode), begun=str(saved_mode)
            )
    else:
        images = steps * images_per_step // world.world_size
        precision = config.precision
        state.set_mode(
            PrecisionMode.parse(
                world.broadcast(lambda: str(_resolve_mode(precision, workload, images=images, is_single=world.world_size == 1)))
            )
        )
    if len(set(rank_steps := world.all_gather(state.step))) > 1:
        raise TrainingError(f"processes found different checkpoints in {checkpoints.uri}: of steps {rank_steps}; start again")
    mode, scaler = state.mode, state.scaler
    forward = world.wrap_ddp(network, mode.prepare_network)

    batches = TrainingBatches(
        labeled,
        pseudo if pseudo_batch else None,
        plan.transform,
        batch_size=config.labeled_batch,
        pseudo_batch_size=pseudo_batch,
        num_classes=classes,
        seed=seed,
        rank=world.rank,
        world_size=world.world_size,
    )
    cuda = device.type == "cuda"
    source = iterate_batches(batches, start=state.step, stop=steps, workers=config.loader_workers, pin_memory=cuda)
    timed_batches = _TimedBatches(source)
    metrics = _MetricAccumulator(
        state,
        world,
        log_every=max(1, math.ceil(steps / HISTORY_POINTS)),
        images_per_step=images_per_step,
        is_student=pseudo_batch > 0,
    )
    started = saved_at = time.monotonic()
    seconds_before = state.seconds
    lr = 0.0

    network.train()
    for name in plan.frozen_batchnorms:
        network.get_submodule(name).eval()
    with (
        _catch_stop_signals() as stop,
        _explain_dead_loaders(stop),
        _explain_out_of_memory(plan.role),
        monitor or Monitor() as active_monitor,
        checkpoint.CheckpointWriter(checkpoints, config.checkpoints_kept) as writer,
    ):
        active_monitor.on_train_start(
            step=state.step, steps=steps, images_per_step=images_per_step, checkpoint_seconds=config.checkpoint_seconds
        )

        def check_finite() -> None:
            if (bad_step := metrics.first_nonfinite()) is not None:
                raise _make_nonfinite_error(bad_step, plan.lr_at(bad_step), batches.list_keys(bad_step), seed, active_monitor)

        for batch in timed_batches:
            # Dropout and stochastic depth follow from (seed, step), like the data: a resumed step draws the same noise.
            # Processes draw apart from each other.
            torch.manual_seed(seed * 1_000_003 + state.step + (world.rank << 48))
            lr = plan.lr_at(state.step)
            for group in optimizer.param_groups:
                group["lr"] = lr

            optimizer.zero_grad(set_to_none=True)
            for last, part in split_batch(batch, config.accumulate):
                images = normalize(part.images.to(device, non_blocking=True))  # [B+U, 3, H, W] float32
                class_ids = part.class_ids.to(device, non_blocking=True)
                targets = part.targets.to(device, non_blocking=True)
                with world.sync_grads_on(forward, last):
                    with mode.autocast(device):
                        logits = forward(images)
                    logits = logits.float()[:, :classes]  # [B+U, C]
                    loss = compute_losses(logits, class_ids, targets, config)
                    scaler.scale(loss.total / config.accumulate).backward()  # type: ignore[no-untyped-call]
                metrics.update(loss, logits, class_ids, targets, share=1 / config.accumulate)
            if config.optimizer.clip_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            state.ema.update(state.step)

            state.step += 1
            if metrics.end_step():
                check_finite()
                metrics.log_point(lr)
                active_monitor.on_log(state.history)
            now = time.monotonic()
            state.seconds = seconds_before + now - started
            active_monitor.on_step_end(state.step, timed_batches.seconds)
            must_stop, must_save = world.any_rank(stop.is_set(), now - saved_at >= config.checkpoint_seconds)
            if must_stop or must_save:
                check_finite()  # a checkpoint must be worth coming back to
                if world.is_main:
                    writer.save(state)
                saved_at = time.monotonic()
                active_monitor.on_checkpoint()
            if must_stop:
                if world.is_main:
                    writer.wait_for_write()
                world.barrier()
                raise Interrupted(f"stopped at step {state.step} of {steps}; the same command continues there")
        check_finite()

    weights = {name: value.detach().cpu() for name, value in state.ema.shadow.items()}
    return TrainingResult(weights, state.step, state.history, state.seconds, timed_batches.seconds, str(mode))


class _TimedBatches:
    """Passes batches on, and adds up the seconds that the loop waited for them."""

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


def make_training_workload(network: nn.Module, role: RoleConfig, batch: int) -> Workload:
    """What a network does in a step, to be measured."""
    device = next(network.parameters()).device
    return Workload("train", network, batch, role.model.resolution, device, models.describe_architecture(role.model))


def _resolve_mode(precision: str, workload: Workload, *, images: int, is_single: bool) -> PrecisionMode:
    """The mode that a configuration asks for, if it works here, or the fastest. What compiling saves is only known of a process alone."""
    if precision == "auto":
        return choose(workload, images=images if is_single else 0)
    mode = PrecisionMode.parse(precision)
    if mode.precision not in list_supported_precisions(workload.device):
        raise ConfigError(f"train.precision: invalid value {precision!r} on {workload.device.type}: float16 needs a GPU")
    return workable(workload, mode)


def _check_rank_parts(config: TrainConfig, pseudo_batch: int, world: World) -> None:
    parts = config.accumulate * world.world_size
    for name, images in (("labeled", config.labeled_batch), ("pseudo-labeled", pseudo_batch)):
        if images % parts:
            raise ConfigError(
                f"train.labeled_batch: invalid value {config.labeled_batch}: a step's {images} {name} images must be a multiple "
                f"of processes × train.accumulate, {world.world_size} × {config.accumulate}, so that all have equal parts"
            )


def split_batch(batch: Batch, parts: int) -> Iterator[tuple[bool, Batch]]:
    """Equal parts of a batch, each with its share of labeled images first and of pseudo-labeled ones after them, and whether
    it is the last one.

    Means over the parts' losses are means over the batch. Raises ValueError if they cannot be equal.
    """
    if parts == 1:
        yield True, batch
        return
    labeled, pseudo = len(batch.class_ids), len(batch.targets)
    if labeled % parts or pseudo % parts:
        raise ValueError(f"{labeled} labeled and {pseudo} pseudo-labeled images cannot be split into {parts} equal parts")
    images = zip(batch.images[:labeled].chunk(parts), batch.images[labeled:].tensor_split(parts), strict=True)
    rest = zip(images, batch.class_ids.chunk(parts), batch.targets.tensor_split(parts), strict=True)
    for number, (both, class_ids, targets) in enumerate(rest, 1):
        yield number == parts, Batch(torch.cat(both), class_ids, targets)


class _MetricAccumulator:
    """Means of what a step measures, over all processes, gathered on the device and read back once a point."""

    def __init__(self, state: TrainingState, world: World, *, log_every: int, images_per_step: int, is_student: bool) -> None:
        self._state = state
        self._world = world
        self._is_student = is_student
        self._log_every = log_every
        self._images_per_step = images_per_step
        self._step_sums: Tensor | None = None
        self._bad_step: Tensor | None = None

    def update(self, loss: Losses, logits: Tensor, class_ids: Tensor, targets: Tensor, *, share: float) -> None:
        """Adds what one part of a batch, `share` of it, says."""
        with torch.no_grad():
            predicted = logits.argmax(1)
            correct = (predicted[: len(class_ids)] == class_ids).float().mean()
            agree = predicted[len(class_ids) :] == targets.argmax(1)
            agreement = agree.float().mean() if len(targets) else torch.zeros_like(correct)
            values = torch.stack([loss.total.detach(), loss.labeled, loss.pseudo, correct, agreement]) * share
        self._step_sums = values if self._step_sums is None else self._step_sums + values

    def end_step(self) -> bool:
        """Ends a step. Whether a point is due."""
        state = self._state
        assert self._step_sums is not None
        values, self._step_sums = self._world.all_reduce_mean(self._step_sums), None
        if self._bad_step is None:
            self._bad_step = torch.tensor(-1, device=values.device)
        # Which step was the first: remembered on the device, for asking it at every step would hold a GPU up.
        self._bad_step = torch.where((self._bad_step < 0) & ~values[0].isfinite(), state.step - 1, self._bad_step)
        state.metric_sums = values if state.metric_sums is None else state.metric_sums.to(values.device) + values
        state.summed_steps += 1
        return state.step % self._log_every == 0

    def first_nonfinite(self) -> int | None:
        """The first step, counted from 0, whose loss was not finite."""
        step = -1 if self._bad_step is None else int(self._bad_step)
        return step if step >= 0 else None

    def log_point(self, lr: float) -> None:
        """Makes a point of the history of the steps since the one before."""
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


def _make_nonfinite_error(step: int, lr: float, keys: list[list[str]], seed: int, monitor: Monitor) -> TrainingError:
    """Says so, and leaves what it takes to look at that step again."""
    keys_by_kind = dict(zip(("labeled", "pseudo_labeled"), keys, strict=False))
    # Images, noise and order follow from (seed, step): the step comes again whenever training continues before it.
    uri = monitor.write_document("not-finite.json", {"step": step, "learning_rate": lr, "seed": seed, **keys_by_kind})
    return TrainingError(
        f"the loss was not finite in step {step} at learning rate {lr:.3g}; "
        + (f"its images are listed in {uri}; " if uri else "")
        + "lower train.optimizer.lr, or set train.optimizer.clip_norm"
    )


@contextmanager
def _explain_out_of_memory(role: RoleConfig) -> Iterator[None]:
    """Says which settings to lower when memory does not suffice for a step."""
    try:
        yield
    except RuntimeError as error:  # torch's own error for GPUs is one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        train = role.train
        raise TrainingError(
            f"out of memory with {train.labeled_batch} labeled images a step, unlabeled_ratio {train.unlabeled_ratio:g}, "
            f"{role.model.resolution} px, in {train.accumulate} part{'s' * (train.accumulate > 1)}: "
            f"raise train.accumulate (to {2 * train.accumulate}), or lower train.labeled_batch or model.resolution"
        ) from error


@contextmanager
def _explain_dead_loaders(stop: threading.Event) -> Iterator[None]:
    """Says in one line that a data loader's process was killed: torch raises that in the middle of whatever is being done."""
    try:
        yield
    except RuntimeError as error:
        # An error of a worker's own says "Caught … in DataLoader worker process".
        if "DataLoader worker (pid" not in str(error):
            raise
        if stop.is_set():
            # A signal to the whole process group. The step under way is lost, and with it the state of this moment.
            raise Interrupted(
                "stopped together with its data loaders; the same command continues from the last checkpoint"
            ) from error
        shared = "for want of shared memory: give the container more /dev/shm"
        memory = shared if "Bus error" in str(error) else "most often for want of memory"
        raise TrainingError(f"a data loader's process was killed, {memory}; lower train.loader_workers or the batch") from error


@contextmanager
def _catch_stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that training stops between steps, with a checkpoint."""
    stop = threading.Event()
    with handle_signals(lambda *_: stop.set()):
        yield stop
