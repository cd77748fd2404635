"""What all benchmarks share: paired timing, the machine's facts, and the form of the results."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.tar.gz"
"""Real images beside the checkout; may be missing."""
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "pillow", "pyarrow", "timm", "torch", "torchvision")
"""Whose versions move figures."""


def parse_arguments(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute at most: for guarding against large regressions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--keep", action="store_true", help="write figures and tables to benchmarks/results; not with --quick")
    options = parser.parse_args()
    if options.keep and options.run_quick:
        parser.error("--keep: a quick run is too rough to be kept; leave --quick out")
    return options


def measure_rates(contestants: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Units a second of each contestant in each round. They take turns, so that a neighbor on the machine disturbs all alike."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            count = run()
            measured[name].append(count / (time.perf_counter() - started))
    return measured


def paired_ratio(measured: Mapping[str, list[float]], ours: str, theirs: str) -> tuple[float, float, float]:
    """Median, least and greatest of ours ÷ theirs, paired by round."""
    pairs = [a / b for a, b in zip(measured[ours], measured[theirs], make_strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def draw_tables(images: Path, counts: Mapping[str, int], seed: int) -> dict[str, str]:
    """Draws images of class folders: for each part so many of a class, none for two parts. Returns part → table as CSV; that of the pool
    has no labels."""
    draw = np.random.default_rng(seed)
    rows: dict[str, list[str]] = {part: ["path" if part == "pool" else "path,label"] for part in counts}
    for category in sorted(images.iterdir()):
        files = sorted(category.iterdir())
        order = iter(draw.permutation(len(files)))
        for part, count in counts.items():
            label = "" if part == "pool" else f",{category.name}"
            # One image of each class between two parts is in none of them: so the tables were that the kept results come from.
            rows[part] += [f"{files[index]}{label}" for index, _ in zip(order, range(count), make_strict=False)]
    return {part: "\n".join(lines) + "\n" for part, lines in rows.items()}


def describe_benchmark_machine() -> dict[str, Any]:
    import torch  # four hundred MiB that not every benchmark needs

    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def write_benchmark(name: str, figures: Mapping[str, float], options: argparse.Namespace, *tables: Table) -> None:
    """Writes what the benchmark called `name` found, as `options` ask: figures, the machine, the tables that were shown."""
    result = {
        "command": f"python -m benchmarks.{name}",
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": describe_benchmark_machine(),
        "figures": dict(figures),
    }
    document = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if options.json:
        options.json.write_text(document)
    if options.keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(document)
        (RESULTS / f"{name}.md").write_text(_render_page(name, result, tables))


def _render_page(name: str, result: Mapping[str, Any], tables: Sequence[Table]) -> str:
    machine_text = ", ".join(f"{field} {value}" for field, value in result["machine"].items() if value is not None)
    parts = [f"# benchmarks.{name}", f"`{result['command']}` on {result['measured']}: {machine_text}."]
    parts += [_table_to_markdown(table) for table in tables]
    figures = Table("figure", "value")
    for figure, value in result["figures"].items():
        figures.add_row(figure, f"{value:,}")
    return "\n\n".join([*parts, _table_to_markdown(figures)]) + "\n"


def _table_to_markdown(table: Table) -> str:
    rows = [[str(column.header) for column in table.columns], ["---"] * len(table.columns)]
    # What is dim and below on a terminal stands behind a colon: a row is one line here.
    rows += [
        [Text.from_markup(str(cell)).plain.replace("\n", ": ") for cell in cells]
        for cells in zip(*(column.cells for column in table.columns), make_strict=True)
    ]
    title = [f"**{table.title}**", ""] if table.title else []
    return "\n".join([*title, *(f"| {' | '.join(row)} |" for row in rows)])
