"""What a run has found, as the metrics of `ns.core.telemetry`. Reads what the steps left in the store, and only where somebody looks."""

from datetime import datetime

from ns.config.schema import GateConfig
from ns.core import telemetry
from ns.evaluation.gate import Verdict
from ns.labeling.diff import compare_label_sets
from ns.labeling.selection import Selection
from ns.runs import records as runs
from ns.storage import Store


def publish_selection(root: Store, run: str, generation: int, selection: Selection, gate: GateConfig) -> None:
    """What became of the pool's images, and from the second generation on how many labels changed."""
    if not telemetry.is_served():
        return
    outcomes = {
        "kept": selection.kept,
        "low_confidence": selection.low_confidence,
        "balanced_out": selection.balanced_out,
        "unreadable": selection.unreadable,
        "left_out": selection.left_out,
    }
    telemetry.record_selection(outcomes, [rule.kept for rule in selection.rules])
    if gate.max_churn is not None:
        telemetry.MAX_CHURN.set(gate.max_churn)
    if generation > 1 and (before := runs.open_previous_label_set(root, run, generation)):
        after = runs.open_run_label_set(root, run, generation)
        telemetry.CHURN.set(compare_label_sets(before.side, after.side, flips=0).churn)


def publish_evaluation(root: Store, run: str, generation: int) -> None:
    """What the evaluation of a generation's model found."""
    if not telemetry.is_served():
        return
    for measures in runs.summarize_run(root, run).measurements:
        if measures.generation != generation:
            continue
        splits = {"heldout": measures.top1, "test": measures.test_top1, **measures.sets}
        for split, top1 in splits.items():
            if top1 is not None:
                telemetry.EVALUATED.labels(split).set(top1)
        for attack, top1 in measures.attacks.items():
            telemetry.ATTACKED.labels(attack).set(top1)
        if measures.scores and measures.scores.mce is not None:
            telemetry.MCE.set(measures.scores.mce)
        if measures.scores and measures.scores.mfr is not None:
            telemetry.MFR.set(measures.scores.mfr)


def publish_verdict(verdict: Verdict) -> None:
    for bound, gain in (("value", verdict.gain), ("low", verdict.gain_low), ("high", verdict.gain_high)):
        telemetry.GAIN.labels(bound).set(gain)
    telemetry.GATE.set(verdict.promoted)
    for condition in verdict.conditions:
        telemetry.GATE_CONDITION.labels(condition.name).set(condition.passed)


def push_run_summary(root: Store, run: str, experiment: str) -> None:
    """Leaves how the run ended with the Pushgateway, if there is one, under the name of the experiment."""
    if not telemetry.is_pushed():
        return
    summary = runs.summarize_run(root, run)
    now = datetime.now().astimezone()
    telemetry.LAST_SUCCESS.set(now.timestamp())
    telemetry.LAST_DURATION.set((now - datetime.fromisoformat(summary.started_at)).total_seconds())
    if summary.best_top1 is not None and summary.teacher_top1 is not None:
        telemetry.LAST_ACCURACY.set(summary.best_top1)
        telemetry.LAST_GAIN.set(summary.best_top1 - summary.teacher_top1)
    telemetry.LAST_PROMOTED.set(sum(generation.verdict == "promoted" for generation in summary.generations))
    telemetry.push_run_metrics(experiment)
