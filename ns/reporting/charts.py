"""Charts as inline SVG. They use the page's color variables, so that they follow it into dark mode and print."""

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ns.core.intervals import wilson_interval
from ns.core.printable import escape_controls
from ns.evaluation.result import Calibration
from ns.labeling.label_set import HISTOGRAM_BINS

# Placeholder colors that matplotlib draws with; `_render_svg` replaces them with the page's variables.
INK, FAINT = "#010101", "#020202"
SERIES = ("#030303", "#040404", "#050505", "#060606", "#070707", "#080808")
MARKERS = ("o", "s", "^", "D", "v", "P")
VARIABLES = {INK: "currentColor", FAINT: "var(--faint)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(SERIES, 1)
}

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # class names may contain $
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}

MAX_BARS = 60
"""Largest number of classes drawn as bars."""
WIDTH, HEIGHT = 4.4, 2.7
"""Inches; a small figure keeps its text readable on a phone."""


def draw_accuracy(generations: Sequence[int], top1: Sequence[float], images: int) -> Markup:
    """Held-out top-1 (0–1) by generation with 95 % Wilson intervals; generation 0 is the first teacher."""
    bounds = [wilson_interval(value, images) for value in top1]

    def draw_axes(axes: Axes) -> None:
        low = [100 * (value - bound[0]) for value, bound in zip(top1, bounds, strict=True)]
        high = [100 * (bound[1] - value) for value, bound in zip(top1, bounds, strict=True)]
        values = [100 * value for value in top1]
        axes.errorbar(range(len(values)), values, yerr=[low, high], color=SERIES[0], marker="o", capsize=4, linewidth=1.6)
        for x, value in enumerate(values):
            axes.annotate(f"{value:.1f}", (x, value), xytext=(7, -11), textcoords="offset points", color=INK)
        axes.set_xticks(range(len(values)), ["teacher" if g == 0 else f"student {g}" for g in generations])
        axes.set(xlim=(-0.4, len(values) - 0.4), ylabel="held-out top-1, %")

    shown = ", ".join(f"{value:.1%}" for value in top1)
    return _render_svg("accuracy", f"Held-out top-1 accuracy by generation: {shown}", draw_axes)


def draw_run_accuracies(top1: Mapping[str, Sequence[tuple[int, float]]]) -> Markup:
    """Held-out top-1 of several runs: (generation, share in 0–1) of each model; generation 0 is the first teacher."""

    def draw_axes(axes: Axes) -> None:
        _plot_lines(axes, {run: [(generation, 100 * value) for generation, value in points] for run, points in top1.items()})
        last = max(generation for points in top1.values() for generation, _ in points)
        axes.set_xticks(range(last + 1), ["teacher" if g == 0 else f"student {g}" for g in range(last + 1)])
        axes.set_ylabel("held-out top-1, %")

    description = "; ".join(f"{run} {', '.join(f'{value:.1%}' for _, value in points)}" for run, points in top1.items())
    return _render_svg("runs", f"Held-out top-1 by generation: {description}", draw_axes)


def draw_confidence(name: str, counts: npt.NDArray[np.uint64], threshold: float) -> Markup:
    """Images by the teacher's confidence in 40 bins, with the threshold. `counts`: uint64 [HISTOGRAM_BINS]."""
    bars = counts.reshape(40, HISTOGRAM_BINS // 40).sum(1).astype(np.int64)

    def draw_axes(axes: Axes) -> None:
        left = np.arange(40) / 40
        for in_part, color in ((left + 1 / 80 > threshold, SERIES[0]), (left + 1 / 80 <= threshold, FAINT)):
            axes.bar(left[in_part], bars[in_part], width=1 / 40, align="edge", color=color)
        axes.axvline(threshold, color=SERIES[1], linewidth=1.5, linestyle="--")
        axes.annotate(
            f"threshold {threshold:g}",
            (threshold, axes.get_ylim()[1]),
            xytext=(4, -8),
            textcoords="offset points",
            color=SERIES[1],
        )
        axes.set(xlim=(0, 1), xlabel="confidence of the teacher", ylabel="images")

    return _render_svg(f"confidence-{name}", f"Histogram of confidence, threshold {threshold:g}", draw_axes)


def draw_class_balance(name: str, class_names: Sequence[str], candidates: Sequence[int], images: Sequence[int]) -> Markup:
    """Images of each class above the threshold, and per epoch after balancing. More than `MAX_BARS` classes are sorted by size."""

    def draw_outline(axes: Axes) -> None:
        order = np.argsort(-np.asarray(candidates), kind="stable")
        axes.stairs(np.asarray(candidates)[order], fill=True, color=FAINT, label="above the threshold")
        axes.stairs(np.asarray(images)[order], color=SERIES[0], linewidth=1.4, label="after balancing")
        axes.set(xlabel="classes, largest first", ylabel="images")
        _add_legend_above(axes)

    def draw_class_bars(axes: Axes) -> None:
        positions = np.arange(len(class_names))
        axes.bar(positions - 0.2, candidates, 0.4, color=FAINT, label="above the threshold")
        axes.bar(positions + 0.2, images, 0.4, color=SERIES[0], label="after balancing")
        step = max(1, math.ceil(len(class_names) / 12))
        shown_names = [escape_controls(class_name, keep_newlines=False)[:10] for class_name in class_names[::step]]
        axes.set_xticks(positions[::step], shown_names)
        axes.set_ylabel("images")
        _add_legend_above(axes)

    description = "Pseudo-labeled images of each class before and after balancing"
    return _render_svg(f"classes-{name}", description, draw_class_bars if len(class_names) <= MAX_BARS else draw_outline)


def draw_bars(name: str, about: str, kinds: Sequence[str], series: Mapping[str, Sequence[float]]) -> Markup:
    """Shares (0–1) by kind, one bar per model; at most as many models as `SERIES` has colors. Kinds go from top to bottom."""

    def draw_axes(axes: Axes) -> None:
        thick = 0.8 / len(series)
        positions = np.arange(len(kinds))
        for number, ((label, values), color) in enumerate(zip(series.items(), SERIES, strict=False)):
            centers = positions + (number - (len(series) - 1) / 2) * thick
            axes.barh(centers, [100 * value for value in values], thick, color=color, label=label)
        axes.set_yticks(positions, kinds)
        axes.set(ylim=(len(kinds) - 0.5, -0.5), xlabel=f"{about}, %")
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        _add_legend_above(axes, columns=3)

    description = "; ".join(
        f"{kind} {', '.join(f'{label} {values[number]:.1%}' for label, values in series.items())}"
        for number, kind in enumerate(kinds)
    )
    height = 0.9 + len(kinds) * max(0.22, 0.1 * len(series))
    return _render_svg(name, f"{about[0].upper()}{about[1:]} by kind: {description}", draw_axes, height)


def draw_attacks(name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Top-1 under FGSM by the largest change of a pixel: (epsilon in 0–255, share in 0–1) of each model."""

    def draw_axes(axes: Axes) -> None:
        _plot_lines(axes, {label: [(epsilon, 100 * share) for epsilon, share in points] for label, points in series.items()})
        axes.set_ylim(bottom=0)
        axes.set(xlabel="FGSM, largest change ε of 255", ylabel="top-1, %")

    description = "; ".join(
        f"{label} {', '.join(f'{share:.1%} at {e:g}' for e, share in points)}" for label, points in series.items()
    )
    return _render_svg(name, f"Top-1 under FGSM: {description}", draw_axes)


def draw_reliability(series: Mapping[str, Calibration]) -> Markup:
    """Accuracy by confidence in bins; on the diagonal the two are equal."""

    def draw_axes(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2, linestyle="--")
        lines = {
            label: [(filled.confidence, filled.accuracy) for filled in calibration.bins if filled.images]
            for label, calibration in series.items()
        }
        _plot_lines(axes, lines)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")

    description = ", ".join(f"{label} {calibration.ece:.1%}" for label, calibration in series.items())
    return _render_svg("reliability", f"Reliability diagram; expected calibration error: {description}", draw_axes)


def draw_confidence_shift(before: Sequence[int], after: Sequence[int]) -> Markup:
    """Images by confidence in two label sets, in equal bins from 0 to 1."""

    def draw_axes(axes: Axes) -> None:
        edges = np.linspace(0, 1, len(before) + 1)
        axes.stairs(before, edges, fill=True, color=FAINT, label="before")
        axes.stairs(after, edges, color=SERIES[0], linewidth=1.6, label="after")
        axes.set(xlim=(0, 1), xlabel="confidence of the teacher", ylabel="images")
        _add_legend_above(axes)

    return _render_svg("shift", "Histograms of confidence before and after", draw_axes)


def draw_training_curves(name: str, history: Sequence[dict[str, float]], series: dict[str, str], unit: str) -> Markup:
    """Training curves; `series` maps fields of the history to names in the legend."""

    def draw_axes(axes: Axes) -> None:
        lines = {label: [(point["step"], point[key]) for point in history if key in point] for key, label in series.items()}
        _plot_lines(axes, lines, markers=("",))
        axes.set(xlabel="step", ylabel=unit)

    return _render_svg(f"curves-{name}", f"Training curves: {', '.join(series.values())}", draw_axes)


def _plot_lines(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], markers: Sequence[str] = MARKERS) -> None:
    """Lines through (x, y) with a legend; lines without points are left out."""
    styles = zip(itertools.cycle(SERIES), itertools.cycle(markers), strict=False)
    for (label, points), (color, marker) in zip(lines.items(), styles, strict=False):
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.4, label=label)
    axes.legend(fontsize=8)


def _add_legend_above(axes: Axes, columns: int = 2) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, fontsize=8)


def _render_svg(name: str, description: str, draw_axes: Callable[[Axes], None], height: float = HEIGHT) -> Markup:
    # The salt makes ids unique on the page and reproducible.
    with mpl.rc_context(cast(Any, {**STYLE, "svg.hashsalt": name})):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
        draw_axes(figure.add_subplot())
        sink = io.StringIO()
        # `savefig` would draw twice where there is a layout.
        FigureCanvasSVG(figure).print_svg(sink, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    # matplotlib gives groups the same ids in every chart; on a page ids must be unique.
    text = re.sub(r'(id="|#)((?!#)[A-Za-z][\w.-]*)', rf"\g<1>{name}-\g<2>", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
