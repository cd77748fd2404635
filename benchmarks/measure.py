"""What all benchmarks share: paired timing, the machine's facts, and the form of the results."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def arguments(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="a minute at most: for guarding against large regressions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args()


def rates(contestants: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Units a second of each contestant in each round. They take turns, so that a neighbour on the machine disturbs all alike."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            count = run()
            found[name].append(count / (time.perf_counter() - started))
    return found


def ratio(found: Mapping[str, list[float]], ours: str, theirs: str) -> tuple[float, float, float]:
    """Median, least and greatest of ours ÷ theirs, paired by round."""
    pairs = [a / b for a, b in zip(found[ours], found[theirs], strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def machine() -> dict[str, Any]:
    import torch  # four hundred MiB that not every benchmark needs

    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def finish(figures: Mapping[str, float], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps({"figures": dict(figures), "machine": machine()}, indent=1) + "\n")
