"""What two runs of one experiment are compared by."""

from collections.abc import Mapping
from typing import Any


def results(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What must not depend on how often a run was killed, nor on where it ran. `summary`: as `ns run --json` prints it."""
    timeless = [{key: value for key, value in row.items() if key != "seconds"} for row in summary["generations"]]
    return {"teacher": summary["teacher_top1"], "generations": timeless, "label_sets": summary["label_sets"]}
