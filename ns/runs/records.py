"""What a run leaves in the store: its state, and a note for each stage that finished.

    ROOT/store/runs/RUN.json        when the run was started, and its state; kept by the client that drives the run
    ROOT/RUN/config.yaml            the experiment, with every field
    ROOT/RUN/stages/G-STAGE.json    the note of a finished stage of generation G (0 is before the first)
    ROOT/RUN/active/G-STAGE.json    on a cluster, the try of a stage that is under way; left behind by a try that was killed
    ROOT/RUN/failures/G-STAGE.json  on a cluster, why a stage failed; removed when the stage is tried again
    ROOT/RUN/report.html            the report; the last stage writes it
    ROOT/RUN/report.json            what it was drawn of

Everything large lies in `ROOT/store/` and is shared by all runs; the notes point there.
"""

import re
from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field

from ns.core.errors import NsError
from ns.core.printable import redact_credentials
from ns.storage import Store
from ns.storage.documents import BlobKey, JsonDocument

RECORDS_PREFIX = "store/runs/"
CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.html"
BASELINE_STAGES = BASELINE_TRAIN, BASELINE_EVALUATE = ("train-baseline", "evaluate-baseline")
"""Stages of the model that `baseline` asks for, in the first generation of a run."""
RUN_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _check_name(name: str) -> str:
    if not RUN_NAME.fullmatch(name):
        raise ValueError("must be the name of a run")
    return name


# A record may come from strangers, and the name becomes part of commands, paths and tags.
RunName = Annotated[str, AfterValidator(_check_name)]
"""Name of a run, in a record."""
RunState = Literal["running", "succeeded", "failed", "interrupted"]


class RunRecord(JsonDocument):
    """The state of a run."""

    run: RunName
    config_digest: str
    state: RunState
    started_at: str
    finished_at: str | None = None
    error: str | None = None
    version: str
    """Version of this package."""
    code: dict[str, str] = Field(default_factory=dict)
    """What results depend on besides the experiment, as `describe_code` has it, when the run was begun or continued."""


class StageNote(JsonDocument):
    """A finished stage of a run."""

    generation: int
    stage: str
    """Name of the stage; labeling tasks add their range of shards."""
    outputs: dict[str, BlobKey]
    """Name → key below the root, of a file that was written last."""
    seconds: float
    """Wall time of the work, in whichever run it was done."""
    reused: bool
    """Whether the work was already done."""
    finished_at: str


class StageTry(JsonDocument):
    """A try of a stage that has begun, and neither finished nor said why it failed. Written on a cluster only."""

    generation: int
    stage: str
    """Name of the stage; labeling tasks add their range of shards."""
    number: int
    """From 1; Argo counts again from 1 if a person retries the run."""
    pod: str = ""
    """Name of its pod, if known."""
    started_at: str


class StageFailure(JsonDocument):
    """The last try of a stage, if it failed. Written on a cluster only, where no client sees the failure."""

    generation: int
    stage: str
    error: str
    exit_code: int
    is_permanent: bool = False
    """Whether another try fails likewise: bad config, bad data, a training that cannot go on."""
    failed_at: str

    def __str__(self) -> str:
        return f"{f'generation {self.generation}: ' if self.generation else ''}{self.stage}: {self.error}"


class AcceptedStudent(NamedTuple):
    """A student that a gate accepted."""

    run: str
    """The run that trained it."""
    generation: int
    model: str
    """Key of its folder below the root."""


def record_key(run: str) -> str:
    return f"{RECORDS_PREFIX}{run}.json"


def _note_key(run: str, generation: int, stage: str) -> str:
    return f"{run}/stages/{generation}-{stage}.json"


def utc_timestamp() -> str:
    """The time in UTC, to the microsecond, since the notes of a run are put in order by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def write_stage_note(
    root: Store, run: str, generation: int, stage: str, outputs: dict[str, str], seconds: float, *, reused: bool
) -> None:
    """Writes a stage's note into the run. If the run did the same work before, the first note stays."""
    previous = find_stage_note(root, run, generation, stage)
    if reused and previous and previous.outputs == outputs:
        return
    note = StageNote(
        generation=generation, stage=stage, outputs=outputs, seconds=seconds, reused=reused, finished_at=utc_timestamp()
    )
    note.save_file(root, _note_key(run, generation, stage))


def find_stage_note(root: Store, run: str, generation: int, stage: str) -> StageNote | None:
    """The note of a stage; None if the stage has not finished."""
    return StageNote.find_file(root, _note_key(run, generation, stage))


def list_stage_notes(root: Store, run: str, stage: str = "") -> list[StageNote]:
    """Notes of all finished stages, or of one stage in each generation, by generation and in the order in which they finished."""
    suffix = f"-{stage}.json" if stage else ".json"
    keys = (key for key in root.list(f"{run}/stages/") if key.endswith(suffix))
    return sorted(StageNote.iterate_files(root, keys), key=lambda note: (note.generation, note.finished_at, note.stage))


def write_stage_failure(root: Store, run: str, generation: int, stage: str, error: NsError | str, *, note_name: str) -> None:
    """Keeps why a stage failed. `note_name`: the stage, and the range of shards of a labeling task."""
    stage_error = error if isinstance(error, NsError) else NsError(error)
    failure = StageFailure(
        generation=generation,
        stage=stage,
        error=redact_credentials(str(error)),
        exit_code=stage_error.exit_code,
        is_permanent=stage_error.is_permanent,
        failed_at=utc_timestamp(),
    )
    failure.save_file(root, _failure_key(run, generation, note_name))


def find_stage_failure(root: Store, run: str, generation: int, *, note_name: str) -> StageFailure | None:
    """Why the last try of a stage failed; None if it did not."""
    return StageFailure.find_file(root, _failure_key(run, generation, note_name))


def delete_stage_failure(root: Store, run: str, generation: int, *, note_name: str) -> None:
    root.delete(_failure_key(run, generation, note_name))


def write_stage_try(root: Store, run: str, generation: int, stage: str, number: int, pod: str) -> None:
    """Keeps that a try of a stage has begun; `delete_stage_try` ends it. `stage` is the name of its note."""
    stage_try = StageTry(generation=generation, stage=stage, number=number, pod=pod, started_at=utc_timestamp())
    stage_try.save_file(root, _try_key(run, generation, stage))


def delete_stage_try(root: Store, run: str, generation: int, stage: str) -> None:
    root.delete(_try_key(run, generation, stage))


def list_stage_tries(root: Store, run: str) -> list[StageTry]:
    """Stages that are under way, or were killed, in the order in which they began."""
    keys = (key for key in root.list(f"{run}/active/") if key.endswith(".json"))
    return sorted(StageTry.iterate_files(root, keys), key=lambda stage_try: stage_try.started_at)


def _try_key(run: str, generation: int, stage: str) -> str:
    return f"{run}/active/{generation}-{stage}.json"


def delete_try_records(root: Store, run: str) -> None:
    """Forgets which stages were under way and which failed: the run begins again."""
    for prefix in ("active", "failures"):
        root.delete_prefix(f"{run}/{prefix}/")


def _failure_key(run: str, generation: int, note_name: str) -> str:
    return f"{run}/failures/{generation}-{note_name}.json"


def list_stage_failures(root: Store, run: str) -> list[StageFailure]:
    """Stages whose last try failed, the latest last."""
    keys = (key for key in root.list(f"{run}/failures/") if key.endswith(".json"))
    return sorted(StageFailure.iterate_files(root, keys), key=lambda failure: failure.failed_at)
