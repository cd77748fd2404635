"""A run in the forms that pipelines show: scalar metrics, a confusion matrix, an ROC curve, HTML, Markdown.

Generation 0 is the first teacher. All of them say what the run has noted so far; those of one generation raise RunError if it has not
evaluated that generation's model (`confusion` and `roc` give None). `ns.reporting.write` makes the report that is kept.
"""

from collections.abc import Callable

import numpy as np

from ns.core.errors import RunError
from ns.evaluation.result import Evaluation, read_predictions
from ns.reporting.context import ReportContext, gather_context
from ns.reporting.markdown import render_markdown
from ns.reporting.metrics import collect_metrics
from ns.reporting.page import render_report
from ns.runs import records as runs
from ns.storage import Store

CONFUSION_CLASSES = 50
"""More cannot be read in a matrix."""
OTHERS = "(others)"
ROC_POINTS = 200
PICTURES = 8
"""Of each group."""
PAGE_BYTES = 1_000_000
"""Kubeflow's page fetches the whole HTML, which should be no more than this."""
PICTURE_BYTES = 500_000
"""Of all pictures of a generation together."""


def collect_generation_metrics(store: Store, run: str, generation: int) -> dict[str, float]:
    """Name → value, of all that is known of the generation's model (`ns.reporting.metrics`); bounds end in `_low` and `_high`.

    `promoted` is 1 or 0 once the gate has decided. Shares in 0–1.
    """
    context = _gather_generation(store, run, generation, pictures=0)
    values: dict[str, float] = {}
    for metric in collect_metrics(context, context.models[-1]):
        values[metric.key] = float(metric.value)
        if metric.low is not None and metric.high is not None:
            values |= {f"{metric.key}_low": float(metric.low), f"{metric.key}_high": float(metric.high)}
    if verdict := context.verdict_of(generation):
        values["promoted"] = float(verdict.promoted)
    return values


def read_confusion(store: Store, run: str, generation: int) -> tuple[list[str], list[list[int]]] | None:
    """Class names, and images of the held-out set by label (row) and prediction (column).

    Of more than 50 classes the 49 with most mistakes are named, and the others stand together in the last row and column.
    """
    key = _find_evaluation_key(store, run, generation)
    if key is None:
        return None
    evaluation = Evaluation.load_file(store, key)
    matrix = np.array(evaluation.confusion, np.int64)
    names = list(evaluation.classes)
    if len(names) > CONFUSION_CLASSES:
        mistakes = matrix.sum(1) + matrix.sum(0) - 2 * matrix.diagonal()
        class_ids = np.sort(np.argsort(-mistakes, kind="stable")[: CONFUSION_CLASSES - 1])
        group = np.full(len(names), len(class_ids))
        group[class_ids] = np.arange(len(class_ids))
        folded = np.zeros((CONFUSION_CLASSES, CONFUSION_CLASSES), np.int64)
        np.add.at(folded, (group[:, None], group[None, :]), matrix)
        names, matrix = [*(names[index] for index in class_ids), OTHERS], folded
    return names, matrix.tolist()


def compute_roc(store: Store, run: str, generation: int) -> tuple[list[float], list[float], list[float]] | None:
    """How well the model's confidence tells its right answers from its wrong ones, on the held-out images.

    False positive rates (wrong answers with confidence above the threshold, of all wrong ones), true positive rates (the same of
    right answers), and thresholds from 1 down to 0; at most 200 points. It says nothing of any one class. None if all answers
    are right, or all wrong.
    """
    key = _find_evaluation_key(store, run, generation)
    if key is None:
        return None
    evaluation = Evaluation.load_file(store, key)
    rows = read_predictions(store.at(key.rpartition("/")[0]), evaluation)
    is_right = rows["rank"].to_numpy() == 0
    confidence = np.clip(rows["confidence"].to_numpy().astype(np.float64), 0, 1)
    if is_right.all() or not is_right.any():
        return None
    # Thresholds where confidences are, evenly by images: that is where the curve bends.
    inner = np.unique(np.quantile(confidence, np.linspace(0, 1, ROC_POINTS - 2), method="nearest"))
    thresholds = np.unique(np.concatenate([[0.0], inner, [1.0]]))[::-1]
    above = [
        1 - np.searchsorted(np.sort(confidence[selected]), thresholds, side="right") / selected.sum()
        for selected in (~is_right, is_right)
    ]
    return above[0].tolist(), above[1].tolist(), thresholds.tolist()


def render_run_html(store: Store, run: str) -> str:
    """The report of the whole run with few pictures, or with none where it would be larger than 1 MB."""
    return _render_small_page(lambda pictures: gather_context(store, run, pictures=pictures, size=PICTURE_BYTES))


def render_run_markdown(store: Store, run: str) -> str:
    """The same as Markdown: tables, a few kB."""
    return render_markdown(gather_context(store, run, pictures=0))


def render_generation_html(store: Store, run: str, generation: int) -> str:
    """The report's page of one generation and its teacher, likewise."""
    return _render_small_page(lambda pictures: _gather_generation(store, run, generation, pictures=pictures))


def render_generation_markdown(store: Store, run: str, generation: int) -> str:
    """The same as Markdown: tables, a few kB."""
    return render_markdown(_gather_generation(store, run, generation, pictures=0))


def _render_small_page(gather_with: Callable[[int], ReportContext]) -> str:
    page = render_report(gather_with(PICTURES))
    return page if len(page.encode()) <= PAGE_BYTES else render_report(gather_with(0))


def _gather_generation(store: Store, run: str, generation: int, *, pictures: int) -> ReportContext:
    if _find_evaluation_key(store, run, generation) is None:
        raise RunError(f"run {run}: generation {generation} is not evaluated yet")
    return gather_context(store, run, generation=generation, pictures=pictures, size=PICTURE_BYTES)


def _find_evaluation_key(store: Store, run: str, generation: int) -> str | None:
    notes = runs.list_stage_notes(store, run)
    return next((n.outputs["evaluation"] for n in notes if (n.stage, n.generation) == ("evaluate", generation)), None)
