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
from ns.storage.documents import encode_json

PROGRESS = "progress.json"
TENSORBOARD = "tensorboard"
PROGRESS_SECONDS = 5.0
EVENTS_SECONDS = 30.0
"""The file of TensorBoard events is written whole; a training has few points."""


class Monitor:
    """Watches one training. With no folder (of a run) there is only the log and Prometheus."""

    def __init__(self, run_store: Store | None = None, *, name: str = "train", tensorboard: bool = False) -> None:
        """`name`: of this training in its run, `1-train` say. Raises ConfigError if TensorBoard is asked for and not installed."""
        self._run_store = run_store
        self._name = name
        self._events = _TensorBoardEvents(run_store, name) if tensorboard and run_store else None
        self._writer = _BackgroundWriter()

    def on_train_start(self, *, step: int, steps: int, images_per_step: int, checkpoint_seconds: float) -> None:
        """Training starts, or goes on, at `step` of `steps`."""
        self._first_step, self._steps, self._images_per_step = step, steps, images_per_step
        self._started_at = self._step_ended_at = time.monotonic()
        self._waited_seconds = 0.0
        self._written_at = float("-inf")
        self._saved_at: str | None = None
        self._progress = log.Progress(steps * images_per_step, "images", done=step * images_per_step)
        self._point: dict[str, float] = {}
        telemetry.STEPS.set(steps)
        telemetry.STEPS_DONE.set(step)
        telemetry.CHECKPOINT_INTERVAL.set(checkpoint_seconds)
        telemetry.record_checkpoint()

    def on_step_end(self, step: int, waited_seconds: float) -> None:
        """A step has ended. `waited_seconds`: for images, since the beginning."""
        now = time.monotonic()
        telemetry.STEP_SECONDS.observe(now - self._step_ended_at)
        telemetry.DATA_WAIT.inc(max(0.0, waited_seconds - self._waited_seconds))
        telemetry.STEPS_DONE.set(step)
        self._step_ended_at, self._waited_seconds = now, waited_seconds
        share = round(waited_seconds / max(now - self._started_at, 1e-9), 3)
        loss = {"loss": round(self._point["loss"], 4)} if self._point else {}
        self._progress.update(self._images_per_step, **loss, data_wait=share)
        if now - self._written_at >= PROGRESS_SECONDS or step == self._steps:
            self._written_at = now
            self._write_progress(step, share)

    def on_log(self, history: Sequence[dict[str, float]]) -> None:
        """The history has a new point."""
        self._point = point = history[-1]
        for part, name in (("total", "loss"), ("labeled", "loss_labeled"), ("pseudo", "loss_pseudo")):
            if name in point:
                telemetry.LOSS.labels(part).set(point[name])
        telemetry.LEARNING_RATE.set(point["lr"])
        telemetry.ACCURACY.set(point["accuracy_labeled"])
        if "agreement" in point:
            telemetry.AGREEMENT.set(point["agreement"])
        if self._events:
            self._writer.submit_write(self._events.make_writer(list(history)))

    def on_checkpoint(self) -> None:
        """A checkpoint was taken."""
        telemetry.record_checkpoint()
        self._saved_at = datetime.now(UTC).isoformat(timespec="seconds")

    def write_document(self, name: str, document: dict[str, Any]) -> str | None:
        """Writes a document into the run's folder, now. Returns where it is, None if nowhere."""
        if not self._run_store:
            return None
        try:
            self._run_store.put(f"{self._name}-{name}", encode_json(document))
        except StoreError as error:
            log.get_logger().warning("cannot be written", file=name, reason=str(error))
            return None
        return f"{self._run_store.uri}/{self._name}-{name}"

    def _write_progress(self, step: int, data_wait: float) -> None:
        if not (run_store := self._run_store):
            return
        spent = self._step_ended_at - self._started_at
        rate = (step - self._first_step) * self._images_per_step / max(spent, 1e-9)
        document = encode_json(
            {
                "training": self._name,
                "step": step,
                "steps": self._steps,
                "images": step * self._images_per_step,
                "images_per_second": round(rate, 2),
                "data_wait_ratio": data_wait,
                "seconds_left": round((self._steps - step) * self._images_per_step / max(rate, 1e-9), 1),
                "checkpoint_at": self._saved_at,
                "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "latest": self._point,
            }
        )
        self._writer.submit_write(lambda: run_store.put(PROGRESS, document), must=step == self._steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events and self._point:
            self._writer.submit_write(self._events.write_history, must=True)
        self._writer.close()


class _BackgroundWriter:
    """Writes beside training, one thing at a time; what comes while it is busy is left out unless it must be done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="monitor")
        self._writing: Future[None] | None = None
        self._complained = False

    def submit_write(self, write: Callable[[], Any], *, must: bool = False) -> None:
        if must or self._writing is None or self._writing.done():
            self._writing = self._thread.submit(self._run_write, write)

    def _run_write(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except StoreError as error:
            if not self._complained:
                log.get_logger().warning("progress cannot be written; training goes on", reason=str(error))
            self._complained = True

    def close(self) -> None:
        self._thread.shutdown()


class _TensorBoardEvents:
    """The history as TensorBoard events, below the run's folder. Written whole each time, so that a continued training has one
    curve and nothing twice."""

    def __init__(self, run_store: Store, name: str) -> None:
        try:
            import tensorboard  # type: ignore[import-untyped]  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "train.tensorboard: TensorBoard is not installed; pip install 'noisy-student[tensorboard]', or set it to false"
            ) from error
        self._store = run_store.at(f"{TENSORBOARD}/{name}")
        self._history: list[dict[str, float]] = []
        self._written = float("-inf")

    def make_writer(self, history: list[dict[str, float]]) -> Callable[[], None]:
        """What writes this history, unless it was done just now."""
        self._history = history

        def write_if_due() -> None:
            if time.monotonic() - self._written >= EVENTS_SECONDS:
                self._written = time.monotonic()
                self.write_history()

        return write_if_due

    def write_history(self) -> None:
        """Writes the history as it is."""
        from torch.utils.tensorboard import SummaryWriter

        with tempfile.TemporaryDirectory(prefix="ns-events-") as scratch:
            with SummaryWriter(scratch) as events:
                for point in self._history:
                    for name, value in point.items():
                        if name != "step":
                            events.add_scalar(name, value, int(point["step"]))
            (events_path,) = Path(scratch).iterdir()
            self._store.put("events.out.tfevents.history", events_path.read_bytes())
