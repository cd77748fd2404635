"""The life of a run: its name, its start, the lock of the client that drives it, its end."""

import contextlib
import os
from collections.abc import Iterator

from filelock import FileLock, Timeout

from ns.config.loader import dump_experiment
from ns.config.schema import Experiment
from ns.core.digest import describe_code, digest_json
from ns.core.errors import ConfigError, RunError, StoreError
from ns.core.printable import redact_credentials
from ns.runs.order import take_number
from ns.runs.records import (
    CONFIG_FILE,
    RUN_NAME,
    AcceptedStudent,
    RunRecord,
    RunState,
    delete_try_records,
    find_stage_note,
    record_key,
    utc_timestamp,
    write_stage_note,
)
from ns.storage import LocalStore, Store
from ns.storage.documents import dump_hashed_fields
from ns.storage.lease import sweep_leases

LOCK_PROBE_SECONDS = 0.5
"""Seconds that a client waits for the lock: another client that only looks whether the run is under way holds it for an instant."""


def derive_run_name(experiment: Experiment) -> str:
    """The name of an experiment's run. It is derived from the experiment, so that the same command finds the same run."""
    return f"{experiment.name}-{digest_experiment(experiment)[:8]}"


def derive_generation_name(experiment: Experiment, generation: int, data_digest: str, teacher_digest: str | None) -> str:
    """The name of the run of one generation, derived from the experiment and the digests of data and teacher."""
    return f"{experiment.name}-gen-{generation}-{digest_json([digest_experiment(experiment), data_digest, teacher_digest])[:8]}"


def digest_experiment(experiment: Experiment) -> str:
    """Digest of what runs of one name must share. The registry and the size of caches may change within a run."""
    return digest_json(dump_hashed_fields(experiment, exclude={"registry": True, "evaluation": {"keep_gib"}}))


def check_run_name(run: str) -> None:
    """Raises ConfigError for a name that a run cannot have: it is a folder beside `store`, and part of the tags of label sets."""
    if not RUN_NAME.fullmatch(run) or run in ("latest", "store"):
        raise ConfigError(
            f"--run: invalid value {run!r}: must be at most 100 letters, digits, dots, dashes and underscores, begin with a letter or "
            "digit, hold no '..', and be neither 'latest' nor 'store'"
        )


def open_run(root: Store, run: str, experiment: Experiment, version: str) -> RunState | None:
    """Opens a new run, or one that was begun; its stages then run with the code of now (`check_run_code`).

    Returns the state that the run had, None for a new one. Raises RunError if it has another configuration, ConfigError for a wrong name.
    """
    check_run_name(run)
    config_digest = digest_experiment(experiment)
    started_at = utc_timestamp()
    existing = RunRecord.find_file(root, record_key(run))
    if existing:
        if existing.config_digest != config_digest:
            raise RunError(
                f"run {run}: was started with another configuration ({root.at(run).uri}/{CONFIG_FILE}); "
                "choose another --run name, or leave it out"
            )
        started_at = existing.started_at
        delete_try_records(root, run)
    else:
        take_number(root, "runs", run)
    root.at(run).put(CONFIG_FILE, dump_experiment(experiment).encode())
    record = RunRecord(
        run=run,
        config_digest=config_digest,
        state="running",
        started_at=started_at,
        version=version,
        code=describe_code(),
    )
    record.save_file(root, record_key(run))
    written = next(iter(root.entries(record_key(run))), None)
    if written:
        sweep_leases(root, written.modified_at)
    return existing.state if existing else None


def check_run_code(root: Store, run: str) -> None:
    """Raises RunError, naming what changed, if the code that decides results is not what the run was begun or continued with.

    The results of one run would come of two programs, and finished work would no longer be found.
    """
    record = RunRecord.find_file(root, record_key(run))
    begun_with = record.code if record else {}
    changed = [
        f"{name} {begun_with[name]}, now {current or 'missing'}"
        for name, current in describe_code().items()
        if begun_with.get(name, current) != current
    ]
    if changed:
        raise RunError(
            f"run {run}: was begun with {'; '.join(changed)}; the same command continues with the code of now, and repeats what it changes"
        )


def record_inherited_teacher(root: Store, run: str, student: AcceptedStudent) -> None:
    """Notes in a run that its teacher is another run's student, with the time that its training took there."""
    note = find_stage_note(root, student.run, student.generation, "train")
    if note:
        write_stage_note(root, run, note.generation, note.stage, note.outputs, note.seconds, reused=True)


def finish_run(root: Store, run: str, state: RunState, error: str | None = None) -> None:
    """Records how a run ended; `error` without the passwords that it may quote."""
    record = RunRecord.load_file(root, record_key(run))
    changes = {"state": state, "error": error and redact_credentials(error), "finished_at": utc_timestamp()}
    record.model_copy(update=changes).save_file(root, record_key(run))


@contextlib.contextmanager
def lock_run(root: Store, run: str) -> Iterator[None]:
    """Locks a run in a local folder for one client, since a second one would only do the same work at the same time.

    Raises RunError naming the process that holds it, StoreError if the folder cannot be written, ConfigError for a wrong name.
    """
    if not isinstance(root, LocalStore):
        # On a cluster Kubeflow starts each stage once.
        yield
        return
    check_run_name(run)
    run_path = root.root / run
    client_path = run_path / ".client"
    lock = _run_lock(root, run)
    try:
        run_path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_PROBE_SECONDS)
    except Timeout:
        pid = client_path.read_text() if client_path.exists() else "unknown"
        raise RunError(f"run {run}: is under way already (process {pid}); wait for it, or stop it first") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{run_path}: cannot write: {reason}; choose another folder with --root") from error
    try:
        with contextlib.suppress(OSError):
            client_path.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


def is_run_driven(root: Store, run: str) -> bool:
    """Whether a client is at work on the run. The system releases the lock of a client that was killed."""
    if not isinstance(root, LocalStore):
        return True
    try:
        with _run_lock(root, run):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _run_lock(root: LocalStore, run: str) -> FileLock:
    return FileLock(root.root / run / ".lock", timeout=0)
