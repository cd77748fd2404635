"""What commands show on a terminal: the steps of a run as they come, and results as tables."""

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ns.core.digest import shorten_digest
from ns.core.log import format_duration
from ns.data.dataset import Dataset
from ns.data.leakage import LeakageReport, count_class_images
from ns.evaluation.gate import Verdict, required_gain
from ns.evaluation.result import Evaluation, Robustness
from ns.evaluation.robustness.relative_scores import RobustnessScores
from ns.labeling.audit import LabelAudit
from ns.labeling.diff import LabelDiff
from ns.labeling.label_set import HISTOGRAM_BINS, LabelSet, read_histogram
from ns.labeling.registry import VersionSummary
from ns.labeling.selection import Selection
from ns.planning import RunPlan
from ns.planning.prices import GpuCost
from ns.planning.tables import build_plan_tables
from ns.runs.lineage import ImageTrace
from ns.runs.records import RunLabelSet, RunSummary
from ns.storage import Store

StageEvent = dict[str, Any]

STAGE_TITLES = {
    "start-generation": "prepare data",
    "prepare-data": "prepare data",
    "train": "train",
    "evaluate": "evaluate",
    "label-shards": "label pool",
    "commit-labels": "select labels",
    "gate": "gate",
    "report": "report",
}


WORST_CLASSES = 5
"""Shown of an evaluation; all are in evaluation.json."""


UNLIMITED = 10_000
"""Columns: more than any table needs."""


class RunView:
    """Draws the events of a run. Without a terminal it prints the lines of finished steps and nothing that moves."""

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
        # Events come from the tailing thread, Ctrl-C to the main one.
        self._lock = threading.Lock()

    def __enter__(self) -> "RunView":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_event(self, event: StageEvent) -> None:
        if event.get("step") not in STAGE_TITLES:
            return
        stage = (int(event.get("generation", 0)), str(event["step"]))
        with self._lock:
            match event["event"]:
                case "started":
                    self._start_stage(stage)
                case "progress":
                    self._advance_stage(stage, event)
                case "finished":
                    self._finish_stage(stage, event)
                case "failed":
                    self._fail_stage(stage, event)
                case "noted":
                    self._close_stage(stage)
                    outcome = "reused" if event["reused"] else format_duration(event["seconds"])
                    self._print_line("[green]✓[/]", f"{_stage_title(stage)}{_format_shards(event)}", "", outcome)
                case "state" if event["state"] in ("RUNNING", "FAILED"):
                    mark = "[red]✗[/]" if event["state"] == "FAILED" else "[dim]·[/]"
                    self._print_line(mark, STAGE_TITLES[stage[1]], "", event["state"].lower())
                case "cost":
                    self._print_line(
                        "[dim]·[/]",
                        _stage_title(stage),
                        f"{event['forward_passes']:,} forward passes",
                        f"~{format_duration(event['seconds'])}",
                    )
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
        # Parallel tasks of one step share a bar.
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
        if event.get("quiet"):
            return
        outcome = "reused" if event.get("reused") else format_duration(event["seconds"])
        self._print_line("[green]✓[/]", f"{_stage_title(stage)}{_format_shards(event)}", _summarize_event(event), outcome)

    def _fail_stage(self, stage: tuple[int, str], event: StageEvent) -> None:
        self._close_stage(stage)
        interrupted = event.get("exit_code") == 130
        self._print_line(
            "[yellow]■[/]" if interrupted else "[red]✗[/]", _stage_title(stage), "", "stopped" if interrupted else "failed"
        )

    def _print_warning(self, stage: tuple[int, str], event: StageEvent) -> None:
        hidden = {"event", "step", "generation", "level", "timestamp", "at", "pid"}
        details = " ".join(f"{key}={value}" for key, value in event.items() if key not in hidden)
        self._console.print(f"[yellow]![/] {escape(_stage_title(stage))}: {escape(event['event'])} [dim]{escape(details)}[/]")

    def _close_stage(self, stage: tuple[int, str]) -> None:
        self._open[stage] = self._open.get(stage, 1) - 1
        if self._open[stage] <= 0 and stage in self._tasks:
            self._progress.remove_task(self._tasks.pop(stage))
            self._parts.pop(stage, None)

    def _print_line(self, mark: str, title: str, details: str, outcome: str) -> None:
        line = f"{mark} {escape(title):<36} {escape(details):<42} [dim]{escape(outcome):>9}[/]"
        # Without a terminal, a line is a line, however long.
        self._console.print(line, highlight=False, soft_wrap=not self._console.is_terminal)


def summary_table(summary: RunSummary) -> Table:
    """The generations of a run, one a row."""
    table = _make_table(f"run {summary.run}")
    for header in ("gen", "model", "labeled", "kept", "top-1", "change", "verdict", "time"):
        table.add_column(header, justify="left" if header in ("model", "verdict") else "right", no_wrap=True)
    notes = {note.generation: note.outputs.get("model", "") for note in summary.stages if note.stage == "train"}
    if summary.teacher_top1 is not None:
        first = min(notes, default=0)
        seconds = sum(note.seconds for note in summary.stages if note.generation <= first)
        model = notes.get(first, "").rpartition("/")[0]
        table.add_row(str(first), _shorten_key(model), "", "", f"{summary.teacher_top1:.1%}", "", "", format_duration(seconds))
    for row in summary.generations:
        promoted = row.verdict == "promoted"
        table.add_row(
            str(row.generation),
            _shorten_key(row.model),
            f"{row.labeled:,}",
            f"{row.kept:,}",
            f"{row.student_top1:.1%}",
            f"{100 * row.gain:+.1f} [{100 * row.gain_low:+.1f}, {100 * row.gain_high:+.1f}]",
            f"[{'green' if promoted else 'yellow'}]{row.verdict}[/]",
            format_duration(row.seconds),
        )
    return table


def measures_table(summary: RunSummary) -> Table | None:
    """What was measured of each model beside held-out accuracy, a model a column; None if that was all."""
    measured = [
        model for model in summary.measurements if model.test_top1 is not None or model.sets or model.scores or model.attacks
    ]
    if not measured:
        return None
    references = {model.scores.mce_relative_to or model.scores.mfr_relative_to for model in measured if model.scores} - {None}
    relative = "AlexNet" if references == {"AlexNet"} else "the first teacher"
    title = f"mCE, mFR: % of {relative}'s" if references else ""
    table = _make_table(title, "", *(f"gen {model.generation}" for model in measured))

    def add_row(name: str, values: list[float | None], form: str) -> None:
        if any(value is not None for value in values):
            table.add_row(name, *("" if value is None else format(value, form) for value in values))

    add_row("test top-1", [model.test_top1 for model in measured], ".1%")
    for name in dict.fromkeys(name for model in measured for name in model.sets):
        add_row(f"{name} top-1", [model.sets.get(name) for model in measured], ".1%")
    for name, field, form in (
        ("error when corrupted", "corruption_error", ".1%"),
        ("mCE", "mce", ".1f"),
        ("flip probability", "flip_probability", ".2%"),
        ("mFR", "mfr", ".1f"),
    ):
        add_row(name, [getattr(model.scores, field) if model.scores else None for model in measured], form)
    for name in dict.fromkeys(name for model in measured for name in model.attacks):
        add_row(f"{name.upper()} top-1", [model.attacks.get(name) for model in measured], ".1%")
    return table


def evaluation_tables(
    evaluation: Evaluation | None, robustness: Robustness | None, comparison_scores: RobustnessScores | None
) -> list[Table]:
    """Accuracy and its worst classes; what corruptions, perturbations and attacks leave."""
    tables = [] if evaluation is None else [accuracy_table(evaluation)]
    return [*tables, *(robustness_tables(robustness, comparison_scores) if robustness and comparison_scores else [])]


def accuracy_table(evaluation: Evaluation) -> Table:
    """Accuracy, calibration, and the classes that are worst."""
    clean = _make_table(evaluation.name or shorten_digest(evaluation.dataset), "accuracy", "")
    seed = f", seed {evaluation.subsample.seed}" if evaluation.subsample else ""
    clean.add_row("images (drawn evenly)" if evaluation.subsample else "images", f"{evaluation.images:,}{seed}")
    if evaluation.unreadable:
        clean.add_row("unreadable", f"{evaluation.unreadable:,}")
    clean.add_row("top-1", f"{evaluation.top1:.2%}")
    clean.add_row("top-5", f"{evaluation.top5:.2%}")
    if evaluation.multi_label_top1 is not None:
        clean.add_row(f"any right class ({evaluation.multi_label_images:,} images)", f"{evaluation.multi_label_top1:.2%}")
    if evaluation.calibration:
        clean.add_row("calibration error (ECE)", f"{evaluation.calibration.ece:.2%}")
    if evaluation.scored_classes:
        clean.add_row("answers chosen among", f"{len(evaluation.scored_classes):,} classes")
    class_accuracies = [
        (share, name) for share, name in zip(evaluation.class_accuracy, evaluation.classes, strict=True) if share is not None
    ]
    for share, name in sorted(class_accuracies)[:WORST_CLASSES]:
        clean.add_row(f"class {escape(name)}", f"{share:.1%}")
    return clean


def robustness_tables(robustness: Robustness, comparison_scores: RobustnessScores) -> list[Table]:
    """Raw numbers, and what they come to in comparison."""
    tables = []
    image_count = f"{robustness.images:,} images"
    if robustness.corruptions:
        score = (
            ""
            if comparison_scores.mce is None
            else f"mCE {comparison_scores.mce:.1f} relative to {comparison_scores.mce_relative_to}, "
        )
        title = f"corruptions: {score}mean error {comparison_scores.corruption_error or 0:.1%}, {image_count}"
        table = _make_table(title, "error at severity", *map(str, robustness.severities), "mean")
        for kind, mean in robustness.mean_corruption_errors().items():
            table.add_row(kind.replace("_", " "), *(f"{rate:.1%}" for rate in robustness.corruptions[kind]), f"{mean:.1%}")
        tables.append(table)
    if robustness.perturbations:
        score = (
            ""
            if comparison_scores.mfr is None
            else f"mFR {comparison_scores.mfr:.1f} relative to {comparison_scores.mfr_relative_to}, "
        )
        title = f"perturbations: {score}mean flip probability {comparison_scores.flip_probability or 0:.2%}, {image_count}"
        table = _make_table(title, "along a sequence", "flip probability", "top-5 distance")
        for kind, flips in robustness.perturbations.items():
            table.add_row(kind.replace("_", " "), f"{flips.flip_probability:.2%}", f"{flips.top5_distance:.3f}")
        tables.append(table)
    if robustness.attacks:
        table = _make_table(f"attacks: {image_count}", "", "epsilon, of 255", "steps", "step size", "top-1")
        clean = "" if robustness.top1 is None else f"{robustness.top1:.1%}"
        table.add_row("none", "0", "", "", clean)
        for attack in robustness.attacks:
            table.add_row(
                attack.name.upper(), f"{attack.epsilon:g}", str(attack.steps), f"{attack.step_size:.3g}", f"{attack.top1:.1%}"
            )
        tables.append(table)
    return tables


def runs_table(summaries: list[RunSummary]) -> Table:
    """Runs, one a row."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for header in ("run", "state", "started", "generations", "best top-1"):
        table.add_column(header, justify="right" if header in ("generations", "best top-1") else "left", no_wrap=True)
    for summary in summaries:
        best = "" if summary.best_top1 is None else f"{summary.best_top1:.1%}"
        table.add_row(
            summary.run, summary.state, summary.started_at[:16].replace("T", " "), str(len(summary.generations)), best
        )
    return table


def classes_table(store: Store, data: Dataset) -> Table:
    """Images of each class of a labeled dataset."""
    table = _make_table("", "class", "images", "share")
    for name, count in count_class_images(store, data).items():
        table.add_row(escape(name), f"{count:,}", f"{count / max(1, data.samples):.1%}")
    return table


def check_tables(report: LeakageReport, suspect_counts: dict[str, int]) -> list[Table]:
    """What a check found, and the sizes of the classes."""
    overlaps = _make_table("images that resemble another", "images of", "in", "same bytes", "near")
    for overlap in report.overlaps:
        overlaps.add_row(escape(overlap.of), escape(overlap.within), f"{overlap.same:,}", f"{overlap.near:,}")
    classes = _make_table("labeled data", "dataset", "classes", "smallest", "largest", "labels to look at")
    for name, counts in report.classes.items():
        smallest, largest = (pick(counts, key=lambda class_name: counts[class_name]) for pick in (min, max))
        ends = (f"{escape(class_name)} {counts[class_name]:,}" for class_name in (smallest, largest))
        classes.add_row(escape(name), f"{len(counts):,}", *ends, f"{suspect_counts[name]:,}" if name in suspect_counts else "")
    return [overlaps, classes] if report.classes else [overlaps]


def label_set_table(resolved: RunLabelSet) -> Table:
    """A label set by class."""
    label_set, selection = resolved.label_set, resolved.selection
    counts = read_histogram(resolved.store, len(label_set.classes))
    middles = (np.arange(HISTOGRAM_BINS) + 0.5) / HISTOGRAM_BINS
    title = f"{label_set.rows:,} images, {label_set.unreadable:,} unreadable, {label_set.left_out:,} left out"
    table = _make_table(
        title, "class", "images", "mean confidence", *(("kept", "least confidence kept", "seen") if selection else ())
    )
    for class_id, (name, histogram) in enumerate(zip(label_set.classes, counts.astype(float), strict=True)):
        images = histogram.sum()
        cells = [escape(name), f"{images:,.0f}", f"{histogram @ middles / images:.1%}" if images else ""]
        if selection:
            rule = selection.rules[class_id]
            cells += [f"{rule.kept:,}", f"{rule.last_kept.confidence:.1%}" if rule.last_kept else "", f"{rule.images:,}"]
        table.add_row(*cells)
    return table


def selection_table(label_set: LabelSet, selection: Selection) -> Table:
    """What a selection keeps, drops and repeats, by class; with a wanted precision, what that costs."""
    title = (
        f"{selection.kept:,} of {label_set.rows:,} images kept, {selection.images:,} with repeats; {selection.low_confidence:,} "
        f"below the threshold, {selection.balanced_out:,} balanced out, {selection.unreadable:,} unreadable, "
        f"{selection.left_out:,} left out"
    )
    headers = ["class", "above threshold", "threshold", "kept", "dropped", "each seen", "seen"]
    if selection.thresholds:
        headers += ["held out", "right", "at least"]
    table = _make_table(title, *headers)
    for class_id, (name, rule) in enumerate(zip(label_set.classes, selection.rules, strict=True)):
        times = f"{rule.copies}–{rule.copies + 1}×" if rule.last_extra else f"{rule.copies}×"
        cells = [
            escape(name),
            f"{rule.candidates:,}",
            f"{rule.threshold:.1%}" if rule.threshold <= 1 else "never",
            f"{rule.kept:,}",
            f"{rule.candidates - rule.kept:,}",
            times,
            f"{rule.images:,}",
        ]
        if selection.thresholds:
            class_thresholds = selection.thresholds.classes[class_id]
            cells += [
                f"{class_thresholds.heldout:,}{' pooled' if class_thresholds.pooled else ''}",
                f"{class_thresholds.correct:,}",
                f"{class_thresholds.bound:.1%}",
            ]
        table.add_row(*cells)
    return table


def trace_table(trace: ImageTrace) -> Table:
    """What each teacher said of one image."""
    table = _make_table(trace.key, "run", "gen", "label", "threshold", "seen", "student", "label set")
    for view in trace.answers:
        predictions = ", ".join(f"{name} {probability:.1%}" for name, probability in list(view.probabilities.items())[:3])
        table.add_row(
            escape(view.run),
            str(view.generation),
            escape(predictions or view.reason or ""),
            "" if view.threshold is None else f"{view.threshold:.1%}",
            f"{view.times_per_epoch}×",
            "" if view.student is None else _shorten_key(view.student),
            view.label_set[:6],
        )
    return table


def diff_tables(diff: LabelDiff) -> list[RenderableType]:
    """What changed between two label sets: by band of confidence, by class, and the most frequent flips."""
    lines = [
        f"{diff.changed:,} of {diff.compared:,} labels changed ({diff.churn:.1%}), confidence {100 * diff.confidence_shift:+.1f} points"
    ]
    if diff.entered is not None:
        lines.append(f"selected: {diff.stayed:,} stayed, {diff.entered:,} entered, {diff.left:,} left")
    by_band = _make_table("", "confidence before", "images", "changed", "churn")
    for band in diff.churn_bins:
        if band.images:
            by_band.add_row(f"{band.low:.1f} … {band.high:.1f}", f"{band.images:,}", f"{band.changed:,}", f"{band.churn:.1%}")
    has_selection = diff.entered is not None
    by_class = _make_table(
        "",
        "class",
        "before",
        "after",
        "lost",
        "gained",
        *(("kept before", "kept after") if has_selection else ()),
        "confidence, points",
    )
    for row in diff.list_changed_classes():
        kept = (row.kept_before, row.kept_after) if has_selection else ()
        by_class.add_row(
            escape(row.name),
            *(f"{value:,}" for value in (row.before, row.after, row.lost, row.gained, *kept)),
            "" if row.shift is None else f"{100 * row.shift:+.1f}",
        )
    flips = _make_table("most frequent flips", "before", "after", "images")
    flips.columns[1].justify = "left"
    for old, new, images in diff.list_frequent_flips():
        flips.add_row(escape(old), escape(new), f"{images:,}")
    return [*(f"[bold]{line}[/]" for line in lines), by_band, by_class, *([flips] if diff.matrix else [])]


def audits_table(audits: list[LabelAudit]) -> Table:
    """Audits of one label set, one a row."""
    table = _make_table(
        "audits: labels that are right, with 95 % intervals", "audit", "of", "looked at", "wrong", "right", "interval"
    )
    table.columns[1].justify = "left"
    for audit in audits:
        table.add_row(
            shorten_digest(audit.digest),
            f"selection {audit.selection[:6]}" if audit.selection else "all labels",
            f"{audit.reviewed:,} of {audit.images:,}",
            f"{audit.wrong:,}",
            f"{audit.precision:.1%}",
            f"{audit.precision_low:.1%} … {audit.precision_high:.1%}",
        )
    return table


def audit_tables(audit: LabelAudit) -> list[Table]:
    """One audit, and its strata."""
    strata = _make_table("", "class", "confidence", "images", "looked at", "right", "interval")
    for stratum in audit.strata:
        strata.add_row(
            escape(stratum.class_name) if stratum.class_name is not None else "all",
            f"{stratum.low:.1f} … {stratum.high:.1f}",
            f"{stratum.images:,}",
            f"{stratum.reviewed:,}",
            "" if stratum.precision is None else f"{stratum.precision:.1%}",
            f"{stratum.precision_low:.1%} … {stratum.precision_high:.1%}",
        )
    return [strata, audits_table([audit])]


def plan_tables(plan: RunPlan) -> list[Table]:
    """What is done, one work a row; and what each device needs meanwhile."""
    rendered = []
    for rows in build_plan_tables(plan):
        table = _make_table(rows.title, *rows.headers)
        for cells in rows.cells:
            table.add_row(*cells)
        table.columns[1].justify = "left"
        for column in table.columns:
            column.no_wrap = True
        rendered.append(table)
    return rendered


def _make_table(title: str, *headers: str) -> Table:
    """A plain table whose first column is text."""
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column, header in enumerate(headers):
        table.add_column(header, justify="left" if column == 0 else "right")
    return table


def _stage_title(stage: tuple[int, str]) -> str:
    generation, name = stage
    if name in ("start-generation", "prepare-data", "report"):
        return STAGE_TITLES[name]
    return f"{f'generation {generation}' if generation else 'teacher'} · {STAGE_TITLES[name]}"


def _format_shards(event: StageEvent) -> str:
    """` (shard 3)` or ` (shards 0–4)`, from a half-open range."""
    if not event.get("shards"):
        return ""
    start, stop = (int(bound) for bound in event["shards"].split("-"))
    return f" (shard {start})" if stop - start == 1 else f" (shards {start}–{stop - 1})"


def _summarize_event(event: StageEvent) -> str:
    match event["step"]:
        case "prepare-data" | "start-generation":
            test = f", {event['test']:,} to test on" if "test" in event else ""
            return f"{event['labeled']:,} labeled, {event['pool']:,} in the pool, {event['heldout']:,} held out{test}"
        case "evaluate":
            more = f", {event['corruption_error']:.1%} wrong when corrupted" if "corruption_error" in event else ""
            return f"top-1 {event['top1']:.1%} of {event['images']:,} images{more}"
        case "label-shards":
            return f"{event['images']:,} images"
        case "commit-labels":
            return f"kept {event['kept']:,} of {event['labeled']:,}, {event['images']:,} with repeats"
        case "gate":
            return f"{'promoted' if event['promoted'] else 'refused'}, change {100 * event['gain']:+.1f} points"
        case "train" if "parameters" in event:
            return f"{event['steps']:,} steps, {event['parameters']:,} parameters"
    return ""


def outlook_tables(steps: Iterable[tuple[str, str, str]], costs: Iterable[GpuCost]) -> list[Table]:
    """What a run would do, and what that costs on each kind of GPU."""
    does = _make_table("", "step", "", "how much")
    for column in does.columns:
        column.justify = "left"
    for row in steps:
        does.add_row(*map(escape, row))
    pays = _make_table("", "GPU", "hours", "price")
    for gpu, hours, cost in costs:
        pays.add_row(gpu, " to ".join(map(_roughly, hours)), " to ".join(map(_roughly, cost)))
    return [does, pays]


def _roughly(number: float) -> str:
    """Two digits, or all before the point."""
    if number < 0.01:
        return "< 0.01"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _shorten_key(key: str) -> str:
    return key.rpartition("/")[2][:6]


def verdict_tables(run: str, verdict: Verdict) -> list[Table]:
    """Every guard of the gate, and the held-out images by who is right."""
    outcome = "promoted" if verdict.promoted else "refused"
    conditions = _make_table(
        f"run {run}, generation {verdict.generation}: {outcome}", "guard", "value", "limit", "", "what it is"
    )
    conditions.columns[3].justify = conditions.columns[4].justify = "left"
    for condition in verdict.conditions:
        mark = "[green]passed[/]" if condition.passed else "[yellow]failed[/]"
        # Points of mCE and mFR; all others are shares.
        form = "+.1f" if condition.name in ("mCE rise", "mFR rise") else "+.2%"
        detail = escape(condition.detail.rstrip(","))
        conditions.add_row(condition.name, format(condition.value, form), format(condition.limit, form), mark, detail)
    if verdict.paired is None:
        return [conditions]
    pairs = _make_table(f"{verdict.images:,} held-out images", "", "student right", "student wrong")
    pairs.add_row("teacher right", f"{verdict.paired.both:,}", f"{verdict.paired.only_teacher:,}")
    pairs.add_row("teacher wrong", f"{verdict.paired.only_student:,}", f"{verdict.paired.neither:,}")
    return [conditions, pairs]


def verdict_lines(verdict: Verdict) -> list[str]:
    """The numbers behind a verdict, and what would have been needed for another one."""
    requirement, lines = required_gain(verdict), []
    lines.append(
        f"top-1 {verdict.teacher_top1:.2%} → {verdict.student_top1:.2%}: gain {100 * verdict.gain:+.2f} points, "
        f"between {100 * verdict.gain_low:+.2f} and {100 * verdict.gain_high:+.2f} "
        f"(paired bootstrap, each bound one-sided at {verdict.level:.4g})"
    )
    if verdict.mcnemar is not None:
        lines.append(f"McNemar's exact test: p = {verdict.mcnemar:.3g}")
    gain = next(condition for condition in verdict.conditions if condition.name == "gain")
    if not gain.passed:
        lines.append(f"on these images a gain of more than {100 * requirement.gain:+.2f} points, about, would have been enough")
        if requirement.images is None:
            lines.append("no number of images would help: the gain itself is not above the limit")
        else:
            lines.append(
                f"a gain as large as this one would be enough on about {requirement.images:,} held-out images, "
                f"{max(0, requirement.images - verdict.images):,} more"
            )
    failed = [condition for condition in verdict.conditions if not condition.passed and condition.name != "gain"]
    lines += [
        f"{condition.name}: would have to be {condition.limit:+.3f} instead of {condition.value:+.3f}" for condition in failed
    ]
    lines.append(f"[dim]recorded reason: {escape(verdict.reason)}[/]")
    return lines


def print_untruncated(table: Table) -> None:
    """Prints a table at its full width, where the terminal is narrower too: what is there to be pasted is never cut."""
    console = Console()
    table_width = console.measure(table, options=console.options.update(width=UNLIMITED)).maximum
    Console(width=max(console.width, table_width)).print(table)


def versions_table(versions: list[VersionSummary]) -> Table:
    """Versions in a label registry, one a row."""
    table = _make_table("", "version", "committed", "rows", "kept", "")
    for version in versions:
        kept = "" if version.kept is None else f"{version.kept:,}"
        in_use = "in use" if version.current else ""
        table.add_row(escape(version.tag), version.date[:10], f"{version.rows:,}", kept, in_use)
    return table
