"""`ns predict`: classes of image files."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ns.cli.options import AsJson, Root
from ns.core.errors import DataError, RunError


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")],
    name: Annotated[str, typer.Option("--run", help="A run's name, the beginning of its name, or 'latest'.")] = "latest",
    root: Root = "runs",
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to print per image, the most likely first.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Classify images with the best model of a run.

    Example: [cyan]ns predict cat.jpg dog.png --run latest[/]
    """
    from ns.modeling.file_predictions import predict_files
    from ns.runs.lookup import resolve_run_name
    from ns.runs.summary import summarize_run
    from ns.storage import open_store

    store = open_store(root)
    summary = summarize_run(store, resolve_run_name(store, name))
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
