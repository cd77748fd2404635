"""The stages of a run on a terminal, as they come."""

import threading

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from ns.cli.output import escape_text
from ns.core.log import StageEvent, format_duration

STAGE_TITLES = {
    "start": "prepare data",
    "prepare": "prepare data",
    # As Kubeflow names what trains, evaluates and decides in one go.
    "teacher": "teacher",
    "student": "student",
    "train": "train",
    "evaluate": "evaluate",
    "label": "label pool",
    "select": "select labels",
    "gate": "gate",
    "train-baseline": "train on labeled images alone",
    "evaluate-baseline": "evaluate that model",
    "report": "report",
}


class RunView:
    """Draws the events of a run. Without a terminal it prints one line per finished stage and nothing that moves."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[tuple[int, str], TaskID] = {}
        self._parts: dict[tuple[int, str], dict[str, StageEvent]] = {}
        self._open: dict[tuple[int, str], int] = {}
        # Events come from the thread that follows the log, Ctrl-C to the main one.
        self._lock = threading.Lock()

    def __enter__(self) -> "RunView":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_event(self, event: StageEvent) -> None:
        if event.get("stage") not in STAGE_TITLES:
            return
        stage = (int(event.get("generation", 0)), str(event["stage"]))
        with self._lock:
            match event["event"]:
                case "started":
                    self._start_stage(stage)
                case "progress":
                    self._advance_stage(stage, event)
                case "finished" | "noted":
                    self._finish_stage(stage, event)
                case "failed":
                    self._fail_stage(stage, event)
                case "cost":
                    passes = f"{event['forward_passes']:,} forward passes"
                    self._print_line("[dim]·[/]", _stage_title(stage), passes, f"~{format_duration(event['seconds'])}")
                case _ if event.get("level") == "warning":
                    self._print_warning(stage, event)

    def _start_stage(self, stage: tuple[int, str]) -> None:
        self._open[stage] = self._open.get(stage, 0) + 1
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(_stage_title(stage), total=None, rate="")

    def _advance_stage(self, stage: tuple[int, str], event: StageEvent) -> None:
        task = self._tasks.get(stage)
        if task is None:
            return
        # Parallel tasks of one stage share a bar.
        parts = self._parts.setdefault(stage, {})
        parts[str(event.get("shards", ""))] = event
        rate = sum(part["per_second"] for part in parts.values())
        loss = f"  loss {event['loss']:.3f}" if "loss" in event else ""
        self._progress.update(
            task,
            completed=sum(part["done"] for part in parts.values()),
            total=sum(part["total"] for part in parts.values()),
            rate=f"{rate:,.0f} {event['unit']}/s{loss}",
        )

    def _finish_stage(self, stage: tuple[int, str], event: StageEvent) -> None:
        self._close_stage(stage)
        # A stage that is watched from outside leaves a note, which has no numbers.
        details = _summarize_event(event) if event["event"] == "finished" else ""
        outcome = "reused" if event.get("reused") else format_duration(event["seconds"])
        self._print_line("[green]✓[/]", f"{_stage_title(stage)}{_format_shards(event)}", details, outcome)

    def _fail_stage(self, stage: tuple[int, str], event: StageEvent) -> None:
        self._close_stage(stage)
        mark, outcome = ("[yellow]■[/]", "stopped") if event.get("exit_code") == 130 else ("[red]✗[/]", "failed")
        # Only of a stage that is watched from outside, where it may be tried again: else the run ends, and says why.
        self._print_line(mark, f"{_stage_title(stage)}{_format_shards(event)}", str(event.get("reason", "")), outcome)

    def _print_warning(self, stage: tuple[int, str], event: StageEvent) -> None:
        hidden = {"event", "stage", "generation", "level", "timestamp", "at", "pid"}
        details = " ".join(f"{key}={value}" for key, value in event.items() if key not in hidden)
        title, text = escape_text(_stage_title(stage)), escape_text(event["event"])
        self._console.print(
            f"[yellow]![/] {title}: {text} [dim]{escape_text(details)}[/]", soft_wrap=not self._console.is_terminal
        )

    def _close_stage(self, stage: tuple[int, str]) -> None:
        self._open[stage] = self._open.get(stage, 1) - 1
        if self._open[stage] <= 0 and stage in self._tasks:
            self._progress.remove_task(self._tasks.pop(stage))
            self._parts.pop(stage, None)

    def _print_line(self, mark: str, title: str, details: str, outcome: str) -> None:
        line = f"{mark} {escape_text(title):<36} {escape_text(details):<42} [dim]{escape_text(outcome):>9}[/]"
        # Without a terminal, no line is wrapped.
        self._console.print(line, soft_wrap=not self._console.is_terminal)


def _stage_title(stage: tuple[int, str]) -> str:
    generation, name = stage
    if name in ("start", "prepare", "report"):
        return STAGE_TITLES[name]
    return f"{f'generation {generation}' if generation else 'teacher'} · {STAGE_TITLES[name]}"


def _format_shards(event: StageEvent) -> str:
    """` (shard 3)` or ` (shards 0–4)`, from a half-open range."""
    if not event.get("shards"):
        return ""
    start, stop = (int(bound) for bound in event["shards"].split("-"))
    return f" (shard {start})" if stop - start == 1 else f" (shards {start}–{stop - 1})"


def _summarize_event(event: StageEvent) -> str:
    match event["stage"]:
        case "prepare" | "start":
            calibration = f", {event['calibration']:,} for calibration" if "calibration" in event else ""
            test = f", {event['test']:,} to test on" if "test" in event else ""
            counts = f"{event['labeled']:,} labeled, {event['pool']:,} in the pool, {event['heldout']:,} held out"
            return f"{counts}{calibration}{test}"
        case "evaluate" | "evaluate-baseline":
            more = f", {event['corruption_error']:.1%} wrong when corrupted" if "corruption_error" in event else ""
            never = f", {event['never_predicted']}" if event.get("never_predicted") else ""
            return f"top-1 {event['top1']:.1%} of {event['images']:,} images{more}{never}"
        case "label":
            return f"{event['images']:,} images"
        case "select":
            foreign = f", {event['foreign']:,} foreign" if "foreign" in event else ""
            classes = f"; {event['classes']}" if "classes" in event else ""
            temperature = f", temperature {event['temperature']:.4g}" if "temperature" in event else ""
            kept = f"kept {event['kept']:,} of {event['labeled']:,}, {event['images']:,} with repeats"
            return f"{kept}{foreign}{temperature}{classes}"
        case "gate":
            return f"{'promoted' if event['promoted'] else 'refused'}, change {100 * event['gain']:+.1f} points"
        case "train" | "train-baseline" if "parameters" in event:
            return f"{event['steps']:,} steps, {event['parameters']:,} parameters"
    return ""
