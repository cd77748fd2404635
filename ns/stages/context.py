"""What every stage is given and leaves behind: its run, its log lines, its note, its metrics, and the reason if it fails."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any, Self

from ns.config.loader import load_experiment
from ns.config.schema import Experiment
from ns.core import log, telemetry
from ns.core.digest import shorten_digest
from ns.core.errors import ConfigError, Interrupted, NsError, RunError, find_error_kind
from ns.core.process import die_with_client, handle_signals, set_openmp_to_sleep
from ns.reporting import mlflow_runs
from ns.runs.lifecycle import check_run_code, digest_experiment
from ns.runs.records import (
    CONFIG_FILE,
    delete_stage_failure,
    delete_stage_try,
    find_stage_failure,
    find_stage_note,
    write_stage_failure,
    write_stage_note,
    write_stage_try,
)
from ns.storage import Store, open_store
from ns.storage.ledger import Ledger

RETRY_VARIABLE = "KFP_RETRY_INDEX"
"""Number of the try, from 0, as KFP 2.17 tells it to a stage."""
POD_VARIABLE = "KFP_POD_NAME"
RETRY_PAUSE_SECONDS = 600
"""Argo begins another try within this time (pipelines/placement.py)."""


STOP = "stop"
"""What stands in the place of a teacher's key when there is no further generation."""


class _StopRequest(BaseException):
    """SIGTERM. No error, so that nothing which survives errors survives this."""


@dataclass(frozen=True)
class RunRef:
    """The run that a stage belongs to. Values that pass between stages are short strings, so these are too."""

    config_uri: str
    """URI of the experiment's YAML file."""
    root: str
    """URI of the store that holds everything."""
    run: str
    """Name of the run, a folder below the root."""

    @classmethod
    def from_uri(cls, uri: str) -> Self:
        """The run that is kept in the folder at `uri`."""
        root, _, run = uri.rpartition("/")
        return cls(f"{uri}/{CONFIG_FILE}", root, run)

    def read_data_key(self) -> str:
        """Key of the run's prepared data, as its stage `prepare` noted it. Raises RunError before that."""
        note = find_stage_note(open_store(self.root), self.run, 0, "prepare")
        if note is None:
            raise RunError(f"run {self.run}: its data is not prepared yet; run the stage prepare first")
        return note.outputs["data"]


@dataclass
class StageContext:
    """What a stage works with."""

    run: str
    generation: int
    experiment: Experiment
    root: Store
    ledger: Ledger
    note_name: str
    """Name of the stage's note in the run: the stage, and the range of shards of a labeling task."""
    started: float = field(default_factory=time.monotonic)
    log_fields: dict[str, Any] = field(default_factory=dict)

    def get_or_run(self, work_name: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, str]]) -> None:
        """Does the work unless the ledger has it, and notes its outputs in the run."""
        entry, reused = self.ledger.get_or_run(work_name, inputs, work)
        self.write_note(entry.outputs, reused=reused, seconds=entry.seconds)

    def write_note(self, outputs: dict[str, str], *, reused: bool, seconds: float | None = None, **log_fields: Any) -> None:
        """Notes the stage in the run. `seconds`: what the work took; since the stage began if None."""
        spent = time.monotonic() - self.started if seconds is None else seconds
        write_stage_note(self.root, self.run, self.generation, self.note_name, outputs, spent, reused=reused)
        self.add_log_fields(reused=reused, **log_fields)

    def add_log_fields(self, **log_fields: Any) -> None:
        """Adds fields to the log line that announces the end of the stage."""
        self.log_fields.update(log_fields)


@contextmanager
def stage(
    name: str, ref: RunRef, generation: int = 0, *, shards: str = "", teacher: str = "", linger: bool = False
) -> Iterator[StageContext]:
    """Begins and ends a stage of a run. `linger`: its metrics can be scraped for a while after its end."""
    note_name = f"{name}-{shards}" if shards else name
    bound_fields = {"shards": shards} if shards else {}
    with announce_stage(name, generation, **bound_fields) as log_fields, keep_state(ref, generation, name, note_name):
        store = open_store(ref.root)
        check_run_code(store, ref.run)
        experiment = load_experiment(ref.config_uri)
        context = StageContext(ref.run, generation, experiment, store, Ledger(store), note_name, log_fields=log_fields)
        begin_telemetry(name, generation, ref.run, experiment, teacher)
        if name != "train":  # Another process may train, and it serves the metrics on the same port.
            telemetry.serve_metrics()
        try:
            yield context
        except Interrupted:
            raise
        except Exception:
            # Where the store fails too, the stage's own error is the one that counts.
            with suppress(NsError):
                mlflow_runs.publish_mlflow_failure(store, ref.run, experiment.name)
            raise
    telemetry.end_stage(time.monotonic() - context.started, linger=linger)


def begin_telemetry(name: str, generation: int, run: str, experiment: Experiment, teacher: str) -> None:
    telemetry.begin_stage(name, generation, run, config_digest=shorten_digest(digest_experiment(experiment)), teacher=teacher)


@contextmanager
def announce_stage(name: str, generation: int, **bound_fields: Any) -> Iterator[dict[str, Any]]:
    """Logs the begin and the end of a stage, the end with the fields put into the dict that it yields, or one line with the error.

    A stage that was asked to stop ends the process with the exit code of Interrupted: started again, it goes on where it was.
    """
    set_openmp_to_sleep()
    log.configure_logging()
    die_with_client()
    started = time.monotonic()
    log_fields: dict[str, Any] = {}
    with log.bind_context(stage=name, generation=generation, **bound_fields):
        logger = log.get_logger()
        logger.info("started", pid=os.getpid())
        try:
            with _stop_on_sigterm():
                yield log_fields
        except (Exception, _StopRequest) as caught:
            error = Interrupted("stopped; the same command continues") if isinstance(caught, _StopRequest) else caught
            reason = str(error) if isinstance(error, NsError) else f"{type(error).__name__}: {error}"
            exit_code = error.exit_code if isinstance(error, NsError) else 1
            logger.error("failed", error=reason, exit_code=exit_code, pid=os.getpid())
            if isinstance(error, Interrupted):
                raise SystemExit(exit_code) from error
            raise
        logger.info("finished", seconds=round(time.monotonic() - started, 3), pid=os.getpid(), **log_fields)


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Raises _StopRequest after SIGTERM, so that a stage gives its leases back: others would wait for them to go stale."""
    stage_pid = os.getpid()

    def handle_sigterm(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != stage_pid:
            # A process that was forked from the stage has inherited this.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        # A second signal must not interrupt what is tidied up after the first.
        signal.signal(number, signal.SIG_IGN)
        raise _StopRequest

    with handle_signals(handle_sigterm, [signal.SIGTERM]):
        yield


def has_client() -> bool:
    """Whether a client follows the stages' events and keeps the run's record; on a cluster none does."""
    return bool(os.environ.get(log.EVENTS_VARIABLE))


@contextmanager
def keep_state(ref: RunRef, generation: int, stage_name: str, note_name: str, *, with_try: bool = True) -> Iterator[None]:
    """Keeps that a stage is under way (`with_try`), and why it failed until it is tried again, where no client follows the stages' events.

    KFP 2.17 says that a task failed, never why, and nothing of any task once a run's status is large. A stage that was killed cannot
    say so; that its try is still kept as being under way does.
    """
    if has_client():
        yield
        return
    _refuse_useless_retry(ref, generation, note_name)
    number = int(os.environ.get(RETRY_VARIABLE) or 0) + 1
    # If it is the store that fails, only the stage's log can say so.
    with suppress(NsError):
        store = open_store(ref.root)
        delete_stage_failure(store, ref.run, generation, note_name=note_name)
        if with_try:
            write_stage_try(store, ref.run, generation, note_name, number, os.environ.get(POD_VARIABLE, ""))
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        reason = error if isinstance(error, NsError) else f"{type(error).__name__}: {error}"
        with suppress(NsError):
            store = open_store(ref.root)
            write_stage_failure(store, ref.run, generation, stage_name, reason, note_name=note_name)
            delete_stage_try(store, ref.run, generation, note_name)
        raise
    with suppress(NsError):
        delete_stage_try(open_store(ref.root), ref.run, generation, note_name)


def _refuse_useless_retry(ref: RunRef, generation: int, note_name: str) -> None:
    """Raises the error of the last try if Argo repeats it by itself and it would fail again.

    KFP's launcher ends with 1 whatever the stage's exit code, so Argo cannot tell what is worth another try. A person who mends the
    cause and retries the run in Kubeflow's UI begins with the first try again, or comes later.
    """
    if int(os.environ.get(RETRY_VARIABLE) or 0) == 0:
        return
    failure = None
    # What cannot be read now is tried.
    with suppress(NsError):
        failure = find_stage_failure(open_store(ref.root), ref.run, generation, note_name=note_name)
    if failure and failure.is_permanent:
        age = datetime.now(UTC) - datetime.fromisoformat(failure.failed_at)
        if age < timedelta(seconds=RETRY_PAUSE_SECONDS):
            raise find_error_kind(failure.exit_code, RunError)(failure.error)


def check_gpus(given: int) -> None:
    """Raises ConfigError if torch does not see the GPUs that a stage was given: on its CPUs it would keep them busy for days."""
    if not given:
        return
    import torch

    if (seen := torch.cuda.device_count()) < given:
        raise ConfigError(
            f"the stage was given {given} GPUs, and torch sees {seen}: its image has no CUDA, or its node no driver; let the placement "
            "name worker-cuda (worker_image), or give 0 GPUs"
        )
