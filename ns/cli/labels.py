"""`ns labels …`: label sets as things to look at, compare, keep and take back."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ns.cli.options import AsJson, Root
from ns.errors import ConfigError

if TYPE_CHECKING:
    from ns.label.registry import Registry

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


RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry", envvar="NS_LABEL_REGISTRY", metavar="URL", help="The label registry: URL or path of its git repository."
    ),
]
RemoteOption = Annotated[
    str | None,
    typer.Option(
        "--remote",
        envvar="NS_LABEL_REMOTE",
        metavar="PLACE",
        help="Folder or s3://bucket/prefix for the data; needed while the registry is empty.",
    ),
]
TagArgument = Annotated[str, typer.Argument(metavar="TAG", help="A version: labels/PROJECT/RUN/gen-N.")]
VersionArgument = Annotated[
    str, typer.Argument(metavar="TAG", help="A version: labels/PROJECT/RUN/gen-N, or current/PROJECT for the one in use.")
]
Why = Annotated[str, typer.Option("--why", help="The reason, for the history.")]


def _registry(place: str | None, remote: str | None = None) -> "Registry":
    from ns.label.registry import Registry

    if not place:
        raise ConfigError("no label registry: give --registry, the URL or path of its git repository, or set NS_LABEL_REGISTRY")
    return Registry(place, remote)


@app.command("list")
def list_versions(registry: RegistryOption = None, as_json: AsJson = False) -> None:
    """The versions in a label registry, by project, the latest last.

    Example: [cyan]ns labels list --registry registry.git[/]
    """
    from rich.console import Console

    from ns.terminal import versions_table

    found = _registry(registry).versions()
    if as_json:
        typer.echo(json.dumps([version.model_dump() for version in found], indent=1))
    else:
        Console().print(versions_table(found))


@app.command()
def version(tag: VersionArgument, registry: RegistryOption = None, as_json: AsJson = False) -> None:
    """What a version was made from, and where each file of it lies in the remote.

    Example: [cyan]ns labels version labels/quickstart/RUN/gen-1 --registry registry.git[/]
    """
    opened = _registry(registry)
    found = opened.show(tag)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    for name, value in found.model_dump(exclude={"format", "files", "directory"}).items():
        typer.echo(f"{name:12}{'' if value is None else value}")
    place = opened.where()
    for file in found.files:
        typer.echo(f"{file.name}\t{file.bytes}\t{file.sha256}\t{place}/{file.key}")


@app.command()
def commit(
    name: Annotated[str, typer.Argument(metavar="LABELS", help="A run's generation: latest/gen-1.")],
    registry: RegistryOption = None,
    remote: RemoteOption = None,
    project: Annotated[str | None, typer.Option(help="First part of the tag; the experiment's name if not given.")] = None,
    as_run: Annotated[str | None, typer.Option("--run", help="Second part of the tag; the run's name if not given.")] = None,
    root: Root = "runs",
) -> None:
    """Keep a run's label set and selection as a version, labels/PROJECT/RUN/gen-N. The same again changes nothing.

    Example: [cyan]ns labels commit latest/gen-1 --registry registry.git --remote s3://bucket/labels[/]
    """
    from ns import config, runs
    from ns.evaluate.gate import Verdict
    from ns.label.registry import Tag
    from ns.store import open_store

    store = open_store(root)
    run, _, generation = name.rpartition("/gen-")
    if not run or not generation.isdigit():
        raise ConfigError(f"LABELS {name}: must be a run's generation (latest/gen-1): project, run and number name the version")
    found = runs.labels(store, name)
    run = runs.find(store, run)
    if project is None:
        project = config.load(f"{store.at(run).uri}/{runs.CONFIG}").name
    gates = [n.outputs["verdict"] for n in runs.notes(store, run) if (n.generation, n.step) == (int(generation), "gate")]
    tag = Tag.of(project, as_run or run, int(generation))
    verdict = Verdict.read(store, gates[0]) if gates else None
    is_new = _registry(registry, remote).commit(tag, found.folder, found.label_set, found.selection, verdict)
    typer.echo(f"{tag}: {'committed' if is_new else 'is there already'}")


@app.command()
def get(
    tag: VersionArgument,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new or empty folder.")],
    registry: RegistryOption = None,
    no_dvc: Annotated[
        bool, typer.Option("--no-dvc", help="Fetch file by file, without DVC; continues where it stopped.")
    ] = False,
) -> None:
    """Bring a version into a folder and check every file. What is there and good stays.

    Example: [cyan]ns labels get current/quickstart labels --registry registry.git[/]
    """
    found = _registry(registry).get(tag, destination, with_dvc=not no_dvc)
    typer.echo(f"{destination}: {found.tag}: {found.rows:,} rows in {len(found.files)} files, all good")


@app.command()
def promote(tag: TagArgument, registry: RegistryOption = None, why: Why = "") -> None:
    """Make a version the one in use of its project, current/PROJECT.

    Example: [cyan]ns labels promote labels/quickstart/RUN/gen-2 --why 'checked by hand'[/]
    """
    _use(tag, registry, why, back=False)


@app.command()
def rollback(tag: TagArgument, registry: RegistryOption = None, why: Why = "") -> None:
    """Go back to an earlier version: current/PROJECT names it again. No version is deleted.

    Example: [cyan]ns labels rollback labels/quickstart/RUN/gen-1 --why 'gen-2 confuses 4 and 9'[/]
    """
    _use(tag, registry, why, back=True)


def _use(tag: str, registry: str | None, why: str, *, back: bool) -> None:
    from ns.label.registry import Tag

    parsed = Tag.parse(tag)
    before = _registry(registry).use(parsed, why, back=back)
    typer.echo(f"current/{parsed.project}: {parsed}" + (" (no change)" if before == tag else f", before: {before or 'none'}"))


@app.command()
def gc(
    registry: RegistryOption = None,
    drop: Annotated[list[str] | None, typer.Option(metavar="TAG", help="Delete this version too. Repeatable.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, only say what would go.")] = False,
) -> None:
    """Delete data that no version needs. Run it while nobody commits, on a remote that holds nothing else.

    Example: [cyan]ns labels gc --drop labels/quickstart/RUN/gen-1[/]
    """
    from ns.label.registry import Tag

    garbage = _registry(registry).gc([Tag.parse(tag) for tag in drop or ()], dry=not yes)
    for name in (*(str(tag) for tag in garbage.dropped), *garbage.keys):
        typer.echo(name)
    done = "deleted" if yes else "would be deleted; --yes does it"
    typer.echo(f"{len(garbage.dropped)} versions, {len(garbage.keys)} files, {garbage.bytes:,} bytes {done}")
