"""Runs side by side."""

import pytest

from ns.config import schema as config
from ns.core.errors import RunError
from ns.evaluation.gate import Verdict
from ns.reporting import comparison
from tests.reporting.conftest import RUN


@pytest.fixture(scope="module")
def found(unchanged):
    return comparison.compare_runs(unchanged, [RUN, "other"])


def cells(found, name):
    return next([cell and str(cell) for cell in line.cells] for line in found.lines if line.name == name)


def test_best_models_stand_side_by_side(unchanged, found):
    best = [Verdict.load_file(unchanged, f"store/verdicts/{seed}1/verdict.json") for seed in (0, 1)]
    shown = cells(found, "held out, top-1")
    for verdict, cell in zip(best, shown, make_strict=True):
        top1 = verdict.student_top1 if verdict.promoted else verdict.teacher_top1
        assert cell.startswith(f"{100 * top1:.1f} %")


def test_the_difference_is_paired(found):
    first, second = cells(found, "difference from the first run, points")
    assert first is None
    assert "[" in second


def test_only_settings_that_differ_are_listed(found):
    assert [row.name for row in found.settings] == ["seed"]
    assert found.settings[0].values == ("0", "1")
    assert not next(row for row in found.lineage if row.name == "pool").differs
    assert next(row for row in found.lineage if row.name == "best model").differs
    assert not any("cannot be compared" in remark for remark in found.remarks)


def test_a_setting_that_one_run_leaves_at_its_default_is_shown_with_it(made_up):
    experiment = config.load_experiment(f"{made_up.uri}/other/config.yaml", ["teacher.train.checkpoints_kept=5", "seed=0"])
    made_up.put("other/config.yaml", config.dump_experiment(experiment).encode())
    (row,) = comparison.compare_runs(made_up, [RUN, "other"]).settings
    assert (row.name, row.values) == ("teacher.train.checkpoints_kept", ("2", "5"))


def test_other_held_out_images_are_warned_of(made_up):
    from ns.evaluation.result import Evaluation
    from ns.runs import records as runs

    (note,) = [n for n in runs.list_stage_notes(made_up, "other") if (n.generation, n.stage) == (1, "evaluate")]
    key = note.outputs["evaluation"]
    for place in (key, key.replace("/11/", "/10/")):
        Evaluation.load_file(made_up, place).model_copy(update_weights={"dataset": "f" * 64}).save_file(made_up, place)
    found = comparison.compare_runs(made_up, [RUN, "other"])
    assert "The held-out images are not the same in all runs: their accuracies cannot be compared." in found.remarks
    assert not any(line.name.startswith("difference") for line in found.metric_rows)


def test_page_and_markdown_say_the_same(unchanged, found):
    page, text = comparison.render_comparison_page(found), comparison.render_comparison_markdown(found)
    for line in found.lines:
        for cell in line.cells:
            assert cell is None or (str(cell) in page and str(cell) in text)
    assert "<script" not in page
    assert comparison.render_comparison_page(comparison.compare_runs(unchanged, [RUN, "other"])) == page


@pytest.mark.parametrize("names", [[RUN], [RUN, RUN]])
def test_one_run_is_no_comparison(unchanged, names):
    with pytest.raises(RunError, match="two or more different ones"):
        comparison.compare_runs(unchanged, names)


def test_a_run_without_a_model_is_named(made_up):
    for key in list(made_up.at("other").list("steps/")):
        made_up.at("other").delete(key)
    with pytest.raises(RunError, match="run other: has no evaluated model yet"):
        comparison.compare_runs(made_up, [RUN, "other"])
