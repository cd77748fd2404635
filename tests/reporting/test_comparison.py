"""Runs side by side."""

import pytest

from ns.config.loader import dump_experiment, load_experiment
from ns.core.errors import RunError
from ns.evaluation.gate import Verdict
from ns.reporting.comparison import compare_runs, render_comparison_markdown, render_comparison_page
from tests.reporting.conftest import RUN


@pytest.fixture(scope="module")
def comparison(unchanged):
    return compare_runs(unchanged, [RUN, "other"])


def cells(comparison, name):
    return next([cell and str(cell) for cell in row.cells] for row in comparison.metric_rows if row.name == name)


def test_compare_runs_shows_best_models(unchanged, comparison):
    best = [Verdict.load_file(unchanged, f"store/verdicts/{seed}1/verdict.json") for seed in (0, 1)]
    shown = cells(comparison, "held out, top-1")
    for verdict, cell in zip(best, shown, strict=True):
        top1 = verdict.student_top1 if verdict.promoted else verdict.teacher_top1
        assert cell.startswith(f"{100 * top1:.1f} %")


def test_compare_runs_pairs_difference(comparison):
    first, second = cells(comparison, "difference from the first run, points")
    assert first is None
    assert "[" in second


def test_compare_runs_lists_differing_settings(comparison):
    assert [row.name for row in comparison.settings] == ["seed"]
    assert comparison.settings[0].values == ("0", "1")
    lineage = {row.name: set(row.values) for row in comparison.lineage}
    assert (len(lineage["pool"]), len(lineage["best model"])) == (1, 2)
    assert not any("cannot be compared" in remark for remark in comparison.remarks)


def test_compare_runs_shows_defaults(made_up):
    experiment = load_experiment(f"{made_up.uri}/other/config.yaml", ["teacher.train.checkpoints_kept=5", "seed=0"])
    made_up.put("other/config.yaml", dump_experiment(experiment).encode())
    (row,) = compare_runs(made_up, [RUN, "other"]).settings
    assert (row.name, row.values) == ("teacher.train.checkpoints_kept", ("2", "5"))


def test_compare_runs_warns_of_other_images(made_up):
    from ns.evaluation.result import Evaluation
    from ns.runs.records import list_stage_notes

    (note,) = [n for n in list_stage_notes(made_up, "other") if (n.generation, n.stage) == (1, "evaluate")]
    key = note.outputs["evaluation"]
    for evaluation_key in (key, key.replace("/11/", "/10/")):
        Evaluation.load_file(made_up, evaluation_key).model_copy(update={"dataset": "f" * 64}).save_file(
            made_up, evaluation_key
        )
    comparison = compare_runs(made_up, [RUN, "other"])
    assert "The held-out images are not the same in all runs: their accuracies cannot be compared." in comparison.remarks
    assert not any(row.name.startswith("difference") for row in comparison.metric_rows)


def test_comparison_page_and_markdown_agree(unchanged, comparison):
    page, text = render_comparison_page(comparison), render_comparison_markdown(comparison)
    for row in comparison.metric_rows:
        for cell in row.cells:
            assert cell is None or (str(cell) in page and str(cell) in text)
    assert "<script" not in page
    assert render_comparison_page(compare_runs(unchanged, [RUN, "other"])) == page


@pytest.mark.parametrize("names", [[RUN], [RUN, RUN]])
def test_compare_runs_refuses_one_run(unchanged, names):
    with pytest.raises(RunError, match="two or more different ones"):
        compare_runs(unchanged, names)


def test_compare_runs_refuses_run_without_model(made_up):
    for key in list(made_up.at("other").list("stages/")):
        made_up.at("other").delete(key)
    with pytest.raises(RunError, match="run other: has no evaluated model yet"):
        compare_runs(made_up, [RUN, "other"])
