"""`ns labels …`: label sets as things to look at, compare, keep and take back."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ns.cli.options import AsJson, Root, group_with_default, write_page
from ns.core.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from ns.labeling.registry import Registry

app = typer.Typer(help="Label sets: look at, check, compare, audit, keep versions of.", no_args_is_help=True)
audit_app = typer.Typer(
    cls=group_with_default("page"),
    help="""Look at a sample of the labels, and say how many are right. `ns labels audit LABELS` is `ns labels audit page LABELS`.

    Example: [cyan]ns labels audit latest/gen-1 --selected-only[/]
    """,
)
app.add_typer(audit_app, name="audit")

Labels = Annotated[
    str, typer.Argument(metavar="LABELS", help="A run's generation (latest/gen-1), or the folder or URI of a label set.")
]
Pool = Annotated[str | None, typer.Option(metavar="DATASET", help="Dataset that was labelled; the run's pool if not given.")]

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


@app.command()
def show(name: Labels, root: Root = "runs", registry: RegistryOption = None, as_json: AsJson = False) -> None:
    """What a label set holds, by class: images, mean confidence, and what the run's selection kept; and its audits.

    With the tag of a version in the registry: what `version` says.

    Example: [cyan]ns labels show latest/gen-1[/]
    """
    if registry and name.startswith("labels/") and not Path(name).exists():
        version(name, registry, as_json)
        return
    from rich.console import Console

    from ns.cli.progress import audits_table, labels_table
    from ns.labeling.audit import audits
    from ns.runs import records as runs
    from ns.storage import open_store

    found = runs.labels(open_store(root), name)
    if as_json:
        typer.echo(found.label_set.model_dump_json(indent=1))
        return
    Console().print(labels_table(found))
    if audited := audits(found.folder, found.label_set):
        Console().print(audits_table(audited))


@app.command()
def verify(name: Labels, root: Root = "runs", pool: Pool = None) -> None:
    """Read a label set from end to end: checksums, rows, keys against the images', probabilities, histograms.

    Example: [cyan]ns labels verify latest/gen-1[/]
    """
    from ns.labeling.label_set import verify as check
    from ns.runs import records as runs
    from ns.storage import open_store

    store = open_store(root)
    found = runs.labels(store, name)
    images = found.pool(store, pool) if pool or found.prepared else None
    checked = check(found.folder, found.label_set, images)
    typer.echo(
        f"{found.folder.uri}: good: {checked:,} rows" + ("" if images else "; keys not compared with images: give --pool")
    )


@app.command()
def select(
    name: Labels,
    root: Root = "runs",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A=B", help="Override a field of the selection. Repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be kept, dropped and repeated, by class.")
    ] = False,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the selection here, as JSON.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides ties between equal confidences; that of the run, or 0, if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Select from a label set, beginning with the policy of its run.

    Example: [cyan]ns labels select latest/gen-1 --set min_confidence=0.6 --set per_class=5000 --dry-run[/]
    """
    from rich.console import Console

    from ns.cli.progress import selection_table
    from ns.config.schema import SelectionConfig, changed
    from ns.labeling.selection import select_from
    from ns.runs import records as runs
    from ns.storage import open_store, split_uri

    if not dry_run and out is None:
        raise ConfigError("give --out FILE to keep the selection, or --dry-run to look at it")
    store = open_store(root)
    found = runs.labels(store, name)
    policy = changed(found.selection.policy if found.selection else SelectionConfig(), overrides or [])
    if seed is None:
        seed = found.selection.seed if found.selection else 0
    calibration = runs.calibration(store, found, policy) if policy.precision is not None else None
    selection = select_from(found.folder, found.label_set, policy, seed=seed, labels=found.folder.uri, calibration=calibration)
    if out is not None:
        folder, file = split_uri(out)
        selection.write(open_store(folder), file)
    if as_json:
        typer.echo(selection.model_dump_json(indent=1))
    else:
        Console().print(selection_table(found.label_set, selection))


@app.command()
def trace(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key of an image in its dataset.")],
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """What every teacher said of one image, the thresholds then in force, and the label sets, runs and models that it fed.

    Example: [cyan]ns labels trace photos/0001[/]
    """
    from rich.console import Console

    from ns.cli.progress import trace_table
    from ns.runs import lineage
    from ns.storage import open_store

    found = lineage.trace(open_store(root), key)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    console = Console()
    for part, place in found.places.items():
        dataset, shard, row = place.split("/")
        console.print(f"{part}: dataset {dataset[:16]}, shard {shard}, row {row}", highlight=False)
    console.print(trace_table(found))
    console.print(
        f"{len(found.models)} models have seen it" + "".join(f"\n  {model}" for model in found.models), highlight=False
    )


@app.command()
def purge(
    name: Labels,
    keys: Annotated[Path, typer.Option(metavar="FILE", help="A text file with a key a line.")],
    out: Annotated[str, typer.Option(help="Folder or URI of the new label set.")],
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Write a label set anew without some images, and list the models that have seen them. The old one stays.

    `data.exclude` keeps further runs from labelling them again.

    Example: [cyan]ns labels purge latest/gen-2 --keys withdrawn.txt --out labels-2b[/]
    """
    from ns.data.key_list import read_keys
    from ns.labeling.purge import purge as without
    from ns.runs import lineage
    from ns.runs import records as runs
    from ns.storage import open_store

    store = open_store(root)
    found = runs.labels(store, name)
    wanted = read_keys(str(keys))
    made, count = without(found.folder, found.label_set, wanted, open_store(out))
    models = lineage.models_that_saw(store, wanted)
    if as_json:
        typer.echo(json.dumps({"label_set": made.digest, "images": count, "models": models}, indent=1))
        return
    typer.echo(f"{out}: {count:,} images purged; label set {made.digest}")
    typer.echo(f"models that have seen them, below {root}: {len(models)}")
    for digest, folder in models.items():
        typer.echo(f"  {digest[:16]}  {folder}")


def label(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or URI of a model, or a run, whose best model it is.")],
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Folder or URI of a dataset (`ns data import` makes one).")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URI of the label set.")],
    root: Root = "runs",
    shards: Annotated[str | None, typer.Option(metavar="START-STOP", help="Only these shards, the last one excluded.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A=B", help="Override a field of labelling: views=ten. Repeatable.")
    ] = None,
    kept: Annotated[
        str | None, typer.Option(help="Only images that the selection of this label set (latest/gen-1) kept.")
    ] = None,
) -> None:
    """Label a dataset with a model, shard by shard. The same command again continues; so do several at once, on parts of it.

    Example: [cyan]ns label latest data/pool labels/pool --set views=flip[/]
    """
    from ns.config.schema import LabellingConfig, changed
    from ns.core import log
    from ns.labeling.offline import label_dataset
    from ns.runs import records as runs
    from ns.storage import open_store

    log.configure()
    config = changed(LabellingConfig(), overrides or [])
    store = open_store(root)
    place = runs.model_place(store, model)
    before = runs.labels(store, kept) if kept else None
    made = label_dataset(
        place, pool, out, config, shards=shards, only=before and (before.folder, before.label_set, before.selection)
    )
    if made is None:
        typer.echo(f"{out}: not all shards are labelled yet")
    else:
        typer.echo(
            f"{out}: {made.rows:,} images, {made.unreadable:,} unreadable, {made.left_out:,} left out; label set {made.digest}"
        )


def _registry(place: str | None, remote: str | None = None) -> "Registry":
    from ns.labeling.registry import Registry

    if not place:
        raise ConfigError("no label registry: give --registry, the URL or path of its git repository, or set NS_LABEL_REGISTRY")
    return Registry(place, remote)


@app.command("list")
def list_versions(registry: RegistryOption = None, as_json: AsJson = False) -> None:
    """The versions in a label registry, by project, the latest last.

    Example: [cyan]ns labels list --registry registry.git[/]
    """
    from ns.cli.progress import print_whole, versions_table

    found = _registry(registry).versions()
    if as_json:
        typer.echo(json.dumps([version.model_dump() for version in found], indent=1))
    else:
        print_whole(versions_table(found))


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
    name: Labels,
    registry: RegistryOption = None,
    remote: RemoteOption = None,
    project: Annotated[str | None, typer.Option(help="First part of the tag; the experiment's name if not given.")] = None,
    as_run: Annotated[str | None, typer.Option("--run", help="Second part of the tag; the run's name if not given.")] = None,
    whole_tag: Annotated[
        str | None, typer.Option("--tag", metavar="TAG", help="The whole tag; needed for a folder: labels/PROJECT/RUN/gen-N.")
    ] = None,
    selected: Annotated[
        str | None,
        typer.Option("--selection", metavar="FILE", help="What `ns labels select --out` wrote of a folder's labels."),
    ] = None,
    root: Root = "runs",
) -> None:
    """Keep a label set and its selection as a version, labels/PROJECT/RUN/gen-N. The same again changes nothing.

    Those of a run; or, under a name of your own (--tag), what `ns label` or `ns labels purge` wrote.

    Example: [cyan]ns labels commit latest/gen-1 --registry registry.git --remote s3://bucket/labels[/]
    """
    from ns.config import schema as config
    from ns.evaluation.gate import Verdict
    from ns.labeling.registry import Tag
    from ns.labeling.selection import Selection
    from ns.runs import records as runs
    from ns.storage import open_store, split_uri

    store = open_store(root)
    run, _, generation = name.rpartition("/gen-")
    of_run = bool(run) and generation.isdigit()
    if whole_tag and (project or as_run):
        raise ConfigError("--tag names the whole version: leave --project and --run out")
    if not of_run and not whole_tag:
        raise ConfigError(
            f"LABELS {name}: must be a run's generation (latest/gen-1), whose project, run and number name the version; "
            "for a folder give the name: --tag labels/PROJECT/RUN/gen-N"
        )
    if of_run and selected:
        raise ConfigError("--selection: is for a folder; a run's generation has its own")
    named = Tag.parse(whole_tag) if whole_tag else None
    found = runs.labels(store, name)
    selection, verdict = found.selection, None
    if of_run:
        run = runs.find(store, run)
        if project is None:
            project = config.load(f"{store.at(run).uri}/{runs.CONFIG}").name
        gates = [n.outputs["verdict"] for n in runs.notes(store, run) if (n.generation, n.step) == (int(generation), "gate")]
        verdict = Verdict.read(store, gates[0]) if gates else None
    elif selected:
        folder, file = split_uri(selected)
        selection = Selection.read(open_store(folder), file)
        if selection.label_set != found.label_set.digest:
            raise DataError(
                f"--selection {selected}: of label set {selection.label_set[:16]}, not {found.label_set.digest[:16]}; "
                f"make one: ns labels select {name} --out {selected}"
            )
    tag = named or Tag.of(project or "", as_run or run, int(generation))
    is_new = _registry(registry, remote).commit(tag, found.folder, found.label_set, selection, verdict)
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
    from ns.labeling.registry import Tag

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
    from ns.labeling.registry import Tag

    garbage = _registry(registry).gc([Tag.parse(tag) for tag in drop or ()], dry=not yes)
    for name in (*(str(tag) for tag in garbage.dropped), *garbage.keys):
        typer.echo(name)
    done = "deleted" if yes else "would be deleted; --yes does it"
    typer.echo(f"{len(garbage.dropped)} versions, {len(garbage.keys)} files, {garbage.bytes:,} bytes {done}")


@app.command()
def diff(
    before: Annotated[
        str, typer.Argument(metavar="A", help="The earlier labels: latest/gen-1, or a label set's folder or URI.")
    ],
    after: Annotated[str, typer.Argument(metavar="B", help="The later labels, of the same images.")],
    root: Root = "runs",
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for an issue or a pull request.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures of the surest flips.")] = None,
    pool: Pool = None,
) -> None:
    """What changed between two label sets: flips by class and by confidence, what entered and left the selection.

    Example: [cyan]ns labels diff latest/gen-1 latest/gen-2 --html diff.html[/]
    """
    from rich.console import Console

    from ns.labeling.diff import compare
    from ns.runs import records as runs
    from ns.storage import open_store

    if as_json and markdown:
        raise ConfigError("--json --markdown: give one of them")
    store = open_store(root)
    old, new = runs.labels(store, before), runs.labels(store, after)
    found = compare(old.side, new.side)
    names = (before, after)
    if html:
        from ns.reporting.labels import diff_page

        # Either of them may be known by its run, and so by its images.
        known = new if new.prepared or pool else old
        write_page(html, diff_page(found, names, *known.pool(store, pool)))
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    elif markdown:
        from ns.reporting.labels import diff_markdown

        typer.echo(diff_markdown(found, names), nl=False)
    elif html:
        typer.echo(f"{html}: {found.churn:.1%} of labels changed; open it in a browser")
    else:
        from ns.cli.progress import diff_tables

        for part in diff_tables(found):
            Console().print(part, highlight=False)


@audit_app.command("page")
def audit(
    name: Labels,
    root: Root = "runs",
    images: Annotated[int, typer.Option(min=1, max=5000, help="Images to look at, roughly.")] = 400,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Another seed draws other images.")] = 0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the page.")] = Path("audit.html"),
    selected_only: Annotated[bool, typer.Option("--selected-only", help="Only images that the run's selection keeps.")] = False,
    pool: Pool = None,
) -> None:
    """Make a page with a sample of the labels, on which to mark those that are wrong. Then: ns labels audit apply.

    Example: [cyan]ns labels audit latest/gen-1 --selected-only[/]
    """
    from ns.labeling.audit import sample
    from ns.reporting.labels import audit_page
    from ns.runs import records as runs
    from ns.storage import open_store

    store = open_store(root)
    found = runs.labels(store, name)
    if selected_only and found.selection is None:
        raise RunError(f"{name}: --selected-only needs to know the selection; name a run's generation, as in latest/gen-1")
    opened = found.pool(store, pool)
    sheet = sample(
        found.folder, found.label_set, images=images, seed=seed, selection=found.selection if selected_only else None
    )
    write_page(out, audit_page(sheet, found.label_set.classes, name, *opened))
    typer.echo(
        f"{out}: {len(sheet.images):,} images of {len(sheet.strata)} strata; open it in a browser, mark what is wrong, download "
        f"audit.json, and run: ns labels audit apply audit.json {name}"
    )


@audit_app.command("apply")
def apply_audit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="audit.json, as the page gave it.")],
    name: Labels,
    root: Root = "runs",
    corrections: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write the images whose right class was named, as a labelled dataset.")
    ] = None,
    as_json: AsJson = False,
    pool: Pool = None,
) -> None:
    """Say how many labels are right, from an audit, and keep that beside the label set. The gate can ask for it.

    Example: [cyan]ns labels audit apply audit.json latest/gen-1 --corrections data/corrections[/]
    """
    from rich.console import Console

    from ns.cli.progress import audit_tables
    from ns.core.errors import DataError
    from ns.labeling.audit import Sheet, check, estimate, keep, write_corrections
    from ns.runs import records as runs
    from ns.storage import open_store

    store = open_store(root)
    found = runs.labels(store, name)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}; name the audit.json that the page gave") from error
    sheet = Sheet.parse(data, str(file))
    check(sheet, str(file), found.folder, found.label_set, found.selection)
    result = estimate(sheet, str(file))
    fixed = None
    if corrections:
        fixed = write_corrections(result, found.label_set.classes, *found.pool(store, pool), open_store(corrections))
    key = keep(result, found.folder)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
        return
    for table in audit_tables(result):
        Console().print(table)
    typer.echo(f"kept as {found.folder.uri}/{key}")
    if corrections:
        typer.echo(f"{corrections}: {fixed.samples if fixed else 0:,} corrected images")
