"""What a run costs beside its computations: the quickstart ÷ a plain loop in one process that trains, labels and evaluates the same.

    python -m benchmarks.quickstart [--quick] [--json FILE] [--keep]

The two take turns, three times with seeds 0, 1 and 2; --quick: once. The plain loop is `benchmarks/plain_loop.py`. Then the finished run
is run again, which finds all work done.

    quickstart_vs_plain_loop    seconds of `ns run quickstart` ÷ seconds of the plain loop, median of the pairs
    finished_run_seconds        seconds of `ns run` of a finished run, the median of three
    accuracy_difference         top-1 of the last student - the plain loop's, points, mean over the seeds
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.measure import parse_arguments, write_benchmark

REPEATS = 3


def main() -> None:
    options = parse_arguments(__doc__ or "")
    seeds = range(1 if options.quick else 3)
    table = Table("seed", "ns run, s", "plain loop, s", "ratio", "top-1 of teacher and students", "plain loop's")
    ratios, differences, finished = [], [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            command = ["-m", "ns", "run", "quickstart", "--json", f"--set=seed={seed}", "--root", str(Path(scratch) / "runs")]
            seconds, output = time_python(*command)
            plain_seconds, plain_output = time_python("-m", "benchmarks.plain_loop", str(seed))
            finished += [time_python(*command)[0] for _ in range(REPEATS if seed == 0 else 0)]
        summary, plain_top1 = json.loads(output), json.loads(plain_output)
        top1 = [summary["teacher_top1"], *(row["student_top1"] for row in summary["generations"])]
        ratios.append(seconds / plain_seconds)
        differences.append(100 * (top1[-1] - plain_top1[-1]))
        row = [f"{seed}", f"{seconds:.1f}", f"{plain_seconds:.1f}", f"{ratios[-1]:.2f}"]
        table.add_row(*row, format_accuracies(top1), format_accuracies(plain_top1))
    figures = {
        "quickstart_vs_plain_loop": round(statistics.median(ratios), 3),
        "finished_run_seconds": round(statistics.median(finished), 2),
        "accuracy_difference": round(statistics.mean(differences), 2),
    }
    write_benchmark("quickstart", figures, options, table)


def time_python(*arguments: str) -> tuple[float, str]:
    """Seconds of a Python, and its standard output."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return time.perf_counter() - started, done.stdout


def format_accuracies(top1: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f} %" for value in top1)


if __name__ == "__main__":
    main()
