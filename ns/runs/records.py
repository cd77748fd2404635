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
from ns.core.digest import digest
from ns.core.errors import ConfigError, DataError, NsError, RunError, StoreError
from ns.data.dataset import Dataset
from ns.data.prepared import Prepared
from ns.evaluation.gate import Verdict
from ns.evaluation.result import MANIFEST as EVALUATION
from ns.evaluation.result import Evaluation, Robustness, read_predictions
from ns.evaluation.robustness.relative_scores import Scores, scores
from ns.labeling.diff import Side
from ns.labeling.label_set import MANIFEST as LABEL_SET
from ns.labeling.label_set import LabelSet
from ns.labeling.selection import Selection
from ns.labeling.thresholds import Calibration, calibrate
from ns.modeling.manifest import MANIFEST as CARD
from ns.storage import LocalStore, Store, open_store
from ns.storage.documents import Document

RECORDS = "store/runs/"
CONFIG = "config.yaml"
REPORT = "report.html"
LOOK_SECONDS = 0.5
"""Whoever looks whether a run is under way holds it for an instant; a client that begins then waits for so long."""

State = Literal["running", "succeeded", "failed", "interrupted"]


class Record(Document):
    """How a run stands."""

    run: str
    config_digest: str
    state: State
    started_at: str
    finished_at: str | None = None
    error: str | None = None
    version: str
    """Of this package."""


class Note(Document):
    """One finished step of a run."""

    generation: int
    step: str
    """Name of the step; labelling tasks add their shard range."""
    outputs: dict[str, str]
    """Name → key below the root."""
    seconds: float
    """Wall time that the work took, whichever run did it."""
    reused: bool
    """Whether the work had been done before."""
    finished_at: str


class Failure(Document):
    """The last try of a step, if it failed; gone when it is tried again. Only on a cluster, where no client sees it happen."""

    generation: int
    step: str
    error: str
    exit_code: int
    failed_at: str

    def __str__(self) -> str:
        return f"{f'generation {self.generation}: ' if self.generation else ''}{self.step}: {self.error}"


class Generation(BaseModel):
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
    labelled: int
    """Images in the pool that the teacher labelled."""
    kept: int
    """Distinct images that the selection kept."""
    label_set: str
    """Digest."""
    verdict: Literal["promoted", "refused"]
    reason: str
    seconds: float
    """Work in this generation; parallel tasks add up."""


class Measures(BaseModel):
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
    scores: Scores | None
    """Of corruptions and perturbations; relative to the first teacher where not to AlexNet."""
    attacks: dict[str, float]
    """`fgsm-8`, `pgd-16-10` (epsilon, steps) → top-1 that is left."""


class Summary(BaseModel):
    """A run at a glance: what `ns runs show --json` prints."""

    model_config = ConfigDict(frozen=True)

    run: str
    state: State
    error: str | None
    config_digest: str
    started_at: str
    finished_at: str | None
    teacher_top1: float | None
    """Of the teacher that the run began with, once it is evaluated."""
    generations: list[Generation]
    measures: list[Measures] = Field(default_factory=list)
    """Of each evaluated model, the first teacher's first."""
    best_model: str | None
    """The last accepted model, as a key below the root."""
    best_top1: float | None
    label_sets: list[str]
    """Digests, by generation."""
    report: str | None
    """URI of the report, once written."""
    steps: list[Note]


class Accepted(NamedTuple):
    """A student that a gate accepted, as the run has it that trained it."""

    run: str
    generation: int
    model: str
    """Key of its folder below the root."""


def accepted(root: Store, experiment: str) -> Accepted | None:
    """The student that a gate accepted last, of all runs of the experiments of this name; None if there is none.

    A student that several runs came to was accepted when the first of them accepted it: runs that are repeated change nothing. One
    whose folder was removed is passed over.
    """
    found: dict[str, tuple[str, Accepted]] = {}
    for record in listed(root):
        if _experiment_name(root, record.run) != experiment:
            continue
        for note in notes(root, record.run):
            if note.step != "gate":
                continue
            verdict = Verdict.read(root, note.outputs["verdict"])
            if verdict.promoted and root.exists(f"{verdict.student}/{CARD}"):
                this = (note.finished_at, Accepted(record.run, verdict.generation, verdict.student))
                found[verdict.student] = min(this, found.get(verdict.student, this))
    return max(found.values())[1] if found else None


def adopt(root: Store, run: str, model: Accepted) -> None:
    """Notes in a run that its teacher is another run's student, with what its training took there."""
    for known in notes(root, model.run):
        if (known.generation, known.step) == (model.generation, "train"):
            note(root, run, known.generation, known.step, known.outputs, known.seconds, reused=True)


def name_of(experiment: Experiment) -> str:
    """The name of the run of an experiment: the same command finds the same run again."""
    return f"{experiment.name}-{digest_of(experiment)[:8]}"


def name_of_generation(experiment: Experiment, generation: int, data: str, teacher: str | None) -> str:
    """The name of the run of one generation: with the same data and teacher (digests) it is the same run again."""
    return f"{experiment.name}-gen-{generation}-{digest([digest_of(experiment), data, teacher])[:8]}"


def check_name(run: str) -> None:
    """Raises ConfigError for what cannot be a run's name: it is a folder beside `store`, and a part of tags of label sets."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run) or ".." in run or run in ("latest", "store"):
        raise ConfigError(
            f"--run: invalid value {run!r}: must be at most 100 letters, digits, dots, dashes and underscores, begin with a letter or "
            "digit, hold no '..', and be neither 'latest' nor 'store'"
        )


def start(root: Store, run: str, experiment: Experiment, version: str) -> Record:
    """Opens a run, or opens it again. Raises RunError if the run exists with another configuration, ConfigError for a wrong name."""
    check_name(run)
    config_digest = digest_of(experiment)
    started_at = now()
    if root.exists(_record(run)):
        known = Record.read(root, _record(run))
        if known.config_digest != config_digest:
            raise RunError(
                f"run {run}: was started with another configuration ({root.at(run).uri}/{CONFIG}); "
                "choose another --run name, or leave it out"
            )
        started_at = known.started_at
    root.at(run).put(CONFIG, config.dump(experiment).encode())
    record = Record(run=run, config_digest=config_digest, state="running", started_at=started_at, version=version)
    record.write(root, _record(run))
    return record


@contextlib.contextmanager
def alone(root: Store, run: str) -> Iterator[None]:
    """Holds a run in a local folder for one client; a second one would only do the same work beside it.

    Raises RunError naming the process that holds it, StoreError when the folder cannot be written, ConfigError for a wrong name.
    """
    if not isinstance(root, LocalStore):
        # On a cluster it is Kubeflow that starts a step once.
        yield
        return
    check_name(run)
    folder = root.root / run
    client = folder / ".client"
    lock = _lock(root, run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOOK_SECONDS)
    except Timeout:
        pid = client.read_text() if client.exists() else "unknown"
        raise RunError(f"run {run}: is under way already (process {pid}); wait for it, or stop it first") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{folder}: cannot write: {reason}; choose another folder with --root") from error
    try:
        with contextlib.suppress(OSError):
            client.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


def _is_driven(root: Store, run: str) -> bool:
    """Whether a client is at work on the run. A client that was killed let go of its lock."""
    if not isinstance(root, LocalStore):
        return True
    try:
        with _lock(root, run):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _lock(root: LocalStore, run: str) -> FileLock:
    return FileLock(root.root / run / ".lock", timeout=0)


def finish(root: Store, run: str, state: State, error: str | None = None) -> None:
    record = Record.read(root, _record(run))
    record.model_copy(update={"state": state, "error": error, "finished_at": now()}).write(root, _record(run))


def note(root: Store, run: str, generation: int, step: str, outputs: dict[str, str], seconds: float, *, reused: bool) -> None:
    """Writes a step's note into the run. Work that this run did before and finds again keeps its first note."""
    key = f"{run}/steps/{generation}-{step}.json"
    if reused and root.exists(key) and Note.read(root, key).outputs == outputs:
        return
    document = Note(generation=generation, step=step, outputs=outputs, seconds=seconds, reused=reused, finished_at=now())
    document.write(root, key)


def notes(root: Store, run: str) -> list[Note]:
    """Notes of all finished steps, in the order in which they finished."""
    folder = root.at(run)
    found = [Note.read(folder, key) for key in folder.list("steps/") if key.endswith(".json")]
    return sorted(found, key=lambda note: (note.generation, note.finished_at, note.step))


def note_failure(root: Store, run: str, generation: int, step: str, error: NsError | str, *, key: str) -> None:
    """Keeps why a step failed. `key`: of this task among all of the run."""
    code = error.exit_code if isinstance(error, NsError) else 1
    failure = Failure(generation=generation, step=step, error=str(error), exit_code=code, failed_at=now())
    failure.write(root, f"{run}/failures/{generation}-{key}.json")


def forget_failure(root: Store, run: str, generation: int, *, key: str) -> None:
    root.delete(f"{run}/failures/{generation}-{key}.json")


def failures(root: Store, run: str) -> list[Failure]:
    """Steps whose last try failed, the latest last."""
    folder = root.at(run)
    found = [Failure.read(folder, key) for key in folder.list("failures/") if key.endswith(".json")]
    return sorted(found, key=lambda failure: failure.failed_at)


def listed(root: Store) -> list[Record]:
    """All runs below a root, the latest last."""
    records = (Record.read(root, key) for key in root.list(RECORDS))
    return sorted(records, key=lambda record: record.started_at)


def find(root: Store, run: str = "latest") -> str:
    """The full name of a run, given its name, an unambiguous beginning of it, or `latest`.

    Raises RunError listing what there is.
    """
    names = [record.run for record in listed(root)]
    if not names:
        raise RunError(f"{root.uri}: no runs here; start one with `ns run`, or name another place with --root")
    if run == "latest":
        return names[-1]
    matching = [name for name in names if name == run] or [name for name in names if name.startswith(run)]
    if len(matching) != 1:
        problem = f"is one of {', '.join(matching)}" if matching else "does not exist"
        raise RunError(f"run {run}: {problem}; runs in {root.uri}: {', '.join(names)}")
    return matching[0]


def prepared(root: Store, run: str) -> Prepared:
    """The datasets of a run. Raises RunError if it has not come so far."""
    for note in notes(root, run):
        if note.step == "prepare-data":
            return Prepared.read(root, note.outputs["data"])
    raise RunError(f"run {run}: its data is not prepared yet; `ns run --resume` continues it")


def model_place(root: Store, name: str) -> str:
    """A model's folder or URI as it is; of a run's name, the place of its best model. Raises RunError if there is none."""
    if open_store(name).exists(CARD):
        return name
    best = summarise(root, find(root, name)).best_model
    if best is None:
        raise RunError(f"run {name}: has no model yet; `ns run --resume` continues it")
    return root.at(best).uri


def summarise(root: Store, run: str) -> Summary:
    """Reads a run's notes and what they point to."""
    folder = root.at(run)
    try:
        record = Record.read(root, _record(run))
    except StoreError as error:
        raise RunError(f"run {run}: does not exist in {root.uri}") from error
    steps = notes(root, run)
    generations = [_generation(root, steps, note) for note in steps if note.step == "gate"]
    # Notes are in the order of generations, and a run may begin with an earlier one's student.
    teacher = next((note for note in steps if note.step == "train"), None)
    first = next((note for note in steps if note.step == "evaluate"), None)
    teacher_top1 = Evaluation.read(root, first.outputs["evaluation"]).top1 if first else None
    best_model = teacher.outputs["model"].rpartition("/")[0] if teacher else None
    best_top1 = teacher_top1
    for generation in generations:
        if generation.verdict == "promoted":
            best_model, best_top1 = generation.model, generation.student_top1
    killed = record.state == "running" and not _is_driven(root, run)
    return Summary(
        run=run,
        state="interrupted" if killed else record.state,
        error=record.error,
        config_digest=record.config_digest,
        started_at=record.started_at,
        finished_at=record.finished_at,
        teacher_top1=teacher_top1,
        generations=generations,
        measures=_measures(root, steps),
        best_model=best_model,
        best_top1=best_top1,
        label_sets=[generation.label_set for generation in generations],
        report=f"{folder.uri}/{REPORT}" if folder.exists(REPORT) else None,
        steps=steps,
    )


class Labels(NamedTuple):
    """A label set, and what is known of it by the run that made it; nothing of one that is opened by its place."""

    folder: Store
    label_set: LabelSet
    selection: Selection | None = None
    prepared: Prepared | None = None
    teacher: str | None = None
    """Key of the model's folder below the root."""

    @property
    def side(self) -> Side:
        """As it is compared with another one."""
        return Side(self.folder, self.label_set, self.selection)

    def pool(self, root: Store, place: str | None = None) -> tuple[Store, Dataset]:
        """The labelled images, of the run or at `place`. Raises DataError if they are not those that were labelled."""
        if place is not None:
            folder = open_store(place)
            dataset = Dataset.load(folder)
        elif self.prepared is not None:
            folder, dataset = self.prepared.pool.open(root)
        else:
            raise RunError(f"{self.folder.uri}: which images were labelled is not known here; name their folder with --pool")
        if dataset.digest != self.label_set.dataset:
            raise DataError(f"{folder.uri}: digest {dataset.digest}, but {self.folder.uri} labels {self.label_set.dataset}")
        return folder, dataset


def calibration(root: Store, found: Labels, policy: SelectionConfig) -> Calibration:
    """The thresholds of a wanted precision for a label set, from its teacher's evaluation on the run's held-out images.

    Raises RunError if there is none.
    """
    heldout = found.prepared.heldout.dataset if found.prepared else None
    for key in root.list("store/evaluations/"):
        if key.endswith(f"/{EVALUATION}"):
            evaluation = Evaluation.read(root, key)
            if (evaluation.model, evaluation.dataset, evaluation.scored) == (found.label_set.teacher, heldout, None):
                return calibrated(root.at(key.removesuffix(f"/{EVALUATION}")), evaluation, policy)
    raise RunError(
        f"{found.folder.uri}: selection.precision needs the teacher's evaluation on held-out images, which only a run has; "
        "name the label set as a run's generation: latest/gen-1"
    )


def calibrated(folder: Store, evaluation: Evaluation, policy: SelectionConfig) -> Calibration:
    """The thresholds of a policy's precision, from an evaluation on held-out images."""
    assert policy.precision is not None
    rows = read_predictions(folder, evaluation)
    return calibrate(
        rows["predicted"].to_numpy(),
        rows["confidence"].to_numpy(),
        rows["rank"].to_numpy() == 0,
        len(evaluation.classes),
        precision=policy.precision,
        level=policy.confidence,
        evaluation=evaluation.digest,
    )


def labels(root: Store, name: str) -> Labels:
    """The label set of a run's generation (`RUN/gen-N`, with a name that `find` knows), or the one in a folder.

    Raises RunError or DataError if there is none.
    """
    run, _, generation = name.rpartition("/gen-")
    if not run or not generation.isdigit():
        folder = open_store(name)
        if not folder.exists(LABEL_SET):
            raise DataError(
                f"{folder.uri}: no {LABEL_SET} here; name a label set's folder, or a run's generation: latest/gen-1"
            )
        return Labels(folder, LabelSet.read(folder, LABEL_SET))
    return generation_labels(root, find(root, run), int(generation))


def generation_labels(root: Store, run: str, number: int) -> Labels:
    """The label set of generation `number` of a run, given its full name. Raises RunError if there is none."""
    steps = {(note.generation, note.step): note.outputs for note in notes(root, run)}
    if (number, "commit-labels") not in steps:
        known = [f"gen-{g}" for g, step in steps if step == "commit-labels"]
        raise RunError(f"run {run}: generation {number} has no label set; there are {', '.join(known) or 'none'}")
    outputs = steps[number, "commit-labels"]
    folder = root.at(outputs["labels"].rpartition("/")[0])
    return Labels(
        folder,
        LabelSet.read(folder, LABEL_SET),
        Selection.read(root, outputs["selection"]),
        Prepared.read(root, steps[0, "prepare-data"]["data"]),
        outputs["teacher"].rpartition("/")[0] if "teacher" in outputs else None,
    )


def labels_before(root: Store, run: str, number: int) -> Labels | None:
    """The labels of the generation before: the run's own, or those that the teacher learnt from in the run that trained it.

    None if there are none, or if they are of another pool, with which this generation's cannot be compared.
    """
    own = generation_labels(root, run, number)
    for name in (run, *(record.run for record in reversed(listed(root)))):
        steps = {note.step: note.outputs for note in notes(root, name) if note.generation == number - 1}
        trained = steps.get("train", {}).get("model") == f"{own.teacher}/{CARD}"
        if "commit-labels" in steps and (name == run or trained):
            before = generation_labels(root, name, number - 1)
            return before if before.label_set.dataset == own.label_set.dataset else None
    return None


def verdict(root: Store, name: str) -> tuple[str, Verdict]:
    """The full name of a run, and the gate's verdict on a generation of it (`RUN/gen-N`), or the last one (`RUN`).

    Raises RunError if the gate has not spoken.
    """
    asked, slash, number = name.rpartition("/gen-")
    if slash and not number.isdigit():
        raise RunError(f"{name}: must be a run, or a generation of it: latest, latest/gen-1")
    run = find(root, asked if slash else name)
    spoken = {note.generation: note.outputs["verdict"] for note in notes(root, run) if note.step == "gate"}
    if not spoken:
        raise RunError(f"run {run}: no student has come to the gate yet; `ns run --resume` continues it")
    generation = int(number) if slash else max(spoken)
    if generation not in spoken:
        known = ", ".join(f"gen-{each}" for each in sorted(spoken))
        raise RunError(f"run {run}: there is no verdict on generation {generation}; there are {known}")
    return run, Verdict.read(root, spoken[generation])


def _generation(root: Store, steps: list[Note], gate: Note) -> Generation:
    verdict = Verdict.read(root, gate.outputs["verdict"])
    own = [note for note in steps if note.generation == gate.generation]
    commit = next((note for note in own if note.step == "commit-labels"), None)
    if commit is None:
        raise DataError(f"generation {gate.generation}: has a verdict but no note of commit-labels in {root.uri}")
    labels = LabelSet.read(root, commit.outputs["labels"])
    selection = Selection.read(root, commit.outputs["selection"])
    return Generation(
        generation=gate.generation,
        model=verdict.student,
        teacher_top1=verdict.teacher_top1,
        student_top1=verdict.student_top1,
        gain=verdict.gain,
        gain_low=verdict.gain_low,
        gain_high=verdict.gain_high,
        labelled=labels.rows,
        kept=selection.kept,
        label_set=labels.digest,
        verdict="promoted" if verdict.promoted else "refused",
        reason=verdict.reason,
        seconds=sum(note.seconds for note in own),
    )


def _measures(root: Store, steps: list[Note]) -> list[Measures]:
    found = []
    reference: Robustness | None = None
    for note in (note for note in steps if note.step == "evaluate"):
        outputs = note.outputs
        heldout = Evaluation.read(root, outputs["evaluation"])
        robustness = Robustness.read(root, outputs["robustness"]) if "robustness" in outputs else None
        reference = reference or robustness
        sets = {name: key for name, key in outputs.items() if name.startswith("set:") and key.endswith(f"/{EVALUATION}")}
        found.append(
            Measures(
                generation=note.generation,
                top1=heldout.top1,
                ece=heldout.calibration.ece if heldout.calibration else None,
                test_top1=Evaluation.read(root, outputs["test"]).top1 if "test" in outputs else None,
                sets={name.removeprefix("set:"): Evaluation.read(root, key).top1 for name, key in sets.items()},
                scores=scores(robustness, reference) if robustness else None,
                attacks={str(one): one.top1 for one in robustness.attacks} if robustness else {},
            )
        )
    return found


def digest_of(experiment: Experiment) -> str:
    """What runs of one name must share."""
    # Where versions are kept may change, and be given later, within one run.
    document = experiment.model_dump(mode="json", exclude={"registry", "evaluation"})
    # An experiment that does not use these is the one it was before they existed, under the same digest and name.
    if asked := experiment.evaluation.model_dump(mode="json", exclude_defaults=True, exclude={"keep_gib"}):
        document["evaluation"] = asked
    if experiment.data.test is None:
        del document["data"]["test"]
    return digest(document)


def _experiment_name(root: Store, run: str) -> str | None:
    # No more of it is read than this, since a field of an old one may be unknown by now.
    key = f"{run}/{CONFIG}"
    document = yaml.safe_load(root.get(key)) if root.exists(key) else None
    return document.get("name") if isinstance(document, dict) else None


def _record(run: str) -> str:
    return f"{RECORDS}{run}.json"


def now() -> str:
    """The time in UTC, to the microsecond: what follows each other closely is put in order by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
