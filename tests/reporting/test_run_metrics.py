"""What a run found, as metrics."""

import pytest

from ns.config.schema import GateConfig
from ns.core import telemetry
from ns.core.errors import StoreError
from ns.reporting import run_metrics
from ns.runs.lookup import (
    open_run_label_set,
    resolve_verdict,
)
from ns.runs.records import find_stage_note
from ns.runs.summary import summarize_run
from ns.stages.prepare import prepare_data
from ns.stages.roles import provide_teacher
from tests.loop import label_pool, open_tiny_run


def test_run_metrics_show_what_a_run_found(finished_run, monkeypatch):
    store, ref = finished_run
    run = ref.run
    value = telemetry.REGISTRY.get_sample_value
    # Gauges tell of the last labeling of this process, whichever test did it; so there is one more here.
    labeling = open_tiny_run(store, "labeling.top_k=3")
    data = prepare_data(labeling)
    label_pool(labeling, data=data, generation=1, teacher=provide_teacher(labeling, data=data))
    assert value("nst_images_processed_total", {"stage": "label"}) >= 2 * 847
    assert value("nst_images_processed_total", {"stage": "evaluate"}) > 0
    assert value("nst_pseudo_label_confidence_count") >= 2 * 847
    assert value("nst_data_wait_seconds_total") > 0
    assert value("nst_shards_done") == value("nst_shards") > 0

    monkeypatch.setenv(telemetry.PORT_VARIABLE, "0")
    (generation,) = summarize_run(store, run).generations
    before = value("nst_pseudo_labels_total", {"outcome": "kept"}) or 0
    selection = open_run_label_set(store, run, 1).selection
    run_metrics.publish_selection(store, run, 1, selection, GateConfig(max_churn=0.25))
    run_metrics.publish_evaluation(store, run, 1)
    run_metrics.publish_verdict(resolve_verdict(store, run)[1])
    assert value("nst_pseudo_labels_total", {"outcome": "kept"}) == before + generation.kept
    assert value("nst_label_churn_limit_ratio") == 0.25
    same = open_run_label_set(store, run, 1)
    with monkeypatch.context() as patch:
        patch.setattr(run_metrics, "open_previous_label_set", lambda *_: same)
        patch.setattr(run_metrics, "open_run_label_set", lambda *_: same)
        run_metrics.publish_selection(store, run, 2, selection, GateConfig())
    assert value("nst_label_churn_ratio") == 0
    assert value("nst_eval_accuracy_ratio", {"split": "heldout"}) == generation.student_top1
    measured = summarize_run(store, run).measurements[-1]
    assert value("nst_eval_balanced_accuracy_ratio", {"split": "heldout"}) == measured.balanced_accuracy
    assert value("nst_loop_gain_ratio", {"bound": "low"}) == generation.gain_low
    assert value("nst_gate_passed") == 1
    assert value("nst_gate_condition_passed", {"condition": "gain"}) == 1

    monkeypatch.setenv(telemetry.GATEWAY_VARIABLE, "http://127.0.0.1:9")
    run_metrics.push_run_summary(store, run, "digits")
    assert telemetry.SUMMARY.get_sample_value("nst_last_run_accuracy_ratio") == generation.student_top1
    assert telemetry.SUMMARY.get_sample_value("nst_last_run_promotions") == 1


def test_publish_evaluation_does_without_what_comes_later(finished_run, monkeypatch):
    """A run whose last evaluation is lost comes to it again through the first ones."""
    store, ref = finished_run
    key = find_stage_note(store, ref.run, 1, "evaluate").outputs["evaluation"]
    monkeypatch.setattr(telemetry, "is_served", lambda: True)
    evaluation = store.get(key)
    store.delete(key)
    try:
        run_metrics.publish_evaluation(store, ref.run, 0)
        with pytest.raises(StoreError, match=r"evaluation\.json"):
            run_metrics.publish_evaluation(store, ref.run, 1)
    finally:
        store.put(key, evaluation)
