"""`ns runs …`: which runs there are, and what came of them."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ns.cli.options import AsJson, Root, RunArgument
from ns.cli.output import escape_text, make_console, make_table, print_json, print_line, shorten_key, to_shell_path
from ns.storage import Store, open_store

if TYPE_CHECKING:
    from ns.runs.summary import RunSummary

app = typer.Typer(help="List runs, and show what came of one.", no_args_is_help=True)


@app.command("list")
def list_all(root: Root = "runs", as_json: AsJson = False) -> None:
    """List the runs of a root, the latest last.

    Example: [cyan]ns runs list[/]
    """
    from ns.runs.lookup import list_runs
    from ns.runs.summary import summarize_run_or_record

    store = open_store(root)
    summaries = [summarize_run_or_record(store, record.run) for record in list_runs(store)]
    if as_json:
        print_json([summary.model_dump(mode="json", exclude={"stages"}) for summary in summaries])
    elif not summaries:
        print_line(f"no runs in {root}; start one with `ns run quickstart`")
    else:
        table = make_table("", "run", "state", "started", "generations", "best top-1", text_columns=range(3), wrap=False)
        for summary in summaries:
            best = "" if summary.best_top1 is None else f"{summary.best_top1:.1%}"
            started = summary.started_at[:16].replace("T", " ")
            table.add_row(summary.run, summary.state, started, str(len(summary.generations)), best)
        make_console().print(table)


@app.command("show")
def show_run(name: RunArgument = "latest", root: Root = "runs", as_json: AsJson = False) -> None:
    """Show a run: its generations, verdicts, report and best model.

    Example: [cyan]ns runs show latest --json[/]
    """
    from ns.runs.lookup import resolve_run_name
    from ns.runs.summary import summarize_run

    store = open_store(root)
    summary = summarize_run(store, resolve_run_name(store, name))
    if as_json:
        print_json(summary)
        return
    console = make_console()
    print_line(f"state: {summary.state}" + (f" ({summary.error})" if summary.error else ""))
    print_run(summary, store, console)
    for row in summary.generations:
        print_line(f"generation {row.generation}: {row.verdict}: {row.reason}")


@app.command("explain")
def explain_work(
    stage: Annotated[str, typer.Argument(help="train, evaluate, select or gate.")],
    name: RunArgument = "latest",
    generation: Annotated[int, typer.Option(min=0, help="Generation; 0 is the first teacher's.")] = 0,
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Say why a stage was redone: which inputs differ from those of the most similar earlier work.

    Example: [cyan]ns runs explain train latest --generation 1[/]
    """
    from ns.runs import explain
    from ns.runs.lookup import resolve_run_name

    store = open_store(root)
    explanation = explain.explain_stage(store, resolve_run_name(store, name), generation, stage)
    if as_json:
        print_json({change.field: {"before": change.before, "now": change.now} for change in explanation.changes})
    elif explanation.nearest is None:
        print_line(f"{explanation.entry.finished_at}: it was the first work of its kind in {root}")
    else:
        table = make_table(
            f"{explanation.nearest.finished_at} → {explanation.entry.finished_at}",
            "input",
            "before",
            "now",
            text_columns=range(3),
        )
        for change in explanation.changes:
            table.add_row(change.field, *(_shorten_value(value) for value in (change.before, change.now)))
        make_console().print(table)


def _shorten_value(value: object) -> str:
    """A value as text, digests by their first letters."""
    text = "" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:16]}…"


def print_run(summary: "RunSummary", store: Store, console: Console) -> None:
    """Prints the generations of a run, what was measured of its models, and where its report and best model are."""
    from ns.data.dataset import format_class_names

    console.print()
    console.print(make_generations_table(summary))
    for model in summary.measurements:
        if model.never_predicted:
            names = format_class_names(model.never_predicted)
            text = f"generation {model.generation} never predicts {len(model.never_predicted):,} classes: {names}"
            console.print(escape_text(text), soft_wrap=True)
    if measurements := make_measurements_table(summary):
        console.print(measurements)
    for title, key in (("report", summary.report), ("best model", summary.best_model)):
        if key:
            uri = key if "://" in key else f"{store.uri}/{key}"
            console.print(f"{title + ':':<11} {escape_text(to_shell_path(uri))}", soft_wrap=True)


def make_generations_table(summary: "RunSummary") -> Table:
    """The generations of a run, one per row."""
    from ns.core.log import format_duration

    headers = ("gen", "model", "labeled", "kept", "top-1", "change", "verdict", "time")
    table = make_table(f"run {summary.run}", *headers, text_columns=(1, 6), wrap=False)
    model_keys = {note.generation: note.outputs.get("model", "") for note in summary.stages if note.stage == "train"}
    if summary.teacher_top1 is not None:
        first = min(model_keys, default=0)
        seconds = sum(note.seconds for note in summary.stages if note.generation <= first)
        model = shorten_key(model_keys.get(first, "").rpartition("/")[0])
        table.add_row(str(first), model, "", "", f"{summary.teacher_top1:.1%}", "", "", format_duration(seconds))
    for row in summary.generations:
        table.add_row(
            str(row.generation),
            shorten_key(row.model),
            f"{row.labeled:,}",
            f"{row.kept:,}",
            f"{row.student_top1:.1%}",
            f"{100 * row.gain:+.1f} [{100 * row.gain_low:+.1f}, {100 * row.gain_high:+.1f}]",
            Text(row.verdict, "green" if row.verdict == "promoted" else "yellow"),
            format_duration(row.seconds),
        )
    return table


def make_measurements_table(summary: "RunSummary") -> Table | None:
    """What was measured of each model besides held-out accuracy, one model per column; None if nothing was."""
    measured = [
        model for model in summary.measurements if model.test_top1 is not None or model.sets or model.scores or model.attacks
    ]
    if not measured:
        return None
    references = {model.scores.mce_relative_to or model.scores.mfr_relative_to for model in measured if model.scores} - {None}
    reference = "AlexNet" if references == {"AlexNet"} else "the first teacher"
    title = f"mCE, mFR: % of {reference}'s" if references else ""
    table = make_table(title, "", *(f"gen {model.generation}" for model in measured))

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
