"""A run in numbers, from its notes and what they point to."""

from typing import Literal

from pydantic import Field

from ns.core import log
from ns.core.errors import DataError, RunError, StoreError
from ns.evaluation.gate import Verdict
from ns.evaluation.result import Evaluation, Robustness
from ns.evaluation.robustness.scores import RobustnessScores, score_robustness
from ns.labeling.label_set import LabelSet
from ns.labeling.selection import Selection
from ns.runs.lifecycle import is_run_driven
from ns.runs.records import BASELINE_STAGES, REPORT_FILE, RunRecord, StageNote, list_stage_notes, record_key
from ns.storage import Store, parent_key
from ns.storage.documents import JsonDocument, parse_json_object


class GenerationSummary(JsonDocument):
    """One generation in numbers."""

    generation: int
    model: str
    """Key of the student's folder below the root."""
    teacher_top1: float
    student_top1: float
    gain: float
    """student_top1 − teacher_top1 on the same held-out images."""
    gain_low: float
    gain_high: float
    """Bounds of the gain, each one-sided at the verdict's level."""
    labeled: int
    """Images in the pool that the teacher labeled."""
    kept: int
    """Distinct images that the selection kept."""
    label_set: str
    """Digest of the label set."""
    verdict: Literal["promoted", "refused"]
    reason: str
    seconds: float
    """Seconds of work in this generation, summed over parallel tasks, without the baseline's."""


class ModelMeasurements(JsonDocument):
    """The results of a model's evaluation, as far as the experiment asked for them."""

    generation: int
    top1: float
    """Top-1 on the held-out images, by which the gate decides."""
    balanced_accuracy: float
    """Mean accuracy of the classes on the held-out images."""
    never_predicted: list[str]
    """Classes that have held-out images, and are the answer for none."""
    ece: float
    """Expected calibration error on the held-out images."""
    test_top1: float | None
    """Top-1 on the images that are only reported."""
    test_balanced_accuracy: float | None
    """Mean accuracy of the classes on them."""
    sets: dict[str, float]
    """Further evaluation sets: name → top-1."""
    scores: RobustnessScores | None
    """Scores of corruptions and perturbations, relative to AlexNet or to the first teacher."""
    attacks: dict[str, float]
    """`fgsm-8`, `pgd-16-10` (epsilon, steps) → top-1 under the attack."""


class RunSummary(RunRecord):
    """A run at a glance, as `ns runs show --json` prints it."""

    teacher_top1: float | None
    """Top-1 of the teacher that the run began with, once it is evaluated."""
    generations: list[GenerationSummary]
    measurements: list[ModelMeasurements] = Field(default_factory=list)
    """Of each evaluated model, by generation."""
    best_model: str | None
    """Key of the last accepted model's folder below the root."""
    best_top1: float | None
    label_sets: list[str]
    """Digests of the label sets, by generation."""
    report: str | None
    """URI of the report, once it is written."""
    stages: list[StageNote]


def list_current_notes(root: Store, run: str, stage: str = "", *, through_generation: int | None = None) -> list[StageNote]:
    """What `list_stage_notes` lists, of a run's loop as it is now, and of all generations or of the first ones.

    A run that is repeated with other code, or after an audit, may refuse a student that it had accepted, or train another one. Notes of
    what followed stay in its folder until the loop comes there again, and are no part of it.
    """
    notes = [
        note for note in list_stage_notes(root, run) if through_generation is None or note.generation <= through_generation
    ]
    return [note for note in _follow_verdicts(root, notes) if stage in ("", note.stage)]


def _follow_verdicts(root: Store, notes: list[StageNote]) -> list[StageNote]:
    """The notes up to where the verdicts lead, from each teacher to its student."""
    gate_notes = [note for note in notes if note.stage == "gate"]
    if not gate_notes:
        return notes
    # A run may begin with the student of an earlier run.
    before = [note for note in notes if note.stage == "train" and note.generation < gate_notes[0].generation]
    teacher = parent_key(before[-1].outputs["model"]) if before else None
    for gate_note in gate_notes:
        generation = gate_note.generation
        outputs = {note.stage: note.outputs for note in notes if note.generation == generation}
        labeled_by = outputs.get("select", {}).get("teacher")
        if teacher and labeled_by and parent_key(labeled_by) != teacher:
            return [note for note in notes if note.generation < generation]
        try:
            verdict = Verdict.load_file(root, gate_note.outputs["verdict"])
        except (DataError, StoreError):
            # What needs it says that it is lost.
            return notes
        student = parent_key(outputs["train"]["model"]) if "train" in outputs else verdict.student
        if (verdict.teacher, verdict.student) != (teacher or verdict.teacher, student):
            # This student is not decided about yet, or comes from another run as the next one's teacher.
            notes.remove(gate_note)
        elif not verdict.promoted:
            return [note for note in notes if note.generation <= generation]
        teacher = student
    return notes


def summarize_run(root: Store, run: str, *, through_generation: int | None = None) -> RunSummary:
    """Reads a run's notes and what they point to, of all generations or of the first ones.

    Raises RunError if there is no such run, DataError or StoreError, with the cure, for what is lost or damaged.
    """
    stage_notes = list_current_notes(root, run, through_generation=through_generation)
    try:
        return _summarize_notes(root, run, stage_notes)
    except (DataError, StoreError) as error:
        if all(_is_readable(root, key) for note in stage_notes for key in note.outputs.values()):
            raise
        raise type(error)(f"{error}; the command that began run {run} makes it again") from error


def summarize_run_or_record(root: Store, run: str) -> RunSummary:
    """As `summarize_run`, for lists: a run that lost something must not hide the others. Of that, only its record is told, and a warning
    says so."""
    try:
        return summarize_run(root, run)
    except (DataError, StoreError) as error:
        log.get_logger().warning("only the record of a run is told", run=run, reason=str(error))
        return _summarize_notes(root, run, [])


def _is_readable(root: Store, key: str) -> bool:
    """Whether a JSON file is there, and whole. Raises StoreError if that cannot be said."""
    try:
        parse_json_object(root.get(key), key)
    except DataError:
        return False
    except StoreError:
        if root.exists(key):
            raise
        return False
    return True


def _summarize_notes(root: Store, run: str, stage_notes: list[StageNote]) -> RunSummary:
    run_store = root.at(run)
    try:
        record = RunRecord.load_file(root, record_key(run))
    except StoreError as error:
        raise RunError(f"run {run}: does not exist in {root.uri}") from error
    generations = [_summarize_generation(root, stage_notes, note) for note in stage_notes if note.stage == "gate"]
    # Notes are sorted by generation, and a run may begin with the student of an earlier run.
    teacher_note = next((note for note in stage_notes if note.stage == "train"), None)
    evaluation_note = next((note for note in stage_notes if note.stage == "evaluate"), None)
    teacher_top1 = Evaluation.load_file(root, evaluation_note.outputs["evaluation"]).top1 if evaluation_note else None
    best_model = parent_key(teacher_note.outputs["model"]) if teacher_note else None
    best_top1 = teacher_top1
    for generation in generations:
        if generation.verdict == "promoted":
            best_model, best_top1 = generation.model, generation.student_top1
    was_killed = record.state == "running" and not is_run_driven(root, run)
    return RunSummary(
        **record.model_dump(exclude={"state"}),
        state="interrupted" if was_killed else record.state,
        teacher_top1=teacher_top1,
        generations=generations,
        measurements=collect_measurements(root, stage_notes),
        best_model=best_model,
        best_top1=best_top1,
        label_sets=[generation.label_set for generation in generations],
        report=f"{run_store.uri}/{REPORT_FILE}" if run_store.exists(REPORT_FILE) else None,
        stages=stage_notes,
    )


def _summarize_generation(root: Store, stage_notes: list[StageNote], gate_note: StageNote) -> GenerationSummary:
    verdict = Verdict.load_file(root, gate_note.outputs["verdict"])
    generation_notes = [note for note in stage_notes if note.generation == gate_note.generation]
    commit_note = next((note for note in generation_notes if note.stage == "select"), None)
    if commit_note is None:
        raise DataError(f"generation {gate_note.generation}: has a verdict but no note of select in {root.uri}")
    label_set = LabelSet.load_file(root, commit_note.outputs["label_set"])
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
        seconds=sum(note.seconds for note in generation_notes if note.stage not in BASELINE_STAGES),
    )


def collect_measurements(root: Store, stage_notes: list[StageNote]) -> list[ModelMeasurements]:
    """What the evaluations among these notes measured. Raises StoreError if one is lost."""
    measurements = []
    reference: Robustness | None = None
    for note in (note for note in stage_notes if note.stage == "evaluate"):
        outputs = note.outputs
        heldout = Evaluation.load_file(root, outputs["evaluation"])
        robustness = Robustness.load_file(root, outputs["robustness"]) if "robustness" in outputs else None
        reference = reference or robustness
        sets = {
            name.removeprefix("set:"): Evaluation.load_file(root, key).top1
            for name, key in outputs.items()
            if name.startswith("set:") and key.endswith(f"/{Evaluation.filename}")
        }
        test = Evaluation.load_file(root, outputs["test"]) if "test" in outputs else None
        measurements.append(
            ModelMeasurements(
                generation=note.generation,
                top1=heldout.top1,
                ece=heldout.calibration.ece,
                balanced_accuracy=heldout.balanced_accuracy,
                never_predicted=heldout.never_predicted,
                test_top1=test.top1 if test else None,
                test_balanced_accuracy=test.balanced_accuracy if test else None,
                sets=sets,
                scores=score_robustness(robustness, reference) if robustness else None,
                attacks={str(attack): attack.top1 for attack in robustness.attacks} if robustness else {},
            )
        )
    return measurements
