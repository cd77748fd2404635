"""The training loop: batch → noise → forward → loss → backward → step → EMA → record."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn

from ns import log, models
from ns.card import MEAN, STD
from ns.config import RoleConfig
from ns.data.stream import Batch, Batches, Labelled, PseudoLabelled, loader
from ns.errors import ConfigError, Interrupted, TrainingError
from ns.memory import keep_freed_memory
from ns.precision import Mode, Workload, choose, supported
from ns.store import Store
from ns.train import checkpoint
from ns.train.checkpoint import State
from ns.train.course import Course
from ns.train.ema import Ema
from ns.train.objective import Losses, losses
from ns.train.optimizer import make_optimizer

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
    """How the network was run (`ns.precision.Mode`)."""


def train(
    network: nn.Module,
    course: Course,
    labelled: Labelled,
    pseudo: PseudoLabelled | None,
    *,
    classes: int,
    seed: int,
    checkpoints: Store,
) -> Trained:
    """Trains `network` (fresh or warm) on labelled and, for a student, pseudo-labelled images. Continues from the newest
    checkpoint in `checkpoints`, bit for bit on the CPU, and leaves a checkpoint behind when asked to stop.

    Raises TrainingError when the loss is not finite, Interrupted after SIGTERM or SIGINT.
    """
    device = models.best_device()
    if device.type == "cpu":
        keep_freed_memory()
    config, steps = course.train, course.steps
    pseudo_batch = config.pseudo_batch if pseudo else 0
    images_a_step = config.labelled_batch + pseudo_batch

    network = network.to(device)
    normalize = models.Normalize(MEAN, STD).to(device)
    optimizer = make_optimizer(network, config.optimizer)
    state = State(network, Ema(network, config.ema_decay), optimizer)
    if checkpoint.restore(checkpoints, state):
        log.get().info("training continues", step=state.step, of=steps, mode=str(state.mode))
    else:
        workload = training_workload(network, course.role, images_a_step // config.accumulate)
        state.run_in(_mode(config.precision, workload, images=steps * images_a_step))
    mode, scaler = state.mode, state.scaler
    forward = mode.prepare(network)

    batches = Batches(
        labelled,
        pseudo if pseudo_batch else None,
        course.transform,
        batch=config.labelled_batch,
        pseudo_batch=pseudo_batch,
        classes=classes,
        seed=seed,
    )
    cuda = device.type == "cuda"
    source = loader(batches, start=state.step, stop=steps, workers=config.loader_workers, pin_memory=cuda)
    waiting = _Waiting(source)
    progress = log.Progress(steps * images_a_step, "images", done=state.step * images_a_step)
    record = _Record(
        state, every=max(1, math.ceil(steps / HISTORY_POINTS)), images_a_step=images_a_step, student=pseudo_batch > 0
    )
    started = saved = time.monotonic()
    before = state.seconds
    rate = 0.0

    network.train()
    for module in course.still:
        module.eval()
    with _stop_signals() as stop, _dead_loaders(stop), checkpoint.Writer(checkpoints) as writer:
        for batch in waiting:
            # Dropout and stochastic depth follow from (seed, step), like the data: a resumed step draws the same noise.
            torch.manual_seed(seed * 1_000_003 + state.step)
            rate = course.rate(state.step)
            for group in optimizer.param_groups:
                group["lr"] = rate

            optimizer.zero_grad(set_to_none=True)
            for part in split(batch, config.accumulate):
                images = normalize(part.images.to(device, non_blocking=True))  # [B+U, 3, H, W] float32
                labels = part.labels.to(device, non_blocking=True)
                targets = part.targets.to(device, non_blocking=True)
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
            record.count(rate)
            now = time.monotonic()
            state.seconds = before + now - started
            progress.advance(images_a_step, **record.latest, data_wait=round(waiting.seconds / (now - started), 3))
            if stop.is_set() or now - saved >= config.checkpoint_seconds:
                record.check(rate)  # a checkpoint must be worth coming back to
                writer.save(state)
                saved = time.monotonic()
            if stop.is_set():
                writer.flush()
                raise Interrupted(f"stopped at step {state.step} of {steps}; the same command continues there")
        record.check(rate)

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


def _mode(precision: str, workload: Workload, *, images: int) -> Mode:
    """The mode that a configuration asks for, or the fastest."""
    if precision == "auto":
        return choose(workload, images=images)
    mode = Mode.parse(precision)
    if mode.precision not in supported(workload.device):
        raise ConfigError(f"train.precision: invalid value {precision!r} on {workload.device.type}: float16 needs a GPU")
    return mode


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Equal parts of a batch, each with its share of labelled images first and of pseudo-labelled ones after them.

    Means over the parts' losses are means over the batch. Raises ValueError if they cannot be equal.
    """
    if parts == 1:
        yield batch
        return
    labelled, pseudo = len(batch.labels), len(batch.targets)
    if labelled % parts or pseudo % parts:
        raise ValueError(f"{labelled} labelled and {pseudo} pseudo-labelled images cannot be split into {parts} equal parts")
    images = zip(batch.images[:labelled].chunk(parts), batch.images[labelled:].tensor_split(parts), strict=True)
    for both, labels, targets in zip(images, batch.labels.chunk(parts), batch.targets.tensor_split(parts), strict=True):
        yield Batch(torch.cat(both), labels, targets)


class _Record:
    """Means of what a step measures, gathered on the device and read back once a point."""

    def __init__(self, state: State, *, every: int, images_a_step: int, student: bool) -> None:
        self._state = state
        self._student = student
        self._every = every
        self._images_a_step = images_a_step
        self.latest: dict[str, float] = {}

    def measure(self, loss: Losses, logits: Tensor, labels: Tensor, targets: Tensor, *, share: float) -> None:
        """Adds what one part of a batch, `share` of it, says."""
        with torch.no_grad():
            predicted = logits.argmax(1)
            correct = (predicted[: len(labels)] == labels).float().mean()
            agree = predicted[len(labels) :] == targets.argmax(1)
            agreement = agree.float().mean() if len(targets) else torch.zeros_like(correct)
            values = torch.stack([loss.total.detach(), loss.labelled, loss.pseudo, correct, agreement]) * share
        state = self._state
        state.sums = values if state.sums is None else state.sums.to(values.device) + values

    def count(self, rate: float) -> None:
        """Ends a step."""
        self._state.counted += 1
        if self._state.step % self._every == 0:
            self._close(rate)

    def check(self, rate: float) -> None:
        """Raises TrainingError if any loss since the last point was not finite."""
        if self._state.sums is not None and not math.isfinite(total := float(self._state.sums[0])):
            raise TrainingError(
                f"the loss became {total} by step {self._state.step} at learning rate {rate:.3g}; "
                "lower train.optimizer.lr, or set train.optimizer.clip_norm"
            )

    def _close(self, rate: float) -> None:
        self.check(rate)
        state = self._state
        assert state.sums is not None
        total, labelled, pseudo, correct, agreement = (state.sums / state.counted).tolist()
        state.sums, state.counted = None, 0
        point = {
            "step": float(state.step),
            "images": float(state.step * self._images_a_step),
            "loss": total,
            "loss_labelled": labelled,
            "accuracy_labelled": correct,
            "lr": rate,
        }
        if self._student:
            point |= {"loss_pseudo": pseudo, "agreement": agreement}
        self.latest = {"loss": round(total, 4)}
        state.history.append(point)


@contextmanager
def _dead_loaders(stop: threading.Event) -> Iterator[None]:
    """Says in one line that a data loader's process was killed: torch raises that in the middle of whatever is being done."""
    try:
        yield
    except (RuntimeError, TrainingError) as error:
        if not any("DataLoader worker" in str(place) for place in (error, error.__cause__)):
            raise
        if stop.is_set():
            # A signal to the whole process group. The step under way is lost, and with it the state of this moment.
            raise Interrupted(
                "stopped together with its data loaders; the same command continues from the last checkpoint"
            ) from error
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(
            "a data loader's process was killed, most often for want of memory; lower train.loader_workers or the batch"
        ) from error


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that training stops between steps, with a checkpoint."""
    stop = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
