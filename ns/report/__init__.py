"""The report of a run: one HTML file."""

from ns.store import Store


def write(root: Store, run: str) -> str:
    root.at(run).put("report.html", b"<html></html>")
    return f"{run}/report.html"
