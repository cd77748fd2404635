"""The model that `baseline: labeled_only` asks for."""

import pytest

from ns.modeling.manifest import ModelManifest
from ns.reporting.artifacts import collect_generation_metrics
from ns.reporting.comparison import compare_runs
from ns.reporting.context import gather_context
from ns.reporting.markdown import render_markdown
from ns.reporting.page import render_report
from ns.runs.records import BASELINE_STAGES, list_stage_notes
from ns.runs.summary import summarize_run
from tests.loop import open_tiny_run, run_loop

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run_with_baseline(finished_run):
    store, _ = finished_run
    ref = open_tiny_run(store, "baseline=labeled_only")
    run_loop(ref)
    # As after a kill at the end: nothing is trained again.
    run_loop(ref)
    return store, ref


def test_baseline_is_trained_on_labeled_images_as_long_as_the_student(run_with_baseline):
    store, ref = run_with_baseline
    context = gather_context(store, ref.run, pictures=0)
    student, baseline = context.models[-1].manifest, context.baseline.manifest
    assert (baseline.steps, baseline.model, baseline.noise) == (student.steps, student.model, student.noise)
    assert (baseline.lineage.label_set, baseline.lineage.selection) == (None, None)
    assert student.lineage.selection
    # The quickstart's students start from their teacher's weights, and so does what they are compared with.
    assert baseline.lineage.teacher == student.lineage.teacher == context.models[0].manifest.digest
    assert baseline.weights_sha256 != student.weights_sha256
    assert "loss_pseudo" not in context.baseline.history[-1]
    assert [note.reused for note in list_stage_notes(store, ref.run) if note.stage in BASELINE_STAGES] == [False, False]


def test_baseline_takes_part_in_no_decision(run_with_baseline, finished_run):
    store, ref = run_with_baseline
    with_baseline, without = summarize_run(store, ref.run), summarize_run(store, finished_run[1].run)
    assert with_baseline.best_model == without.best_model
    assert with_baseline.measurements == without.measurements
    assert [model.title for model in gather_context(store, ref.run, pictures=0).models] == ["First teacher", "Student 1"]


def test_baseline_stands_beside_the_students(run_with_baseline, finished_run):
    store, ref = run_with_baseline
    context = gather_context(store, ref.run, pictures=0)
    top1 = context.baseline.evaluation.top1
    page, text = render_report(context), render_markdown(context)
    assert '<th scope="col" class="n">Labeled images only</th>' in page
    assert "| Student 1 | Labeled images only |" in text
    assert collect_generation_metrics(store, ref.run, 1)["baseline_heldout_top1"] == top1
    comparison = compare_runs(store, [finished_run[1].run, ref.run])
    cells = {row.name: row.cells for row in comparison.metric_rows}
    assert cells["labeled images only, held out, top-1"][0] is None
    assert cells["labeled images only, held out, top-1"][1].value == top1
    gain = cells["gain over labeled images only, points"][1]
    assert gain.value == pytest.approx(context.best_model.evaluation.top1 - top1)
    assert gain.low <= gain.value <= gain.high
    assert ModelManifest.load(store.at(context.baseline.key)).generation == 1
