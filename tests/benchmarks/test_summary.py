import json

import pytest
from rich.table import Table

from benchmarks.measure import RESULTS
from benchmarks.summary import FIGURES, GUARDED, find_regressions, least_favorable, load_kept, render_summary_page

BASELINE = {"label": {"forward_ratio": 0.9}, "select": {"scan_ratio": 2.0, "vs_pandas": 10.0}}


def guard(*measurements):
    """What is found worse when the benchmarks measure these, one after the other."""
    left = list(measurements)
    return find_regressions(BASELINE, lambda name: left.pop(0), Table("", "", "", "", ""))


def test_a_ratio_a_quarter_worse_twice_is_a_regression():
    worse = guard({"forward_ratio": 0.6}, {"forward_ratio": 0.62}, BASELINE["select"])
    assert worse == ["label: forward_ratio: 0.620, was 0.900"]


def test_once_is_chance():
    assert guard({"forward_ratio": 0.6}, {"forward_ratio": 0.88}, BASELINE["select"]) == []


def test_of_some_ratios_less_is_better():
    slow = {"scan_ratio": 2.6, "vs_pandas": 10.0}
    assert guard(BASELINE["label"], slow, slow) == ["select: scan_ratio: 2.600, was 2.000"]
    assert guard(BASELINE["label"], {"scan_ratio": 0.5, "vs_pandas": 9.0}) == []


def test_a_ratio_that_is_measured_no_more_is_a_regression():
    assert len(guard({}, {}, BASELINE["select"])) == 1


def test_what_is_kept_to_compare_with_is_the_least_favorable():
    runs = [{"scan_ratio": 2.0, "vs_pandas": 11.0}, {"scan_ratio": 2.5, "vs_pandas": 12.0}]
    assert least_favorable("select", runs) == {"scan_ratio": 2.5, "vs_pandas": 11.0}


def test_the_page_says_what_was_reached():
    text = render_summary_page({"label": {"forward_ratio": 0.886, "vs_timm_inference": 9.08}, "select": {"peak_mib": 2000.0}})
    assert "| 0.886 | ≥ 0.95 | not reached |" in text
    assert "| 9.08 | ≥ 5 | reached |" in text
    assert "| 2,000 | ≤ 1024 | not reached |" in text


def test_the_page_is_that_of_the_results():
    assert (RESULTS / "README.md").read_text() == render_summary_page(load_kept(RESULTS)), "run `python -m benchmarks.summary`"


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_that_are_shown_are_ones_that_were_measured(name):
    path = RESULTS / f"{name}.json"
    if not path.exists():
        pytest.skip("not measured yet")
    assert {figure.name for figure in FIGURES[name]} <= json.loads(path.read_text())["figures"].keys()


def test_guarded_benchmarks_are_ones_that_there_are():
    assert set(GUARDED) <= set(FIGURES)
