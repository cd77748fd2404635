"""Decides: whether a student replaces its teacher, and so which teacher the next generation has."""

from collections.abc import Container
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ns.core import log
from ns.core.digest import digest_json
from ns.core.errors import DataError, TrainingError
from ns.data.fingerprint import FINGERPRINTS, read_contents
from ns.data.prepared import PreparedData
from ns.evaluation.gate import LabelQuality, Verdict, beats_chance, evaluate_gate, find_lost_classes
from ns.evaluation.result import Evaluation, ImageMistakes, Robustness, read_mistakes, read_predictions
from ns.evaluation.tries import GateTry, number_try
from ns.labeling.audit import check_audit, choose_deciding_audit, load_audits
from ns.labeling.diff import compare_label_sets
from ns.modeling.manifest import ModelManifest
from ns.reporting import run_metrics
from ns.runs.lookup import open_previous_label_set, open_run_label_set
from ns.runs.order import take_number
from ns.runs.records import find_stage_note, list_stage_notes
from ns.stages.context import STOP, RunRef, StageContext, stage
from ns.stages.evaluate import evaluate_heldout, measure_gate_robustness
from ns.stages.keys import generation_inputs, read_labeled_classes, read_model_digest
from ns.storage import parent_key


def check_first_teacher(ref: RunRef, *, data: str, teacher: str) -> None:
    """Raises TrainingError if the first teacher is no better than chance: its pseudo-labels would only waste the student."""
    with stage("check", ref) as context:
        _check_beats_chance(context, data, teacher)


def resolve_teacher(ref: RunRef, *, data: str, generation: int, first_teacher: str) -> str:
    """Key of the teacher of a generation, or STOP if the generation does not take place.

    `first_teacher` is the model that the run began with.
    """
    with stage("next-teacher", ref, generation) as context:
        teacher = first_teacher
        first_generation = ModelManifest.load(context.root.at(teacher)).generation
        if generation - first_generation > context.experiment.generations:
            return STOP
        for earlier in range(first_generation + 1, generation):
            # The run's own verdict counts, even if the code has changed since; the ledger's if it is another run's.
            note = find_stage_note(context.root, context.run, earlier, "gate")
            verdict_key = note.outputs["verdict"] if note else _find_verdict_key(context, data, earlier, teacher)
            verdict = Verdict.find_file(context.root, verdict_key) if verdict_key else None
            # A run that was continued with another teacher has notes of what is no longer part of it.
            if verdict is None or verdict.teacher != teacher or not verdict.promoted:
                return STOP
            teacher = verdict.student
        return teacher


def gate_generation(ref: RunRef, *, data: str, generation: int, teacher: str, student: str) -> str:
    """Compares student and teacher on the held-out images and records the verdict. Returns the key of `verdict.json`."""
    with stage("gate", ref, generation, teacher=teacher, linger=True) as context:
        root, experiment = context.root, context.experiment
        heldout = _read_heldout(context, data, teacher, student)
        teacher_rows, student_rows = heldout.rows
        gate_try = GateTry(
            heldout=heldout.digest, teacher=read_model_digest(root, teacher), student=read_model_digest(root, student)
        )
        verdict = evaluate_gate(
            experiment.gate,
            generation=generation,
            teacher=teacher,
            student=student,
            class_ids=teacher_rows["class_id"].to_numpy(),
            teacher_correct=teacher_rows["rank"].to_numpy() == 0,
            student_correct=student_rows["rank"].to_numpy() == 0,
            classes=read_labeled_classes(root, data),
            seed=experiment.seed,
            lost_classes=find_lost_classes(*heldout.evaluations),
            label_quality=_collect_label_evidence(context, generation),
            mistakes=_collect_mistakes(context, data, teacher, student, set(teacher_rows["key"].to_pylist())),
            heldout=heldout.digest,
            copies=heldout.copies,
            try_number=number_try(root, gate_try),
        )
        for warning in verdict.warnings:
            log.get_logger().warning(warning)
        inputs = generation_inputs(context, data, generation, teacher)
        key = f"{context.ledger.derive_key('verdicts', 'generation', inputs)}/{Verdict.filename}"
        # A run that comes to the same verdict again keeps the time at which the student was accepted.
        reused = root.exists(key) and Verdict.load_file(root, key) == verdict
        verdict.save_file(root, key)
        if verdict.promoted:
            take_number(root, "accepted", student)
        context.ledger.record_entry("generation", inputs, {"verdict": key}, 0.0)
        context.write_note({"verdict": key}, reused=reused, gain=verdict.gain, promoted=verdict.promoted, reason=verdict.reason)
        run_metrics.publish_verdict(verdict)
        run_metrics.publish_evaluation(root, ref.run, generation)
        return key


def was_student_refused(context: StageContext, data: str, teacher: str) -> bool:
    """Whether this run has been through its generation with this data and teacher, and refused the student."""
    if not context.root.exists(f"{teacher}/{ModelManifest.filename}"):
        return False
    key = _find_verdict_key(context, data, context.generation, teacher)
    if key is None or Verdict.load_file(context.root, key).promoted:
        return False
    notes = list_stage_notes(context.root, context.run)
    return any((note.generation, note.outputs.get("verdict")) == (context.generation, key) for note in notes)


def _find_verdict_key(context: StageContext, data: str, generation: int, teacher: str) -> str | None:
    """Key of the verdict on a generation with this data and teacher, in whichever run; None if there is none."""
    inputs = generation_inputs(context, data, generation, teacher)
    entry = context.ledger.find_entry("generation", inputs)
    return entry.outputs["verdict"] if entry else None


def _collect_label_evidence(context: StageContext, generation: int) -> LabelQuality:
    """What the gate asks of the generation's labels. They are read only if it asks."""
    gate_config = context.experiment.gate
    evidence = LabelQuality()
    compares = generation > 1 and (gate_config.max_churn is not None or gate_config.max_class_shrinkage is not None)
    if not compares and gate_config.min_audited_precision is None and gate_config.min_class_coverage is None:
        return evidence
    current = open_run_label_set(context.root, context.run, generation)
    if current.selection is not None:
        evidence = evidence._replace(class_coverage=current.selection.represented_share)
    if compares and (previous := open_previous_label_set(context.root, context.run, generation)):
        diff = compare_label_sets(previous.side, current.side, flips=0)
        evidence = evidence._replace(churn=diff.churn, shrinkage=diff.shrinkage, shrunk_class=diff.shrunk_class)
    audit = choose_deciding_audit(load_audits(current.store, current.label_set), current.selection)
    if audit is not None:
        check_audit(audit, current.store, current.label_set, current.selection)
        evidence = evidence._replace(audited_precision=(audit.precision, audit.precision_low, audit.reviewed))
    return evidence


def _collect_mistakes(
    context: StageContext, data: str, teacher: str, student: str, keys: Container[str]
) -> tuple[ImageMistakes, ImageMistakes] | None:
    """What teacher and student got wrong of the corrupted images with these keys; None if the gate does not ask for it."""
    if not context.experiment.gate.required_suites:
        return None
    prepared, root = PreparedData.load_file(context.root, data), context.root
    measured_keys = (measure_gate_robustness(context, prepared, model).key for model in (teacher, student))
    before, after = (
        read_mistakes(root.at(parent_key(key)), Robustness.load_file(root, key)).take_images(keys) for key in measured_keys
    )
    if before.keys != after.keys:
        raise DataError("gate: teacher and student were evaluated on different corrupted images; run the evaluation again")
    return before, after


class _HeldoutRows(NamedTuple):
    """What models said of the held-out images."""

    evaluations: tuple[Evaluation, ...]
    rows: tuple[pa.Table, ...]
    """The predictions of each model for the same images in the same order; of images with equal bytes, those for the first."""
    copies: int
    """Images that were left out because an earlier one has the same bytes."""
    digest: str
    """Digest of the images' bytes, whatever their names and order."""


def _read_heldout(context: StageContext, data: str, *models: str) -> _HeldoutRows:
    """Raises DataError if the models were evaluated on different images."""
    results = [evaluate_heldout(context, data, model) for model in models]
    tables = [read_predictions(*result) for result in results]
    if any(table["key"] != tables[0]["key"] for table in tables):
        raise DataError("gate: teacher and student were evaluated on different images; run the evaluation again")
    store, dataset = PreparedData.load_file(context.root, data).heldout.open_dataset(context.root)
    contents = read_contents(store, dataset, context.root.at(FINGERPRINTS))
    image_contents = np.array([contents[key] for key in tables[0]["key"].to_pylist()])
    distinct, first_rows = np.unique(image_contents, return_index=True)
    first_rows.sort()
    return _HeldoutRows(
        tuple(evaluation for _, evaluation in results),
        tuple(table.take(first_rows) for table in tables),
        len(image_contents) - len(distinct),
        digest_json([content.hex() for content in distinct.tolist()]),
    )


def _check_beats_chance(context: StageContext, data: str, teacher: str) -> None:
    heldout = _read_heldout(context, data, teacher)
    (evaluation,), (rows,) = heldout.evaluations, heldout.rows
    class_ids, predicted = rows["class_id"].to_numpy(), rows["predicted_class_id"].to_numpy()
    if not beats_chance(class_ids, predicted, seed=context.experiment.seed):
        largest = max(range(len(evaluation.classes)), key=lambda class_id: evaluation.class_images[class_id])
        share = evaluation.class_images[largest] / evaluation.images
        chance = 1 / sum(images > 0 for images in evaluation.class_images)
        never_predicted = evaluation.describe_never_predicted()
        raise TrainingError(
            f"the first teacher is no better than chance on {evaluation.images:,} held-out images: "
            f"its top-1 is {evaluation.top1:.1%}, always {evaluation.classes[largest]!r} has {share:.1%}; "
            f"its balanced accuracy is {evaluation.balanced_accuracy:.1%}, any fixed answer has {chance:.1%}; "
            + (f"it {never_predicted}; " if never_predicted else "")
            + "its pseudo-labels would be noise; train it longer (teacher.train.epochs), or check data.labeled"
        )
