"""A plan in tables: for terminals (`ns.cli.progress`) and as Markdown."""

from typing import NamedTuple

from ns.core.log import format_duration
from ns.planning.cost import RunPlan, format_plan_remarks
from ns.reporting.markdown import escape_markdown, format_table


class PlanTable(NamedTuple):
    """A table; its first two columns are text."""

    title: str
    headers: tuple[str, ...]
    cells: list[tuple[str, ...]]


def build_plan_tables(run_plan: RunPlan) -> list[PlanTable]:
    """What is done, one work a row; and what each device needs meanwhile."""
    work = PlanTable(
        f"{run_plan.experiment} on {run_plan.devices} × {run_plan.machine}",
        ("", "network", "params", "MAC", "images", "time", "hours"),
        [],
    )
    needs = PlanTable("each device", ("", "mode", "steps", "images/s", "reads", "cores", "net/step", "checkpoint"), [])
    for estimate in run_plan.work:
        name = f"{estimate.generation} {estimate.task}"
        work.cells.append(
            (
                name,
                f"{estimate.arch}@{estimate.resolution}",
                _format_si(estimate.parameters),
                _format_si(estimate.multiply_adds),
                _format_si(estimate.images),
                format_duration(estimate.seconds),
                f"{estimate.device_hours:,.2f}" if estimate.device_hours < 100 else f"{estimate.device_hours:,.0f}",
            )
        )
        if estimate.task not in ("evaluate", "robustness"):
            needs.cells.append(
                (
                    name,
                    estimate.mode,
                    f"{estimate.steps:,}" if estimate.steps else "",
                    _format_si(estimate.images_per_second),
                    "?" if estimate.read_bytes_per_second is None else f"{_format_si(estimate.read_bytes_per_second)}B/s",
                    "?" if estimate.loader_cores is None else f"{estimate.loader_cores:,.2g}",
                    f"{_format_si(estimate.network_bytes_per_step)}B" if estimate.network_bytes_per_step else "",
                    f"{_format_si(estimate.checkpoint_bytes)}B" if estimate.checkpoint_bytes else "",
                )
            )
    return [work, needs]


def render_plan_markdown(run_plan: RunPlan) -> str:
    """The tables, and what they do not say."""
    lines = [f"### Plan of {escape_markdown(run_plan.experiment)}", ""]
    lines += [f"- {escape_markdown(line)}" for line in format_plan_remarks(run_plan)]
    for rows in build_plan_tables(run_plan):
        lines += ["", f"**{escape_markdown(rows.title)}**"]
        lines += format_table(rows.headers, [tuple(map(escape_markdown, cells)) for cells in rows.cells])
    return "\n".join(lines) + "\n"


def _format_si(value: float) -> str:
    """Three digits and a prefix: `480M`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"
