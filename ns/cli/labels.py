"""`ns labels …`: label sets as things to look at, compare, keep and take back."""

from typing import Annotated

import typer

from ns.cli.options import AsJson, Root

app = typer.Typer(help="Label sets: look at, check, compare, audit, keep versions of.", no_args_is_help=True)

Labels = Annotated[
    str, typer.Argument(metavar="LABELS", help="A run's generation (latest/gen-1), or the folder or URI of a label set.")
]
Pool = Annotated[str | None, typer.Option(help="The labelled dataset; that of the run if not given.")]


@app.command()
def show(name: Labels, root: Root = "runs", as_json: AsJson = False) -> None:
    """What a label set holds, by class: images, mean confidence, and what the run's selection kept.

    Example: [cyan]ns labels show latest/gen-1[/]
    """
    from rich.console import Console

    from ns import runs
    from ns.store import open_store
    from ns.terminal import labels_table

    found = runs.labels(open_store(root), name)
    if as_json:
        typer.echo(found.label_set.model_dump_json(indent=1))
        return
    Console().print(labels_table(found))


@app.command()
def verify(name: Labels, root: Root = "runs", pool: Pool = None) -> None:
    """Read a label set from end to end: checksums, rows, keys against the images', probabilities, histograms.

    Example: [cyan]ns labels verify latest/gen-1[/]
    """
    from ns import runs
    from ns.label.labelset import verify as check
    from ns.store import open_store

    store = open_store(root)
    found = runs.labels(store, name)
    images = found.pool(store, pool) if pool or found.prepared else None
    checked = check(found.folder, found.label_set, images)
    typer.echo(
        f"{found.folder.uri}: good: {checked:,} rows" + ("" if images else "; keys not compared with images: give --pool")
    )
