"""Shows how a training goes: in the log, to Prometheus, in `progress.json` in the run's folder, to TensorBoard and MLflow.

Nothing here can stop training: a failed write is logged once, and tried again later.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, Self

from ns.core import log, telemetry
from ns.core.errors import ConfigError, StoreError
from ns.core.mlflow_client import MlflowRun
from ns.storage import Store
from ns.storage.documents import encode_json
from ns.storage.scratch import make_scratch_dir

PROGRESS = "progress.json"
TENSORBOARD = "tensorboard"
PROGRESS_SECONDS = 5.0
"""Seconds between writes of `progress.json`."""
CURVES_SECONDS = 10.0
"""Seconds between requests that log curves to MLflow."""
EVENTS_SECONDS = 30.0
"""Seconds between copies of the file of TensorBoard events."""


class Monitor:
    """Shows one training. Without the store of a run it uses the log and Prometheus only."""

    def __init__(
        self,
        run_store: Store | None = None,
        *,
        name: str = "train",
        tensorboard: bool = False,
        mlflow_run: MlflowRun | None = None,
    ) -> None:
        """`name`: the training's name in its run, such as `1-train`. Raises ConfigError if TensorBoard is wanted but not installed."""
        self._run_store = run_store
        self._name = name
        self._mlflow_run = mlflow_run
        self._curves_sent_at = float("-inf")
        self._events = _TensorBoardEvents(run_store, name) if tensorboard and run_store else None
        self._writer = _BackgroundWriter()

    def on_train_start(self, *, step: int, steps: int, images_per_step: int, checkpoint_seconds: float) -> None:
        """Training starts, or continues, after `step` of `steps` steps."""
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
        if self._events:
            self._events.open(step)

    def on_step_end(self, step: int, waited_seconds: float) -> None:
        """A step has ended. `waited_seconds`: seconds spent waiting for images so far."""
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
            self._events.add_point(point)
            self._writer.submit_write(self._events.copy_if_due)
        tracked = self._mlflow_run
        if tracked and time.monotonic() - self._curves_sent_at >= CURVES_SECONDS:
            # What is left out comes with a later point, or with the end of the stage.
            self._curves_sent_at = time.monotonic()
            points = [*history]
            self._writer.submit_write(lambda: tracked.log_curves(points))

    def on_checkpoint(self) -> None:
        """A checkpoint was taken."""
        telemetry.record_checkpoint()
        self._saved_at = datetime.now(UTC).isoformat(timespec="seconds")

    def write_document(self, name: str, document: dict[str, Any]) -> str | None:
        """Writes a document into the run's folder at once. Returns its URI, or None if it cannot be written."""
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
        progress = {
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
        document = encode_json(progress)
        self._writer.submit_write(lambda: run_store.put(PROGRESS, document), must=step == self._steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events:
            self._writer.submit_write(self._events.copy_to_store, must=True)
        self._writer.close()
        if self._events:
            self._events.close()


class _BackgroundWriter:
    """Writes in a thread of its own, one thing at a time. What comes while it is busy is left out, unless it must be written."""

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
    """The history as TensorBoard events. They are written to a local file, which is copied below the run's folder now and then."""

    def __init__(self, run_store: Store, name: str) -> None:
        try:
            import tensorboard  # type: ignore[import-untyped]  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "train.tensorboard: TensorBoard is not installed; pip install 'noisy-student[tensorboard]', or set it to false"
            ) from error
        self._store = run_store.at(f"{TENSORBOARD}/{name}")
        self._copied_at = float("-inf")

    def open(self, step: int) -> None:
        """Begins a file for the points after `step`. TensorBoard drops what an interrupted attempt wrote of later steps."""
        from torch.utils.tensorboard import SummaryWriter

        self._scratch = ExitStack()
        self._folder = self._scratch.enter_context(make_scratch_dir("events"))
        self._events = SummaryWriter(str(self._folder), purge_step=step + 1)

    def add_point(self, point: dict[str, float]) -> None:
        for name, value in point.items():
            if name != "step":
                self._events.add_scalar(name, value, int(point["step"]))

    def copy_if_due(self) -> None:
        if time.monotonic() - self._copied_at >= EVENTS_SECONDS:
            self.copy_to_store()

    def copy_to_store(self) -> None:
        self._copied_at = time.monotonic()
        self._events.flush()
        for path in self._folder.iterdir():
            self._store.put(path.name, path.read_bytes())

    def close(self) -> None:
        self._events.close()
        self._scratch.close()
