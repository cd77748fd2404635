"""`ns gate …`: explains why a student became the teacher, or did not."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ns.cli.options import AsJson, Root
from ns.cli.output import escape_text, make_console, make_table, print_json
from ns.storage import open_store

if TYPE_CHECKING:
    from ns.evaluation.gate import Verdict

app = typer.Typer(help="Explain why a student became the teacher, or did not.", no_args_is_help=True)


@app.callback()
def _keep_group() -> None:
    # Without a callback, typer would merge the only command into the group.
    pass


@app.command()
def explain(
    name: Annotated[
        str, typer.Argument(metavar="RUN|RUN/gen-N", help="A run, for its last verdict, or a generation.")
    ] = "latest",
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Explain a verdict: each condition with its value, the images that each model gets right, and what would have been enough.

    Example: [cyan]ns gate explain latest/gen-1[/]
    """
    from ns.evaluation.gate import required_gain
    from ns.runs.lookup import resolve_verdict

    run, verdict = resolve_verdict(open_store(root), name)
    if as_json:
        print_json({"run": run, **verdict.model_dump(mode="json"), "required_gain": required_gain(verdict)})
        return
    console = make_console()
    console.print(*make_verdict_tables(run, verdict))
    console.print(*format_verdict(verdict), sep="\n")


def make_verdict_tables(run: str, verdict: "Verdict") -> list[Table]:
    """The conditions of the gate, and the held-out images by which model is right."""
    outcome = "promoted" if verdict.promoted else "refused"
    title = f"run {run}, generation {verdict.generation}: {outcome}"
    conditions = make_table(title, "condition", "value", "required", "", "what it is", text_columns=(0, 3, 4))
    for condition in verdict.conditions:
        mark = Text("passed", "green") if condition.passed else Text("failed", "yellow")
        cells = (condition.name, condition.format_value(), condition.format_requirement())
        conditions.add_row(*cells, mark, condition.detail.rstrip(","))
    copies = f", {verdict.copies:,} copies left out" if verdict.copies else ""
    pairs = make_table(f"{verdict.images:,} held-out images{copies}", "", "student right", "student wrong")
    pairs.add_row("teacher right", f"{verdict.paired.both:,}", f"{verdict.paired.only_teacher:,}")
    pairs.add_row("teacher wrong", f"{verdict.paired.only_student:,}", f"{verdict.paired.neither:,}")
    return [conditions, pairs]


def format_verdict(verdict: "Verdict") -> list[str]:
    """The numbers behind a verdict, and what would have been enough for a promotion."""
    from ns.evaluation.gate import required_gain

    requirement = required_gain(verdict)
    lines = [
        f"top-1 {verdict.teacher_top1:.2%} → {verdict.student_top1:.2%}: gain {100 * verdict.gain:+.2f} points, "
        f"between {100 * verdict.gain_low:+.2f} and {100 * verdict.gain_high:+.2f} "
        f"(paired bootstrap, each bound one-sided at {verdict.level:.6g})",
        f"McNemar's exact test: p = {verdict.mcnemar:.3g}",
    ]
    tries = "the first try" if verdict.try_number == 1 else f"try {verdict.try_number:,}"
    lines.append(
        f"{tries} on these held-out images; the probability that any so far accepted a student without the required gain is at most "
        f"{verdict.family_error:.3g}"
    )
    lines += [f"[yellow]warning:[/] {escape_text(warning)}" for warning in verdict.warnings]
    gain = next(condition for condition in verdict.conditions if condition.name == "gain")
    if not gain.passed:
        lines.append(f"on these images a gain of more than about {100 * requirement.gain:+.2f} points would have been enough")
        if requirement.images is None:
            lines.append("no number of images would help: the gain itself is not above the required one")
        else:
            lines.append(
                f"a gain as large as this one would be enough on about {requirement.images:,} held-out images, "
                f"{max(0, requirement.images - verdict.images):,} more"
            )
    failed = [condition for condition in verdict.conditions if not condition.passed and condition.name != "gain"]
    lines += [f"{condition.name}: {condition.format_value()}, must be {condition.format_requirement()}" for condition in failed]
    lines.append(f"[dim]recorded reason: {escape_text(verdict.reason)}[/]")
    return lines
