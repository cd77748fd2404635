"""`ns label` and `ns labels …`: make, inspect, compare, audit, version and purge label sets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ns.cli.options import (
    AsJson,
    Markdown,
    ModelArgument,
    RegistryOption,
    RemoteOption,
    Root,
    make_default_group,
    override_option,
)
from ns.cli.output import make_console, print_json, print_line, print_text, print_untruncated, write_page
from ns.core.errors import ConfigError, DataError, RunError
from ns.storage import Store, open_store, read_uri, split_uri

if TYPE_CHECKING:
    from ns.labeling.registry import LabelRegistry
    from ns.runs.lookup import RunLabelSet

app = typer.Typer(help="Inspect, check, compare, audit and version label sets.", no_args_is_help=True)
audit_app = typer.Typer(
    cls=make_default_group("page"),
    help="""Estimate the share of right labels from a sample that you review. `ns labels audit LABELS` is `ns labels audit page LABELS`.

    Example: [cyan]ns labels audit latest/gen-1 --selected-only[/]
    """,
)
app.add_typer(audit_app, name="audit")

LabelSetArgument = Annotated[str, typer.Argument(metavar="LABELS", help="latest/gen-1, or a label set's folder or URI.")]
Pool = Annotated[str | None, typer.Option(metavar="DATASET", help="The dataset that was labeled; default: the run's pool.")]

TagArgument = Annotated[str, typer.Argument(metavar="TAG", help="A version: labels/PROJECT/RUN/gen-N.")]
VersionArgument = Annotated[str, typer.Argument(metavar="TAG", help="A version: labels/PROJECT/RUN/gen-N, or current/PROJECT.")]
ExportForm = Literal["csv", "parquet", "label-studio"]
CHOICE_BATCH = 64
Why = Annotated[str, typer.Option("--why", help="The reason, for the history.")]


def _open_label_set(root: str, name: str) -> "tuple[Store, RunLabelSet]":
    from ns.runs.lookup import open_label_set

    store = open_store(root)
    return store, open_label_set(store, name)


@app.command("show")
def show_label_set(name: LabelSetArgument, root: Root = "runs", as_json: AsJson = False) -> None:
    """Show a label set by class: images, mean confidence, and images that the run's selection kept; and its audits.

    Example: [cyan]ns labels show latest/gen-1[/]
    """
    from ns.cli.label_tables import make_audits_table, make_label_set_table
    from ns.labeling.audit import load_audits

    _, resolved = _open_label_set(root, name)
    if as_json:
        print_json(resolved.label_set)
        return
    make_console().print(make_label_set_table(resolved))
    if label_audits := load_audits(resolved.store, resolved.label_set):
        make_console().print(make_audits_table(label_audits))


@app.command("verify")
def verify_labels(name: LabelSetArgument, root: Root = "runs", pool: Pool = None) -> None:
    """Read a label set from end to end and check checksums, rows, keys, probabilities and histograms.

    Example: [cyan]ns labels verify latest/gen-1[/]
    """
    from ns.labeling.label_set import verify_label_set

    store, resolved = _open_label_set(root, name)
    images = resolved.open_pool(store, pool) if pool or resolved.prepared else None
    row_count = verify_label_set(resolved.store, resolved.label_set, images)
    print_line(
        f"{resolved.store.uri}: good: {row_count:,} rows"
        + ("" if images else "; keys were not compared with those of the images: give --pool")
    )


@app.command("select")
def select_labels(
    name: LabelSetArgument,
    root: Root = "runs",
    overrides: Annotated[list[str] | None, override_option("selection, as in per_class=5000")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be kept, by class; write nothing.")] = False,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the selection to this JSON file.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed that breaks ties; default: the run's, or 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a selection from a label set, by the policy of its run and your overrides.

    Example: [cyan]ns labels select latest/gen-1 --set min_confidence=0.6 --set per_class=5000 --dry-run[/]
    """
    from ns.cli.label_tables import make_selection_table
    from ns.config.loader import with_overrides
    from ns.config.schema import SelectionConfig
    from ns.labeling.selection import make_selection
    from ns.runs.lookup import find_policy_foreign_limit, find_policy_thresholds

    if not dry_run and out is None:
        raise ConfigError("give --out FILE to write the selection, or --dry-run to print it")
    store, resolved = _open_label_set(root, name)
    policy = with_overrides(resolved.selection.policy if resolved.selection else SelectionConfig(), overrides or [])
    if seed is None:
        seed = resolved.selection.seed if resolved.selection else 0
    if policy.images_from == "first" and resolved.selection and resolved.selection.choice:
        raise ConfigError(
            "--set from=each: the images of this generation were chosen by the run's first one; select from that one"
        )
    thresholds = find_policy_thresholds(store, resolved, policy) if policy.precision is not None else None
    selection = make_selection(
        resolved.store,
        resolved.label_set,
        policy,
        seed=seed,
        label_set_key=resolved.store.uri,
        thresholds=thresholds,
        foreign_limit=find_policy_foreign_limit(store, resolved, policy),
        labeled_images=resolved.selection.labeled_images if resolved.selection else None,
    )
    if out is not None:
        folder, file = split_uri(out)
        selection.save_file(open_store(folder), file)
    if as_json:
        print_json(selection)
    else:
        make_console().print(make_selection_table(resolved.label_set, selection))
        for remark in selection.describe_classes(resolved.label_set.classes):
            print_line(remark)


@app.command("trace")
def trace_key(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key of an image in its dataset, or the path of its file.")],
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Show the history of one image: every teacher's label, the threshold, and the label sets, runs and models it went into.

    Example: [cyan]ns labels trace photos/0001[/]
    """
    from ns.cli.label_tables import make_trace_table
    from ns.runs.lineage import trace_image

    history = trace_image(open_store(root), key)
    if as_json:
        print_json(history)
        return
    for part, location in history.locations.items():
        dataset, shard, row = location.split("/")
        print_line(f"{part}: dataset {dataset[:16]}, shard {shard}, row {row}")
    make_console().print(make_trace_table(history))
    print_line(f"{len(history.models)} models have seen it")
    for model in history.models:
        print_line(f"  {model}")


@app.command("purge")
def purge_keys(
    name: LabelSetArgument,
    keys: Annotated[Path, typer.Option(metavar="FILE", help="A text file with one key, or path of an image's file, per line.")],
    out: Annotated[str, typer.Option(help="Folder or URI of the new label set.")],
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Write a copy of a label set without some images, and list the models that have seen them. The original stays.

    Use `data.exclude` to keep later runs from labeling them again.

    Example: [cyan]ns labels purge latest/gen-2 --keys withdrawn.txt --out labels-2b[/]
    """
    from ns.data.key_list import read_keys
    from ns.labeling.label_set import iter_label_rows
    from ns.labeling.purge import purge_images
    from ns.runs.lineage import find_exposed_models

    store, resolved = _open_label_set(root, name)
    key_list = read_keys(str(keys))
    all_keys = (key for rows in iter_label_rows(resolved.store, resolved.label_set) for key in rows.keys)
    removed_keys, unknown = key_list.match_keys(all_keys)
    if unknown:
        raise DataError(f"{keys}: {len(unknown)} of its lines name no image of this label set; the first: {unknown[0]}")
    purged, count = purge_images(resolved.store, resolved.label_set, removed_keys, open_store(out))
    models = find_exposed_models(store, key_list.spellings)
    if as_json:
        print_json({"label_set": purged.digest, "images": count, "models": models})
        return
    print_line(f"{out}: {count:,} images purged; label set {purged.digest}")
    print_line(f"models that have seen them, below {root}: {len(models)}")
    for digest, folder in models.items():
        print_line(f"  {digest[:16]}  {folder}")


@app.command("import")
def import_label_set(
    labels: Annotated[str, typer.Argument(metavar="LABELS", help="CSV, TSV or Parquet, or an export of Label Studio.")],
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Folder or URI of the dataset that was labeled.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URI of the label set.")],
    classes: Annotated[Path, typer.Option(help="File of class names, one per line, or the labeled data's dataset.json.")],
    source: Annotated[str, typer.Option(help="Who made the labels, for the record.")] = "",
    prefix: Annotated[str, typer.Option(metavar="TEXT", help="What stands before the keys or paths, as in pool/.")] = "",
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Classes kept of each image; of at most 100, all are.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Make a label set of labels from elsewhere: another model's table, or an export of Label Studio.

    A table has a column `key` or `path`, and either `class` and perhaps `confidence`, or a column of probabilities for each class.

    Example: [cyan]ns labels import clip.csv store/pool labels/clip --classes store/labeled/dataset.json[/]
    """
    from ns.cli.data import read_class_names
    from ns.labeling.imported import import_labels

    imported = import_labels(labels, pool, out, read_class_names(classes), source=source, prefix=prefix, top_k=top_k)
    if as_json:
        print_json({"label_set": imported.label_set.digest, "labeled": imported.labeled, "unmatched": imported.unmatched})
        return
    label_set = imported.label_set
    print_line(f"{out}: {imported.labeled:,} of {label_set.rows:,} images have a label; label set {label_set.digest}")
    if imported.unmatched:
        print_line(
            f"{labels}: {len(imported.unmatched):,} of its names are no image of {pool}; the first: {imported.unmatched[0]}",
            err=True,
        )


@app.command("next")
def choose_next(
    name: LabelSetArgument,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Folder or URI for pictures, table and Label Studio's tasks.")],
    count: Annotated[int, typer.Option(min=1, help="Number of images.")] = 200,
    images_uri: Annotated[str | None, typer.Option(metavar="URI", help="What the pictures' addresses begin with.")] = None,
    root: Root = "runs",
    pool: Pool = None,
) -> None:
    """Write the images most worth a person's label as tasks for Label Studio: unsure ones, unlike each other, of all classes.

    In Label Studio: a project with interface.xml, the folder's images as local storage, and tasks.json imported. Its export, put into the
    folder, is labeled data: `ns data import FOLDER/export.json DATASET --role labeled`.

    Example: [cyan]ns labels next latest/gen-1 --count 200 --out to-label[/]
    """
    from ns.labeling.next_images import choose_next_images
    from ns.labeling.tasks import LOCAL_FILES, write_tasks
    from ns.modeling.predictor import Predictor

    store, resolved = _open_label_set(root, name)
    if resolved.teacher is None:
        raise ConfigError(f"LABELS {name}: a label set by itself has no teacher here; name a run's generation: latest/gen-1")
    images = resolved.open_pool(store, pool)
    predictor = Predictor(store.at(resolved.teacher), batch=CHOICE_BATCH)
    tasks = choose_next_images(resolved.store, resolved.label_set, images, predictor, count)
    model = resolved.label_set.teacher[:16]
    write_tasks(open_store(out), tasks, images, resolved.label_set.classes, model=model, images_uri=images_uri or LOCAL_FILES)
    print_line(f"{out}: {len(tasks):,} images to label")


@app.command("export")
def export_label_set(
    name: LabelSetArgument,
    out: Annotated[str, typer.Option(metavar="PATH", help="A table's file, or the folder of the tasks.")],
    form: Annotated[ExportForm, typer.Option(help="A table of all labels, or tasks of the least confident ones.")] = "csv",
    count: Annotated[int, typer.Option(min=1, help="Most tasks.")] = 1000,
    selected_only: Annotated[bool, typer.Option("--selected-only", help="Only images that the run's selection keeps.")] = False,
    images_uri: Annotated[str | None, typer.Option(metavar="URI", help="What the pictures' addresses begin with.")] = None,
    root: Root = "runs",
    pool: Pool = None,
) -> None:
    """Write the labels as a table, or as tasks for Label Studio, where people correct them.

    `ns labels import` reads both.

    Example: [cyan]ns labels export latest/gen-1 --form label-studio --selected-only --out to-check[/]
    """
    from ns.labeling.tasks import LOCAL_FILES, find_least_confident, write_label_table, write_tasks

    store, resolved = _open_label_set(root, name)
    if selected_only and resolved.selection is None:
        raise RunError(f"{name}: --selected-only needs a selection; name a run's generation, as in latest/gen-1")
    selection = resolved.selection if selected_only else None
    if form != "label-studio":
        folder, file = split_uri(out)
        row_count = write_label_table(open_store(folder), file, resolved.store, resolved.label_set, selection, form)
        print_line(f"{out}: {row_count:,} labels")
        return
    tasks = find_least_confident(resolved.store, resolved.label_set, selection, count)
    images = resolved.open_pool(store, pool)
    classes, teacher = resolved.label_set.classes, resolved.label_set.teacher
    write_tasks(open_store(out), tasks, images, classes, model=teacher[:16], images_uri=images_uri or LOCAL_FILES)
    print_line(f"{out}: {len(tasks):,} tasks")


def label(
    model: ModelArgument,
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Folder or URI of a dataset (`ns data import` makes one).")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URI of the label set.")],
    root: Root = "runs",
    shards: Annotated[str | None, typer.Option(metavar="START-STOP", help="Label only these shards; STOP is excluded.")] = None,
    overrides: Annotated[list[str] | None, override_option("labeling, as in views=ten")] = None,
    kept: Annotated[
        str | None, typer.Option(metavar="LABELS", help="Label only images that the selection of this generation kept.")
    ] = None,
) -> None:
    """Label a dataset with a model, shard by shard. Run the command again to continue; processes can share the work by --shards.

    Example: [cyan]ns label latest data/pool labels/pool --set views=flip[/]
    """
    from ns.config.loader import with_overrides
    from ns.config.schema import LabelingConfig
    from ns.core.log import configure_logging
    from ns.labeling.offline import label_dataset
    from ns.runs.lookup import open_label_set, resolve_model_uri

    configure_logging()
    config = with_overrides(LabelingConfig(), overrides or [])
    store = open_store(root)
    kept_set = open_label_set(store, kept) if kept else None
    kept_by = kept_set and (kept_set.store, kept_set.label_set, kept_set.selection)
    label_set = label_dataset(resolve_model_uri(store, model), pool, out, config, shards=shards, kept_by=kept_by)
    if label_set is None:
        print_line(f"{out}: not all shards are labeled yet")
    else:
        counts = f"{label_set.rows:,} images, {label_set.unreadable:,} unreadable, {label_set.left_out:,} left out"
        print_line(f"{out}: {counts}; label set {label_set.digest}")


def _open_registry(url: str | None, remote: str | None = None) -> "LabelRegistry":
    from ns.labeling.registry import LabelRegistry

    if not url:
        raise ConfigError("no label registry: give --registry, the URL or path of its git repository, or set NS_LABEL_REGISTRY")
    return LabelRegistry(url, remote)


@app.command("list")
def list_versions(registry: RegistryOption = None, as_json: AsJson = False) -> None:
    """List the versions in a label registry, by project, the latest last.

    Example: [cyan]ns labels list --registry registry.git[/]
    """
    from ns.cli.label_tables import make_versions_table

    versions = _open_registry(registry).list_versions()
    if as_json:
        print_json(
            [
                {"tag": str(version.tag), "date": date, "current": current, **version.model_dump(exclude={"format", "files"})}
                for version, date, current in versions
            ]
        )
    else:
        print_untruncated(make_versions_table(versions))


@app.command("version")
def show_version(tag: VersionArgument, registry: RegistryOption = None, as_json: AsJson = False) -> None:
    """Show the digests a version was made from, and where each of its files lies in the remote.

    Example: [cyan]ns labels version labels/quickstart/RUN/gen-1 --registry registry.git[/]
    """
    from ns.labeling.registry.storage import object_key

    label_registry = _open_registry(registry)
    details = label_registry.find_version(tag)
    if as_json:
        print_json(details)
        return
    for name, value in details.model_dump(exclude={"format", "files", "directory"}).items():
        print_line(f"{name:12}{'' if value is None else value}")
    remote_uri = label_registry.locate_data()
    for file in details.files:
        print_line(f"{file.name}\t{file.bytes}\t{file.sha256}\t{remote_uri}/{object_key(file.md5)}")


@app.command("commit")
def commit_version(
    name: LabelSetArgument,
    registry: RegistryOption = None,
    remote: RemoteOption = None,
    new_tag: Annotated[
        str | None,
        typer.Option("--tag", metavar="TAG", help="Its name; a folder needs one; default: labels/PROJECT/RUN/gen-N."),
    ] = None,
    selected: Annotated[
        str | None, typer.Option("--selection", metavar="FILE", help="A folder's selection, from `ns labels select --out`.")
    ] = None,
    root: Root = "runs",
) -> None:
    """Commit a label set and its selection as a version, labels/PROJECT/RUN/gen-N. Committing the same again changes nothing.

    Name a run's generation, or a folder that `ns label` or `ns labels purge` wrote, with a tag of your own (--tag).

    Example: [cyan]ns labels commit latest/gen-1 --registry registry.git --remote s3://bucket/labels[/]
    """
    from ns.config.loader import load_experiment
    from ns.evaluation.gate import Verdict
    from ns.labeling.registry import VersionTag
    from ns.labeling.selection import Selection
    from ns.runs.lookup import open_label_set, resolve_run_name, split_generation
    from ns.runs.records import CONFIG_FILE, find_stage_note

    named = split_generation(name)
    if named and selected:
        raise ConfigError("--selection: is for a folder; a run's generation has its own selection")
    store = open_store(root)
    run, generation = (resolve_run_name(store, named[0]), named[1]) if named else ("", 0)
    if new_tag:
        tag = VersionTag.parse(new_tag)
    elif named:
        tag = VersionTag.from_parts(load_experiment(f"{store.at(run).uri}/{CONFIG_FILE}").name, run, generation)
    else:
        raise ConfigError(
            f"LABELS {name}: must be a run's generation (latest/gen-1), which names the version; "
            "for a folder give the name: --tag labels/PROJECT/RUN/gen-N"
        )
    resolved = open_label_set(store, name)
    selection, verdict = resolved.selection, None
    if named:
        if note := find_stage_note(store, run, generation, "gate"):
            verdict = Verdict.load_file(store, note.outputs["verdict"])
    elif selected:
        selection = Selection.parse(read_uri(selected), selected)
        if selection.label_set != resolved.label_set.digest:
            raise DataError(
                f"--selection {selected}: is of label set {selection.label_set[:16]}, not {resolved.label_set.digest[:16]}; "
                f"make one: ns labels select {name} --out {selected}"
            )
    is_new = _open_registry(registry, remote).commit_version(tag, resolved.store, resolved.label_set, selection, verdict)
    print_line(f"{tag}: {'committed' if is_new else 'is there already'}")


@app.command("get")
def get_version(
    tag: VersionArgument,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new or empty folder.")],
    registry: RegistryOption = None,
) -> None:
    """Download a version into a folder and check every file. Intact files in the folder stay.

    Example: [cyan]ns labels get current/quickstart labels --registry registry.git[/]
    """
    fetched = _open_registry(registry).download_version(tag, destination)
    print_line(f"{destination}: {fetched.tag}: {fetched.rows:,} rows in {len(fetched.files)} files, all good")


@app.command("promote")
def promote_version(tag: TagArgument, registry: RegistryOption = None, why: Why = "") -> None:
    """Make a version the one in use of its project, current/PROJECT.

    Example: [cyan]ns labels promote labels/quickstart/RUN/gen-2 --why 'checked by hand'[/]
    """
    _switch_version(tag, registry, why, back=False)


@app.command("rollback")
def roll_back_version(tag: TagArgument, registry: RegistryOption = None, why: Why = "") -> None:
    """Make an earlier version the one in use again. No version is deleted.

    Example: [cyan]ns labels rollback labels/quickstart/RUN/gen-1 --why 'gen-2 confuses 4 and 9'[/]
    """
    _switch_version(tag, registry, why, back=True)


def _switch_version(tag: str, registry: str | None, why: str, *, back: bool) -> None:
    from ns.labeling.registry import VersionTag

    parsed = VersionTag.parse(tag)
    before = _open_registry(registry).set_current(parsed, why, is_rollback=back)
    print_line(
        f"current/{parsed.project}: {parsed}" + (" (no change)" if before == parsed else f", before: {before or 'none'}")
    )


@app.command("gc")
def collect_registry_garbage(
    registry: RegistryOption = None,
    drop: Annotated[list[str] | None, typer.Option(metavar="TAG", help="Delete this version, too. Repeatable.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without this option, only print what would be deleted.")] = False,
) -> None:
    """Delete data that no version needs. Run it while no commit is running, on a remote that holds nothing else.

    Example: [cyan]ns labels gc --drop labels/quickstart/RUN/gen-1[/]
    """
    from ns.labeling.registry import VersionTag
    from ns.labeling.registry.gc import collect_garbage

    garbage = collect_garbage(_open_registry(registry), [VersionTag.parse(tag) for tag in drop or ()], dry_run=not yes)
    for name in (*(str(tag) for tag in garbage.dropped), *garbage.keys):
        print_line(name)
    done = "deleted" if yes else "would be deleted; --yes does it"
    print_line(f"{len(garbage.dropped)} versions, {len(garbage.keys)} files, {garbage.bytes:,} bytes {done}")


@app.command("diff")
def diff_label_sets(
    before: Annotated[str, typer.Argument(metavar="A", help="The earlier label set: latest/gen-1, or a folder or URI.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The later label set, of the same images.")],
    root: Root = "runs",
    as_json: AsJson = False,
    markdown: Markdown = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures of confident flips.")] = None,
    pool: Pool = None,
) -> None:
    """Compare two label sets: flips by class and by confidence, and images that entered and left the selection.

    Example: [cyan]ns labels diff latest/gen-1 latest/gen-2 --html diff.html[/]
    """
    from ns.labeling.diff import compare_label_sets
    from ns.runs.lookup import open_label_set

    if as_json and markdown:
        raise ConfigError("--json --markdown: give one of them")
    store = open_store(root)
    old, new = open_label_set(store, before), open_label_set(store, after)
    difference = compare_label_sets(old.side, new.side)
    names = (before, after)
    if html:
        from ns.reporting.label_set_pages import render_diff_page

        # Only a label set of a run knows its images.
        with_images = new if new.prepared or pool else old
        write_page(html, render_diff_page(difference, names, *with_images.open_pool(store, pool)))
    if as_json:
        print_json(difference)
    elif markdown:
        from ns.reporting.label_set_pages import render_diff_markdown

        print_text(render_diff_markdown(difference, names))
    elif html:
        print_line(f"{html}: {difference.churn:.1%} of labels changed; open it in a browser")
    else:
        from ns.cli.label_tables import make_diff_parts

        make_console().print(*make_diff_parts(difference), sep="\n")


AUDIT_IMAGES, AUDIT_SEED = 400, 0
AuditSize = Annotated[int, typer.Option(min=1, max=5000, help="Approximate number of images.")]
AuditSeed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the sample.")]


@audit_app.command("page")
def write_audit_page(
    name: LabelSetArgument,
    root: Root = "runs",
    images: AuditSize = AUDIT_IMAGES,
    seed: AuditSeed = AUDIT_SEED,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File of the page.")] = Path("audit.html"),
    selected_only: Annotated[bool, typer.Option("--selected-only", help="Sample only what the run's selection keeps.")] = False,
    pool: Pool = None,
) -> None:
    """Write a page with a sample of the images, to mark wrong labels on. `ns labels audit apply` evaluates your answers.

    Example: [cyan]ns labels audit latest/gen-1 --selected-only[/]
    """
    from ns.labeling.audit import draw_audit_sample
    from ns.reporting.label_set_pages import render_audit_page

    store, resolved = _open_label_set(root, name)
    if selected_only and resolved.selection is None:
        raise RunError(f"{name}: --selected-only needs a selection; name a run's generation, as in latest/gen-1")
    pool_data = resolved.open_pool(store, pool)
    selection = resolved.selection if selected_only else None
    sheet = draw_audit_sample(resolved.store, resolved.label_set, sample_size=images, seed=seed, selection=selection)
    options_given = (("--images", images, AUDIT_IMAGES), ("--seed", seed, AUDIT_SEED))
    options = "".join(f" {option} {value}" for option, value, default in options_given if value != default)
    write_page(out, render_audit_page(sheet, resolved.label_set.classes, name, *pool_data))
    print_line(
        f"{out}: {len(sheet.images):,} images of {len(sheet.strata)} strata; open it in a browser, mark what is wrong, download "
        f"audit.json, and run: ns labels audit apply audit.json {name}{options}"
    )


@audit_app.command("apply")
def apply_audit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The audit.json that the page gave.")],
    name: LabelSetArgument,
    root: Root = "runs",
    images: AuditSize = AUDIT_IMAGES,
    seed: AuditSeed = AUDIT_SEED,
    corrections: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write corrected images as a labeled dataset.")
    ] = None,
    as_json: AsJson = False,
    pool: Pool = None,
) -> None:
    """Estimate the share of right labels from an audit, and write it beside the label set. The gate can require a minimum.

    Give --images and --seed if the page was made with them: the file must not choose what it is about.

    Example: [cyan]ns labels audit apply audit.json latest/gen-1 --corrections data/corrections[/]
    """
    from ns.cli.label_tables import make_audit_tables
    from ns.labeling.audit import AuditSheet, check_audit_sheet, estimate_precision, save_audit, write_corrections

    store, resolved = _open_label_set(root, name)
    sheet = AuditSheet.parse(read_uri(str(file)), str(file))
    check_audit_sheet(sheet, str(file), resolved.store, resolved.label_set, resolved.selection, sample_size=images, seed=seed)
    result = estimate_precision(sheet, str(file))
    corrected = None
    if corrections:
        pool_data = resolved.open_pool(store, pool)
        corrected = write_corrections(result, resolved.label_set.classes, *pool_data, open_store(corrections))
    key = save_audit(result, resolved.store)
    if as_json:
        print_json(result)
        return
    make_console().print(*make_audit_tables(result))
    print_line(f"kept as {resolved.store.uri}/{key}")
    if corrections:
        print_line(f"{corrections}: {corrected.samples if corrected else 0:,} corrected images")
