"""`ns config …`: experiments as files."""

from typing import TYPE_CHECKING

import typer

from ns.cli.options import ConfigArgument, Overrides, load_experiment_argument
from ns.cli.output import print_json

if TYPE_CHECKING:
    from ns.config.schema import Experiment

ASSUMED_CLASSES = 1000
"""Classes, as long as no data are read."""

app = typer.Typer(help="Show and check experiments, and describe their fields.", no_args_is_help=True)


@app.command("show")
def show_config(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Print an experiment with every field, defaults included.

    Example: [cyan]ns config show quickstart --set generations=1[/]
    """
    from ns.config.loader import dump_experiment

    typer.echo(dump_experiment(load_experiment_argument(config, overrides)), nl=False)


@app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of experiments, for editors and readers.

    Example: [cyan]ns config schema > experiment.schema.json[/]
    """
    from ns.config.schema import Experiment

    print_json(Experiment.model_json_schema())


@app.command("check")
def check_config(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Check an experiment and its networks without running anything.

    Example: [cyan]ns config check my-experiment.yaml[/]
    """
    experiment = load_experiment_argument(config, overrides)
    from ns.modeling.factory import check_models

    check_models(experiment)
    typer.echo(f"{config}: good")
    for line in describe_shared_memory(experiment):
        typer.echo(line)


def describe_shared_memory(experiment: "Experiment") -> list[str]:
    """What the data loaders of each role take of shared memory, if it is more than a container has by default."""
    from rich.filesize import decimal

    from ns.data.loading.shared_memory import CONTAINER_DEFAULT, StepShape, split_step

    lines = []
    for field, role in experiment.map_roles().items():
        train, is_student = role.train, field != "teacher"
        classes = role.model.outputs or ASSUMED_CLASSES
        shape = StepShape(train.labeled_batch, train.pseudo_batch * is_student, role.model.resolution, classes)
        if (size := split_step(shape, train.loader_workers).bytes_in_flight) > CONTAINER_DEFAULT:
            lines.append(
                f"{field}: data loaders take {decimal(size)} of memory in /dev/shm; with less, training may wait for images"
            )
    return lines
