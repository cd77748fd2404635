"""`ns predict`: classes of image files."""

from pathlib import Path
from typing import Annotated

import typer

from ns.cli.options import AsJson, Root
from ns.cli.output import print_json, print_line
from ns.core.errors import DataError
from ns.storage import open_store


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
    from ns.runs.lookup import find_best_model, resolve_run_name

    store = open_store(root)
    predictions = predict_files(store.at(find_best_model(store, resolve_run_name(store, name))), images, top)
    if as_json:
        predictions = list(predictions)
        print_json(predictions)
    failed = False
    for prediction in predictions:
        if prediction.error is not None:
            failed = True
            print_line(f"error: {prediction.path}: {prediction.error}", err=True)
        elif not as_json:
            classes = ", ".join(f"{class_name} {probability:.1%}" for class_name, probability in prediction.classes)
            print_line(f"{prediction.path}: {classes}")
    if failed:
        raise typer.Exit(DataError.exit_code)
