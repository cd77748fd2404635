"""The report of a made-up run: its content, its safety, and that it is reproducible."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from ns.cli.runs import print_run
from ns.core.errors import DataError
from ns.core.intervals import wilson_interval
from ns.evaluation import gate
from ns.evaluation.result import Evaluation
from ns.reporting import charts
from ns.reporting.context import gather_context
from ns.reporting.metrics import collect_metrics
from ns.runs.summary import summarize_run
from tests.reporting.conftest import RUN, page_of


def test_report_shows_results(page, unchanged):
    summary = summarize_run(unchanged, RUN)
    (row,) = summary.generations
    assert f"{100 * summary.teacher_top1:.1f} % → {100 * row.student_top1:.1f} %" in page
    assert f"<b>{row.kept}</b> of 60 images kept" in page
    assert "1 unreadable" in page
    assert "threshold 0.5" in page
    assert '<th scope="row">parameters</th><td class="n">1,234,567</td>' in page
    assert "per_class: 10" in page
    assert "checkpoints_kept: 2" in page
    assert "of 59 images have a different label than in the previous generation" in page


def test_report_shows_metrics_side_by_side(page):
    # Errors of 0.3 and 0.45 against the first teacher's 0.4 and 0.6.
    assert (
        '<th scope="row">mCE, % of the first teacher&#39;s</th><td class="n">100.0</td><td class="n"><b>75.0</b></td>' in page
    )
    assert (
        '<th scope="row">FGSM, ε 4, top-1</th><td class="n">10.0 % [2.8, 30.1]</td><td class="n"><b>20.0 % [8.1, 41.6]</b></td>'
        in page
    )
    assert "Measured on 20 of the images of held &lt;i&gt;out; mCE and mFR are percent of the first teacher’s errors" in page
    assert (
        '<th scope="rowgroup" rowspan="2">fog</th><td>First teacher</td><td class="n">40.0 %</td><td class="n">60.0 %</td>'
        in page
    )
    assert "held out, ECE" in page
    assert "<b>7</b> images of the pool are also in an evaluation set and get no label" in page
    assert '<tr><td>pool</td><td>heldout</td><td class="n">3</td><td class="n">4</td></tr>' in page


def test_report_shows_conditions(page, unchanged):
    verdict = gate.Verdict.load_file(unchanged, "store/verdicts/01/verdict.json")
    assert len(verdict.conditions) > 1
    for condition in verdict.conditions:
        assert f'<th scope="row">{condition.name}</th><td class="n">{condition.format_value()}</td>' in page
    assert page.count("✓ passed") == sum(condition.passed for condition in verdict.conditions)


def test_report_shows_disagreement(page, unchanged):
    paired = gate.Verdict.load_file(unchanged, "store/verdicts/01/verdict.json").paired
    assert paired.only_student > 0
    assert f"won: only student 1 right<br><b>{paired.only_student}</b>" in page
    assert f"lost: only first teacher right<br><b>{paired.only_teacher}</b>" in page
    context = gather_context(unchanged, RUN)
    assert context.disagreement.galleries[0].title == "Won"
    assert len(context.disagreement.galleries[0].pictures) == min(5, paired.only_student)
    assert sum(row.won for row in context.gains.rows) == paired.only_student
    assert [row.gain for row in context.gains.rows] == sorted(row.gain for row in context.gains.rows)


def test_gather_context_limits_pictures(unchanged):
    whole = gather_context(unchanged, RUN)
    size = 30_000
    cut = gather_context(unchanged, RUN, size=size)

    def list_galleries(context):
        return [*context.galleries, context.flips, *context.disagreement.galleries, *context.gains.galleries]

    def count_bytes(context):
        return sum(len(picture.source) for gallery in list_galleries(context) for picture in gallery.pictures)

    assert count_bytes(cut) <= size < count_bytes(whole)
    assert all(
        short.pictures == full.pictures[: len(short.pictures)]
        for short, full in zip(list_galleries(cut), list_galleries(whole), strict=True)
    )


def test_draw_class_balance_of_many_classes_is_small():
    many = charts.draw_class_balance("x", [f"class {n}" for n in range(1000)], range(1000), range(1000))
    assert len(many) < 150_000


@pytest.mark.parametrize("name", [r"$\bad{$", "a$b$", "_^{}"])
def test_draw_class_balance_shows_names_literally(name):
    assert name in ElementTree.fromstring(charts.draw_class_balance("x", [name, "other"], [3, 4], [1, 2])).itertext()


def test_report_escapes_names(page):
    assert "<script" not in page
    assert "/<b>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_report_loads_nothing(page):
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(http" not in page
    assert "@import" not in page


def test_write_report_is_reproducible(page, unchanged):
    assert page_of(unchanged) == page


def test_report_pictures_are_small(page):
    assert page.count("<img ") <= (3 + 1 + 3 + 3) * 5
    assert page.count("data:image/jpeg") > 10
    assert len(page) < 1_000_000


def test_report_charts_have_unique_ids(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) >= 9
    for chart in charts:
        ElementTree.fromstring(chart.replace("xlink:href", "href"))


@pytest.mark.parametrize("reached", ["nothing", "prepare", "train", "evaluate"])
def test_write_report_of_unfinished_run(made_up, reached):
    order = ["prepare", "train", "evaluate"]
    keep = order[: order.index(reached) + 1] if reached in order else []
    for key in list(made_up.at(RUN).list("stages/")):
        if key not in [f"stages/0-{stage}.json" for stage in keep]:
            made_up.at(RUN).delete(key)
    page = page_of(made_up)
    assert 'id="labels"' not in page
    assert 'id="disagreement"' not in page
    assert ("No model is evaluated yet" in page) == (reached != "evaluate")


def test_wilson_interval():
    # Brown, Cai & DasGupta (2001): 0 of 10 gives an upper bound of about 0.278.
    low, high = wilson_interval(0.0, 10)
    assert low == pytest.approx(0, abs=1e-9)
    assert high == pytest.approx(0.2775, abs=1e-3)


@pytest.mark.parametrize("count", [1, 7, 60, 500, 100_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_wilson_interval_contains_share(share, count):
    low, high = wilson_interval(share, count)
    assert 0 <= low <= share <= high <= 1


def test_report_names_classes_that_are_never_predicted(page, made_up):
    assert "never predicts" not in page
    key = "store/evaluations/01/evaluation.json"
    evaluation = Evaluation.load_file(made_up, key)
    evaluation.model_copy(update={"class_predicted": (30, 0, 0)}).save_file(made_up, key)
    assert "Student 1 never predicts 2 of 3 classes: &lt;script&gt;" in page_of(made_up)
    console = Console(record=True, width=200)
    print_run(summarize_run(made_up, RUN), made_up, console)
    assert "generation 1 never predicts 2 classes: <script>" in console.export_text()


@pytest.mark.parametrize("data", [b"", b"[", b'{"step": 1}', b"[1]", b"[{}]"])
def test_report_names_curves_that_are_damaged(made_up, data):
    key = next(key for key in made_up.list("store/models/01/") if "history" in key)
    made_up.put(key, data)
    with pytest.raises(DataError, match=r"store/models/01/history.*the run that trained the model makes it again"):
        gather_context(made_up, RUN)


def test_metrics_tell_foreign_images_and_classes_without_their_share(unchanged):
    context = gather_context(unchanged, RUN, pictures=0)
    model = context.models[-1]
    labeling = context.labeling_of(model.generation)
    first, *others = labeling.selection.rules
    rules = (first.model_copy(update={"foreign": labeling.label_set.rows // 2, "candidates": 0, "kept": 0}), *others)
    selection = labeling.selection.model_copy(update={"foreign_limit": 1.2, "rules": rules})
    polluted = replace(context, labelings=[replace(labeling, selection=selection)])
    plain, changed = ({metric.key: metric.value for metric in collect_metrics(shown, model)} for shown in (context, polluted))
    assert (plain["class_coverage"], "foreign" in plain) == (1, False)
    assert (changed["class_coverage"], changed["foreign"]) == (pytest.approx(2 / 3), pytest.approx(0.5, abs=0.02))
