"""`ns data …`: datasets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from ns.cli.options import AsJson
from ns.cli.output import make_console, make_table, print_json, print_line, to_shell_path, write_page
from ns.core.errors import ConfigError, DataError
from ns.storage import Store, open_store, read_uri

if TYPE_CHECKING:
    from ns.data.dataset import Dataset
    from ns.data.leakage import LeakageReport, NamedDataset
    from ns.modeling.predictor import Predictor

app = typer.Typer(help="Import, check and show datasets.", no_args_is_help=True)


@app.command("import")
def import_data(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Class folders, images, a table, tars or an archive.")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="URI of the new dataset: a folder or s3://bucket/prefix.")],
    role: Annotated[Literal["labeled", "unlabeled", "evaluation"], typer.Option(help="What the images are for.")] = "unlabeled",
    name: Annotated[str | None, typer.Option(help="Name of the dataset; default: the source's.")] = None,
    split: Annotated[str | None, typer.Option(help="Import only the rows of a table that have this split.")] = None,
    classes: Annotated[Path | None, typer.Option(help="File of class names, one per line, or a dataset.json.")] = None,
    max_side: Annotated[int | None, typer.Option(min=8, help="Shrink images to this longest side, px; default: never.")] = None,
    max_megapixels: Annotated[int, typer.Option(min=1, max=178, help="Leave out images of more million pixels.")] = 100,
    max_rejected_share: Annotated[
        float, typer.Option(min=0, max=1, help="Fail if a larger share of images is unreadable.")
    ] = 0.1,
    shard_samples: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number of images per shard.")] = 10_000,
    shard_mib: Annotated[int, typer.Option(min=1, max=4096, help="Maximum size of a shard in MiB.")] = 256,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes; default: one per core.")] = None,
) -> None:
    """Make a dataset from a collection of images. Unreadable images are counted, listed and left out.

    The same command continues an import that was stopped.

    Example: [cyan]ns data import photos/ data/pool[/], [cyan]ns data import labels.csv data/train --role labeled --split train[/]
    """
    from ns.config.schema import ImportConfig
    from ns.core.log import configure_logging
    from ns.data.importing.ingest import derive_dataset_name, import_images

    configure_logging()
    config = ImportConfig(
        max_rejected_share=max_rejected_share,
        shard_samples=shard_samples,
        shard_mib=shard_mib,
        max_side=max_side,
        max_megapixels=max_megapixels,
    )
    dataset = import_images(
        source,
        open_store(destination),
        name=name or derive_dataset_name(source),
        role=role,
        config=config,
        classes=read_class_names(classes) if classes else None,
        split=split,
        workers=workers,
    )
    print_line(
        f"{destination}: {dataset.samples:,} images in {len(dataset.shards)} shards, {dataset.rejected:,} left out, "
        f"digest {dataset.digest[:16]}"
    )


@app.command("check")
def check_data(
    datasets: Annotated[list[str], typer.Argument(metavar="DATASET", help="URIs of datasets of any role.")],
    out: Annotated[str, typer.Option(metavar="URI", help="Folder of the lists, and fingerprints for later checks.")] = "check",
    model: Annotated[str | None, typer.Option(metavar="URI", help="Model to check near duplicates and class names.")] = None,
    bits: Annotated[int, typer.Option(min=0, max=8, help="Bits of 64 in which the hashes of near duplicates may differ.")] = 4,
    allow_overlap: Annotated[bool, typer.Option("--allow-overlap", help="Accept labeled images in evaluation sets.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find duplicate images within a pool, and images of a pool or training set that are also in an evaluation set.

    Example: [cyan]ns data check data/pool data/train data/test --out check[/]
    """
    from ns.core.log import configure_logging
    from ns.data.leakage import DUPLICATES, NamedDataset, check_datasets

    configure_logging()
    if twice := [uri for uri in dict.fromkeys(datasets) if datasets.count(uri) > 1]:
        raise ConfigError(f"DATASET: {twice[0]} is named twice; name each dataset once: images within it are compared too")
    opened = [(uri, *_open_dataset(uri)) for uri in datasets]
    names = [data.name for _, _, data in opened]
    checked = [NamedDataset(data.name if names.count(data.name) == 1 else uri, store, data) for uri, store, data in opened]
    target = open_store(out)
    features = None
    suspect_counts: dict[str, int] = {}
    if model:
        from ns.modeling.predictor import Predictor

        predictor = Predictor(open_store(model), batch=256)
        features = predictor.extract_features
        suspect_counts = {
            named.name: _write_suspects(predictor, named, target) for named in checked if named.dataset.role == "labeled"
        }
    report = check_datasets(checked, target, target.at("fingerprints"), bits=bits, features=features)
    if as_json:
        print_json(report.model_dump(mode="json") | {"suspects": suspect_counts})
    else:
        make_console().print(*_make_check_tables(report, suspect_counts))
        print_line(f"{report.left_out:,} images of pools are also in an evaluation set: they are left out")
        if report.skipped:
            print_line(f"{report.skipped:,} comparisons were skipped, in groups of images that are too much alike")
        print_line(f"lists: {to_shell_path(target.uri)}/")
    roles = {named.name: named.dataset.role for named in checked}
    for overlap in report.overlaps:
        shared = overlap.same + overlap.near
        if shared and (roles[overlap.of], roles[overlap.within]) == ("labeled", "evaluation") and not allow_overlap:
            raise DataError(
                f"{overlap.of}: {shared} of its images are also in the evaluation set {overlap.within} "
                f"(see {to_shell_path(target.uri)}/{DUPLICATES}); remove them from one, or allow it with --allow-overlap"
            )


def _open_dataset(uri: str) -> tuple[Store, "Dataset"]:
    """Raises DataError for what is not imported yet."""
    from ns.data.dataset import Dataset

    store = open_store(uri)
    if not store.exists(Dataset.filename):
        raise DataError(f"{uri}: no {Dataset.filename} here; name a dataset, or make one with `ns data import`")
    return store, Dataset.load(store)


def _write_suspects(predictor: "Predictor", named: "NamedDataset", target: Store) -> int:
    """Lists the images whose class name the model doubts. Returns their number."""
    from ns.labeling.label_errors import find_label_errors
    from ns.storage.parquet import write_table

    table = find_label_errors(predictor, named.store, named.dataset)
    write_table(target, f"suspects-{named.dataset.digest[:16]}.parquet", table)
    return len(table)


def _make_check_tables(report: "LeakageReport", suspect_counts: dict[str, int]) -> list[Table]:
    """Which datasets share images, and the sizes of the classes."""
    overlaps = make_table("images that resemble another", "images of", "in", "same bytes", "near")
    for overlap in report.overlaps:
        overlaps.add_row(overlap.of, overlap.within, f"{overlap.same:,}", f"{overlap.near:,}")
    classes = make_table("labeled data", "dataset", "classes", "smallest", "largest", "class names to check")
    for name, counts in report.classes.items():
        smallest, largest = (pick(counts, key=lambda class_name: counts[class_name]) for pick in (min, max))
        ends = (f"{class_name} {counts[class_name]:,}" for class_name in (smallest, largest))
        classes.add_row(name, f"{len(counts):,}", *ends, f"{suspect_counts[name]:,}" if name in suspect_counts else "")
    return [overlaps, classes] if report.classes else [overlaps]


@app.command("verify")
def verify_data(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="URI of a dataset: a folder or s3://bucket/prefix.")],
) -> None:
    """Read a dataset from end to end and check checksums, indices, labels and keys. Prints each problem.

    Example: [cyan]ns data verify data/pool[/]
    """
    from ns.data.verify import find_damage

    store, data = _open_dataset(dataset)
    problems = 0
    for problem in find_damage(store, data):
        print_line(problem)
        problems += 1
    if problems:
        raise DataError(f"{store.uri}: {problems:,} problems")
    print_line(f"{store.uri}: good: {data.samples:,} images in {len(data.shards):,} shards")


@app.command("show")
def show_data(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="URI of a dataset: a folder or s3://bucket/prefix.")],
    sheet: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a contact sheet here, as HTML.")] = None,
    images: Annotated[int, typer.Option(min=1, max=2000, help="Number of images on the sheet.")] = 120,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Another seed draws other images.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a dataset holds, and optionally a sample of its images.

    Example: [cyan]ns data show data/pool --sheet pool.html[/]
    """
    from ns.data.contact_sheet import render_contact_sheet
    from ns.data.leakage import count_class_images

    store, data = _open_dataset(dataset)
    if as_json:
        print_json(data.model_dump(mode="json") | {"digest": data.digest, "samples": data.samples})
    else:
        mib = data.bytes / (1 << 20)
        print_line(f"{data.name}: {data.role}, {data.samples:,} images, {mib:,.1f} MiB in {len(data.shards)} shards")
        print_line(f"digest {data.digest}, {data.rejected:,} left out")
        if data.classes:
            table = make_table("", "class", "images", "share")
            for name, count in count_class_images(store, data).items():
                table.add_row(name, f"{count:,}", f"{count / max(1, data.samples):.1%}")
            make_console().print(table)
    if sheet:
        write_page(sheet, render_contact_sheet(store, data, images, seed))
        print_line(f"contact sheet: {sheet}", err=as_json)


def read_class_names(path: Path) -> list[str]:
    from ns.data.class_names import normalize_name
    from ns.data.dataset import Dataset

    data = read_uri(str(path))
    if path.suffix == ".json":
        dataset = Dataset.parse(data, str(path))
        if not dataset.classes:
            raise DataError(f"{path}: is a dataset without classes; name that of the labeled images")
        return list(dataset.classes)
    names = [name for line in data.decode("utf-8-sig", errors="replace").splitlines() if (name := normalize_name(line))]
    if len(set(names)) != len(names) or len(names) < 2:
        raise DataError(f"{path}: {len(names)} class names, {len(set(names))} of them different; must be 2 or more, each once")
    return names
