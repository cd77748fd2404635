"""Finds runs, and the models, label sets and verdicts that runs left behind, by their names."""

from typing import NamedTuple

from ns.config.schema import SelectionConfig
from ns.config.yaml_text import parse_yaml
from ns.core import log
from ns.core.errors import ConfigError, DataError, RunError
from ns.data.dataset import Dataset
from ns.data.prepared import PreparedData
from ns.evaluation.gate import Verdict
from ns.evaluation.result import Evaluation, read_predictions
from ns.labeling.diff import DiffSide
from ns.labeling.foreign import find_foreign_limit
from ns.labeling.label_set import LabelSet
from ns.labeling.selection import Selection
from ns.labeling.thresholds import Thresholds, find_thresholds
from ns.modeling.manifest import ModelManifest
from ns.runs.order import read_numbers
from ns.runs.records import (
    CONFIG_FILE,
    RECORDS_PREFIX,
    RUN_NAME,
    AcceptedStudent,
    RunRecord,
    find_stage_note,
    list_stage_notes,
    record_key,
)
from ns.runs.summary import list_current_notes, summarize_run
from ns.storage import Store, open_store, parent_key


def list_runs(root: Store) -> list[RunRecord]:
    """All runs below a root, the one that was begun last at the end."""
    numbers = read_numbers(root, "runs")
    records = RunRecord.iterate_files(root, root.list(RECORDS_PREFIX))
    return sorted(records, key=lambda record: (numbers.get(record.run, (0, "")), record.started_at))


def resolve_run_name(root: Store, run: str = "latest") -> str:
    """The full name of a run, given its name, an unambiguous beginning of it, or `latest`.

    Raises RunError, with a list of the runs, if there is not exactly one.
    """
    if RUN_NAME.fullmatch(run) and root.exists(record_key(run)):
        return run
    names = [record.run for record in list_runs(root)]
    if not names:
        raise RunError(f"{root.uri}: no runs here; start one with `ns run`, or name another folder with --root")
    if run == "latest":
        return names[-1]
    matching = [name for name in names if name == run] or [name for name in names if name.startswith(run)]
    if len(matching) != 1:
        problem = f"is one of {', '.join(matching)}" if matching else "does not exist"
        raise RunError(f"run {run}: {problem}; runs in {root.uri}: {', '.join(names)}")
    return matching[0]


def read_prepared_data(root: Store, run: str) -> PreparedData:
    """The datasets of a run. Raises RunError if they are not prepared yet."""
    prepared = find_prepared_data(root, run)
    if prepared is None:
        raise RunError(f"run {run}: its data is not prepared yet; `ns run --resume` continues it")
    return prepared


def find_prepared_data(root: Store, run: str) -> PreparedData | None:
    """The datasets of a run; None if they are not prepared yet."""
    note = find_stage_note(root, run, 0, "prepare")
    return PreparedData.load_file(root, note.outputs["data"]) if note else None


def resolve_model_uri(root: Store, name: str) -> str:
    """The URI of a model, given as a model's folder or URI, or as a run whose best model is meant. Raises RunError if there is none."""
    if open_store(name).exists(ModelManifest.filename):
        return name
    return root.at(find_best_model(root, resolve_run_name(root, name))).uri


def find_best_model(root: Store, run: str) -> str:
    """Key of the folder of a run's last accepted model. Raises RunError if there is none."""
    best_model = summarize_run(root, run).best_model
    if best_model is None:
        raise RunError(f"run {run}: has no model yet; `ns run --resume` continues it")
    return best_model


def split_generation(name: str) -> tuple[str, int] | None:
    """The run and the generation that `RUN/gen-N` names; None for any other name."""
    run, _, number = name.rpartition("/gen-")
    # Other scripts' digits are digits too, and some are no numbers.
    return (run, int(number)) if run and number.isascii() and number.isdigit() else None


def resolve_verdict(root: Store, name: str) -> tuple[str, Verdict]:
    """The full name of a run, and the gate's verdict on a generation of it (`RUN/gen-N`), or the last one (`RUN`).

    Raises RunError if there is no verdict.
    """
    named = split_generation(name)
    if named is None and "/gen-" in name:
        raise RunError(f"{name}: must be a run, or a generation of it: latest, latest/gen-1")
    run = resolve_run_name(root, named[0] if named else name)
    verdict_keys = {note.generation: note.outputs["verdict"] for note in list_current_notes(root, run, "gate")}
    if not verdict_keys:
        raise RunError(f"run {run}: no student has come to the gate yet; `ns run --resume` continues it")
    generation = named[1] if named else max(verdict_keys)
    if generation not in verdict_keys:
        available = ", ".join(f"gen-{judged_generation}" for judged_generation in sorted(verdict_keys))
        raise RunError(f"run {run}: there is no verdict on generation {generation}; there are {available}")
    return run, Verdict.load_file(root, verdict_keys[generation])


def find_accepted_student(root: Store, experiment: str) -> AcceptedStudent | None:
    """The student that a gate accepted last, in any run of an experiment of this name; None if there is none.

    If several runs accepted the same student, the first counts, so that a repeated run changes nothing. Students whose folder was
    removed are left out.
    """
    numbers = read_numbers(root, "accepted")
    accepted_students: dict[str, tuple[tuple[int, str], str, AcceptedStudent]] = {}
    for record in list_runs(root):
        if read_experiment_name(root, record.run) != experiment:
            continue
        for note in list_current_notes(root, record.run, "gate"):
            verdict = Verdict.find_file(root, note.outputs["verdict"])
            if verdict and verdict.promoted and root.exists(f"{verdict.student}/{ModelManifest.filename}"):
                student = AcceptedStudent(record.run, verdict.generation, verdict.student)
                rank = numbers.get(verdict.student, (0, ""))
                accepted_students.setdefault(verdict.student, (rank, note.finished_at, student))
    return max(accepted_students.values())[-1] if accepted_students else None


def read_experiment_name(root: Store, run: str) -> str | None:
    """Name of a run's experiment; None if its file is missing or damaged."""
    # Only the name is read: the experiments of other versions may have fields that this one does not know.
    key = f"{run}/{CONFIG_FILE}"
    try:
        document = parse_yaml(root.get(key), f"{root.uri}/{key}") if root.exists(key) else None
    except ConfigError as error:
        log.get_logger().warning("passed over", file=f"{root.uri}/{key}", reason=str(error))
        return None
    return document.get("name") if isinstance(document, dict) else None


class RunLabelSet(NamedTuple):
    """A label set and, if it was opened as a run's generation, what the run knows of it."""

    store: Store
    label_set: LabelSet
    selection: Selection | None = None
    prepared: PreparedData | None = None
    teacher: str | None = None
    """Key of the teacher's folder below the root."""
    calibration: str | None = None
    """Key of the labeler's `evaluation.json` on the calibration images, below the root."""
    foreign: str | None = None
    """Key of the teacher's `foreign.json`, below the root."""

    @property
    def side(self) -> DiffSide:
        """The label set as one side of a comparison."""
        return DiffSide(self.store, self.label_set, self.selection)

    def open_pool(self, root: Store, uri: str | None = None) -> tuple[Store, Dataset]:
        """The pool, from the run or from `uri`. Raises DataError if it is not the pool that was labeled, RunError if it is unknown."""
        if uri is not None:
            pool_store = open_store(uri)
            dataset = Dataset.load(pool_store)
        elif self.prepared is not None:
            pool_store, dataset = self.prepared.pool.open_dataset(root)
        else:
            raise RunError(f"{self.store.uri}: the pool of a label set by itself is unknown; name its folder with --pool")
        if dataset.digest != self.label_set.dataset:
            raise DataError(f"{pool_store.uri}: digest {dataset.digest}, but {self.store.uri} labels {self.label_set.dataset}")
        return pool_store, dataset


def open_label_set(root: Store, name: str) -> RunLabelSet:
    """The label set of a run's generation (`RUN/gen-N`, where RUN is as in `resolve_run_name`), or the one in a folder.

    Raises RunError or DataError if there is none.
    """
    named = split_generation(name)
    if named is None:
        label_store = open_store(name)
        if not label_store.exists(LabelSet.filename):
            raise DataError(
                f"{label_store.uri}: no {LabelSet.filename} here; name a label set's folder, or a run's generation: latest/gen-1"
            )
        return RunLabelSet(label_store, LabelSet.load(label_store))
    run, generation = named
    return open_run_label_set(root, resolve_run_name(root, run), generation)


def open_run_label_set(root: Store, run: str, generation: int) -> RunLabelSet:
    """The label set of a generation of a run, given the run's full name. Raises RunError if there is none."""
    note = find_stage_note(root, run, generation, "select")
    if note is None:
        available = [f"gen-{other.generation}" for other in list_stage_notes(root, run, "select")]
        raise RunError(f"run {run}: generation {generation} has no label set; there are {', '.join(available) or 'none'}")
    label_store = root.at(parent_key(note.outputs["label_set"]))
    return RunLabelSet(
        label_store,
        LabelSet.load(label_store),
        Selection.load_file(root, note.outputs["selection"]),
        read_prepared_data(root, run),
        parent_key(note.outputs["teacher"]),
        note.outputs.get("calibration"),
        note.outputs.get("foreign"),
    )


def open_previous_label_set(root: Store, run: str, generation: int) -> RunLabelSet | None:
    """The label set of the generation before: from the run itself, or from the run that trained the teacher on it.

    None if there is none, or if it is of another pool and cannot be compared with this generation's.
    """
    current = open_run_label_set(root, run, generation)
    for name in (run, *(record.run for record in reversed(list_runs(root)))):
        note = find_stage_note(root, name, generation - 1, "train")
        trained = note is not None and note.outputs["model"] == f"{current.teacher}/{ModelManifest.filename}"
        if (name == run or trained) and find_stage_note(root, name, generation - 1, "select"):
            previous = open_run_label_set(root, name, generation - 1)
            return previous if previous.label_set.dataset == current.label_set.dataset else None
    return None


def find_policy_foreign_limit(root: Store, run_label_set: RunLabelSet, policy: SelectionConfig) -> float | None:
    """The foreign score above which the policy leaves images of a label set out; None if the label set has no such scores.

    Raises RunError if the run's scores of the calibration images are not known.
    """
    if run_label_set.label_set.foreign_score == "none":
        return None
    if run_label_set.foreign is None:
        raise RunError(
            f"{run_label_set.store.uri}: selection.foreign_quantile needs the scores of the calibration images, which only a run "
            "has; name the label set as a run's generation: latest/gen-1"
        )
    return find_foreign_limit(root.at(parent_key(run_label_set.foreign)), policy.foreign_quantile)


def find_policy_thresholds(root: Store, run_label_set: RunLabelSet, policy: SelectionConfig) -> Thresholds:
    """The thresholds of the policy's precision for a label set, from the run's calibration images as its teacher labels them.

    Raises RunError if the run has none.
    """
    key = run_label_set.calibration
    if key is None:
        cure = (
            "name the label set as a run's generation: latest/gen-1"
            if run_label_set.prepared is None
            else "start a run with data.calibration, or with selection.precision, which sets some of the held-out images apart"
        )
        raise RunError(
            f"{run_label_set.store.uri}: selection.precision needs calibration images that the teacher has labeled, and there are "
            f"none; {cure}"
        )
    return compute_policy_thresholds(root.at(parent_key(key)), Evaluation.load_file(root, key), policy)


def compute_policy_thresholds(store: Store, evaluation: Evaluation, policy: SelectionConfig) -> Thresholds:
    """The thresholds of a policy's precision, from an evaluation on calibration images."""
    assert policy.precision is not None
    rows = read_predictions(store, evaluation)
    return find_thresholds(
        rows["predicted_class_id"].to_numpy(),
        rows["confidence"].to_numpy(),
        rows["rank"].to_numpy() == 0,
        len(evaluation.classes),
        precision=policy.precision,
        level=policy.confidence,
        evaluation=evaluation.digest,
        min_confidence=policy.min_confidence,
    )
