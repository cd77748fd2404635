"""A generation in the forms that pipelines show."""

import re

import numpy as np
import pyarrow as pa
import pytest

from ns.core import log
from ns.core.digest import sha256_bytes
from ns.core.errors import RunError, StoreError
from ns.evaluation.accuracy import summarize_predictions
from ns.evaluation.result import PREDICTIONS_SCHEMA, Evaluation
from ns.reporting import artifacts
from ns.stages.context import RunRef
from ns.stages.report import publish_model_metrics, publish_report
from ns.storage import parent_key
from ns.storage.parquet import encode_table
from tests.reporting.conftest import CLASSES, RUN

EVALUATION = "store/evaluations/01/evaluation.json"


def test_collect_generation_metrics(unchanged):
    result = artifacts.collect_generation_metrics(unchanged, RUN, 1)
    evaluation = Evaluation.load_file(unchanged, EVALUATION)
    assert result["heldout_top1"] == evaluation.top1
    assert result["heldout_top1_low"] < result["heldout_top1"] < result["heldout_top1_high"]
    assert result["heldout_ece"] == evaluation.calibration.ece
    assert result["mce"] == pytest.approx(75)
    assert result["fgsm_4"] == pytest.approx(0.2)
    assert result["pgd_16_10"] == 0.05
    assert result["gain_low"] < result["gain"] < result["gain_high"]
    # Three processes trained.
    assert result["device_hours"] == pytest.approx((result["seconds"] + 2 * result["train_seconds"]) / 3600)
    assert result["promoted"] in (0.0, 1.0)
    assert all(isinstance(value, float) for value in result.values())
    assert all(re.fullmatch("[a-z0-9_]+", key) for key in result)


def test_collect_generation_metrics_of_first_teacher(unchanged):
    result = artifacts.collect_generation_metrics(unchanged, RUN, 0)
    assert result["mce"] == pytest.approx(100)
    assert "promoted" not in result
    assert "gain" not in result


def write_predictions(store, class_ids, predicted, names) -> Evaluation:
    """Replaces the evaluation of generation 1."""
    before = Evaluation.load_file(store, EVALUATION)
    table = pa.table(
        [
            pa.array([str(row) for row in range(len(class_ids))]),
            *(pa.array(values, pa.uint16()) for values in (class_ids, predicted)),
            pa.array(np.full(len(class_ids), 0.5, np.float32)),
            pa.array((class_ids != predicted).astype(np.uint16)),
        ],
        schema=PREDICTIONS_SCHEMA,
    )
    encoded = encode_table(table)
    evaluation = summarize_predictions(
        table,
        model=before.model,
        dataset=before.dataset,
        classes=names,
        unreadable=0,
        mode="float32",
        name="heldout",
        predictions_sha256=sha256_bytes(encoded),
    )
    folder = store.at(parent_key(EVALUATION))
    folder.put(evaluation.predictions_key, encoded)
    evaluation.save(folder)
    return evaluation


def test_read_confusion(unchanged):
    names, matrix = artifacts.read_confusion(unchanged, RUN, 1)
    assert tuple(names) == CLASSES
    assert matrix == Evaluation.load_file(unchanged, EVALUATION).build_confusion_matrix()


def test_read_confusion_folds_many_classes(made_up):
    count = 70
    rng = np.random.default_rng(0)
    matrix = np.diag(np.full(count, 100)) + rng.integers(0, 2, (count, count))
    matrix[69, 68] = 50
    names = tuple(f"c{number}" for number in range(count))
    class_ids, predicted = (np.repeat(ids.ravel(), matrix.ravel()) for ids in np.indices(matrix.shape))
    write_predictions(made_up, class_ids, predicted, names)
    shown, folded = artifacts.read_confusion(made_up, RUN, 1)
    assert len(shown) == len(folded) == artifacts.CONFUSION_CLASSES
    assert shown[-1] == artifacts.OTHERS
    assert folded[shown.index("c69")][shown.index("c68")] == 50
    assert np.sum(folded) == matrix.sum()


def test_compute_roc(unchanged):
    wrong, right, thresholds = artifacts.compute_roc(unchanged, RUN, 1)
    assert (wrong[0], right[0], thresholds[0]) == (0, 0, 1)
    assert (wrong[-1], right[-1], thresholds[-1]) == (1, 1, 0)
    assert 2 < len(thresholds) <= artifacts.ROC_POINTS
    assert thresholds == sorted(thresholds, reverse=True)
    assert wrong == sorted(wrong)
    assert right == sorted(right)
    # By hand, at one of them.
    import pyarrow.parquet as pq

    rows = pq.read_table(unchanged.path(f"store/evaluations/01/{Evaluation.load_file(unchanged, EVALUATION).predictions_key}"))
    above = rows["confidence"].to_numpy() > thresholds[5]
    correct = rows["rank"].to_numpy() == 0
    assert right[5] == pytest.approx((above & correct).sum() / correct.sum())
    assert wrong[5] == pytest.approx((above & ~correct).sum() / (~correct).sum())


def test_render_small_html_is_small_and_confined(unchanged):
    page = artifacts.render_small_html(unchanged, RUN, 1)
    assert page.startswith("<!doctype html>")
    assert len(page.encode()) < 1_000_000
    assert "<b>made-up</b> · generation 1" in page
    assert 'id="gate"' in page
    assert "Generation 2" not in page
    text = artifacts.render_small_markdown(unchanged, RUN, 1)
    assert text.startswith("### made\\-up, generation 1:".replace("\\-", "-"))
    assert len(text) < 20_000


def test_render_small_html_is_small(unchanged, monkeypatch):
    page = artifacts.render_small_html(unchanged, RUN)
    assert len(page.encode()) < 1_000_000
    assert "<b>made-up</b> · generation" not in page
    assert "data:image/" in page
    assert artifacts.render_small_markdown(unchanged, RUN).startswith("### made-up: ")
    # Where there is no room for pictures there are none.
    monkeypatch.setattr(
        artifacts, "render_report", lambda context: "x" * (artifacts.PAGE_BYTES if context.galleries else 1) + "x"
    )
    assert artifacts.render_small_html(unchanged, RUN) == "xx"
    assert artifacts.render_small_html(unchanged, RUN, 1) == "xx"


def test_artifacts_of_unevaluated_generation(unchanged):
    with pytest.raises(RunError, match="made-up: generation 2 is not evaluated yet"):
        artifacts.render_small_html(unchanged, RUN, 2)
    assert artifacts.read_confusion(unchanged, RUN, 2) is None
    assert artifacts.compute_roc(unchanged, RUN, 2) is None


class FakeArtifact:
    """Keeps what is logged to a Kubeflow artifact."""

    def __init__(self, path):
        self.path = str(path)
        self.metrics = {}
        self.matrix = self.curve = None

    def log_metric(self, name, value):
        self.metrics[name] = value

    def log_confusion_matrix(self, names, matrix):
        self.matrix = names, matrix

    def log_roc_curve(self, *curve):
        self.curve = curve


def test_publish_functions_write_kubeflow_artifacts(unchanged, tmp_path, monkeypatch):
    monkeypatch.delenv(log.EVENTS_VARIABLE, raising=False)
    metrics, answers, page, summary = (
        FakeArtifact(tmp_path / name) for name in ("metrics", "answers", "page.html", "summary.md")
    )
    ref = RunRef("", unchanged.uri, RUN)
    publish_model_metrics(ref, "store/models/01", metrics, answers)
    monkeypatch.setattr(artifacts, "render_small_html", lambda _, run, generation: f"page of {run}, {generation}")
    publish_report(ref, page, summary, 1)
    assert metrics.metrics == artifacts.collect_generation_metrics(unchanged, RUN, 1)
    assert answers.matrix == artifacts.read_confusion(unchanged, RUN, 1)
    assert answers.curve == artifacts.compute_roc(unchanged, RUN, 1)
    assert (tmp_path / "page.html").read_text() == f"page of {RUN}, 1"
    assert (tmp_path / "summary.md").read_text() == artifacts.render_small_markdown(unchanged, RUN, 1)
    publish_report(ref, page, summary)
    assert (tmp_path / "page.html").read_text() == f"page of {RUN}, None"
    assert (tmp_path / "summary.md").read_text() == artifacts.render_small_markdown(unchanged, RUN)


def test_publish_model_metrics_does_without_what_comes_later(made_up, tmp_path, monkeypatch):
    """A run whose last evaluation is lost comes to it again through the first ones."""
    monkeypatch.delenv(log.EVENTS_VARIABLE, raising=False)
    metrics, answers = FakeArtifact(tmp_path / "metrics"), FakeArtifact(tmp_path / "answers")
    made_up.delete(EVALUATION)
    publish_model_metrics(RunRef("", made_up.uri, RUN), "store/models/00", metrics, answers)
    assert metrics.metrics == artifacts.collect_generation_metrics(made_up, RUN, 0)
    with pytest.raises(StoreError, match=r"evaluation\.json"):
        artifacts.collect_generation_metrics(made_up, RUN, 1)


def test_publish_functions_do_nothing_with_client(unchanged, tmp_path, monkeypatch):
    monkeypatch.setenv(log.EVENTS_VARIABLE, str(tmp_path / "events"))
    artifact, ref = FakeArtifact(tmp_path / "page.html"), RunRef("", unchanged.uri, RUN)
    publish_model_metrics(ref, "store/models/m", artifact, artifact)
    publish_report(ref, artifact, artifact, 1)
    publish_report(ref, artifact, artifact)
    assert not artifact.metrics
    assert not (tmp_path / "page.html").exists()
