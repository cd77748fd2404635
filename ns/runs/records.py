"""Runs: which steps each took, what each gave, and how it ended.

    ROOT/store/runs/RUN.json      when it was started, and its state; kept by the client that drives the run
    ROOT/RUN/config.yaml          the experiment, every field
    ROOT/RUN/steps/G-STEP.json    one note for each step of generation G (0 is before the first); written when it is done
    ROOT/RUN/failures/G-STEP.json why a step failed, on a cluster, until it is tried again
    ROOT/RUN/report.html          written by the last step

Everything heavy lives in `ROOT/store/` and is shared by runs; a note points there.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal, NamedTuple

import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from ns.config import schema as config
from ns.config.schema import Experiment, SelectionConfig
from ns.core.digest import digest_json
from ns.core.errors import ConfigError, DataError, NsError, RunError, StoreError
from ns.data.dataset import Dataset
from ns.data.prepared import PreparedData
from ns.evaluation.gate import Verdict
from ns.evaluation.result import MANIFEST as EVALUATION
from ns.evaluation.result import Evaluation, Robustness, read_predictions
from ns.evaluation.robustness.relative_scores import RobustnessScores, score_robustness
from ns.labeling.diff import DiffSide
from ns.labeling.label_set import MANIFEST as LABEL_SET
from ns.labeling.label_set import LabelSet
from ns.labeling.selection import Selection
from ns.labeling.thresholds import Thresholds, find_thresholds
from ns.modeling.manifest import MANIFEST as CARD
from ns.storage import LocalStore, Store, open_store
from ns.storage.documents import JsonDocument

RECORDS = "store/runs/"
CONFIG = "config.yaml"
REPORT = "report.html"
LOCK_PROBE_SECONDS = 0.5
"""Whoever looks whether a run is under way holds it for an instant; a client that begins then waits for so long."""

RunState = Literal["running", "succeeded", "failed", "interrupted"]


class RunRecord(JsonDocument):
    """How a run stands."""

    run: str
    config_digest: str
    state: RunState
    started_at: str
    finished_at: str | None = None
    error: str | None = None
    version: str
    """Of this package."""


class StageNote(JsonDocument):
    """One finished step of a run."""

    generation: int
    stage: str
    """Name of the step; labeling tasks add their shard range."""
    outputs: dict[str, str]
    """Name → key below the root."""
    seconds: float
    """Wall time that the work took, whichever run did it."""
    reused: bool
    """Whether the work had been done before."""
    finished_at: str


class StageFailure(JsonDocument):
    """The last try of a step, if it failed; gone when it is tried again. Only on a cluster, where no client sees it happen."""

    generation: int
    stage: str
    error: str
    exit_code: int
    failed_at: str

    def __str__(self) -> str:
        return f"{f'generation {self.generation}: ' if self.generation else ''}{self.stage}: {self.error}"


class GenerationSummary(BaseModel):
    """One trip round the loop, in numbers."""

    model_config = ConfigDict(frozen=True)

    generation: int
    model: str
    """The student, as a key below the root."""
    teacher_top1: float
    student_top1: float
    gain: float
    """student_top1 − teacher_top1, on the same held-out images."""
    gain_low: float
    gain_high: float
    """Two-sided bootstrap interval of the gain, at the gate's level."""
    labeled: int
    """Images in the pool that the teacher labeled."""
    kept: int
    """Distinct images that the selection kept."""
    label_set: str
    """Digest."""
    verdict: Literal["promoted", "refused"]
    reason: str
    seconds: float
    """Work in this generation; parallel tasks add up."""


class ModelMeasurements(BaseModel):
    """What the evaluation of one model found, on whatever the experiment asked for."""

    model_config = ConfigDict(frozen=True)

    generation: int
    top1: float
    """Of the held-out images, which decide."""
    ece: float | None
    """Calibration error on them."""
    test_top1: float | None
    """Of the images that are only reported."""
    sets: dict[str, float]
    """Further evaluation sets: name → top-1."""
    scores: RobustnessScores | None
    """Of corruptions and perturbations; relative to the first teacher where not to AlexNet."""
    attacks: dict[str, float]
    """`fgsm-8`, `pgd-16-10` (epsilon, steps) → top-1 that is left."""


class RunSummary(BaseModel):
    """A run at a glance: what `ns runs show --json` prints."""

    model_config = ConfigDict(frozen=True)

    run: str
    state: RunState
    error: str | None
    config_digest: str
    started_at: str
    finished_at: str | None
    teacher_top1: float | None
    """Of the teacher that the run began with, once it is evaluated."""
    generations: list[GenerationSummary]
    measurements: list[ModelMeasurements] = Field(default_factory=list)
    """Of each evaluated model, the first teacher's first."""
    best_model: str | None
    """The last accepted model, as a key below the root."""
    best_top1: float | None
    label_sets: list[str]
    """Digests, by generation."""
    report: str | None
    """URI of the report, once written."""
    stages: list[StageNote]


class AcceptedStudent(NamedTuple):
    """A student that a gate accepted, as the run has it that trained it."""

    run: str
    generation: int
    model: str
    """Key of its folder below the root."""


def find_accepted_student(root: Store, experiment: str) -> AcceptedStudent | None:
    """The student that a gate accepted last, of all runs of the experiments of this name; None if there is none.

    A student that several runs came to was accepted when the first of them accepted it: runs that are repeated change nothing. One
    whose folder was removed is passed over.
    """
    accepted_students: dict[str, tuple[str, AcceptedStudent]] = {}
    for record in list_runs(root):
        if _read_experiment_name(root, record.run) != experiment:
            continue
        for note in list_stage_notes(root, record.run):
            if note.stage != "gate":
                continue
            verdict = Verdict.load_file(root, note.outputs["verdict"])
            if verdict.promoted and root.exists(f"{verdict.student}/{CARD}"):
                acceptance = (note.finished_at, AcceptedStudent(record.run, verdict.generation, verdict.student))
                accepted_students[verdict.student] = min(acceptance, accepted_students.get(verdict.student, acceptance))
    return max(accepted_students.values())[1] if accepted_students else None


def record_inherited_teacher(root: Store, run: str, student: AcceptedStudent) -> None:
    """Notes in a run that its teacher is another run's student, with what its training took there."""
    for student_note in list_stage_notes(root, student.run):
        if (student_note.generation, student_note.stage) == (student.generation, "train"):
            write_stage_note(
                root, run, student_note.generation, student_note.stage, student_note.outputs, student_note.seconds, reused=True
            )


def derive_run_name(experiment: Experiment) -> str:
    """The name of the run of an experiment: the same command finds the same run again."""
    return f"{experiment.name}-{digest_experiment(experiment)[:8]}"


def derive_generation_name(experiment: Experiment, generation: int, data_digest: str, teacher_digest: str | None) -> str:
    """The name of the run of one generation: with the same data and teacher (digests) it is the same run again."""
    return f"{experiment.name}-gen-{generation}-{digest_json([digest_experiment(experiment), data_digest, teacher_digest])[:8]}"


def check_run_name(run: str) -> None:
    """Raises ConfigError for what cannot be a run's name: it is a folder beside `store`, and a part of tags of label sets."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run) or ".." in run or run in ("latest", "store"):
        raise ConfigError(
            f"--run: invalid value {run!r}: must be at most 100 letters, digits, dots, dashes and underscores, begin with a letter or "
            "digit, hold no '..', and be neither 'latest' nor 'store'"
        )


def open_run(root: Store, run: str, experiment: Experiment, version: str) -> RunRecord:
    """Opens a run, or opens it again. Raises RunError if the run exists with another configuration, ConfigError for a wrong name."""
    check_run_name(run)
    config_digest = digest_experiment(experiment)
    started_at = utc_timestamp()
    if root.exists(record_key(run)):
        existing = RunRecord.load_file(root, record_key(run))
        if existing.config_digest != config_digest:
            raise RunError(
                f"run {run}: was started with another configuration ({root.at(run).uri}/{CONFIG}); "
                "choose another --run name, or leave it out"
            )
        started_at = existing.started_at
    root.at(run).put(CONFIG, config.dump_experiment(experiment).encode())
    record = RunRecord(run=run, config_digest=config_digest, state="running", started_at=started_at, version=version)
    record.save_file(root, record_key(run))
    return record


@contextlib.contextmanager
def lock_run(root: Store, run: str) -> Iterator[None]:
    """Holds a run in a local folder for one client; a second one would only do the same work beside it.

    Raises RunError naming the process that holds it, StoreError when the folder cannot be written, ConfigError for a wrong name.
    """
    if not isinstance(root, LocalStore):
        # On a cluster it is Kubeflow that starts a step once.
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
    """Whether a client is at work on the run. A client that was killed let go of its lock."""
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


def finish_run(root: Store, run: str, state: RunState, error: str | None = None) -> None:
    record = RunRecord.load_file(root, record_key(run))
    record.model_copy(update={"state": state, "error": error, "finished_at": utc_timestamp()}).save_file(root, record_key(run))


def write_stage_note(
    root: Store, run: str, generation: int, stage: str, outputs: dict[str, str], seconds: float, *, reused: bool
) -> None:
    """Writes a step's note into the run. Work that this run did before and finds again keeps its first note."""
    key = f"{run}/steps/{generation}-{stage}.json"
    if reused and root.exists(key) and StageNote.load_file(root, key).outputs == outputs:
        return
    document = StageNote(
        generation=generation, stage=stage, outputs=outputs, seconds=seconds, reused=reused, finished_at=utc_timestamp()
    )
    document.save_file(root, key)


def list_stage_notes(root: Store, run: str) -> list[StageNote]:
    """Notes of all finished steps, in the order in which they finished."""
    run_store = root.at(run)
    stage_notes = [StageNote.load_file(run_store, key) for key in run_store.list("steps/") if key.endswith(".json")]
    return sorted(stage_notes, key=lambda note: (note.generation, note.finished_at, note.stage))


def write_stage_failure(root: Store, run: str, generation: int, stage: str, error: NsError | str, *, note_name: str) -> None:
    """Keeps why a step failed. `key`: of this task among all of the run."""
    code = error.exit_code if isinstance(error, NsError) else 1
    failure = StageFailure(generation=generation, stage=stage, error=str(error), exit_code=code, failed_at=utc_timestamp())
    failure.save_file(root, f"{run}/failures/{generation}-{note_name}.json")


def delete_stage_failure(root: Store, run: str, generation: int, *, note_name: str) -> None:
    root.delete(f"{run}/failures/{generation}-{note_name}.json")


def list_stage_failures(root: Store, run: str) -> list[StageFailure]:
    """Steps whose last try failed, the latest last."""
    run_store = root.at(run)
    stage_failures = [StageFailure.load_file(run_store, key) for key in run_store.list("failures/") if key.endswith(".json")]
    return sorted(stage_failures, key=lambda failure: failure.failed_at)


def list_runs(root: Store) -> list[RunRecord]:
    """All runs below a root, the latest last."""
    records = (RunRecord.load_file(root, key) for key in root.list(RECORDS))
    return sorted(records, key=lambda record: record.started_at)


def resolve_run_name(root: Store, run: str = "latest") -> str:
    """The full name of a run, given its name, an unambiguous beginning of it, or `latest`.

    Raises RunError listing what there is.
    """
    names = [record.run for record in list_runs(root)]
    if not names:
        raise RunError(f"{root.uri}: no runs here; start one with `ns run`, or name another place with --root")
    if run == "latest":
        return names[-1]
    matching = [name for name in names if name == run] or [name for name in names if name.startswith(run)]
    if len(matching) != 1:
        problem = f"is one of {', '.join(matching)}" if matching else "does not exist"
        raise RunError(f"run {run}: {problem}; runs in {root.uri}: {', '.join(names)}")
    return matching[0]


def read_prepared_data(root: Store, run: str) -> PreparedData:
    """The datasets of a run. Raises RunError if it has not come so far."""
    for note in list_stage_notes(root, run):
        if note.stage == "prepare-data":
            return PreparedData.load_file(root, note.outputs["data"])
    raise RunError(f"run {run}: its data is not prepared yet; `ns run --resume` continues it")


def resolve_model_uri(root: Store, name: str) -> str:
    """A model's folder or URI as it is; of a run's name, the place of its best model. Raises RunError if there is none."""
    if open_store(name).exists(CARD):
        return name
    model_key = summarize_run(root, resolve_run_name(root, name)).best_model
    if model_key is None:
        raise RunError(f"run {name}: has no model yet; `ns run --resume` continues it")
    return root.at(model_key).uri


def summarize_run(root: Store, run: str) -> RunSummary:
    """Reads a run's notes and what they point to."""
    run_store = root.at(run)
    try:
        record = RunRecord.load_file(root, record_key(run))
    except StoreError as error:
        raise RunError(f"run {run}: does not exist in {root.uri}") from error
    stage_notes = list_stage_notes(root, run)
    generations = [_summarize_generation(root, stage_notes, note) for note in stage_notes if note.stage == "gate"]
    # Notes are in the order of generations, and a run may begin with an earlier one's student.
    teacher_note = next((note for note in stage_notes if note.stage == "train"), None)
    evaluation_note = next((note for note in stage_notes if note.stage == "evaluate"), None)
    teacher_top1 = Evaluation.load_file(root, evaluation_note.outputs["evaluation"]).top1 if evaluation_note else None
    best_model = teacher_note.outputs["model"].rpartition("/")[0] if teacher_note else None
    best_top1 = teacher_top1
    for generation in generations:
        if generation.verdict == "promoted":
            best_model, best_top1 = generation.model, generation.student_top1
    was_killed = record.state == "running" and not is_run_driven(root, run)
    return RunSummary(
        run=run,
        state="interrupted" if was_killed else record.state,
        error=record.error,
        config_digest=record.config_digest,
        started_at=record.started_at,
        finished_at=record.finished_at,
        teacher_top1=teacher_top1,
        generations=generations,
        measurements=_collect_measurements(root, stage_notes),
        best_model=best_model,
        best_top1=best_top1,
        label_sets=[generation.label_set for generation in generations],
        report=f"{run_store.uri}/{REPORT}" if run_store.exists(REPORT) else None,
        stages=stage_notes,
    )


class RunLabelSet(NamedTuple):
    """A label set, and what is known of it by the run that made it; nothing of one that is opened by its place."""

    store: Store
    label_set: LabelSet
    selection: Selection | None = None
    prepared: PreparedData | None = None
    teacher: str | None = None
    """Key of the model's folder below the root."""

    @property
    def side(self) -> DiffSide:
        """As it is compared with another one."""
        return DiffSide(self.store, self.label_set, self.selection)

    def open_pool(self, root: Store, uri: str | None = None) -> tuple[Store, Dataset]:
        """The labeled images, of the run or at `place`. Raises DataError if they are not those that were labeled."""
        if uri is not None:
            pool_store = open_store(uri)
            dataset = Dataset.load(pool_store)
        elif self.prepared is not None:
            pool_store, dataset = self.prepared.pool.open_dataset(root)
        else:
            raise RunError(f"{self.store.uri}: which images were labeled is not known here; name their folder with --pool")
        if dataset.digest != self.label_set.dataset:
            raise DataError(f"{pool_store.uri}: digest {dataset.digest}, but {self.store.uri} labels {self.label_set.dataset}")
        return pool_store, dataset


def find_policy_thresholds(root: Store, run_label_set: RunLabelSet, policy: SelectionConfig) -> Thresholds:
    """The thresholds of a wanted precision for a label set, from its teacher's evaluation on the run's held-out images.

    Raises RunError if there is none.
    """
    heldout = run_label_set.prepared.heldout.digest if run_label_set.prepared else None
    for key in root.list("store/evaluations/"):
        if key.endswith(f"/{EVALUATION}"):
            evaluation = Evaluation.load_file(root, key)
            if (evaluation.model, evaluation.dataset, evaluation.scored_classes) == (
                run_label_set.label_set.teacher,
                heldout,
                None,
            ):
                return compute_policy_thresholds(root.at(key.removesuffix(f"/{EVALUATION}")), evaluation, policy)
    raise RunError(
        f"{run_label_set.store.uri}: selection.precision needs the teacher's evaluation on held-out images, which only a run has; "
        "name the label set as a run's generation: latest/gen-1"
    )


def compute_policy_thresholds(store: Store, evaluation: Evaluation, policy: SelectionConfig) -> Thresholds:
    """The thresholds of a policy's precision, from an evaluation on held-out images."""
    assert policy.precision is not None
    rows = read_predictions(store, evaluation)
    return find_thresholds(
        rows["predicted"].to_numpy(),
        rows["confidence"].to_numpy(),
        rows["rank"].to_numpy() == 0,
        len(evaluation.classes),
        precision=policy.precision,
        level=policy.confidence,
        evaluation=evaluation.digest,
    )


def open_label_set(root: Store, name: str) -> RunLabelSet:
    """The label set of a run's generation (`RUN/gen-N`, with a name that `find` knows), or the one in a folder.

    Raises RunError or DataError if there is none.
    """
    run, _, generation = name.rpartition("/gen-")
    if not run or not generation.isdigit():
        label_store = open_store(name)
        if not label_store.exists(LABEL_SET):
            raise DataError(
                f"{label_store.uri}: no {LABEL_SET} here; name a label set's folder, or a run's generation: latest/gen-1"
            )
        return RunLabelSet(label_store, LabelSet.load_file(label_store, LABEL_SET))
    return open_run_label_set(root, resolve_run_name(root, run), int(generation))


def open_run_label_set(root: Store, run: str, generation: int) -> RunLabelSet:
    """The label set of generation `number` of a run, given its full name. Raises RunError if there is none."""
    outputs_by_stage = {(note.generation, note.stage): note.outputs for note in list_stage_notes(root, run)}
    if (generation, "commit-labels") not in outputs_by_stage:
        available = [f"gen-{g}" for g, stage in outputs_by_stage if stage == "commit-labels"]
        raise RunError(f"run {run}: generation {generation} has no label set; there are {', '.join(available) or 'none'}")
    outputs = outputs_by_stage[generation, "commit-labels"]
    label_store = root.at(outputs["labels"].rpartition("/")[0])
    return RunLabelSet(
        label_store,
        LabelSet.load_file(label_store, LABEL_SET),
        Selection.load_file(root, outputs["selection"]),
        PreparedData.load_file(root, outputs_by_stage[0, "prepare-data"]["data"]),
        outputs["teacher"].rpartition("/")[0] if "teacher" in outputs else None,
    )


def open_previous_label_set(root: Store, run: str, generation: int) -> RunLabelSet | None:
    """The labels of the generation before: the run's own, or those that the teacher learnt from in the run that trained it.

    None if there are none, or if they are of another pool, with which this generation's cannot be compared.
    """
    current = open_run_label_set(root, run, generation)
    for name in (run, *(record.run for record in reversed(list_runs(root)))):
        outputs_by_stage = {
            note.stage: note.outputs for note in list_stage_notes(root, name) if note.generation == generation - 1
        }
        trained = outputs_by_stage.get("train", {}).get("model") == f"{current.teacher}/{CARD}"
        if "commit-labels" in outputs_by_stage and (name == run or trained):
            previous = open_run_label_set(root, name, generation - 1)
            return previous if previous.label_set.dataset == current.label_set.dataset else None
    return None


def resolve_verdict(root: Store, name: str) -> tuple[str, Verdict]:
    """The full name of a run, and the gate's verdict on a generation of it (`RUN/gen-N`), or the last one (`RUN`).

    Raises RunError if the gate has not spoken.
    """
    run_name, slash, number = name.rpartition("/gen-")
    if slash and not number.isdigit():
        raise RunError(f"{name}: must be a run, or a generation of it: latest, latest/gen-1")
    run = resolve_run_name(root, run_name if slash else name)
    verdict_keys = {note.generation: note.outputs["verdict"] for note in list_stage_notes(root, run) if note.stage == "gate"}
    if not verdict_keys:
        raise RunError(f"run {run}: no student has come to the gate yet; `ns run --resume` continues it")
    generation = int(number) if slash else max(verdict_keys)
    if generation not in verdict_keys:
        available = ", ".join(f"gen-{judged_generation}" for judged_generation in sorted(verdict_keys))
        raise RunError(f"run {run}: there is no verdict on generation {generation}; there are {available}")
    return run, Verdict.load_file(root, verdict_keys[generation])


def _summarize_generation(root: Store, stage_notes: list[StageNote], gate_note: StageNote) -> GenerationSummary:
    verdict = Verdict.load_file(root, gate_note.outputs["verdict"])
    generation_notes = [note for note in stage_notes if note.generation == gate_note.generation]
    commit_note = next((note for note in generation_notes if note.stage == "commit-labels"), None)
    if commit_note is None:
        raise DataError(f"generation {gate_note.generation}: has a verdict but no note of commit-labels in {root.uri}")
    label_set = LabelSet.load_file(root, commit_note.outputs["labels"])
    selection = Selection.load_file(root, commit_note.outputs["selection"])
    return GenerationSummary(
        generation=gate_note.generation,
        model=verdict.student,
        teacher_top1=verdict.teacher_top1,
        student_top1=verdict.student_top1,
        gain=verdict.gain,
        gain_low=verdict.gain_low,
        gain_high=verdict.gain_high,
        labeled=label_set.rows,
        kept=selection.kept,
        label_set=label_set.digest,
        verdict="promoted" if verdict.promoted else "refused",
        reason=verdict.reason,
        seconds=sum(note.seconds for note in generation_notes),
    )


def _collect_measurements(root: Store, stage_notes: list[StageNote]) -> list[ModelMeasurements]:
    measurements = []
    reference: Robustness | None = None
    for note in (note for note in stage_notes if note.stage == "evaluate"):
        outputs = note.outputs
        heldout = Evaluation.load_file(root, outputs["evaluation"])
        robustness = Robustness.load_file(root, outputs["robustness"]) if "robustness" in outputs else None
        reference = reference or robustness
        sets = {name: key for name, key in outputs.items() if name.startswith("set:") and key.endswith(f"/{EVALUATION}")}
        measurements.append(
            ModelMeasurements(
                generation=note.generation,
                top1=heldout.top1,
                ece=heldout.calibration.ece if heldout.calibration else None,
                test_top1=Evaluation.load_file(root, outputs["test"]).top1 if "test" in outputs else None,
                sets={name.removeprefix("set:"): Evaluation.load_file(root, key).top1 for name, key in sets.items()},
                scores=score_robustness(robustness, reference) if robustness else None,
                attacks={str(attack): attack.top1 for attack in robustness.attacks} if robustness else {},
            )
        )
    return measurements


def digest_experiment(experiment: Experiment) -> str:
    """What runs of one name must share."""
    # Where versions are kept may change, and be given later, within one run.
    document = experiment.model_dump(mode="json", exclude={"registry", "evaluation"})
    # An experiment that does not use these is the one it was before they existed, under the same digest and name.
    if evaluation_fields := experiment.evaluation.model_dump(mode="json", exclude_defaults=True, exclude={"keep_gib"}):
        document["evaluation"] = evaluation_fields
    if experiment.data.test is None:
        del document["data"]["test"]
    return digest_json(document)


def _read_experiment_name(root: Store, run: str) -> str | None:
    # No more of it is read than this, since a field of an old one may be unknown by now.
    key = f"{run}/{CONFIG}"
    document = yaml.safe_load(root.get(key)) if root.exists(key) else None
    return document.get("name") if isinstance(document, dict) else None


def record_key(run: str) -> str:
    return f"{RECORDS}{run}.json"


def utc_timestamp() -> str:
    """The time in UTC, to the microsecond: what follows each other closely is put in order by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
