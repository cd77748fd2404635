"""`ns …`: the command line. Heavy libraries are imported by the commands that need them, so that help is instant."""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ns import __version__
from ns.cli import doctor, evaluate, export, gate, labels, promote, report, trigger
from ns.cli.options import (
    AsJson,
    ConfigArgument,
    Inputs,
    Kfp,
    Overrides,
    Root,
    RunArgument,
    load_experiment_argument,
    make_program,
    to_shell_path,
    write_page,
)
from ns.core.errors import ConfigError, DataError, Interrupted, NsError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from ns.config.schema import Experiment
    from ns.runs.records import RunSummary
    from ns.storage import Store

# Newer typers bring a click of their own, which is not the one that can be imported.
UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = make_program("Noisy Student self-training: teacher, pseudo-labels, noisy student, gate, again.")
runs_app = typer.Typer(help="Runs: what was done, and what came of it.", no_args_is_help=True)
config_app = typer.Typer(help="Experiments: show, check, and describe their fields.", no_args_is_help=True)
data_app = typer.Typer(help="Datasets: make, check, and look at them.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(labels.app, name="labels")
app.add_typer(report.app, name="report")
app.add_typer(gate.app, name="gate")
app.add_typer(promote.app, name="promote")
app.add_typer(doctor.app, name="doctor")


class Runner(StrEnum):
    local = "local"
    docker = "docker"
    kfp = "kfp"


class DataRole(StrEnum):
    labeled = "labeled"
    unlabeled = "unlabeled"
    evaluation = "evaluation"


def main() -> None:
    """Entry point. Exits with the code of the error, 0 if there was none."""
    sys.exit(run_command_line(sys.argv[1:]))


def run_command_line(arguments: list[str]) -> int:
    return run_app(app, arguments, "ns")


def run_app(program: typer.Typer, arguments: list[str], name: str) -> int:
    """Runs a command line. Returns its exit code: an error's own, after its message in one line on standard error."""
    debug = "--debug" in arguments
    try:
        return int(program([a for a in arguments if a != "--debug"], standalone_mode=False, prog_name=name) or 0)
    except NsError as error:
        code, message, trace = error.exit_code, str(error), traceback.format_exc()
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code, message, trace = Interrupted.exit_code, "interrupted", ""
    except UsageError as error:
        error.show()
        return int(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code, message, trace = (
            1,
            f"{type(error).__name__}: {error} (this should not happen; --debug shows where)",
            traceback.format_exc(),
        )
    if debug:
        sys.stderr.write(trace)
    for line in message.splitlines() or [""]:
        sys.stderr.write(f"{'' if code == Interrupted.exit_code else 'error: '}{line}\n")
    return code


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"ns {__version__}")
        raise typer.Exit


@app.callback()
def _set_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
) -> None:
    pass


@app.command()
def run(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML file, or a preset: quickstart.")] = None,
    overrides: Overrides = None,
    root: Root = "runs",
    name: Annotated[str | None, typer.Option("--run", help="Name of the run; made from the experiment if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the latest run that is not finished.")] = False,
    runner: Annotated[
        Runner, typer.Option(help="Steps as processes here, in containers of Docker or Podman here, or on Kubeflow.")
    ] = Runner.local,
    image: Annotated[
        str | None,
        typer.Option(help="Image of the steps; if not given, what `make images` made last, or on Kubeflow the pipeline's own."),
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="4g", help="Memory of each container; no limit if not given.")] = None,
    gpus: Annotated[
        int, typer.Option(min=-1, help="GPUs of each container, -1 for all; on Kubeflow of each step that uses any.")
    ] = 0,
    stage_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Longest time of a container; the pipeline's if not given.")
    ] = None,
    kfp: Kfp = None,
    inputs: Inputs = None,
    follow: Annotated[
        bool | None, typer.Option("--follow/--no-follow", help="On Kubeflow: watch until the run ends (the default).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the whole loop, here or on Kubeflow. The same command again continues where it stopped, and redoes nothing.

    Example: [cyan]ns run quickstart --set seed=1[/], [cyan]ns run quickstart --runner docker --memory 4g[/],
    [cyan]ns run my.yaml --runner kfp --root s3://bucket/runs --input train_gpus=1[/]
    """
    runner_options: list[tuple[str, Any, tuple[Runner, ...]]] = [
        ("--image", image, (Runner.docker, Runner.kfp)),
        ("--memory", memory, (Runner.docker,)),
        ("--gpus", gpus or None, (Runner.docker, Runner.kfp)),
        ("--step-timeout", stage_timeout, (Runner.docker,)),
        ("--kfp", kfp, (Runner.kfp,)),
        ("--input", inputs, (Runner.kfp,)),
        ("--follow/--no-follow", follow, (Runner.kfp,)),
    ]
    for option, value, runners in runner_options:
        if value is not None and runner not in runners:
            raise ConfigError(f"{option}: means nothing to --runner {runner}; add --runner {' or '.join(runners)}")
    from rich.console import Console

    from ns import storage as stores
    from ns.runs import records as runs

    store = stores.open_store(root)
    if resume == (config is not None):
        raise ConfigError("give a CONFIG, or --resume to continue the latest unfinished run (and not both)")
    if resume and overrides:
        raise ConfigError("--set: means nothing with --resume, which continues a run as it was started; give its CONFIG")
    if resume:
        name, experiment = _find_unfinished(store, name)
    else:
        experiment = load_experiment_argument(str(config), overrides)
        name = name or runs.derive_run_name(experiment)
    # The stream as it is now: while KFP runs, sys.stderr is its log.
    console = Console(file=sys.stderr)
    if runner is Runner.kfp:
        _run_on_kubeflow(
            store, name, experiment, console, kfp, follow, {"image": image, "gpus": gpus, "inputs": inputs or ()}, as_json
        )
        return
    with runs.lock_run(store, name):
        runs.open_run(store, name, experiment, __version__)
        if runner is Runner.docker:
            from pipelines.runners import docker

            container = docker.ContainerOptions(image, memory, gpus=gpus, stage_seconds=stage_timeout)
            _run_recorded(
                store, name, console, partial(docker.run_in_containers, root=store, experiment=experiment, container=container)
            )
        else:
            from pipelines.runners import local

            _run_recorded(store, name, console, partial(local.run_locally, root=store.uri))
    _print_summary(store, name, as_json)


def _run_on_kubeflow(
    store: "Store",
    name: str,
    experiment: "Experiment",
    console: "Console",
    url: str | None,
    follow: bool | None,
    input_options: dict[str, Any],
    as_json: bool,
) -> None:
    """Submits a run, or finds the one that is under way, and follows it unless told otherwise."""
    from ns.cli.progress import RunView
    from ns.runs import records as runs
    from pipelines import kfp_client as submit
    from pipelines import remote_run as cluster

    cluster.check_remote_uris(store, experiment)
    client = submit.KfpClient(url or "")
    registry = experiment.registry is not None
    arguments = cluster.build_inputs(f"{store.uri}/{name}/{runs.CONFIG}", store, name, **input_options, registry=registry)
    submitted = cluster.submit_run(client, store, name, experiment, arguments)
    message = f"run {name}: {'submitted' if submitted.new else 'is under way'}: {submitted.url}"
    console.print(message, highlight=False, soft_wrap=True)
    if follow is False:
        if as_json:
            typer.echo(json.dumps(submitted._asdict(), indent=1))
        return
    with RunView(console) as view:
        cluster.follow_run(client, submitted, store, name, view.on_event)
    _print_summary(store, name, as_json)


def _print_summary(store: "Store", name: str, as_json: bool) -> None:
    from rich.console import Console

    from ns.runs import records as runs

    summary = runs.summarize_run(store, name)
    if as_json:
        typer.echo(summary.model_dump_json(indent=1))
    else:
        _print_run(summary, store, Console())


def _run_recorded(store: "Store", name: str, console: "Console", run_pipeline: Callable[..., None]) -> None:
    """Runs the pipeline and keeps the run's record true whatever happens."""
    from ns.cli.progress import RunView
    from ns.runs import records as runs
    from ns.storage import LocalStore

    log = store.root / name / "pipeline.log" if isinstance(store, LocalStore) else None
    try:
        with RunView(console) as view:
            run_pipeline(config_uri=f"{store.uri}/{name}/{runs.CONFIG}", run=name, log=log, on_event=view.on_event)
    except Interrupted as error:
        _record_end(store, name, "interrupted", error)
        raise
    except BaseException as error:
        _record_end(store, name, "failed", error)
        if log is not None and log.exists() and isinstance(error, NsError):
            console.print(f"[dim]log: {log}[/]", highlight=False, soft_wrap=True)
        raise
    runs.finish_run(store, name, "succeeded")


def _record_end(store: "Store", name: str, state: Any, error: BaseException) -> None:
    from ns.runs import records as runs

    # The store may be what failed; its message matters, not that the record could not be written either.
    with contextlib.suppress(NsError):
        runs.finish_run(store, name, state, str(error) or type(error).__name__)


def _find_unfinished(store: "Store", name: str | None) -> tuple[str, "Experiment"]:
    from ns.config import schema as config
    from ns.runs import records as runs

    unfinished = [record.run for record in runs.list_runs(store) if record.state != "succeeded"]
    if name is not None:
        unfinished = [run for run in unfinished if run == name]
    if not unfinished:
        raise RunError(f"{store.uri}: no unfinished run{f' {name}' if name else ''} to resume")
    return unfinished[-1], config.load_experiment(f"{store.uri}/{unfinished[-1]}/{runs.CONFIG}")


def _print_run(summary: "RunSummary", store: "Store", console: "Console") -> None:
    from ns.cli.progress import measures_table, summary_table

    console.print()
    console.print(summary_table(summary))
    if measures := measures_table(summary):
        console.print(measures)
    for title, key in (("report", summary.report), ("best model", summary.best_model)):
        if key:
            uri = key if "://" in key else f"{store.uri}/{key}"
            console.print(f"{title + ':':<11} {to_shell_path(uri)}", highlight=False, soft_wrap=True)


@runs_app.command("list")
def runs_list(root: Root = "runs", as_json: AsJson = False) -> None:
    """List the runs of a root, the latest last.

    Example: [cyan]ns runs list[/]
    """
    from rich.console import Console

    from ns.cli.progress import runs_table
    from ns.runs import records as runs
    from ns.storage import open_store

    store = open_store(root)
    summaries = [runs.summarize_run(store, record.run) for record in runs.list_runs(store)]
    if as_json:
        typer.echo(json.dumps([summary.model_dump(mode="json", exclude={"steps"}) for summary in summaries], indent=1))
    elif not summaries:
        typer.echo(f"no runs in {root}; start one with `ns run quickstart`")
    else:
        Console().print(runs_table(summaries))


@runs_app.command("show")
def runs_show(name: RunArgument = "latest", root: Root = "runs", as_json: AsJson = False) -> None:
    """Show a run: its generations, verdicts, report and best model.

    Example: [cyan]ns runs show latest --json[/]
    """
    from rich.console import Console

    from ns.runs import records as runs
    from ns.storage import open_store

    store = open_store(root)
    summary = runs.summarize_run(store, runs.resolve_run_name(store, name))
    if as_json:
        typer.echo(summary.model_dump_json(indent=1))
        return
    console = Console()
    console.print(f"state: {summary.state}" + (f" ({summary.error})" if summary.error else ""), highlight=False)
    _print_run(summary, store, console)
    for row in summary.generations:
        console.print(f"generation {row.generation}: {row.verdict}: {row.reason}", highlight=False)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")],
    name: Annotated[str, typer.Option("--run", help="A run's name, the beginning of it, or 'latest'.")] = "latest",
    root: Root = "runs",
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to print for each image, the likeliest first.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Classify images with the best model of a run.

    Example: [cyan]ns predict cat.jpg dog.png --run latest[/]
    """
    from ns.evaluation.predict import predict_files
    from ns.runs import records as runs
    from ns.storage import open_store

    store = open_store(root)
    summary = runs.summarize_run(store, runs.resolve_run_name(store, name))
    if summary.best_model is None:
        raise RunError(f"run {summary.run}: has no model yet; `ns run --resume` continues it")
    predictions = predict_files(store.at(summary.best_model), images, top)
    if as_json:
        typer.echo(json.dumps([prediction.model_dump(mode="json") for prediction in predictions], indent=1))
    for prediction in predictions:
        if prediction.error is not None:
            typer.echo(f"error: {prediction.path}: {prediction.error}", err=True)
        elif not as_json:
            classes = ", ".join(f"{class_name} {probability:.1%}" for class_name, probability in prediction.classes)
            typer.echo(f"{prediction.path}: {classes}")
    if any(prediction.error for prediction in predictions):
        raise typer.Exit(DataError.exit_code)


@config_app.command("show")
def config_show(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Print an experiment with every field, defaults included.

    Example: [cyan]ns config show quickstart --set generations=1[/]
    """
    from ns.config.schema import dump_experiment

    typer.echo(dump_experiment(load_experiment_argument(config, overrides)), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of experiments, for editors and for reading.

    Example: [cyan]ns config schema > experiment.schema.json[/]
    """
    from ns.config.schema import Experiment

    typer.echo(json.dumps(Experiment.model_json_schema(), indent=1))


@config_app.command("check")
def config_check(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Check an experiment and its networks, without running anything.

    Example: [cyan]ns config check my-experiment.yaml[/]
    """
    experiment = load_experiment_argument(config, overrides)
    from ns.modeling import factory as models

    models.check_models(experiment)
    typer.echo(f"{config}: good")


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    labeled: Annotated[int | None, typer.Option(min=1, help="Labeled images, instead of looking at data.labeled.")] = None,
    pool: Annotated[int | None, typer.Option(min=1, help="Images of the pool, instead of looking at data.pool.")] = None,
    heldout: Annotated[int | None, typer.Option(min=1, help="Held-out images, instead of looking at data.heldout.")] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Images of the test, instead of looking at data.test.")] = None,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes, where the labeled images are not looked at.")] = 1000,
    image_kb: Annotated[float | None, typer.Option(min=0, help="Mean size of an image, kB, instead of looking.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that train together, each like the one here.")] = 1,
    speed: Annotated[
        float | None,
        typer.Option(
            min=0.001, metavar="TMACS", help="10¹² multiply-adds a second of a device elsewhere, instead of measuring."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long to measure, s.")] = 30,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a device for an hour, in any currency.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a run would cost: device-hours, reading, checkpoints, network; from a short measurement on this machine.

    Example: [cyan]ns plan my-experiment.yaml --pool 300000000 --image-kb 110 --devices 8 --price 2.5[/]
    """
    experiment = load_experiment_argument(config, overrides)
    from rich.console import Console

    from ns import planning as plans
    from ns.cli.progress import plan_tables
    from ns.core import log
    from ns.data.prepared import DataPart

    given_counts: dict[DataPart, int | None] = {"labeled": labeled, "pool": pool, "heldout": heldout, "test": test}
    counts = plans.KnownCounts(
        {part: count for part, count in given_counts.items() if count is not None}, image_kb and image_kb * 1000, classes
    )
    log.configure_logging()
    estimate = plans.estimate_run(
        experiment,
        plans.PlanRequest(counts, devices, seconds, speed and speed * 1e12, price),
    )
    if as_json:
        typer.echo(estimate.model_dump_json(indent=1))
        return
    console = Console()
    for table in plan_tables(estimate):
        console.print(table)
    for line in plans.format_plan_remarks(estimate):
        console.print(line, highlight=False)


@data_app.command("import")
def data_import(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Class folders, a folder of images, a table, tars or an archive; also on S3."),
    ],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="The dataset's folder, or s3://bucket/prefix.")],
    role: Annotated[DataRole, typer.Option(help="What the images are for.")] = DataRole.unlabeled,
    name: Annotated[str | None, typer.Option(help="The dataset's name; the source's if not given.")] = None,
    split: Annotated[str | None, typer.Option(help="Only rows of a table whose split is this; all if not given.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="A text file with a class name a line, or the dataset.json whose classes to use.")
    ] = None,
    max_side: Annotated[
        int | None, typer.Option(min=8, help="Longest side, px; larger images are made smaller. No limit if not given.")
    ] = None,
    max_rejected_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable images that is still accepted.")
    ] = 0.1,
    shard_samples: Annotated[int, typer.Option(min=1, max=100_000, help="Images in a shard, at most.")] = 10_000,
    shard_mib: Annotated[int, typer.Option(min=1, max=4096, help="MiB in a shard, at most.")] = 256,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as many as cores if not given.")] = None,
) -> None:
    """Make a dataset of any collection of images. Unreadable ones are counted, listed and left out.

    The same command continues an import that was stopped.

    Example: [cyan]ns data import photos/ data/pool[/], [cyan]ns data import labels.csv data/train --role labeled --split train[/]
    """
    from ns.core import log
    from ns.data.importing.ingest import ImportLimits, import_images, source_name
    from ns.storage import open_store

    log.configure_logging()
    dataset = import_images(
        source,
        open_store(destination),
        name=name or source_name(source),
        role=role.value,
        limits=ImportLimits(max_rejected_share, shard_samples, shard_mib, max_side),
        classes=_read_class_names(classes) if classes else None,
        split=split,
        workers=workers,
    )
    typer.echo(
        f"{destination}: {dataset.samples:,} images in {len(dataset.shards)} shards, {dataset.rejected:,} left out, "
        f"digest {dataset.digest[:16]}"
    )


@data_app.command("check")
def data_check(
    datasets: Annotated[
        list[str], typer.Argument(metavar="DATASET", help="Folders or s3:// prefixes of datasets, of any roles.")
    ],
    out: Annotated[str, typer.Option(help="Folder for the lists and for fingerprints, which a later check reuses.")] = "check",
    model: Annotated[
        str | None, typer.Option(help="A model's folder: confirms near duplicates, and looks for wrong labels.")
    ] = None,
    bits: Annotated[int, typer.Option(min=0, max=8, help="Bits of 64 in which hashes of near duplicates may differ.")] = 4,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Succeed although labeled images are also in an evaluation set.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for images that are there twice: in a pool, and above all in a pool or training set and an evaluation set.

    Example: [cyan]ns data check data/pool data/train data/test --out check[/]
    """
    from rich.console import Console

    from ns.cli.progress import check_tables
    from ns.core import log
    from ns.data.dataset import Dataset
    from ns.data.leakage import DUPLICATES, NamedDataset, check_datasets
    from ns.storage import open_store

    log.configure_logging()
    opened = [(uri, open_store(uri)) for uri in datasets]
    loaded = [(uri, store, Dataset.load(store)) for uri, store in opened]
    names = [data.name for _, _, data in loaded]
    checked = [NamedDataset(data.name if names.count(data.name) == 1 else uri, store, data) for uri, store, data in loaded]
    target = open_store(out)
    features = None
    suspect_counts: dict[str, int] = {}
    if model:
        from ns.modeling.predictor import Predictor

        predictor = Predictor(open_store(model), batch=256)
        features = predictor.extract_features
        suspect_counts = {
            dataset.name: _write_suspects(predictor, dataset, target)
            for dataset in checked
            if dataset.dataset.role == "labeled"
        }
    report = check_datasets(checked, target, target.at("fingerprints"), bits=bits, features=features)
    if as_json:
        typer.echo(json.dumps(report.model_dump(mode="json") | {"suspects": suspect_counts}, indent=1))
    else:
        for table in check_tables(report, suspect_counts):
            Console().print(table)
        typer.echo(f"{report.left_out:,} images of pools are in an evaluation set too: they are left out")
        if report.skipped:
            typer.echo(f"{report.skipped:,} comparisons were left out, among images that are too much alike")
        typer.echo(f"lists: {to_shell_path(target.uri)}/")
    roles = {dataset.name: dataset.dataset.role for dataset in checked}
    for overlap in report.overlaps:
        if (roles[overlap.of], roles[overlap.within]) == ("labeled", "evaluation") and overlap.same + overlap.near:
            message = (
                f"{overlap.of}: {overlap.same + overlap.near} of its images are also in the evaluation set {overlap.within} "
                f"(see {to_shell_path(target.uri)}/{DUPLICATES}); remove them from one, or allow it with --allow-overlap"
            )
            if not allow_overlap:
                raise DataError(message)


def _write_suspects(predictor: Any, dataset: Any, target: "Store") -> int:
    import io

    import pyarrow.parquet as pq

    from ns.evaluation.label_errors import find_label_errors

    table = find_label_errors(predictor, dataset.folder, dataset.data)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    target.put(f"suspects-{dataset.data.digest[:16]}.parquet", sink.getvalue())
    return len(table)


@data_app.command("show")
def data_show(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A dataset's folder, or s3://bucket/prefix.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet, as HTML, here.")] = None,
    images: Annotated[int, typer.Option(min=1, max=2000, help="Images on the sheet.")] = 120,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Another seed draws other images.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a dataset holds, and what it looks like.

    Example: [cyan]ns data show data/pool --sheet pool.html[/]
    """
    from rich.console import Console

    from ns.cli.progress import classes_table
    from ns.data.contact_sheet import render_contact_sheet
    from ns.data.dataset import Dataset
    from ns.storage import open_store

    store = open_store(dataset)
    data = Dataset.load(store)
    if as_json:
        typer.echo(json.dumps(data.model_dump(mode="json") | {"digest": data.digest, "samples": data.samples}, indent=1))
    else:
        typer.echo(
            f"{data.name}: {data.role}, {data.samples:,} images, {data.bytes / (1 << 20):,.1f} MiB in {len(data.shards)} shards"
        )
        typer.echo(f"digest {data.digest}, {data.rejected:,} left out")
        if data.classes:
            Console().print(classes_table(store, data))
    if sheet:
        write_page(sheet, render_contact_sheet(store, data, images, seed))
        typer.echo(f"contact sheet: {sheet}", err=as_json)


def _read_class_names(file: Path) -> list[str]:
    from ns.data.dataset import Dataset
    from ns.storage import read_uri

    data = read_uri(str(file))
    if file.suffix == ".json":
        return list(Dataset.parse(data, str(file)).classes)
    names = [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]
    if len(set(names)) != len(names) or len(names) < 2:
        raise DataError(f"{file}: {len(names)} names, {len(set(names))} different ones; must be at least 2, each once")
    return names


# Help lists commands in this order, those above first.
app.command("label")(labels.label)
app.command()(evaluate.evaluate)
app.command()(export.export)
app.command()(trigger.trigger)
app.command()(trigger.watch)
