"""The report of a run: one HTML file that needs nothing else."""

from ns import runs
from ns.report.facts import gather
from ns.report.page import render
from ns.store import Store


def write(root: Store, run: str) -> str:
    """Writes ROOT/RUN/report.html from what the run has noted so far. Returns its key."""
    root.at(run).put(runs.REPORT, render(gather(root, run)).encode())
    return f"{run}/{runs.REPORT}"
