import json

import pytest
from rich.table import Table

from benchmarks.measure import RESULTS
from benchmarks.summary import (
    FIGURES,
    GUARDED,
    README,
    find_regressions,
    least_favorable,
    load_kept,
    render_readme,
    render_summary_page,
)

BASELINE = {"label": {"forward_ratio": 0.9}, "select": {"scan_ratio": 2.0, "vs_pandas": 10.0}}


def guard(*measurements):
    """What is found worse when the benchmarks measure these, one after the other."""
    left = list(measurements)
    return find_regressions(BASELINE, lambda name: left.pop(0), Table("", "", "", "", ""))


def test_find_regressions_needs_two_worse_measurements():
    worse = guard({"forward_ratio": 0.6}, {"forward_ratio": 0.62}, BASELINE["select"])
    assert worse == ["label: forward_ratio: 0.620, was 0.900"]


def test_find_regressions_ignores_one_worse_measurement():
    assert guard({"forward_ratio": 0.6}, {"forward_ratio": 0.88}, BASELINE["select"]) == []


def test_find_regressions_knows_ratios_of_which_less_is_better():
    slow = {"scan_ratio": 2.6, "vs_pandas": 10.0}
    assert guard(BASELINE["label"], slow, slow) == ["select: scan_ratio: 2.600, was 2.000"]
    assert guard(BASELINE["label"], {"scan_ratio": 0.5, "vs_pandas": 9.0}) == []


def test_find_regressions_reports_missing_ratios():
    assert len(guard({}, {}, BASELINE["select"])) == 1


def test_least_favorable_of_several_runs():
    runs = [{"scan_ratio": 2.0, "vs_pandas": 11.0}, {"scan_ratio": 2.5, "vs_pandas": 12.0}]
    assert least_favorable("select", runs) == {"scan_ratio": 2.5, "vs_pandas": 11.0}


def test_summary_page_compares_with_targets():
    text = render_summary_page({"label": {"forward_ratio": 0.886, "vs_timm_inference": 9.08}, "select": {"peak_mib": 2000.0}})
    assert "| 0.886 | ≥ 0.95 | not reached |" in text
    assert "| 9.08 | ≥ 5 | reached |" in text
    assert "| 2,000 | ≤ 1024 | not reached |" in text


def test_summary_page_says_what_the_network_alone_would_reach():
    figures = {"vs_timm_train": 1.0, "vs_timm_train.a": 1.0, "step_ratio_randaugment.a": 0.8}
    figures |= {"vs_timm_train.b": 1.2, "step_ratio_randaugment.b": 0.5}
    text = render_summary_page({"train": figures})
    assert "| 1 | ≥ 2.5 | not reached; the network alone, on a batch in memory: 1.25 |" in text


def test_readme_has_the_figures_that_were_measured():
    assert render_readme(README.read_text(), load_kept(RESULTS)) == README.read_text(), "run `python -m benchmarks.summary`"


def test_readme_tells_the_least_and_the_most_favorable_case():
    kept = load_kept(RESULTS)
    kept["train"] = {"step_ratio_plain": 0.9, "vs_timm_train": 1.0, "vs_timm_train.b0": 3.0, "vs_timm_train.r18": 1.0}
    assert "1.0 to 3.0 times as fast as timm's `train.py`" in render_readme(README.read_text(), kept)


def test_readme_tells_the_interval_of_an_experiment(tmp_path):
    figure = "clean_error_reduction_over_control"
    result = {"figures": {figure: 0.163}, "intervals": {figure: {"value": 0.163, "low": 0.121, "high": 0.205}}}
    (tmp_path / "method_cifar10.json").write_text(json.dumps(result))
    text = render_readme(README.read_text(), load_kept(tmp_path))
    assert (
        "**16.3%** fewer errors after two generations than as long a training on the labels alone (95 % interval: 12.1% to 20.5%)"
        in text
    )


def test_summary_page_is_up_to_date():
    assert (RESULTS / "README.md").read_text() == render_summary_page(load_kept(RESULTS)), "run `python -m benchmarks.summary`"


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_summary_figures_were_measured(name):
    path = RESULTS / f"{name}.json"
    if not path.exists():
        pytest.skip("not measured yet")
    assert {figure.name for figure in FIGURES[name]} <= json.loads(path.read_text())["figures"].keys()


def test_guarded_benchmarks_exist():
    assert set(GUARDED) <= set(FIGURES)
