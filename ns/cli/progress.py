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

from ns.core.digest import short
from ns.core.log import duration
from ns.data.dataset import Dataset
from ns.data.leakage import CheckReport, class_counts
from ns.evaluation.gate import Verdict, needed
from ns.evaluation.result import Evaluation, Robustness
from ns.evaluation.robustness.relative_scores import Scores
from ns.labeling.audit import Audit
from ns.labeling.diff import Diff
from ns.labeling.label_set import BINS, LabelSet, read_histogram
from ns.labeling.registry import Listed
from ns.labeling.selection import Selection
from ns.planning import Plan
from ns.planning.prices import Cost
from ns.planning.tables import tables
from ns.runs.lineage import Trace
from ns.runs.records import Labels, Summary
from ns.storage import Store

Event = dict[str, Any]

TITLES = {
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
        self._parts: dict[tuple[int, str], dict[str, Event]] = {}
        self._open: dict[tuple[int, str], int] = {}
        # Events come from the tailing thread, Ctrl-C to the main one.
        self._lock = threading.Lock()

    def __enter__(self) -> "RunView":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_event(self, event: Event) -> None:
        if event.get("step") not in TITLES:
            return
        step = (int(event.get("generation", 0)), str(event["step"]))
        with self._lock:
            match event["event"]:
                case "started":
                    self._start(step)
                case "progress":
                    self._advance(step, event)
                case "finished":
                    self._finish(step, event)
                case "failed":
                    self._fail(step, event)
                case "noted":
                    self._close(step)
                    what = "reused" if event["reused"] else duration(event["seconds"])
                    self._say("[green]✓[/]", f"{_title(step)}{_shards(event)}", "", what)
                case "state" if event["state"] in ("RUNNING", "FAILED"):
                    mark = "[red]✗[/]" if event["state"] == "FAILED" else "[dim]·[/]"
                    self._say(mark, TITLES[step[1]], "", event["state"].lower())
                case "cost":
                    self._say(
                        "[dim]·[/]",
                        _title(step),
                        f"{event['forward_passes']:,} forward passes",
                        f"~{duration(event['seconds'])}",
                    )
                case _ if event.get("level") == "warning":
                    self._warn(step, event)

    def _start(self, step: tuple[int, str]) -> None:
        self._open[step] = self._open.get(step, 0) + 1
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(_title(step), total=None, rate="")

    def _advance(self, step: tuple[int, str], event: Event) -> None:
        task = self._tasks.get(step)
        if task is None:
            return
        # Parallel tasks of one step share a bar.
        parts = self._parts.setdefault(step, {})
        parts[str(event.get("shards", ""))] = event
        rate = sum(part["per_second"] for part in parts.values())
        loss = f"  loss {event['loss']:.3f}" if "loss" in event else ""
        self._progress.update(
            task,
            completed=sum(part["done"] for part in parts.values()),
            total=sum(part["total"] for part in parts.values()),
            rate=f"{rate:,.0f} {event['unit']}/s{loss}",
        )

    def _finish(self, step: tuple[int, str], event: Event) -> None:
        self._close(step)
        if event.get("quiet"):
            return
        what = "reused" if event.get("reused") else duration(event["seconds"])
        self._say("[green]✓[/]", f"{_title(step)}{_shards(event)}", _facts(event), what)

    def _fail(self, step: tuple[int, str], event: Event) -> None:
        self._close(step)
        interrupted = event.get("exit_code") == 130
        self._say("[yellow]■[/]" if interrupted else "[red]✗[/]", _title(step), "", "stopped" if interrupted else "failed")

    def _warn(self, step: tuple[int, str], event: Event) -> None:
        hidden = {"event", "step", "generation", "level", "timestamp", "at", "pid"}
        facts = " ".join(f"{key}={value}" for key, value in event.items() if key not in hidden)
        self._console.print(f"[yellow]![/] {escape(_title(step))}: {escape(event['event'])} [dim]{escape(facts)}[/]")

    def _close(self, step: tuple[int, str]) -> None:
        self._open[step] = self._open.get(step, 1) - 1
        if self._open[step] <= 0 and step in self._tasks:
            self._progress.remove_task(self._tasks.pop(step))
            self._parts.pop(step, None)

    def _say(self, mark: str, title: str, facts: str, what: str) -> None:
        line = f"{mark} {escape(title):<36} {escape(facts):<42} [dim]{escape(what):>9}[/]"
        # Without a terminal, a line is a line, however long.
        self._console.print(line, highlight=False, soft_wrap=not self._console.is_terminal)


def summary_table(summary: Summary) -> Table:
    """The generations of a run, one a row."""
    table = _table(f"run {summary.run}")
    for header in ("gen", "model", "labelled", "kept", "top-1", "change", "verdict", "time"):
        table.add_column(header, justify="left" if header in ("model", "verdict") else "right", no_wrap=True)
    notes = {note.generation: note.outputs.get("model", "") for note in summary.steps if note.step == "train"}
    if summary.teacher_top1 is not None:
        first = min(notes, default=0)
        seconds = sum(note.seconds for note in summary.steps if note.generation <= first)
        model = notes.get(first, "").rpartition("/")[0]
        table.add_row(str(first), _short(model), "", "", f"{summary.teacher_top1:.1%}", "", "", duration(seconds))
    for row in summary.generations:
        promoted = row.verdict == "promoted"
        table.add_row(
            str(row.generation),
            _short(row.model),
            f"{row.labelled:,}",
            f"{row.kept:,}",
            f"{row.student_top1:.1%}",
            f"{100 * row.gain:+.1f} [{100 * row.gain_low:+.1f}, {100 * row.gain_high:+.1f}]",
            f"[{'green' if promoted else 'yellow'}]{row.verdict}[/]",
            duration(row.seconds),
        )
    return table


def measures_table(summary: Summary) -> Table | None:
    """What was measured of each model beside held-out accuracy, a model a column; None if that was all."""
    asked = [one for one in summary.measures if one.test_top1 is not None or one.sets or one.scores or one.attacks]
    if not asked:
        return None
    by = {one.scores.mce_relative_to or one.scores.mfr_relative_to for one in asked if one.scores} - {None}
    relative = "AlexNet" if by == {"AlexNet"} else "the first teacher"
    title = f"mCE, mFR: % of {relative}'s" if by else ""
    table = _table(title, "", *(f"gen {one.generation}" for one in asked))

    def row(name: str, values: list[float | None], form: str) -> None:
        if any(value is not None for value in values):
            table.add_row(name, *("" if value is None else format(value, form) for value in values))

    row("test top-1", [one.test_top1 for one in asked], ".1%")
    for name in dict.fromkeys(name for one in asked for name in one.sets):
        row(f"{name} top-1", [one.sets.get(name) for one in asked], ".1%")
    for name, field, form in (
        ("error when corrupted", "corruption_error", ".1%"),
        ("mCE", "mce", ".1f"),
        ("flip probability", "flip_probability", ".2%"),
        ("mFR", "mfr", ".1f"),
    ):
        row(name, [getattr(one.scores, field) if one.scores else None for one in asked], form)
    for name in dict.fromkeys(name for one in asked for name in one.attacks):
        row(f"{name.upper()} top-1", [one.attacks.get(name) for one in asked], ".1%")
    return table


def evaluation_tables(evaluation: Evaluation | None, robustness: Robustness | None, scored: Scores | None) -> list[Table]:
    """Accuracy and its worst classes; what corruptions, perturbations and attacks leave."""
    tables = [] if evaluation is None else [accuracy_table(evaluation)]
    return [*tables, *(robustness_tables(robustness, scored) if robustness and scored else [])]


def accuracy_table(evaluation: Evaluation) -> Table:
    """Accuracy, calibration, and the classes that are worst."""
    clean = _table(evaluation.name or short(evaluation.dataset), "accuracy", "")
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
    if evaluation.scored:
        clean.add_row("answers chosen among", f"{len(evaluation.scored):,} classes")
    known = [
        (share, name) for share, name in zip(evaluation.class_accuracy, evaluation.classes, strict=True) if share is not None
    ]
    for share, name in sorted(known)[:WORST_CLASSES]:
        clean.add_row(f"class {escape(name)}", f"{share:.1%}")
    return clean


def robustness_tables(robustness: Robustness, scored: Scores) -> list[Table]:
    """Raw numbers, and what they come to in comparison."""
    tables = []
    of = f"{robustness.images:,} images"
    if robustness.corruptions:
        score = "" if scored.mce is None else f"mCE {scored.mce:.1f} relative to {scored.mce_relative_to}, "
        title = f"corruptions: {score}mean error {scored.corruption_error or 0:.1%}, {of}"
        table = _table(title, "error at severity", *map(str, robustness.severities), "mean")
        for kind, mean in robustness.corruption_error().items():
            table.add_row(kind.replace("_", " "), *(f"{rate:.1%}" for rate in robustness.corruptions[kind]), f"{mean:.1%}")
        tables.append(table)
    if robustness.perturbations:
        score = "" if scored.mfr is None else f"mFR {scored.mfr:.1f} relative to {scored.mfr_relative_to}, "
        title = f"perturbations: {score}mean flip probability {scored.flip_probability or 0:.2%}, {of}"
        table = _table(title, "along a sequence", "flip probability", "top-5 distance")
        for kind, one in robustness.perturbations.items():
            table.add_row(kind.replace("_", " "), f"{one.flip_probability:.2%}", f"{one.top5_distance:.3f}")
        tables.append(table)
    if robustness.attacks:
        table = _table(f"attacks: {of}", "", "epsilon, of 255", "steps", "step size", "top-1")
        clean = "" if robustness.top1 is None else f"{robustness.top1:.1%}"
        table.add_row("none", "0", "", "", clean)
        for attack in robustness.attacks:
            table.add_row(
                attack.name.upper(), f"{attack.epsilon:g}", str(attack.steps), f"{attack.step_size:.3g}", f"{attack.top1:.1%}"
            )
        tables.append(table)
    return tables


def runs_table(summaries: list[Summary]) -> Table:
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


def classes_table(folder: Store, data: Dataset) -> Table:
    """Images of each class of a labelled dataset."""
    table = _table("", "class", "images", "share")
    for name, count in class_counts(folder, data).items():
        table.add_row(escape(name), f"{count:,}", f"{count / max(1, data.samples):.1%}")
    return table


def check_tables(report: CheckReport, doubted: dict[str, int]) -> list[Table]:
    """What a check found, and the sizes of the classes."""
    found = _table("images that resemble another", "images of", "in", "same bytes", "near")
    for overlap in report.overlaps:
        found.add_row(escape(overlap.of), escape(overlap.within), f"{overlap.same:,}", f"{overlap.near:,}")
    classes = _table("labelled data", "dataset", "classes", "smallest", "largest", "labels to look at")
    for name, counts in report.classes.items():
        smallest, largest = (pick(counts, key=lambda label: counts[label]) for pick in (min, max))
        ends = (f"{escape(label)} {counts[label]:,}" for label in (smallest, largest))
        classes.add_row(escape(name), f"{len(counts):,}", *ends, f"{doubted[name]:,}" if name in doubted else "")
    return [found, classes] if report.classes else [found]


def labels_table(labels: Labels) -> Table:
    """A label set by class."""
    label_set, selection = labels.label_set, labels.selection
    counts = read_histogram(labels.folder, len(label_set.classes))
    middles = (np.arange(BINS) + 0.5) / BINS
    title = f"{label_set.rows:,} images, {label_set.unreadable:,} unreadable, {label_set.left_out:,} left out"
    table = _table(
        title, "class", "images", "mean confidence", *(("kept", "least confidence kept", "seen") if selection else ())
    )
    for number, (name, own) in enumerate(zip(label_set.classes, counts.astype(float), strict=True)):
        images = own.sum()
        cells = [escape(name), f"{images:,.0f}", f"{own @ middles / images:.1%}" if images else ""]
        if selection:
            rule = selection.rules[number]
            cells += [f"{rule.kept:,}", f"{rule.last.confidence:.1%}" if rule.last else "", f"{rule.images:,}"]
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
    if selection.calibration:
        headers += ["held out", "right", "at least"]
    table = _table(title, *headers)
    for number, (name, rule) in enumerate(zip(label_set.classes, selection.rules, strict=True)):
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
        if selection.calibration:
            found = selection.calibration.classes[number]
            cells += [f"{found.heldout:,}{' pooled' if found.pooled else ''}", f"{found.correct:,}", f"{found.bound:.1%}"]
        table.add_row(*cells)
    return table


def trace_table(trace: Trace) -> Table:
    """What each teacher said of one image."""
    table = _table(trace.key, "run", "gen", "label", "threshold", "seen", "student", "label set")
    for view in trace.views:
        says = ", ".join(f"{name} {probability:.1%}" for name, probability in list(view.classes.items())[:3])
        table.add_row(
            escape(view.run),
            str(view.generation),
            escape(says or view.reason or ""),
            "" if view.threshold is None else f"{view.threshold:.1%}",
            f"{view.seen}×",
            "" if view.student is None else _short(view.student),
            view.label_set[:6],
        )
    return table


def diff_tables(diff: Diff) -> list[RenderableType]:
    """What changed between two label sets: by band of confidence, by class, and the most frequent flips."""
    lines = [
        f"{diff.changed:,} of {diff.compared:,} labels changed ({diff.churn:.1%}), confidence {100 * diff.shift:+.1f} points"
    ]
    if diff.entered is not None:
        lines.append(f"selected: {diff.stayed:,} stayed, {diff.entered:,} entered, {diff.left:,} left")
    by_band = _table("", "confidence before", "images", "changed", "churn")
    for band in diff.bands:
        if band.images:
            by_band.add_row(f"{band.low:.1f} … {band.high:.1f}", f"{band.images:,}", f"{band.changed:,}", f"{band.churn:.1%}")
    known = diff.entered is not None
    by_class = _table(
        "",
        "class",
        "before",
        "after",
        "lost",
        "gained",
        *(("kept before", "kept after") if known else ()),
        "confidence, points",
    )
    for row in diff.changed_classes():
        kept = (row.kept_before, row.kept_after) if known else ()
        by_class.add_row(
            escape(row.name),
            *(f"{value:,}" for value in (row.before, row.after, row.lost, row.gained, *kept)),
            "" if row.shift is None else f"{100 * row.shift:+.1f}",
        )
    flips = _table("most frequent flips", "before", "after", "images")
    flips.columns[1].justify = "left"
    for old, new, images in diff.frequent():
        flips.add_row(escape(old), escape(new), f"{images:,}")
    return [*(f"[bold]{line}[/]" for line in lines), by_band, by_class, *([flips] if diff.matrix else [])]


def audits_table(found: list[Audit]) -> Table:
    """Audits of one label set, one a row."""
    table = _table(
        "audits: labels that are right, with 95 % intervals", "audit", "of", "looked at", "wrong", "right", "interval"
    )
    table.columns[1].justify = "left"
    for audit in found:
        table.add_row(
            short(audit.digest),
            f"selection {audit.selection[:6]}" if audit.selection else "all labels",
            f"{audit.looked:,} of {audit.images:,}",
            f"{audit.wrong:,}",
            f"{audit.precision:.1%}",
            f"{audit.precision_low:.1%} … {audit.precision_high:.1%}",
        )
    return table


def audit_tables(audit: Audit) -> list[Table]:
    """One audit, and its strata."""
    strata = _table("", "class", "confidence", "images", "looked at", "right", "interval")
    for one in audit.strata:
        strata.add_row(
            escape(one.label) if one.label is not None else "all",
            f"{one.low:.1f} … {one.high:.1f}",
            f"{one.images:,}",
            f"{one.looked:,}",
            "" if one.precision is None else f"{one.precision:.1%}",
            f"{one.precision_low:.1%} … {one.precision_high:.1%}",
        )
    return [strata, audits_table([audit])]


def plan_tables(plan: Plan) -> list[Table]:
    """What is done, one work a row; and what each device needs meanwhile."""
    found = []
    for rows in tables(plan):
        table = _table(rows.title, *rows.headers)
        for cells in rows.cells:
            table.add_row(*cells)
        table.columns[1].justify = "left"
        for column in table.columns:
            column.no_wrap = True
        found.append(table)
    return found


def _table(title: str, *headers: str) -> Table:
    """A plain table whose first column is text."""
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for place, header in enumerate(headers):
        table.add_column(header, justify="left" if place == 0 else "right")
    return table


def _title(step: tuple[int, str]) -> str:
    generation, name = step
    if name in ("start-generation", "prepare-data", "report"):
        return TITLES[name]
    return f"{f'generation {generation}' if generation else 'teacher'} · {TITLES[name]}"


def _shards(event: Event) -> str:
    """` (shard 3)` or ` (shards 0–4)`, from a half-open range."""
    if not event.get("shards"):
        return ""
    start, stop = (int(bound) for bound in event["shards"].split("-"))
    return f" (shard {start})" if stop - start == 1 else f" (shards {start}–{stop - 1})"


def _facts(event: Event) -> str:
    match event["step"]:
        case "prepare-data" | "start-generation":
            test = f", {event['test']:,} to test on" if "test" in event else ""
            return f"{event['labelled']:,} labelled, {event['pool']:,} in the pool, {event['heldout']:,} held out{test}"
        case "evaluate":
            more = f", {event['corruption_error']:.1%} wrong when corrupted" if "corruption_error" in event else ""
            return f"top-1 {event['top1']:.1%} of {event['images']:,} images{more}"
        case "label-shards":
            return f"{event['images']:,} images"
        case "commit-labels":
            return f"kept {event['kept']:,} of {event['labelled']:,}, {event['images']:,} with repeats"
        case "gate":
            return f"{'promoted' if event['promoted'] else 'refused'}, change {100 * event['gain']:+.1f} points"
        case "train" if "parameters" in event:
            return f"{event['steps']:,} steps, {event['parameters']:,} parameters"
    return ""


def outlook_tables(steps: Iterable[tuple[str, str, str]], costs: Iterable[Cost]) -> list[Table]:
    """What a run would do, and what that costs on each kind of GPU."""
    does = _table("", "step", "", "how much")
    for column in does.columns:
        column.justify = "left"
    for row in steps:
        does.add_row(*map(escape, row))
    pays = _table("", "GPU", "hours", "price")
    for gpu, hours, cost in costs:
        pays.add_row(gpu, " to ".join(map(_roughly, hours)), " to ".join(map(_roughly, cost)))
    return [does, pays]


def _roughly(number: float) -> str:
    """Two digits, or all before the point."""
    if number < 0.01:
        return "< 0.01"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _short(key: str) -> str:
    return key.rpartition("/")[2][:6]


def verdict_tables(run: str, verdict: Verdict) -> list[Table]:
    """Every guard of the gate, and the held-out images by who is right."""
    outcome = "promoted" if verdict.promoted else "refused"
    guards = _table(f"run {run}, generation {verdict.generation}: {outcome}", "guard", "value", "limit", "", "what it is")
    guards.columns[3].justify = guards.columns[4].justify = "left"
    for guard in verdict.guards:
        mark = "[green]passed[/]" if guard.passed else "[yellow]failed[/]"
        # Points of mCE and mFR; all others are shares.
        form = "+.1f" if guard.name in ("mCE rise", "mFR rise") else "+.2%"
        detail = escape(guard.detail.rstrip(","))
        guards.add_row(guard.name, format(guard.value, form), format(guard.limit, form), mark, detail)
    if verdict.paired is None:
        return [guards]
    pairs = _table(f"{verdict.images:,} held-out images", "", "student right", "student wrong")
    pairs.add_row("teacher right", f"{verdict.paired.both:,}", f"{verdict.paired.only_teacher:,}")
    pairs.add_row("teacher wrong", f"{verdict.paired.only_student:,}", f"{verdict.paired.neither:,}")
    return [guards, pairs]


def verdict_lines(verdict: Verdict) -> list[str]:
    """The numbers behind a verdict, and what would have been needed for another one."""
    asked, lines = needed(verdict), []
    lines.append(
        f"top-1 {verdict.teacher_top1:.2%} → {verdict.student_top1:.2%}: gain {100 * verdict.gain:+.2f} points, "
        f"between {100 * verdict.gain_low:+.2f} and {100 * verdict.gain_high:+.2f} "
        f"(paired bootstrap, each bound one-sided at {verdict.level:.4g})"
    )
    if verdict.mcnemar is not None:
        lines.append(f"McNemar's exact test: p = {verdict.mcnemar:.3g}")
    gain = next(guard for guard in verdict.guards if guard.name == "gain")
    if not gain.passed:
        lines.append(f"on these images a gain of more than {100 * asked.gain:+.2f} points, about, would have been enough")
        if asked.images is None:
            lines.append("no number of images would help: the gain itself is not above the limit")
        else:
            lines.append(
                f"a gain as large as this one would be enough on about {asked.images:,} held-out images, "
                f"{max(0, asked.images - verdict.images):,} more"
            )
    failed = [guard for guard in verdict.guards if not guard.passed and guard.name != "gain"]
    lines += [f"{guard.name}: would have to be {guard.limit:+.3f} instead of {guard.value:+.3f}" for guard in failed]
    lines.append(f"[dim]recorded reason: {escape(verdict.reason)}[/]")
    return lines


def print_whole(table: Table) -> None:
    """Prints a table at its full width, where the terminal is narrower too: what is there to be pasted is never cut."""
    console = Console()
    wanted = console.measure(table, options=console.options.update(width=UNLIMITED)).maximum
    Console(width=max(console.width, wanted)).print(table)


def versions_table(versions: list[Listed]) -> Table:
    """Versions in a label registry, one a row."""
    table = _table("", "version", "committed", "rows", "kept", "")
    for version in versions:
        kept = "" if version.kept is None else f"{version.kept:,}"
        in_use = "in use" if version.current else ""
        table.add_row(escape(version.tag), version.date[:10], f"{version.rows:,}", kept, in_use)
    return table
