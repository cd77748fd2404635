"""`ns init`: a first experiment from a look at a folder."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ns.cli.output import print_line
from ns.core.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from ns.data.prepared import DataPart


def write_first_experiment(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Holds the folders of your images.")],
    hours: Annotated[float, typer.Option(min=0.05, max=10_000, help="Time that the run may take on this machine.")] = 8,
    labeled: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Labeled images: one subfolder per class, or a table; default: labeled or train."),
    ] = None,
    pool: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Images without labels; default: pool or unlabeled.")
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images that decide; default: heldout or val, else a quarter of the labeled ones."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The experiment; default: NAME.yaml, by the folder's name."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Write a first experiment from a look at your images: network, resolution, batch, and epochs that fit the time. Takes a minute.

    Example: [cyan]ns init images/ --hours 8[/]
    """
    from ns.core.log import configure_logging, format_duration
    from ns.planning import proposal as proposals
    from ns.storage import LocalStore

    given: dict[DataPart, Path | None] = {"labeled": labeled, "pool": pool, "heldout": heldout}
    parts = proposals.find_parts(folder, {part: path for part, path in given.items() if path is not None})
    stem = output.stem if output else folder.resolve().name
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-") or "images"
    path = output or Path(f"{name}.yaml")
    tables = [path.parent / f"{name}-{part}.csv" for part in ("labeled", "heldout") if "heldout" not in parts]
    for file in (path, *tables):
        if file.exists() and not force:
            raise ConfigError(f"{file}: is there already; choose another name with --output, or replace it with --force")
    configure_logging()
    proposal = proposals.propose_experiment(
        parts, name=name, hours=hours, output_dir=path.parent.resolve(), measure_seconds=proposals.MEASURE_SECONDS
    )
    # The experiment last: it names the tables.
    files = {path.parent / table: text for table, text in proposal.tables.items()}
    files[path] = proposals.format_experiment(proposal, hours)
    for file, text in files.items():
        try:
            LocalStore(file.parent).put(file.name, text.encode())
        except StoreError as error:
            raise StoreError(f"{error}; choose another place with --output") from error
        print_line(f"written: {file}")
    plan, role = proposal.plan, proposal.experiment.teacher
    print_line(
        f"{plan.labeled:,} labeled images of {plan.classes} classes, {plan.pool:,} in the pool, {plan.heldout:,} held out; "
        f"{role.model.arch} at {role.model.resolution} px, {role.train.epochs:g} epochs"
    )
    print_line(f"about {format_duration(3600 * proposal.hours)} on {plan.machine}, if every generation is run")
    for remark in proposal.remarks:
        print_line(f"note: {remark}")
    print_line(f"next: ns run {path}")
