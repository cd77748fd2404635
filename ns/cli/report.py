"""`ns report …`: pages and Markdown of one run, and of several."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from ns.cli.options import Root, RunArgument, group_with_default, plain, write_page

Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown, for an issue or a pull request; write no page.")]
OpenIt = Annotated[bool, typer.Option("--open", help="Open it in the browser.")]


app = typer.Typer(
    cls=group_with_default("show"),
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
    run = runs.find(store, name)
    if markdown:
        from ns.reporting.context import gather
        from ns.reporting.markdown import markdown as text

        typer.echo(text(gather(store, run, pictures=0)), nl=False)
        return
    key = reports.write(store, run)
    typer.echo(plain(f"{store.uri}/{key}"))
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
    found = comparison.compare(store, [runs.find(store, name) for name in names])
    if markdown:
        typer.echo(comparison.markdown(found), nl=False)
        return
    write_page(out, comparison.page(found))
    typer.echo(f"{out}: {len(names)} runs compared; open it in a browser")
    if open_it:
        webbrowser.open(out.absolute().as_uri())
