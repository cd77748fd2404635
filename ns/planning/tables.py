"""A plan in tables: for terminals (`ns.cli.progress`) and as Markdown."""

from typing import NamedTuple

from ns.core.log import duration
from ns.planning.cost import Plan, remarks
from ns.reporting.markdown import plain, table


class Rows(NamedTuple):
    """A table; its first two columns are text."""

    title: str
    headers: tuple[str, ...]
    cells: list[tuple[str, ...]]


def tables(plan: Plan) -> list[Rows]:
    """What is done, one work a row; and what each device needs meanwhile."""
    work = Rows(
        f"{plan.experiment} on {plan.devices} × {plan.machine}",
        ("", "network", "params", "MAC", "images", "time", "hours"),
        [],
    )
    needs = Rows("each device", ("", "mode", "steps", "images/s", "reads", "cores", "net/step", "checkpoint"), [])
    for one in plan.work:
        name = f"{one.generation} {one.task}"
        work.cells.append(
            (
                name,
                f"{one.arch}@{one.resolution}",
                _si(one.parameters),
                _si(one.multiply_adds),
                _si(one.images),
                duration(one.seconds),
                f"{one.device_hours:,.2f}" if one.device_hours < 100 else f"{one.device_hours:,.0f}",
            )
        )
        if one.task not in ("evaluate", "robustness"):
            needs.cells.append(
                (
                    name,
                    one.mode,
                    f"{one.steps:,}" if one.steps else "",
                    _si(one.images_per_second),
                    "?" if one.read_bytes_per_second is None else f"{_si(one.read_bytes_per_second)}B/s",
                    "?" if one.loader_cores is None else f"{one.loader_cores:,.2g}",
                    f"{_si(one.network_bytes_per_step)}B" if one.network_bytes_per_step else "",
                    f"{_si(one.checkpoint_bytes)}B" if one.checkpoint_bytes else "",
                )
            )
    return [work, needs]


def markdown(plan: Plan) -> str:
    """The tables, and what they do not say."""
    lines = [f"### Plan of {plain(plan.experiment)}", ""]
    lines += [f"- {plain(line)}" for line in remarks(plan)]
    for rows in tables(plan):
        lines += ["", f"**{plain(rows.title)}**"]
        lines += table(rows.headers, [tuple(map(plain, cells)) for cells in rows.cells])
    return "\n".join(lines) + "\n"


def _si(value: float) -> str:
    """Three digits and a prefix: `480M`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"
