"""The dry run of a pipeline: its plan, in place of all else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ns.config import schema as config
from ns.core import log
from ns.planning.cost import Asked, plan, remarks
from ns.planning.tables import markdown
from ns.runs import records as runs
from ns.storage import open_store


def dry_run(
    config_place: str,
    root: str,
    overrides: Sequence[str],
    fields: Mapping[str, str | int],
    *,
    devices: int,
    one_generation: bool,
    page: Any,
) -> str:
    """Plans what a run of the pipeline would do, measured on the machine that this is called on. Writes nothing below the root.

    `overrides` and `fields` as in `ns.stages.steps.start_run`. `one_generation`: from the student that was accepted last, as
    `ns.stages.steps.start_generation` finds it. `page` is Kubeflow's `Markdown`, which gets the tables. Returns the first line.
    """
    log.configure()
    experiment = config.chosen(config_place, overrides, fields)
    begun = None
    if one_generation:
        latest = runs.accepted(open_store(root), experiment.name)
        begun = latest.generation if latest else None
        experiment = experiment.model_copy(update={"generations": 1})
    made = plan(experiment, Asked(devices=devices, begun=begun))
    for line in remarks(made):
        log.get().info("plan", says=line)
    Path(page.path).write_text(markdown(made), encoding="utf-8")
    return remarks(made)[0]
