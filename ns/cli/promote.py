"""`ns promote …`: the pointer, a file in git that names the model in use."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ns.cli.options import AsJson, Root, RunArgument, make_default_group
from ns.cli.output import print_json, print_line, write_page
from ns.core.errors import ConfigError, DataError
from ns.storage import open_store

if TYPE_CHECKING:
    from ns.promotion.mlflow_registry import RegisteredVersion
    from ns.promotion.promote import ModelPointer, PointerMove

app = typer.Typer(
    cls=make_default_group("move"),
    help="""Choose the model in use: a small file in a git repository names it. `ns promote RUN` is `ns promote move RUN`.

    Example: [cyan]ns promote latest --branch promote/production --body body.md[/]
    """,
)


@app.command("move")
def promote_run(
    name: RunArgument = "latest",
    root: Root = "runs",
    to: Annotated[Path, typer.Option(metavar="FILE", help="The pointer: a YAML file.")] = Path("models/production.yaml"),
    branch: Annotated[
        str | None, typer.Option(metavar="NAME", help="Commit it on this branch, reset to HEAD; touch no file, push nothing.")
    ] = None,
    body: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the evidence as Markdown for a pull request.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check, and print what would change.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a run's best model the one in use. The gate must have accepted it, and all its bytes are read and checked.

    With MLFLOW_TRACKING_URI it is registered in MLflow too, as ONNX, with the pointer's name as alias.

    Example: [cyan]ns promote latest --root s3://bucket/noisy-student --branch promote/production --body body.md[/]
    """
    from ns.promotion import promote
    from ns.promotion.mlflow_registry import register_model
    from ns.runs.lookup import resolve_run_name

    if to.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--to {to}: must end in .yaml")
    store = open_store(root)
    candidate = promote.read_candidate(store, resolve_run_name(store, name))
    pointer, title = candidate.pointer, promote.format_title(candidate.pointer)
    if branch:
        move = promote.commit_pointer(pointer, to, branch, title=title, accepted_at=candidate.accepted_at, dry_run=dry_run)
    else:
        move = promote.write_pointer(pointer, to, dry_run=dry_run)
    registered = None if dry_run else register_model(pointer, move.before, to.stem)
    if body is not None:
        write_page(body, promote.render_evidence(store, candidate, move.before, to.as_posix()))
    if as_json:
        committed_on = branch if move.commit else None
        result = {"pointer": candidate.pointer, **move._asdict(), "branch": committed_on, "title": title}
        print_json(result | ({"mlflow_version": registered.version} if registered else {}))
    else:
        for line in _describe_move(pointer, candidate.weights_bytes, move, to, branch, dry_run=dry_run):
            print_line(line)
        _print_registered(registered, to)


def _print_registered(registered: "RegisteredVersion | None", to: Path) -> None:
    if registered:
        print_line(f"MLflow: {registered.name}, version {registered.version}, alias {to.stem}")


def _describe_move(
    pointer: "ModelPointer", weights_bytes: int, move: "PointerMove", to: Path, branch: str | None, *, dry_run: bool
) -> list[str]:
    new = f"{pointer.run}, generation {pointer.generation}, all {weights_bytes:,} bytes good"
    if not move.changed:
        return [f"{to}: already names this model: {new}"]
    old = f"{move.before.run}, generation {move.before.generation}" if move.before else "none"
    lines = [f"{to}: {'would move' if dry_run else 'moved'} to {new} (before: {old})"]
    return [*lines, f"branch {branch}: {move.commit}; push it, and open a pull request"] if move.commit else lines


@app.command("back")
def restore_previous(
    to: Annotated[Path, typer.Option(metavar="FILE", help="The pointer: a YAML file in git.")] = Path("models/production.yaml"),
    branch: Annotated[
        str | None, typer.Option(metavar="NAME", help="Commit it on this branch, reset to HEAD; touch no file, push nothing.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check, and print what would change.")] = False,
) -> None:
    """Go back to the model before, from git's history. All its bytes are read and checked first.

    With MLFLOW_TRACKING_URI the alias in MLflow moves back too.

    Example: [cyan]ns promote back --to models/production.yaml[/]
    """
    from ns.promotion import promote
    from ns.promotion.mlflow_registry import register_model

    pointer = promote.read_previous_pointer(to)
    weights_bytes = promote.verify_model(pointer, f"{to}, before")
    if branch:
        title = f"Go back to {pointer.run}, generation {pointer.generation}"
        move = promote.commit_pointer(pointer, to, branch, title=title, dry_run=dry_run)
    else:
        move = promote.write_pointer(pointer, to, dry_run=dry_run)
    registered = None if dry_run else register_model(pointer, move.before, to.stem)
    for line in _describe_move(pointer, weights_bytes, move, to, branch, dry_run=dry_run):
        print_line(line)
    _print_registered(registered, to)


@app.command("check")
def check_pointers(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Pointers, as `ns promote` writes them.")],
) -> None:
    """Check that the model of each pointer exists, is the right one, and is undamaged.

    Example: [cyan]ns promote check models/production.yaml[/]
    """
    from ns.promotion.promote import read_pointer, verify_model

    for file in files:
        pointer = read_pointer(file)
        if pointer is None:
            raise DataError(f"{file}: does not exist; `ns promote RUN --to {file}` makes it")
        size = verify_model(pointer, str(file))
        print_line(f"{file}: good: {pointer.run}, generation {pointer.generation}, {size:,} bytes")
