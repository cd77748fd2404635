"""Charts as inline SVG. Colours are the page's, so that they follow it into dark mode and print."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ns.label.labelset import BINS
from ns.proportion import wilson

# Stand-ins that matplotlib draws with; the page's style decides what they are.
INK, FAINT = "#010101", "#020202"
SERIES = ("#030303", "#040404", "#050505", "#060606", "#070707", "#080808")
VARIABLES = {INK: "currentColor", FAINT: "var(--faint)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)
}

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
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

WIDTH, HEIGHT = 4.4, 2.7
"""Inches; small, so that the text is readable on a phone."""


def accuracy(generations: Sequence[int], top1: Sequence[float], images: int) -> str:
    """Held-out top-1 by generation with 95 % Wilson intervals; 0 is the first teacher."""
    bounds = [wilson(value, images) for value in top1]

    def draw(axes: Axes) -> None:
        low = [100 * (value - bound[0]) for value, bound in zip(top1, bounds, strict=True)]
        high = [100 * (bound[1] - value) for value, bound in zip(top1, bounds, strict=True)]
        values = [100 * value for value in top1]
        axes.errorbar(range(len(values)), values, yerr=[low, high], color=SERIES[0], marker="o", capsize=4, linewidth=1.6)
        for x, value in enumerate(values):
            axes.annotate(f"{value:.1f}", (x, value), xytext=(7, -11), textcoords="offset points", color=INK)
        axes.set_xticks(range(len(values)), ["teacher" if g == 0 else f"student {g}" for g in generations])
        axes.set_xlim(-0.4, len(values) - 0.4)
        axes.set_ylabel("held-out top-1, %")

    shown = ", ".join(f"{value:.1%}" for value in top1)
    return _svg("accuracy", f"Held-out top-1 accuracy by generation: {shown}", draw)


def confidence(name: str, counts: npt.NDArray[np.uint64], threshold: float) -> str:
    """Images by the teacher's confidence, in 40 bins, with the threshold drawn in."""
    bars = counts.reshape(40, BINS // 40).sum(1).astype(np.int64)

    def draw(axes: Axes) -> None:
        left = np.arange(40) / 40
        for wanted, colour in ((left + 1 / 80 > threshold, SERIES[0]), (left + 1 / 80 <= threshold, FAINT)):
            axes.bar(left[wanted], bars[wanted], width=1 / 40, align="edge", color=colour)
        axes.axvline(threshold, color=SERIES[1], linewidth=1.5, linestyle="--")
        axes.annotate(
            f"threshold {threshold:g}",
            (threshold, axes.get_ylim()[1]),
            xytext=(4, -8),
            textcoords="offset points",
            color=SERIES[1],
        )
        axes.set_xlim(0, 1)
        axes.set_xlabel("confidence of the teacher")
        axes.set_ylabel("images")

    return _svg(f"confidence-{name}", f"Histogram of confidence, threshold {threshold:g}", draw)


def classes(name: str, labels: Sequence[str], candidates: Sequence[int], images: Sequence[int]) -> str:
    """Images of each class above the threshold, and in an epoch after balancing."""

    def draw(axes: Axes) -> None:
        positions = np.arange(len(labels))
        axes.bar(positions - 0.2, candidates, 0.4, color=FAINT, label="above the threshold")
        axes.bar(positions + 0.2, images, 0.4, color=SERIES[0], label="after balancing")
        step = max(1, math.ceil(len(labels) / 12))
        axes.set_xticks(positions[::step], [label[:10] for label in labels[::step]])
        axes.set_ylabel("images")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8)

    return _svg(f"classes-{name}", "Pseudo-labelled images of each class before and after balancing", draw)


def shift(before: Sequence[int], after: Sequence[int]) -> str:
    """Images by confidence in two label sets; equal bins from 0 to 1."""

    def draw(axes: Axes) -> None:
        edges = np.linspace(0, 1, len(before) + 1)
        axes.stairs(before, edges, fill=True, color=FAINT, label="before")
        axes.stairs(after, edges, color=SERIES[0], linewidth=1.6, label="after")
        axes.set_xlim(0, 1)
        axes.set_xlabel("confidence of the teacher")
        axes.set_ylabel("images")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8)

    return _svg("shift", "Histograms of confidence before and after", draw)


def curves(name: str, history: Sequence[dict[str, float]], series: dict[str, str], unit: str) -> str:
    """Training curves: `series` maps fields of the history to names."""

    def draw(axes: Axes) -> None:
        for (key, label), colour in zip(series.items(), SERIES, strict=False):
            points = [(point["step"], point[key]) for point in history if key in point]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.legend(fontsize=8)

    return _svg(f"curves-{name}", f"Training curves: {', '.join(series.values())}", draw)


def _svg(name: str, description: str, draw: Callable[[Axes], None]) -> str:
    # The salt makes ids unique on the page, and the same every time.
    with mpl.rc_context(cast(Any, {**STYLE, "svg.hashsalt": name})):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw(figure.add_subplot())
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    # Ids of groups repeat in every chart; the page must not have them twice.
    text = re.sub(r'(id="|#)((?!#)[A-Za-z][\w.-]*)', rf"\g<1>{name}-\g<2>", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
