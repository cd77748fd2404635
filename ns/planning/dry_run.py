"""The dry run of a pipeline: its plan, in place of all else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ns.config import schema as config
from ns.core import log
from ns.planning.cost import PlanRequest, estimate_run, format_plan_remarks
from ns.planning.tables import render_plan_markdown
from ns.runs import records as runs
from ns.storage import open_store


def dry_run(
    config_uri: str,
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
    log.configure_logging()
    experiment = config.load_with_overrides(config_uri, overrides, fields)
    from_generation = None
    if one_generation:
        latest = runs.find_accepted_student(open_store(root), experiment.name)
        from_generation = latest.generation if latest else None
        experiment = experiment.model_copy(update={"generations": 1})
    run_plan = estimate_run(experiment, PlanRequest(devices=devices, from_generation=from_generation))
    for line in format_plan_remarks(run_plan):
        log.get_logger().info("plan", says=line)
    Path(page.path).write_text(render_plan_markdown(run_plan), encoding="utf-8")
    return format_plan_remarks(run_plan)[0]
