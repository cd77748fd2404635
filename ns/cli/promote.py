"""`ns promote …`: the file that names the model in use."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ns.cli.options import AsJson, Root, RunArgument, make_default_group, write_page
from ns.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ns.promotion.promote import PointerMove, PromotionCandidate

app = typer.Typer(
    cls=make_default_group("move"),
    help="""Which model is in use: a small file in a git repository. `ns promote RUN` is `ns promote move RUN`.

    Example: [cyan]ns promote latest --branch promote/production --body body.md[/]
    """,
)


@app.command()
def move(
    name: RunArgument = "latest",
    root: Root = "runs",
    to: Annotated[Path, typer.Option(metavar="FILE", help="The pointer: the YAML file that names the model in use.")] = Path(
        "models/production.yaml"
    ),
    branch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Commit it on this branch, made anew from HEAD; no file is touched, nothing is pushed."
        ),
    ] = None,
    body: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the evidence here, as Markdown, for a pull request.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check, and say what would change.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a run's best model the one in use: reads it from end to end, and moves the pointer. Only a model that the gate has accepted.

    Example: [cyan]ns promote latest --root s3://bucket/noisy-student --branch promote/production --body body.md[/]
    """
    from ns.promotion import promote
    from ns.runs import records as runs
    from ns.storage import open_store

    if to.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--to {to}: must end in .yaml")
    store = open_store(root)
    candidate = promote.read_candidate(store, runs.resolve_run_name(store, name))
    moved = (
        promote.commit_pointer(candidate, to, branch, dry_run=dry_run)
        if branch
        else promote.move_pointer(candidate, to, dry_run=dry_run)
    )
    if body is not None:
        write_page(body, promote.render_evidence(store, candidate, moved.before, to.as_posix()))
    if as_json:
        document = {
            "pointer": candidate.pointer.model_dump(mode="json"),
            "before": moved.before.model_dump(mode="json") if moved.before else None,
            "changed": moved.changed,
            "branch": branch if moved.commit else None,
            "commit": moved.commit,
            "title": promote.commit_subject(candidate.pointer),
        }
        typer.echo(json.dumps(document, indent=1))
        return
    typer.echo(_describe_move(candidate, moved, to, branch, dry_run=dry_run))


def _describe_move(
    candidate: "PromotionCandidate", moved: "PointerMove", to: Path, branch: str | None, *, dry_run: bool
) -> str:
    pointer, before = candidate.pointer, moved.before
    new = f"{pointer.run}, generation {pointer.generation}, all {candidate.weights_bytes:,} bytes good"
    if not moved.changed:
        return f"{to}: names this model already: {new}"
    old = f"{before.run}, generation {before.generation}" if before else "none"
    verb = "would move" if dry_run else "moved"
    message = f"{to}: {verb} to {new} (before: {old})"
    return f"{message}\nbranch {branch}: {moved.commit}; push it, and open a pull request" if moved.commit else message


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Pointers, as `ns promote` writes them.")],
) -> None:
    """Check pointers: the model that each names is there, is that model, and is whole.

    Example: [cyan]ns promote check models/production.yaml[/]
    """
    from ns.promotion import promote

    for file in files:
        pointer = promote.read_pointer(file)
        if pointer is None:
            raise DataError(f"{file}: does not exist; `ns promote RUN --to {file}` makes it")
        size = promote.verify_model(pointer, str(file))
        typer.echo(f"{file}: good: {pointer.run}, generation {pointer.generation}, {size:,} bytes")
