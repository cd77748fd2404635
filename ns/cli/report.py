"""`ns report …`: pages and Markdown about one run or several."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from ns.cli.options import Markdown, Root, RunArgument, make_default_group
from ns.cli.output import print_line, print_text, to_shell_path, write_page
from ns.core.errors import ConfigError
from ns.storage import open_store

OpenIt = Annotated[bool, typer.Option("--open", help="Open the page in the browser.")]

app = typer.Typer(
    cls=make_default_group("show"),
    help="""Pages and Markdown about one run or several. `ns report RUN` is short for `ns report show RUN`.

    Example: [cyan]ns report latest --open[/]
    """,
)


@app.command()
def show(
    name: RunArgument = "latest",
    root: Root = "runs",
    markdown: Markdown = False,
    open_it: OpenIt = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the report on this machine, as of each load.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0 takes a free one.")] = 8000,
) -> None:
    """Write a run's report again, and print its path; or serve it while the run goes on.

    Example: [cyan]ns report latest --open[/], [cyan]ns report latest --serve[/]
    """
    from ns.reporting.page import write_report
    from ns.runs.lookup import resolve_run_name

    _check_one_form(markdown, open_it or serve)
    store = open_store(root)
    run = resolve_run_name(store, name)
    if serve:
        from ns.reporting.server import ReportServer

        with ReportServer(store, run, port) as server:
            print_line(f"{server.url}: the report of {run}; Ctrl-C ends it")
            if open_it:
                webbrowser.open(server.url)
            server.serve_forever()
    if markdown:
        from ns.reporting.context import gather_context
        from ns.reporting.markdown import render_markdown

        print_text(render_markdown(gather_context(store, run, pictures=0)))
        return
    key = write_report(store, run)
    print_line(to_shell_path(f"{store.uri}/{key}"))
    if open_it:
        webbrowser.open(f"{store.uri}/{key}")


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN", help="Names of runs, their beginnings, or 'latest'.")],
    root: Root = "runs",
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the page.")] = Path("comparison.html"),
    markdown: Markdown = False,
    open_it: OpenIt = False,
) -> None:
    """Compare runs: the metrics of their best models, the settings that differ, and the lineage.

    Example: [cyan]ns report compare quickstart-1a2b quickstart-3c4d --open[/]
    """
    from ns.reporting.comparison import compare_runs, render_comparison_markdown, render_comparison_page
    from ns.runs.lookup import resolve_run_name

    _check_one_form(markdown, open_it)
    store = open_store(root)
    comparison = compare_runs(store, [resolve_run_name(store, name) for name in names])
    if markdown:
        print_text(render_comparison_markdown(comparison))
        return
    write_page(out, render_comparison_page(comparison))
    print_line(f"{out}: {len(names)} runs compared; open it in a browser")
    if open_it:
        webbrowser.open(out.absolute().as_uri())


def _check_one_form(markdown: bool, open_it: bool) -> None:
    if markdown and open_it:
        raise ConfigError("--markdown excludes --open and --serve; give one of them")
