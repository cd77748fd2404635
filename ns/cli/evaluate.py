"""`ns evaluate`: any model on any dataset, outside of runs."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ns.cli.options import AsJson, Root
from ns.core.errors import ConfigError

if TYPE_CHECKING:
    from ns.evaluation.robustness.published import Kind as Published


class Suite(StrEnum):
    clean = "clean"
    corruptions = "corruptions"
    perturbations = "perturbations"
    attacks = "attacks"


class Kind(StrEnum):
    images = "images"
    imagenet_c = "imagenet-c"
    cifar10_c = "cifar10-c"
    imagenet_p = "imagenet-p"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or URI of a model, or a run, whose best model it is.")],
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Folder or URI of a labelled dataset (`ns data import` makes one).")
    ],
    root: Root = "runs",
    suites: Annotated[
        list[Suite] | None, typer.Option("--suite", help="What to measure beside clean accuracy. Repeatable.")
    ] = None,
    kind: Annotated[
        Kind, typer.Option(help="What DATASET is: a dataset, or the folder of a set of corrupted images as it was published.")
    ] = Kind.images,
    images: Annotated[
        int | None, typer.Option(min=1, help="Only so many images, drawn evenly over the classes; all if not given.")
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder or URI for results and predictions, from which the same command goes on.")
    ] = "evaluation",
    classes: Annotated[
        str | None,
        typer.Option(metavar="own|NAMES", help="Choose answers among the dataset's classes only, or among these: A,B,C."),
    ] = None,
    multi_label: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSON or Parquet that names all the right classes of each image (ReaL).")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="FILE", help="A robustness.json whose errors to divide by, as mCE does by AlexNet's.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A=B", help="Override a field of evaluation: severities=[3]. Repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=8192, help="Images in a forward pass.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model on a dataset: accuracy, calibration, corruptions, perturbations, attacks. The same command again continues.

    Example: [cyan]ns evaluate latest data/test --suite corruptions --suite attacks --images 1000[/]
    """
    from rich.console import Console

    from ns.cli.progress import evaluation_tables
    from ns.config.schema import EvaluationConfig, changed
    from ns.core import log
    from ns.evaluation.offline import evaluate_dataset, evaluate_published
    from ns.evaluation.result import Robustness
    from ns.evaluation.robustness.relative_scores import scores
    from ns.runs import records as runs
    from ns.storage import open_store, split_uri

    log.configure()
    config = changed(EvaluationConfig(), overrides or [])
    fields = {"suites": tuple(suite.value for suite in suites)} if suites else {}
    config = config.model_copy(update=fields | ({} if images is None else {"images": images}))
    other = None
    if reference:
        folder, key = split_uri(reference)
        other = Robustness.read(open_store(folder), key)
    place = runs.model_place(open_store(root), model)
    if kind is Kind.images:
        chosen = tuple(classes.split(",")) if classes else None
        found = evaluate_dataset(place, dataset, out, config, batch=batch, classes=chosen, multi_label=multi_label)
    elif classes or multi_label:
        raise ConfigError(f"--classes and --multi-label are for plain images; leave them out for {kind.value}")
    else:
        found = evaluate_published(place, dataset, cast("Published", kind.value), out, config, batch=batch)
    scored = scores(found.robustness, other) if found.robustness else None
    if as_json:
        document = {
            "place": found.place,
            "evaluation": found.evaluation and found.evaluation.model_dump(mode="json"),
            "robustness": found.robustness and found.robustness.model_dump(mode="json"),
            "scores": scored and scored.model_dump(mode="json"),
        }
        typer.echo(json.dumps(document, indent=1))
        return
    console = Console()
    for table in evaluation_tables(found.evaluation, found.robustness, scored):
        console.print(table)
