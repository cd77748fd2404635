"""`ns gate …`: why a student became the teacher, or did not."""

import json
from typing import Annotated

import typer

from ns.cli.options import AsJson, Root

app = typer.Typer(help="The gate: why a student became the teacher, or did not.", no_args_is_help=True)


@app.callback()
def _keep_group() -> None:
    # Without this, typer would make the only command the group itself.
    pass


@app.command()
def explain(
    name: Annotated[
        str, typer.Argument(metavar="RUN|RUN/gen-N", help="A run, whose last verdict it is, or a generation: latest/gen-1.")
    ] = "latest",
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Explain a verdict: every guard with its number and limit, the images in pairs, and what would have been needed.

    Example: [cyan]ns gate explain latest/gen-1[/]
    """
    from rich.console import Console

    from ns.cli.progress import verdict_lines, verdict_tables
    from ns.evaluation.gate import required_gain
    from ns.runs import records as runs
    from ns.storage import open_store

    run, verdict = runs.resolve_verdict(open_store(root), name)
    if as_json:
        typer.echo(
            json.dumps(
                {"run": run, **verdict.model_dump(mode="json"), "needed": required_gain(verdict).model_dump(mode="json")},
                indent=1,
            )
        )
        return
    console = Console()
    for table in verdict_tables(run, verdict):
        console.print(table)
    for line in verdict_lines(verdict):
        console.print(line, highlight=False)
