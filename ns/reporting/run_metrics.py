"""Publishes the results of stages as the metrics of `ns.core.telemetry`. Reads the store only if metrics are served or pushed."""

from datetime import datetime

from ns.config.schema import GateConfig
from ns.core import telemetry
from ns.evaluation.gate import Verdict
from ns.labeling.diff import compare_label_sets
from ns.labeling.selection import Selection
from ns.runs.lookup import open_previous_label_set, open_run_label_set
from ns.runs.records import list_stage_notes
from ns.runs.summary import collect_measurements, summarize_run
from ns.storage import Store


def publish_selection(root: Store, run: str, generation: int, selection: Selection, gate: GateConfig) -> None:
    """How many images were kept or dropped and, from the second generation on, the share of changed labels."""
    if not telemetry.is_served():
        return
    outcomes = {
        "kept": selection.kept,
        "low_confidence": selection.low_confidence,
        "unproven": selection.unproven,
        "balanced_out": selection.balanced_out,
        "foreign": selection.foreign,
        "unreadable": selection.unreadable,
        "left_out": selection.left_out,
    }
    telemetry.record_selection(outcomes, [rule.kept for rule in selection.rules])
    if gate.max_churn is not None:
        telemetry.MAX_CHURN.set(gate.max_churn)
    if generation > 1 and (before := open_previous_label_set(root, run, generation)):
        after = open_run_label_set(root, run, generation)
        telemetry.CHURN.set(compare_label_sets(before.side, after.side, flips=0).churn)


def publish_evaluation(root: Store, run: str, generation: int) -> None:
    """The accuracies and robustness scores of a generation's model."""
    if not telemetry.is_served():
        return
    # What comes after it may be lost, and is made again after it.
    notes = [note for note in list_stage_notes(root, run, "evaluate") if note.generation <= generation]
    for model in collect_measurements(root, notes):
        if model.generation != generation:
            continue
        splits = {"heldout": model.top1, "test": model.test_top1, **model.sets}
        for split, top1 in splits.items():
            if top1 is not None:
                telemetry.EVALUATED.labels(split).set(top1)
        for split, balanced_accuracy in (("heldout", model.balanced_accuracy), ("test", model.test_balanced_accuracy)):
            if balanced_accuracy is not None:
                telemetry.BALANCED_ACCURACY.labels(split).set(balanced_accuracy)
        for attack, top1 in model.attacks.items():
            telemetry.ATTACKED.labels(attack).set(top1)
        if model.scores and model.scores.mce is not None:
            telemetry.MCE.set(model.scores.mce)
        if model.scores and model.scores.mfr is not None:
            telemetry.MFR.set(model.scores.mfr)


def publish_verdict(verdict: Verdict) -> None:
    """The gain, its bounds, which conditions of the gate hold, and how often its held-out images have decided."""
    for bound, gain in (("value", verdict.gain), ("low", verdict.gain_low), ("high", verdict.gain_high)):
        telemetry.GAIN.labels(bound).set(gain)
    telemetry.GATE.set(verdict.promoted)
    for condition in verdict.conditions:
        telemetry.GATE_CONDITION.labels(condition.name).set(condition.passed)
    telemetry.GATE_TRIES.set(verdict.try_number)
    telemetry.FAMILY_ERROR.set(verdict.family_error)


def push_run_summary(root: Store, run: str, experiment: str) -> None:
    """Pushes the results of a finished run to the Pushgateway, if there is one, under the experiment's name."""
    if not telemetry.is_pushed():
        return
    summary = summarize_run(root, run)
    now = datetime.now().astimezone()
    telemetry.LAST_SUCCESS.set(now.timestamp())
    telemetry.LAST_DURATION.set((now - datetime.fromisoformat(summary.started_at)).total_seconds())
    if summary.best_top1 is not None and summary.teacher_top1 is not None:
        telemetry.LAST_ACCURACY.set(summary.best_top1)
        telemetry.LAST_GAIN.set(summary.best_top1 - summary.teacher_top1)
    telemetry.LAST_PROMOTED.set(sum(generation.verdict == "promoted" for generation in summary.generations))
    telemetry.push_run_metrics(experiment)
