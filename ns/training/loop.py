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
from ns.core.process import signalled
from ns.data.loading.stream import Batch, Batches, Labelled, PseudoLabelled, loader
from ns.modeling import factory as models
from ns.modeling.distributed import ALONE, World
from ns.modeling.manifest import MEAN, STD
from ns.modeling.precision import Mode, Workload, choose, supported, workable
from ns.storage import Store
from ns.training import checkpoint
from ns.training.checkpoint import State
from ns.training.ema import Ema
from ns.training.loss import Losses, losses
from ns.training.monitor import Monitor
from ns.training.optim import make_optimizer
from ns.training.plan import Course

HISTORY_POINTS = 200


@dataclass(frozen=True)
class Trained:
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


def train(
    network: nn.Module,
    course: Course,
    labelled: Labelled,
    pseudo: PseudoLabelled | None,
    *,
    classes: int,
    seed: int,
    checkpoints: Store,
    world: World = ALONE,
    monitor: Monitor | None = None,
) -> Trained:
    """Trains `network` (fresh or warm) on labelled and, for a student, pseudo-labelled images. Continues from the newest
    checkpoint in `checkpoints`, bit for bit on the CPU, and leaves a checkpoint behind when asked to stop.

    All processes of `world` call this with the same arguments; the first one writes. `monitor` shows how it goes.

    Raises TrainingError when the loss is not finite or memory does not suffice, Interrupted after SIGTERM or SIGINT.
    """
    device = models.best_device()
    if device.type == "cpu":
        keep_freed_memory()
    config, steps = course.train, course.steps
    pseudo_batch = config.pseudo_batch if pseudo else 0
    images_a_step = config.labelled_batch + pseudo_batch
    _refuse_unequal_parts(config, pseudo_batch, world)

    network = network.to(device)
    normalize = models.Normalize(MEAN, STD).to(device)
    optimizer = make_optimizer(network, config.optimizer)
    state = State(network, Ema(network, config.ema_decay), optimizer)
    workload = training_workload(network, course.role, images_a_step // config.accumulate // world.size)
    if checkpoint.restore(checkpoints, state):
        begun = state.mode
        state.mode = Mode.parse(world.first_says(lambda: str(workable(workload, begun))))
        log.get().info("training continues", step=state.step, of=steps, mode=str(state.mode))
        if state.mode != begun:
            log.get().warning(
                "cannot compile here: what comes out is equal to rounding only", mode=str(state.mode), begun=str(begun)
            )
    else:
        images = steps * images_a_step // world.size
        asked = config.precision
        state.run_in(Mode.parse(world.first_says(lambda: str(_mode(asked, workload, images=images, alone=world.size == 1)))))
    if len(set(everyones := world.everyones(state.step))) > 1:
        raise TrainingError(f"processes found different checkpoints in {checkpoints.uri}: of steps {everyones}; start again")
    mode, scaler = state.mode, state.scaler
    forward = world.share(network, mode.prepare)

    batches = Batches(
        labelled,
        pseudo if pseudo_batch else None,
        course.transform,
        batch=config.labelled_batch,
        pseudo_batch=pseudo_batch,
        classes=classes,
        seed=seed,
        rank=world.rank,
        world=world.size,
    )
    cuda = device.type == "cuda"
    source = loader(batches, start=state.step, stop=steps, workers=config.loader_workers, pin_memory=cuda)
    waiting = _Waiting(source)
    record = _Record(
        state, world, every=max(1, math.ceil(steps / HISTORY_POINTS)), images_a_step=images_a_step, student=pseudo_batch > 0
    )
    started = saved = time.monotonic()
    before = state.seconds
    rate = 0.0

    network.train()
    for name in course.still:
        network.get_submodule(name).eval()
    with (
        _stop_signals() as stop,
        _dead_loaders(stop),
        _memory_explained(course.role),
        monitor or Monitor() as watching,
        checkpoint.Writer(checkpoints, config.checkpoints_kept) as writer,
    ):
        watching.begin(step=state.step, steps=steps, images_a_step=images_a_step, checkpoint_seconds=config.checkpoint_seconds)

        def check() -> None:
            if (broken := record.broken()) is not None:
                raise _not_finite(broken, course.rate(broken), batches.keys(broken), seed, watching)

        for batch in waiting:
            # Dropout and stochastic depth follow from (seed, step), like the data: a resumed step draws the same noise.
            # Processes draw apart from each other.
            torch.manual_seed(seed * 1_000_003 + state.step + (world.rank << 48))
            rate = course.rate(state.step)
            for group in optimizer.param_groups:
                group["lr"] = rate

            optimizer.zero_grad(set_to_none=True)
            for last, part in split(batch, config.accumulate):
                images = normalize(part.images.to(device, non_blocking=True))  # [B+U, 3, H, W] float32
                labels = part.labels.to(device, non_blocking=True)
                targets = part.targets.to(device, non_blocking=True)
                with world.gathering(forward, last):
                    with mode.autocast(device):
                        logits = forward(images)
                    logits = logits.float()[:, :classes]  # [B+U, C]
                    loss = losses(logits, labels, targets, config)
                    scaler.scale(loss.total / config.accumulate).backward()  # type: ignore[no-untyped-call]
                record.measure(loss, logits, labels, targets, share=1 / config.accumulate)
            if config.optimizer.clip_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            state.ema.update(state.step)

            state.step += 1
            if record.count():
                check()
                record.close(rate)
                watching.pointed(state.history)
            now = time.monotonic()
            state.seconds = before + now - started
            watching.stepped(state.step, waiting.seconds)
            stopping, saving = world.any(stop.is_set(), now - saved >= config.checkpoint_seconds)
            if stopping or saving:
                check()  # a checkpoint must be worth coming back to
                if world.first:
                    writer.save(state)
                saved = time.monotonic()
                watching.saved()
            if stopping:
                if world.first:
                    writer.flush()
                world.wait()
                raise Interrupted(f"stopped at step {state.step} of {steps}; the same command continues there")
        check()

    weights = {name: value.detach().cpu() for name, value in state.ema.shadow.items()}
    return Trained(weights, state.step, state.history, state.seconds, waiting.seconds, str(mode))


class _Waiting:
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


def training_workload(network: nn.Module, role: RoleConfig, batch: int) -> Workload:
    """What a network does in a step, to be measured."""
    device = next(network.parameters()).device
    return Workload("train", network, batch, role.model.resolution, device, models.description(role.model))


def _mode(precision: str, workload: Workload, *, images: int, alone: bool) -> Mode:
    """The mode that a configuration asks for, if it works here, or the fastest. What compiling saves is only known of a process alone."""
    if precision == "auto":
        return choose(workload, images=images if alone else 0)
    mode = Mode.parse(precision)
    if mode.precision not in supported(workload.device):
        raise ConfigError(f"train.precision: invalid value {precision!r} on {workload.device.type}: float16 needs a GPU")
    return workable(workload, mode)


def _refuse_unequal_parts(config: TrainConfig, pseudo_batch: int, world: World) -> None:
    parts = config.accumulate * world.size
    for name, images in (("labelled", config.labelled_batch), ("pseudo-labelled", pseudo_batch)):
        if images % parts:
            raise ConfigError(
                f"train.labelled_batch: invalid value {config.labelled_batch}: a step's {images} {name} images must be a multiple "
                f"of processes × train.accumulate, {world.size} × {config.accumulate}, so that all have equal parts"
            )


def split(batch: Batch, parts: int) -> Iterator[tuple[bool, Batch]]:
    """Equal parts of a batch, each with its share of labelled images first and of pseudo-labelled ones after them, and whether
    it is the last one.

    Means over the parts' losses are means over the batch. Raises ValueError if they cannot be equal.
    """
    if parts == 1:
        yield True, batch
        return
    labelled, pseudo = len(batch.labels), len(batch.targets)
    if labelled % parts or pseudo % parts:
        raise ValueError(f"{labelled} labelled and {pseudo} pseudo-labelled images cannot be split into {parts} equal parts")
    images = zip(batch.images[:labelled].chunk(parts), batch.images[labelled:].tensor_split(parts), strict=True)
    rest = zip(images, batch.labels.chunk(parts), batch.targets.tensor_split(parts), strict=True)
    for number, (both, labels, targets) in enumerate(rest, 1):
        yield number == parts, Batch(torch.cat(both), labels, targets)


class _Record:
    """Means of what a step measures, over all processes, gathered on the device and read back once a point."""

    def __init__(self, state: State, world: World, *, every: int, images_a_step: int, student: bool) -> None:
        self._state = state
        self._world = world
        self._student = student
        self._every = every
        self._images_a_step = images_a_step
        self._step: Tensor | None = None
        self._broken: Tensor | None = None

    def measure(self, loss: Losses, logits: Tensor, labels: Tensor, targets: Tensor, *, share: float) -> None:
        """Adds what one part of a batch, `share` of it, says."""
        with torch.no_grad():
            predicted = logits.argmax(1)
            correct = (predicted[: len(labels)] == labels).float().mean()
            agree = predicted[len(labels) :] == targets.argmax(1)
            agreement = agree.float().mean() if len(targets) else torch.zeros_like(correct)
            values = torch.stack([loss.total.detach(), loss.labelled, loss.pseudo, correct, agreement]) * share
        self._step = values if self._step is None else self._step + values

    def count(self) -> bool:
        """Ends a step. Whether a point is due."""
        state = self._state
        assert self._step is not None
        values, self._step = self._world.mean(self._step), None
        if self._broken is None:
            self._broken = torch.tensor(-1, device=values.device)
        # Which step was the first: remembered on the device, for asking it at every step would hold a GPU up.
        self._broken = torch.where((self._broken < 0) & ~values[0].isfinite(), state.step - 1, self._broken)
        state.sums = values if state.sums is None else state.sums.to(values.device) + values
        state.counted += 1
        return state.step % self._every == 0

    def broken(self) -> int | None:
        """The first step, counted from 0, whose loss was not finite."""
        step = -1 if self._broken is None else int(self._broken)
        return step if step >= 0 else None

    def close(self, rate: float) -> None:
        """Makes a point of the history of the steps since the one before."""
        state = self._state
        assert state.sums is not None
        total, labelled, pseudo, correct, agreement = (state.sums / state.counted).tolist()
        state.sums, state.counted = None, 0
        point = {
            "step": float(state.step),
            "images": float(state.step * self._images_a_step),
            "processes": float(self._world.size),
            "loss": total,
            "loss_labelled": labelled,
            "accuracy_labelled": correct,
            "lr": rate,
        }
        if self._student:
            point |= {"loss_pseudo": pseudo, "agreement": agreement}
        state.history.append(point)


def _not_finite(step: int, rate: float, keys: list[list[str]], seed: int, monitor: Monitor) -> TrainingError:
    """Says so, and leaves what it takes to look at that step again."""
    names = dict(zip(("labelled", "pseudo_labelled"), keys, strict=False))
    # Images, noise and order follow from (seed, step): the step comes again whenever training continues before it.
    place = monitor.keep("not-finite.json", {"step": step, "learning_rate": rate, "seed": seed, **names})
    return TrainingError(
        f"the loss was not finite in step {step} at learning rate {rate:.3g}; "
        + (f"its images are listed in {place}; " if place else "")
        + "lower train.optimizer.lr, or set train.optimizer.clip_norm"
    )


@contextmanager
def _memory_explained(role: RoleConfig) -> Iterator[None]:
    """Says which settings to lower when memory does not suffice for a step."""
    try:
        yield
    except RuntimeError as error:  # torch's own error for GPUs is one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        train = role.train
        raise TrainingError(
            f"out of memory with {train.labelled_batch} labelled images a step, unlabelled_ratio {train.unlabelled_ratio:g}, "
            f"{role.model.resolution} px, in {train.accumulate} part{'s' * (train.accumulate > 1)}: "
            f"raise train.accumulate (to {2 * train.accumulate}), or lower train.labelled_batch or model.resolution"
        ) from error


@contextmanager
def _dead_loaders(stop: threading.Event) -> Iterator[None]:
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
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that training stops between steps, with a checkpoint."""
    stop = threading.Event()
    with signalled(lambda *_: stop.set()):
        yield stop
