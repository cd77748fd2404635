"""Reports in the forms that Kubeflow shows: scalar metrics, a confusion matrix, an ROC curve, small HTML pages, Markdown.

Generation 0 is the first teacher. Functions of one generation raise RunError if its model is not evaluated yet, except `read_confusion`
and `compute_roc`, which return None.
"""

import numpy as np

from ns.core.errors import RunError
from ns.evaluation.result import Evaluation, read_predictions
from ns.reporting.context import ReportContext, gather_context
from ns.reporting.markdown import render_markdown
from ns.reporting.metrics import collect_metrics, flatten_metrics
from ns.reporting.page import render_report
from ns.runs.records import find_stage_note
from ns.storage import Store, parent_key

CONFUSION_CLASSES = 50
"""A matrix of more classes is unreadable."""
OTHERS = "(others)"
ROC_POINTS = 200
PICTURES = 8
"""Pictures per gallery."""
PAGE_BYTES = 1_000_000
"""Size limit of a page: Kubeflow's UI fetches it whole."""
PAGE_PICTURE_BYTES = 500_000
"""Size limit of all pictures of a page together."""


def collect_generation_metrics(store: Store, run: str, generation: int) -> dict[str, float]:
    """The metrics of the generation's model, as `flatten_metrics` names them; shares in 0–1.

    `promoted` is 1 or 0 once the gate has decided; `baseline_heldout_top1` is that of the run's baseline.
    """
    context = _gather_context(store, run, generation, pictures=0)
    values = flatten_metrics(collect_metrics(context, context.models[-1]))
    if verdict := context.verdict_of(generation):
        values["promoted"] = float(verdict.promoted)
    if context.baseline and context.baseline.evaluation:
        values["baseline_heldout_top1"] = context.baseline.evaluation.top1
    return values


def read_confusion(store: Store, run: str, generation: int) -> tuple[list[str], list[list[int]]] | None:
    """Class names, and counts of held-out images by true class (row) and prediction (column).

    Of more than 50 classes, the 49 with the most mistakes are named; the last row and column sum up the others.
    """
    key = _find_evaluation_key(store, run, generation)
    if key is None:
        return None
    evaluation = Evaluation.load_file(store, key)
    rows = read_predictions(store.at(parent_key(key)), evaluation)
    names = list(evaluation.classes)
    group = np.arange(len(names))
    if len(names) > CONFUSION_CLASSES:
        images, predicted, correct = map(
            np.array, (evaluation.class_images, evaluation.class_predicted, evaluation.class_correct)
        )
        shown = np.sort(np.argsort(2 * correct - images - predicted, kind="stable")[: CONFUSION_CLASSES - 1])
        group = np.full(len(names), len(shown))
        group[shown] = np.arange(len(shown))
        names = [*(names[class_id] for class_id in shown), OTHERS]
    matrix = np.zeros((len(names), len(names)), np.int64)
    np.add.at(matrix, (group[rows["class_id"].to_numpy()], group[rows["predicted_class_id"].to_numpy()]), 1)
    return names, matrix.tolist()


def compute_roc(store: Store, run: str, generation: int) -> tuple[list[float], list[float], list[float]] | None:
    """How well the model's confidence separates its right from its wrong answers on the held-out images, over all classes.

    Returns false positive rates (share of wrong answers with confidence above the threshold), true positive rates (the same of right
    answers), and thresholds from 1 down to 0; at most 200 points. None if all answers are right, or all wrong.
    """
    key = _find_evaluation_key(store, run, generation)
    if key is None:
        return None
    evaluation = Evaluation.load_file(store, key)
    rows = read_predictions(store.at(parent_key(key)), evaluation)
    is_right = rows["rank"].to_numpy() == 0
    confidence = np.clip(rows["confidence"].to_numpy().astype(np.float64), 0, 1)
    if is_right.all() or not is_right.any():
        return None
    # Thresholds at quantiles of confidence: the curve bends where the images are.
    inner = np.unique(np.quantile(confidence, np.linspace(0, 1, ROC_POINTS - 2), method="nearest"))
    thresholds = np.unique(np.concatenate([[0.0], inner, [1.0]]))[::-1]
    above = [
        1 - np.searchsorted(np.sort(confidence[selected]), thresholds, side="right") / selected.sum()
        for selected in (~is_right, is_right)
    ]
    return above[0].tolist(), above[1].tolist(), thresholds.tolist()


def render_small_html(store: Store, run: str, generation: int | None = None) -> str:
    """The report of the run, or of one generation and its teacher, with few pictures, or without any if it would exceed 1 MB."""
    page = render_report(_gather_context(store, run, generation, pictures=PICTURES))
    return page if len(page.encode()) <= PAGE_BYTES else render_report(_gather_context(store, run, generation, pictures=0))


def render_small_markdown(store: Store, run: str, generation: int | None = None) -> str:
    """The report of the run, or of one generation and its teacher, as Markdown tables, a few kB."""
    return render_markdown(_gather_context(store, run, generation, pictures=0))


def _gather_context(store: Store, run: str, generation: int | None, *, pictures: int) -> ReportContext:
    if generation is not None and _find_evaluation_key(store, run, generation) is None:
        raise RunError(f"run {run}: generation {generation} is not evaluated yet")
    return gather_context(store, run, generation=generation, pictures=pictures, size=PAGE_PICTURE_BYTES)


def _find_evaluation_key(store: Store, run: str, generation: int) -> str | None:
    note = find_stage_note(store, run, generation, "evaluate")
    return note.outputs["evaluation"] if note else None
