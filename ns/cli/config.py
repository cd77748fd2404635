"""`ns config …`: experiments as files."""

import typer

from ns.cli.options import ConfigArgument, Overrides, load_experiment_argument
from ns.cli.output import print_json

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
