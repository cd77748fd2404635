"""Pages about arms: their errors, the claims, and the picture of the errors by generation."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.arms import Measured, format_minutes
from benchmarks.contrasts import LEVEL, Contrast, adjust_holm, bound_mean, contrast_errors, contrast_ratios, join_claims
from benchmarks.measure import describe_benchmark_machine, format_markdown_table

SUITES = {"corruptions": "mCE", "perturbations": "mFR", "attacks": "errors under attack"}
"""Measurements besides clean errors → their names."""


class Claim(NamedTuple):
    """That one arm is better than another: in clean errors, or in each of the suites of robustness."""

    student: str
    control: str
    suites: tuple[str, ...] = ()


def contrast_arms(student: Measured, control: Measured, suite: str = "") -> Contrast:
    """Clean errors avoided, in points of accuracy; of a suite, the share of mistakes avoided, in %."""
    if not suite:
        return contrast_errors(student.test, control.test).change_unit(100)
    return contrast_ratios(getattr(student, suite), getattr(control, suite)).change_unit(100)


def reduce_error(student: Measured, control: Measured) -> Contrast:
    """1 − the student's test error ÷ the control's."""
    return contrast_ratios(student.test[..., None], control.test[..., None])


def compute_claims(arms: Mapping[str, Measured], claims: Mapping[str, Claim]) -> dict[str, dict[str, Any]]:
    """Claim → its contrasts, p-values and whether it holds at 5 % for all claims together (Holm)."""
    contrasts = {
        name: {
            SUITES.get(suite, "errors"): contrast_arms(arms[claim.student], arms[claim.control], suite)
            for suite in claim.suites or ("",)
        }
        for name, claim in claims.items()
    }
    p_values = {name: join_claims(list(of_claim.values())) for name, of_claim in contrasts.items()}
    adjusted = adjust_holm(p_values)
    return {
        name: {
            "student": claim.student,
            "control": claim.control,
            "contrasts": {measure: contrast._asdict() for measure, contrast in contrasts[name].items()},
            "p_value": p_values[name],
            "adjusted_p_value": adjusted[name],
            "holds": adjusted[name] < 1 - LEVEL,
        }
        for name, claim in claims.items()
    }


def render_claims(claims: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, claim in claims.items():
        for measure, contrast in claim["contrasts"].items():
            unit = "points" if measure == "errors" else "%"
            verdict = "shown" if claim["holds"] else "not shown"
            rows.append([
                name,
                f"{claim['student']} against {claim['control']}",
                f"{measure}, {unit}",
                format_interval(Contrast(**contrast), 2 if unit == "points" else 1),
                format_p_value(claim["adjusted_p_value"]),
                verdict,
            ])  # fmt: skip
    return format_markdown_table(["claim", "arms", "avoided", "difference, 95 % interval", "p (Holm)", ""], rows)


def format_interval(contrast: Contrast, digits: int) -> str:
    """`1.23 (0.45 … 2.01)`."""
    value, low, high = (f"{number:.{digits}f}" for number in contrast[:3])
    return f"{value} ({low} … {high})"


def format_p_value(p_value: float) -> str:
    return f"{p_value:.4f}" if p_value >= 1e-4 else "< 0.0001"


def render_arms(arms: Mapping[str, Measured], about: Mapping[str, str], reference: str) -> str:
    """A row for each arm. mCE and mFR are relative to the arm `reference`."""
    rows = []
    for name, measured in arms.items():
        cells = [name, about[name], format_interval(bound_mean(100.0 * measured.test), 1)]
        for suite in SUITES:
            has_suite, has_reference = getattr(measured, suite).size, reference in arms
            ratio = contrast_arms(measured, arms[reference], suite) if has_suite and has_reference else None
            cells.append(f"{100 - ratio.value:.1f}" if ratio else "")
        rows.append(cells)
    header = ["arm", "", "clean error, % (95 % interval)", *(f"{name} ({reference}: 100)" for name in SUITES.values())]
    has_suite = [True] * 3 + [any(row[column] for row in rows) for column in range(3, len(header))]
    return format_markdown_table(
        [cell for cell, keep in zip(header, has_suite, strict=True) if keep],
        [[cell for cell, keep in zip(row, has_suite, strict=True) if keep] for row in rows],
    )


def render_figures(intervals: Mapping[str, Mapping[str, Any]], unit: str = "value") -> str:
    """A row for each figure. `intervals`: figure → fields of its Contrast."""
    rows = []
    for name, fields in intervals.items():
        contrast = Contrast(**fields)
        rows.append([name, f"{contrast.value:.3f}", f"{contrast.low:.3f} … {contrast.high:.3f}"])
    return format_markdown_table(["", unit, "95 % interval"], rows)


def render_seeds(arms: Mapping[str, Measured], seeds: Sequence[int]) -> str:
    errors = {name: 100 * measured.test.mean(1) for name, measured in arms.items()}
    rows = [[str(seed), *(f"{values[row]:.2f}" for values in errors.values())] for row, seed in enumerate(seeds)]
    return "Clean error of each seed, %:\n\n" + format_markdown_table(["seed", *errors], rows)


def render_cost(arms: Iterable[Measured], result: Mapping[str, Any], cores: int = 2) -> str:
    """The processors' time of all arms, what it is on that many cores, and what made `result`."""
    seconds = sum(float(about["cpu_seconds"]) for measured in arms for about in measured.about["seeds"])
    machine = result["machine"]
    return (
        f"{seconds / 3600:.1f} hours of a processor, {format_minutes(seconds / cores)} on {cores} cores ({machine['cpu']}), "
        f"interrupted tries not counted; torch {machine['torch']}. Made by `{result['command']}`."
    )


def draw_generations(arms: Mapping[str, Measured], lines: Mapping[str, Sequence[tuple[int, str]]], path: Path) -> None:
    """Writes an SVG of clean errors with their intervals: label of a line → (generation, arm) of its points."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same bytes from the same numbers.
    with mpl.rc_context({"svg.hashsalt": "arms", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for number, (label, points) in enumerate(lines.items()):
            bounds = [(generation, bound_mean(100.0 * arms[name].test)) for generation, name in points if name in arms]
            if bounds:
                values = np.array([[contrast.value, contrast.low, contrast.high] for _, contrast in bounds])
                spread = abs(values[:, 1:].T - values[:, 0])
                # Beside each other, so that intervals do not hide each other.
                positions = [generation + 0.03 * number for generation, _ in bounds]
                axes.errorbar(positions, values[:, 0], spread, marker="o", markersize=4, capsize=3, linewidth=1.4, label=label)
        axes.set_xticks([0, 1, 2], ["teacher", "generation 1", "generation 2"])
        axes.set_ylabel("clean test error, % (95 % interval)")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})


def describe_results(
    command: str,
    seeds: Sequence[int],
    arms: Mapping[str, Measured],
    intervals: Mapping[str, Contrast],
    claims: Mapping[str, Claim],
) -> dict[str, Any]:
    """What is kept as JSON: figures with their intervals, claims, errors of the arms, and where they were measured."""
    return {
        "command": command,
        "seeds": list(seeds),
        "figures": {name: contrast.value for name, contrast in intervals.items()},
        "intervals": {name: contrast._asdict() for name, contrast in intervals.items()},
        "claims": compute_claims(arms, claims),
        "arms": {name: bound_mean(measured.test)._asdict() for name, measured in arms.items()},
        "machine": describe_benchmark_machine(),
    }


def write_results(folder: Path, name: str, result: Mapping[str, Any], text: str) -> None:
    """Writes NAME.json and NAME.md, and prints the page."""
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(text)
