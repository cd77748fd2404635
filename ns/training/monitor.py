"""How a training goes, for those who watch: the log, Prometheus, `progress.json` in the run's folder, TensorBoard.

Nothing here can stop training: what cannot be written is logged once, and tried again later.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from ns.core import log, telemetry
from ns.core.errors import ConfigError, StoreError
from ns.storage import Store
from ns.storage.documents import pretty

PROGRESS = "progress.json"
TENSORBOARD = "tensorboard"
PROGRESS_SECONDS = 5.0
EVENTS_SECONDS = 30.0
"""The file of TensorBoard events is written whole; a training has few points."""


class Monitor:
    """Watches one training. With no folder (of a run) there is only the log and Prometheus."""

    def __init__(self, folder: Store | None = None, *, name: str = "train", tensorboard: bool = False) -> None:
        """`name`: of this training in its run, `1-train` say. Raises ConfigError if TensorBoard is asked for and not installed."""
        self._folder = folder
        self._name = name
        self._events = _Events(folder, name) if tensorboard and folder else None
        self._writer = _InBackground()

    def begin(self, *, step: int, steps: int, images_a_step: int, checkpoint_seconds: float) -> None:
        """Training starts, or goes on, at `step` of `steps`."""
        self._first, self._steps, self._images_a_step = step, steps, images_a_step
        self._started = self._ended = time.monotonic()
        self._waited = 0.0
        self._written = float("-inf")
        self._saved_at: str | None = None
        self._progress = log.Progress(steps * images_a_step, "images", done=step * images_a_step)
        self._point: dict[str, float] = {}
        telemetry.STEPS.set(steps)
        telemetry.STEPS_DONE.set(step)
        telemetry.CHECKPOINT_INTERVAL.set(checkpoint_seconds)
        telemetry.checkpoint_saved()

    def stepped(self, step: int, waited_seconds: float) -> None:
        """A step has ended. `waited_seconds`: for images, since the beginning."""
        now = time.monotonic()
        telemetry.STEP_SECONDS.observe(now - self._ended)
        telemetry.DATA_WAIT.inc(max(0.0, waited_seconds - self._waited))
        telemetry.STEPS_DONE.set(step)
        self._ended, self._waited = now, waited_seconds
        share = round(waited_seconds / max(now - self._started, 1e-9), 3)
        loss = {"loss": round(self._point["loss"], 4)} if self._point else {}
        self._progress.advance(self._images_a_step, **loss, data_wait=share)
        if now - self._written >= PROGRESS_SECONDS or step == self._steps:
            self._written = now
            self._write_progress(step, share)

    def pointed(self, history: Sequence[dict[str, float]]) -> None:
        """The history has a new point."""
        self._point = point = history[-1]
        for part, name in (("total", "loss"), ("labelled", "loss_labelled"), ("pseudo", "loss_pseudo")):
            if name in point:
                telemetry.LOSS.labels(part).set(point[name])
        telemetry.LEARNING_RATE.set(point["lr"])
        telemetry.ACCURACY.set(point["accuracy_labelled"])
        if "agreement" in point:
            telemetry.AGREEMENT.set(point["agreement"])
        if self._events:
            self._writer.do(self._events.writer(list(history)))

    def saved(self) -> None:
        """A checkpoint was taken."""
        telemetry.checkpoint_saved()
        self._saved_at = datetime.now(UTC).isoformat(timespec="seconds")

    def keep(self, name: str, document: dict[str, Any]) -> str | None:
        """Writes a document into the run's folder, now. Returns where it is, None if nowhere."""
        if not self._folder:
            return None
        try:
            self._folder.put(f"{self._name}-{name}", pretty(document))
        except StoreError as error:
            log.get().warning("cannot be written", file=name, reason=str(error))
            return None
        return f"{self._folder.uri}/{self._name}-{name}"

    def _write_progress(self, step: int, data_wait: float) -> None:
        if not (folder := self._folder):
            return
        spent = self._ended - self._started
        rate = (step - self._first) * self._images_a_step / max(spent, 1e-9)
        document = pretty(
            {
                "training": self._name,
                "step": step,
                "steps": self._steps,
                "images": step * self._images_a_step,
                "images_per_second": round(rate, 2),
                "data_wait_ratio": data_wait,
                "seconds_left": round((self._steps - step) * self._images_a_step / max(rate, 1e-9), 1),
                "checkpoint_at": self._saved_at,
                "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "latest": self._point,
            }
        )
        self._writer.do(lambda: folder.put(PROGRESS, document), must=step == self._steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events and self._point:
            self._writer.do(self._events.last, must=True)
        self._writer.close()


class _InBackground:
    """Writes beside training, one thing at a time; what comes while it is busy is left out unless it must be done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="monitor")
        self._writing: Future[None] | None = None
        self._complained = False

    def do(self, write: Callable[[], Any], *, must: bool = False) -> None:
        if must or self._writing is None or self._writing.done():
            self._writing = self._thread.submit(self._try, write)

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except StoreError as error:
            if not self._complained:
                log.get().warning("progress cannot be written; training goes on", reason=str(error))
            self._complained = True

    def close(self) -> None:
        self._thread.shutdown()


class _Events:
    """The history as TensorBoard events, below the run's folder. Written whole each time, so that a continued training has one
    curve and nothing twice."""

    def __init__(self, folder: Store, name: str) -> None:
        try:
            import tensorboard  # type: ignore[import-untyped]  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "train.tensorboard: TensorBoard is not installed; pip install 'noisy-student[tensorboard]', or set it to false"
            ) from error
        self._folder = folder.at(f"{TENSORBOARD}/{name}")
        self._history: list[dict[str, float]] = []
        self._written = float("-inf")

    def writer(self, history: list[dict[str, float]]) -> Callable[[], None]:
        """What writes this history, unless it was done just now."""
        self._history = history

        def write() -> None:
            if time.monotonic() - self._written >= EVENTS_SECONDS:
                self._written = time.monotonic()
                self.last()

        return write

    def last(self) -> None:
        """Writes the history as it is."""
        from torch.utils.tensorboard import SummaryWriter

        with tempfile.TemporaryDirectory(prefix="ns-events-") as scratch:
            with SummaryWriter(scratch) as events:
                for point in self._history:
                    for name, value in point.items():
                        if name != "step":
                            events.add_scalar(name, value, int(point["step"]))
            (made,) = Path(scratch).iterdir()
            self._folder.put("events.out.tfevents.history", made.read_bytes())
