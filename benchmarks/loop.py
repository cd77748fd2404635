"""Where the time of a whole run goes: the quickstart, step by step, and what is no step's work.

    python -m benchmarks.loop [--quick] [--json FILE] [--keep]

Between the steps lie the starts of their processes (Python, torch, kfp's launcher) and Kubeflow's local runner. Everything runs as `ns
run` does it. --quick leaves one generation of the two.

    overhead_share    of the run's wall time, what no step was at work in
    help_seconds      `ns --help`, the median of five
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import arguments, finish
from ns import __version__
from ns.config.schema import load, located
from ns.runs import records as runs
from ns.storage import LocalStore
from pipelines.runners import local


def main() -> None:
    options = arguments(__doc__ or "")
    console = Console(width=100)
    help_seconds = statistics.median(seconds_of([sys.executable, "-m", "ns", "--help"]) for _ in range(5))
    with tempfile.TemporaryDirectory() as scratch:
        store = LocalStore(Path(scratch) / "runs")
        experiment = load(located("quickstart"), ["generations=1"] if options.quick else [])
        runs.start(store, "loop", experiment, __version__)
        events: list[local.Event] = []
        started = time.time()
        where = f"{store.uri}/loop/{runs.CONFIG}"
        local.run(config_uri=where, root=store.uri, run="loop", log=Path(scratch) / "log", on_event=events.append)
        ended = time.time()
    table = Table("step", "starts at, s", "works, s", "before it, s")
    last = started
    steps = intervals(events)
    for name, begin, end in steps:
        table.add_row(name, f"{begin - started:.1f}", f"{end - begin:.1f}", f"{max(begin - last, 0):.1f}")
        last = max(last, end)
    table.add_row("the end", f"{ended - started:.1f}", "", f"{ended - last:.1f}")
    share = 1 - covered([(begin, end) for _, begin, end in steps]) / (ended - started)
    console.print(table)
    figures = {
        "overhead_share": round(share, 4),
        "help_seconds": round(help_seconds, 3),
        "run_seconds": round(ended - started, 1),
    }
    console.print(figures)
    finish("loop", figures, options, table)


def seconds_of(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def intervals(events: Sequence[local.Event]) -> list[tuple[str, float, float]]:
    """Name, start and end, in seconds of the clock, of each step that started and finished; in order of their starts."""
    begun: dict[int, local.Event] = {}
    found = []
    for event in events:
        if event["event"] == "started":
            begun[event["pid"]] = event
        elif event["event"] == "finished" and event.get("pid") in begun:
            first = begun.pop(event["pid"])
            found.append((local.name_of(first), first["at"], event["at"]))
    return sorted(found, key=lambda step: step[1])


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of the spans."""
    total, end = 0.0, float("-inf")
    for begin, stop in sorted(spans):
        total += max(stop - max(begin, end), 0)
        end = max(end, stop)
    return total


if __name__ == "__main__":
    main()
