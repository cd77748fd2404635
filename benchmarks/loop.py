"""Where the time of a whole run goes: the quickstart, stage by stage, and the time outside all stages.

    python -m benchmarks.loop [--quick] [--json FILE] [--keep]

Between the stages lie the starts of their processes (Python, torch, kfp's launcher) and Kubeflow's local runner. Everything runs as in
`ns run`. --quick runs one generation of the two.

    overhead_share    share of the run's wall time in which no stage runs
    help_seconds      `ns --help`, the median of five
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.measure import parse_arguments, write_benchmark
from ns import __version__
from ns.config.loader import load_experiment, resolve_preset
from ns.core.log import StageEvent
from ns.runs.lifecycle import open_run
from ns.runs.records import CONFIG_FILE
from ns.storage import LocalStore
from pipelines.runners import local


def main() -> None:
    options = parse_arguments(__doc__ or "")
    help_seconds = statistics.median(time_command([sys.executable, "-m", "ns", "--help"]) for _ in range(5))
    with tempfile.TemporaryDirectory() as scratch:
        store = LocalStore(Path(scratch) / "runs")
        experiment = load_experiment(resolve_preset("quickstart"), ["generations=1"] if options.quick else [])
        open_run(store, "loop", experiment, __version__)
        events: list[StageEvent] = []
        started = time.time()
        config_uri = f"{store.uri}/loop/{CONFIG_FILE}"
        local.run_locally(config_uri=config_uri, root=store.uri, run="loop", log=Path(scratch) / "log", on_event=events.append)
        ended = time.time()
    table = Table("stage", "starts at, s", "runs, s", "before it, s")
    last = started
    intervals = find_stage_intervals(events)
    for name, begin, end in intervals:
        table.add_row(name, f"{begin - started:.1f}", f"{end - begin:.1f}", f"{max(begin - last, 0):.1f}")
        last = max(last, end)
    table.add_row("the end", f"{ended - started:.1f}", "", f"{ended - last:.1f}")
    share = 1 - measure_union([(begin, end) for _, begin, end in intervals]) / (ended - started)
    figures = {
        "overhead_share": round(share, 4),
        "help_seconds": round(help_seconds, 3),
        "run_seconds": round(ended - started, 1),
    }
    write_benchmark("loop", figures, options, table)


def time_command(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def find_stage_intervals(events: Sequence[StageEvent]) -> list[tuple[str, float, float]]:
    """Name, start and end (Unix seconds) of each stage that started and finished, in the order of their starts."""
    started: dict[int, StageEvent] = {}
    spans = []
    for event in events:
        if event["event"] == "started":
            started[event["pid"]] = event
        elif event["event"] == "finished" and event.get("pid") in started:
            start_event = started.pop(event["pid"])
            spans.append((local.describe_stage(start_event), start_event["at"], event["at"]))
    return sorted(spans, key=lambda span: span[1])


def measure_union(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of the spans."""
    total, end = 0.0, float("-inf")
    for begin, stop in sorted(spans):
        total += max(stop - max(begin, end), 0)
        end = max(end, stop)
    return total


if __name__ == "__main__":
    main()
