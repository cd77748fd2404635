"""`ns config …`: experiments as files."""

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ns.cli.options import ConfigArgument, Overrides, Root, load_experiment_argument
from ns.cli.output import print_json, print_line, print_text
from ns.core.errors import prefix_errors
from ns.storage import open_store

if TYPE_CHECKING:
    from ns.config.schema import Experiment, GateConfig
    from ns.data.dataset import Dataset
    from ns.storage import Store

ASSUMED_CLASSES = 1000
"""Classes, as long as no data are read."""
TABLE_CLASSES = (10, 100, 1000)
"""Numbers of classes that needs are shown for, as long as it is not known."""

app = typer.Typer(help="Show and check experiments, and describe their fields.", no_args_is_help=True)


@app.command("show")
def show_config(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Print an experiment with every field, defaults included.

    Example: [cyan]ns config show quickstart --set generations=1[/]
    """
    from ns.config.loader import dump_experiment

    print_text(dump_experiment(load_experiment_argument(config, overrides)))


@app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of experiments, for editors and readers.

    Example: [cyan]ns config schema > experiment.schema.json[/]
    """
    from ns.config.schema import Experiment

    print_json(Experiment.model_json_schema())


@app.command("check")
def check_config(
    config: ConfigArgument,
    overrides: Overrides = None,
    heldout: Annotated[
        int | None, typer.Option(min=1, help="Held-out images; default: those of data.heldout, if it is a dataset.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Number of classes, for use with --heldout.")] = None,
    root: Root = "runs",
) -> None:
    """Check an experiment and its networks without running anything; say how many held-out images the gate needs.

    Example: [cyan]ns config check my-experiment.yaml --heldout 2000 --classes 20[/]
    """
    experiment = load_experiment_argument(config, overrides, root)
    from ns.config.idle_settings import describe_idle_settings
    from ns.modeling.factory import check_models

    with prefix_errors(str(config)):
        remarks = check_models(experiment, root=open_store(root))
    print_line(f"{config}: good")
    for remark in [*remarks, *describe_idle_settings(experiment)]:
        print_line(f"warning: {remark}")
    for line in describe_missing_data(experiment):
        print_line(line)
    for line in describe_shared_memory(experiment):
        print_line(line)
    if experiment.selection.precision is not None:
        from ns.labeling.thresholds import count_required_images

        required = count_required_images(experiment.selection.precision, experiment.selection.confidence)
        print_line(
            f"selection.precision {experiment.selection.precision:g}: a threshold of its own takes {required:,} calibration images that "
            "the teacher puts in the class; classes with fewer share one"
        )
    given = (heldout, classes) if heldout else count_prepared_heldout(experiment)
    for line in describe_gate_needs(experiment.gate, *given):
        print_line(line)


def describe_missing_data(experiment: "Experiment") -> list[str]:
    """Local data that are not there. No fault of an experiment that is checked before its data come, or runs elsewhere."""
    from ns.data.importing.sources import resolve_local_path

    return [
        f"warning: {field}: {uri}: there is no such file or folder on this machine"
        for field, uri in experiment.map_uris().items()
        # Patterns such as pool-{000..127}.tar stand for many files.
        if not uri.startswith("s3://") and "{" not in uri and not resolve_local_path(uri).exists()
    ]


def count_prepared_heldout(experiment: "Experiment") -> tuple[int | None, int | None]:
    """Held-out images that will decide, and classes; None where the data would have to be listed first."""
    from ns.core.errors import NsError
    from ns.data.locate import classify_uri, open_data

    uri = experiment.data.heldout
    with suppress(NsError):  # Data that are not there yet are no fault of the experiment.
        if classify_uri(uri) != "source":
            with open_data(uri, "evaluation") as data:
                _, dataset = cast("tuple[Store, Dataset]", data)
                sets_apart = experiment.needs_calibration and experiment.data.calibration is None
                share = 1 - experiment.data.calibration_share if sets_apart else 1
                return round(share * dataset.samples), len(dataset.classes)
    return None, None


def describe_gate_needs(gate: "GateConfig", images: int | None, classes: int | None) -> list[str]:
    """What the requirements of the gate take to see a change, and what so many held-out images can show."""
    from ns.evaluation.gate import FEW_IMAGES
    from ns.evaluation.power import DISCORDANT, POWER, RISE_SPREADS, find_seen_change, list_needs

    lines = [f"held-out images to see a true change with probability {POWER:g}, at level {gate.level:g}:"]
    class_counts = (classes,) if classes else TABLE_CLASSES
    needs: dict[str, list[str]] = {}
    for count in class_counts:
        for need in list_needs(gate, count):
            of_classes = f", {count:,} classes" if need.field == "max_class_drop" else ""
            row = f"{need.change:+.3g} points: {need.images:,}{' per class' if of_classes else ''}"
            rows = needs.setdefault(f"{need.field} {getattr(gate, need.field):g}{of_classes}", [])
            rows += [] if row in rows else [row]
    fields = list(dict.fromkeys(title.split()[0] for title in needs))
    lines += [
        f"  {title}: {'; '.join(needs[title])}" for title in sorted(needs, key=lambda title: fields.index(title.split()[0]))
    ]
    if images:
        classes = classes or ASSUMED_CLASSES
        seen = []
        for field in fields:
            count = max(1, images // classes) if field == "max_class_drop" else images
            change = find_seen_change(gate, field, count, classes)
            seen.append(f"{field} none" if change is None else f"{field} {change:+.1f} points")
        lines.append(f"  with {images:,} images of {classes:,} classes, from: {', '.join(seen)}")
        if images < FEW_IMAGES:
            lines.append(f"  warning: fewer than {FEW_IMAGES} images show only very large changes; hold out more")
    assumption = f"only one of two models is right on {DISCORDANT:.0%} of the images"
    spreads = [f"{RISE_SPREADS[field]:.0f} for {field}" for field in fields if field in RISE_SPREADS]
    if spreads:
        assumption += f"; standard deviation of an image's part of a rise, in points: {', '.join(spreads)}"
    return [*lines, f"  assumed: {assumption}"]


def describe_shared_memory(experiment: "Experiment") -> list[str]:
    """What the data loaders of each role take of shared memory, if it is more than a container has by default."""
    from rich.filesize import decimal

    from ns.data.loading.shared_memory import CONTAINER_DEFAULT, StepShape, split_step

    lines = []
    for field, role in experiment.map_roles().items():
        train, is_student = role.train, field != "teacher"
        classes = role.model.outputs or ASSUMED_CLASSES
        pseudo_batch, resolution = train.pseudo_batch * is_student, role.model.resolution
        shape = StepShape(train.labeled_batch, pseudo_batch, resolution, classes, role.noise.mixes_images)
        if (size := split_step(shape, train.loader_workers).bytes_in_flight) > CONTAINER_DEFAULT:
            lines.append(
                f"{field}: data loaders take {decimal(size)} of memory in /dev/shm; with less, training may wait for images"
            )
    return lines
