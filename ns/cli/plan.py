"""`ns plan`: what a run will take."""

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ns.cli.options import AsJson, ConfigArgument, Overrides, load_experiment_argument
from ns.cli.output import escape_text, make_console, make_table, print_json

if TYPE_CHECKING:
    from ns.config.schema import Experiment
    from ns.data.prepared import DataPart
    from ns.planning.cost import RunPlan

QUICK_SECONDS, QUICK_LIMIT = 3, 45
"""Seconds to measure for before a run, and seconds after which it begins without an estimate: its data may take an hour to list."""
LONG_HOURS = 24
"""A longer run is begun only if a person agrees, where one is there."""


def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    labeled: Annotated[int | None, typer.Option(min=1, help="Labeled images; default: those of data.labeled.")] = None,
    pool: Annotated[int | None, typer.Option(min=1, help="Images in the pool; default: those of data.pool.")] = None,
    heldout: Annotated[int | None, typer.Option(min=1, help="Held-out images; default: those of data.heldout.")] = None,
    calibration: Annotated[
        int | None, typer.Option(min=1, help="Calibration images; default: those of data.calibration.")
    ] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Test images; default: those of data.test.")] = None,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes, for use with --labeled.")] = 1000,
    image_kb: Annotated[float | None, typer.Option(min=0, help="Mean size of an image, kB; default: the files' mean.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices that train together, each like this machine's.")] = 1,
    speed: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="TMACS", help="10¹² multiply-adds per second of a device; default: measured."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds to measure for.")] = 30,
    price: Annotated[float | None, typer.Option(min=0, help="Price per device-hour, in any currency.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate time, I/O and storage of a run, from a measurement of this machine that takes 30 s.

    Example: [cyan]ns plan my-experiment.yaml --pool 300000000 --image-kb 110 --devices 8 --price 2.5[/]
    """
    experiment = load_experiment_argument(config, overrides)
    from ns.core.log import configure_logging
    from ns.planning.cost import PlanRequest, estimate_run
    from ns.planning.data_stats import KnownCounts

    given_counts: dict[DataPart, int | None] = {
        "labeled": labeled, "pool": pool, "heldout": heldout, "calibration": calibration, "test": test
    }  # fmt: skip
    counts = KnownCounts(
        {part: count for part, count in given_counts.items() if count is not None}, image_kb and image_kb * 1000, classes
    )
    configure_logging()
    run_plan = estimate_run(experiment, PlanRequest(counts, devices, seconds, speed and speed * 1e12, price))
    if as_json:
        print_json(run_plan)
        return
    console = make_console()
    console.print(*make_plan_tables(run_plan))
    for remark in format_plan_remarks(run_plan):
        console.print(escape_text(remark))


def make_plan_tables(run_plan: "RunPlan") -> list[Table]:
    """The work of each generation, one task per row; and what each device needs for it."""
    from ns.core.log import format_duration

    title = f"{run_plan.experiment} on {run_plan.devices} × {run_plan.machine}"
    work_headers = ("network", "params", "MAC", "images", "time", "hours")
    work = make_table(title, "", *work_headers, text_columns=range(2), wrap=False)
    need_headers = ("mode", "steps", "images/s", "reads", "cores", "net/step", "checkpoint")
    needs = make_table("each device", "", *need_headers, text_columns=range(2), wrap=False)
    for estimate in run_plan.work:
        name = f"{estimate.generation} {estimate.task}"
        work.add_row(
            name,
            f"{estimate.arch}@{estimate.resolution}",
            _format_si(estimate.parameters),
            _format_si(estimate.multiply_adds),
            _format_si(estimate.images),
            format_duration(estimate.seconds),
            _format_hours(estimate.device_hours),
        )
        if estimate.task not in ("evaluate", "robustness"):
            needs.add_row(
                name,
                estimate.mode,
                f"{estimate.steps:,}" if estimate.steps else "",
                _format_si(estimate.images_per_second),
                "?" if estimate.read_bytes_per_second is None else f"{_format_si(estimate.read_bytes_per_second)}B/s",
                "?" if estimate.loader_cores is None else f"{estimate.loader_cores:,.2g}",
                f"{_format_si(estimate.network_bytes_per_step)}B" if estimate.network_bytes_per_step else "",
                f"{_format_si(estimate.checkpoint_bytes)}B" if estimate.checkpoint_bytes else "",
            )
    return [work, needs]


def format_plan_remarks(run_plan: "RunPlan") -> list[str]:
    """Totals and advice that the tables do not show, one sentence each."""
    from ns.core.log import format_duration

    sentences = [
        f"{_format_hours(run_plan.device_hours)} device-hours in {format_duration(3600 * run_plan.hours)}, if every generation is run"
        + (f": {run_plan.cost:,.2f}" if run_plan.cost is not None else ""),
        f"label sets: at most {decimal(run_plan.label_set_bytes)} per generation · "
        f"models: {decimal(run_plan.model_bytes)} · checkpoints: at most {decimal(run_plan.checkpoint_bytes)} at a time",
    ]
    largest = max(run_plan.work, key=lambda work: work.shared_memory_bytes)
    sentences.append(
        f"shared memory: data loaders take at most {decimal(largest.shared_memory_bytes)} per device, part of the memory "
        f"({largest.field}); with less in /dev/shm, training may wait for images"
    )
    for work in run_plan.work:
        if work.task == "train" and work.steps * work.images and run_plan.pool and work.generation:
            pseudo = work.images - work.steps * work.labeled_batch
            sentences.append(
                f"{work.field}, generation {work.generation}: sees each image of the pool {pseudo / run_plan.pool:.1f} times"
            )
    sentences += run_plan.selection_remarks
    labeling_work = [work for work in run_plan.work if work.task == "label"]
    if max((work.devices for work in labeling_work), default=run_plan.devices) < run_plan.devices:
        sentences.append(f"labeling uses {labeling_work[0].devices} of {run_plan.devices} devices: raise labeling.tasks")
    waiting = {work.field: work for work in run_plan.work if work.limited_by == "loader" and work.task == "train"}
    for name, work in waiting.items():
        sentences.append(
            f"{name}: waits for images; set {name}.train.loader_workers to {math.ceil(work.loader_cores or 1)} or more, "
            "on nodes with as many cores per device"
        )
    return sentences


def _format_hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"


def _format_si(value: float) -> str:
    """Three digits and a prefix: `480M`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def announce_time(experiment: "Experiment", console: Console, *, agreed: bool) -> None:
    """Says on a terminal about how long a new run takes here. If it is more than a day, asks, unless the person has `agreed` before.

    Says nothing of the quickstart, nor where no estimate is at hand soon. Raises typer.Abort if the person does not want it.
    """
    if not console.is_terminal or experiment.data.pool.startswith("digits:"):
        return
    from ns.core.log import format_duration

    run_plan = _estimate_quickly(experiment)
    if run_plan is None:
        return
    text = f"about {format_duration(3600 * run_plan['hours'])} on {run_plan['machine']}, if every generation is run"
    console.print(escape_text(text), soft_wrap=True)
    if run_plan["hours"] > LONG_HOURS and not agreed and sys.stdin.isatty():
        console.print(
            "[dim]ns plan CONFIG says what takes it; ns init FOLDER --hours 8 proposes a shorter one[/]", soft_wrap=True
        )
        typer.confirm("Begin?", abort=True, err=True)


def _estimate_quickly(experiment: "Experiment") -> dict[str, Any] | None:
    """The plan as JSON, made by a process of its own: torch stays out of the one that follows the run. None if there is none soon."""
    from ns.config.loader import dump_experiment
    from ns.storage.scratch import make_scratch_dir

    with make_scratch_dir("plan") as folder:
        config = folder / "experiment.yaml"
        config.write_text(dump_experiment(experiment), encoding="utf-8")
        command = [sys.executable, "-m", "ns", "plan", str(config), "--json", f"--seconds={QUICK_SECONDS}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=QUICK_LIMIT)
            return dict(json.loads(done.stdout)) if done.returncode == 0 else None
        except (subprocess.TimeoutExpired, ValueError):
            return None
