"""Shared by all benchmarks: paired timing, the description of the machine, and the form of the results."""

import argparse
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ns.core.process import OPENMP_VARIABLES, count_cores

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.tar.gz"
"""Real images beside the checkout, if they exist."""
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "pillow", "pyarrow", "timm", "torch", "torchvision")
"""Packages whose versions change figures."""


def make_parser(about: str) -> argparse.ArgumentParser:
    """A parser with the options that `write_benchmark` needs."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures")
    parser.add_argument("--keep", action="store_true", help="write figures and tables to benchmarks/results")
    return parser


def parse_arguments(about: str) -> argparse.Namespace:
    parser = make_parser(about)
    parser.add_argument("--quick", action="store_true", help="a minute at most, to detect large regressions; not with --keep")
    options = parser.parse_args()
    if options.keep and options.quick:
        parser.error("--keep: a quick run is too imprecise; leave --quick out")
    return options


def measure_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Returns what each contestant returns in each round. They take turns, so that other load on the machine disturbs all alike."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            measured[name].append(run())
    return measured


def measure_rates(
    contestants: Mapping[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Returns units per second of each contestant in each round; a contestant returns its number of units.

    `clock=time.process_time` is less disturbed by other programs, for contestants that wait for nothing.
    """

    def measure_rate(run: Callable[[], int]) -> float:
        started = clock()
        count = run()
        return count / (clock() - started)

    return measure_turns({name: partial(measure_rate, run) for name, run in contestants.items()}, rounds)


def paired_ratio(measured: Mapping[str, list[float]], ours: str, theirs: str) -> tuple[float, float, float]:
    """Returns median, least and greatest of ours ÷ theirs, paired by round."""
    pairs = [a / b for a, b in zip(measured[ours], measured[theirs], strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def record_ratio(
    figures: dict[str, float],
    table: Table,
    figure: str,
    measured: Mapping[str, list[float]],
    pair: tuple[str, str],
    case: Sequence[str],
) -> None:
    """Adds a paired ratio of a case to figures and table. The figure without a case is its least favorable case."""
    median, least, greatest = paired_ratio(measured, *pair)
    figures[f"{figure}.{'_'.join(case)}"] = round(median, 4)
    figures[figure] = round(min(median, figures.get(figure, median)), 4)
    speeds = [f"{statistics.median(measured[side]):,.1f}" for side in pair]
    table.add_row(*case, figure, *speeds, f"{median:.3f}", f"{least:.3f} … {greatest:.3f}")


def stream_script(script: str, *arguments: str) -> Generator[str, None, None]:
    """Yields the output of a peer's Python script, line by line. Closing ends the script; one that ends by itself raises SystemExit."""
    command = [sys.executable, script, *arguments]
    # Its threads wait as its users' do.
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP_VARIABLES}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line)
            yield line
        raise SystemExit("".join(lines[-20:]) + f"{script} ended early")
    finally:
        # Its loaders too.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def draw_tables(images: Path, counts: Mapping[str, int], seed: int) -> dict[str, str]:
    """Draws images of class folders for several parts that share no image. Returns part → CSV; that of the pool has no labels.

    `counts`: part → images per class.
    """
    draw = np.random.default_rng(seed)
    rows: dict[str, list[str]] = {part: ["path" if part == "pool" else "path,label"] for part in counts}
    for category in sorted(images.iterdir()):
        files = sorted(category.iterdir())
        order = iter(draw.permutation(len(files)))
        for part, count in counts.items():
            label = "" if part == "pool" else f",{category.name}"
            rows[part] += [f"{files[index]}{label}" for index in itertools.islice(order, count)]
    return {part: "\n".join(lines) + "\n" for part, lines in rows.items()}


def describe_benchmark_machine() -> dict[str, Any]:
    import torch  # 400 MiB that not every benchmark needs

    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": count_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def write_benchmark(name: str, figures: Mapping[str, float], options: argparse.Namespace, *tables: Table) -> None:
    """Prints figures and tables of a benchmark, and writes them with the machine as `options.json` and `options.keep` say."""
    Console(width=120).print(*tables, dict(figures))
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
    parts.append(
        format_markdown_table(["figure", "value"], [[name, f"{value:,}"] for name, value in result["figures"].items()])
    )
    return "\n\n".join(parts) + "\n"


def format_markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _table_to_markdown(table: Table) -> str:
    # A second line in a cell follows after a colon: a row is one line here.
    rows = [
        [Text.from_markup(str(cell)).plain.replace("\n", ": ") for cell in cells]
        for cells in zip(*(column.cells for column in table.columns), strict=True)
    ]
    return format_markdown_table([str(column.header) for column in table.columns], rows)
