"""`ns report …`: pages and Markdown of one run, and of several."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from ns.cli.options import Root, RunArgument, make_default_group, to_shell_path, write_page

Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown, for an issue or a pull request; write no page.")]
OpenIt = Annotated[bool, typer.Option("--open", help="Open it in the browser.")]


app = typer.Typer(
    cls=make_default_group("show"),
    help="""Pages and Markdown of a run, or of several. `ns report RUN` is `ns report show RUN`.

    Example: [cyan]ns report latest --open[/]
    """,
)


@app.command()
def show(
    name: RunArgument = "latest",
    root: Root = "runs",
    markdown: Markdown = False,
    open_it: OpenIt = False,
) -> None:
    """Write a run's report again, and say where it is.

    Example: [cyan]ns report latest --open[/]
    """
    from ns.core.errors import ConfigError
    from ns.reporting import page as reports
    from ns.runs import records as runs
    from ns.storage import open_store

    if markdown and open_it:
        raise ConfigError("--markdown --open: give one of them")
    store = open_store(root)
    run = runs.resolve_run_name(store, name)
    if markdown:
        from ns.reporting.context import gather_context
        from ns.reporting.markdown import render_markdown as text

        typer.echo(text(gather_context(store, run, pictures=0)), nl=False)
        return
    key = reports.write_report(store, run)
    typer.echo(to_shell_path(f"{store.uri}/{key}"))
    if open_it:
        webbrowser.open(f"{store.uri}/{key}")


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN", help="Names of runs, beginnings of them, or 'latest'.")],
    root: Root = "runs",
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the page.")] = Path("comparison.html"),
    markdown: Markdown = False,
    open_it: OpenIt = False,
) -> None:
    """Put runs side by side: numbers of their best models, what was set differently, what they were made from.

    Example: [cyan]ns report compare quickstart-1a2b quickstart-3c4d --open[/]
    """
    from ns.core.errors import ConfigError
    from ns.reporting import comparison
    from ns.runs import records as runs
    from ns.storage import open_store

    if markdown and open_it:
        raise ConfigError("--markdown --open: give one of them")
    store = open_store(root)
    compared = comparison.compare_runs(store, [runs.resolve_run_name(store, name) for name in names])
    if markdown:
        typer.echo(comparison.render_comparison_markdown(compared), nl=False)
        return
    write_page(out, comparison.render_comparison_page(compared))
    typer.echo(f"{out}: {len(names)} runs compared; open it in a browser")
    if open_it:
        webbrowser.open(out.absolute().as_uri())
