"""`ns evaluate`: any model on any dataset, outside of runs."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ns.cli.options import AsJson, Root
from ns.core.errors import ConfigError

if TYPE_CHECKING:
    from ns.evaluation.robustness.published import PublishedKind as Published


class SuiteOption(StrEnum):
    clean = "clean"
    corruptions = "corruptions"
    perturbations = "perturbations"
    attacks = "attacks"


class DatasetKind(StrEnum):
    images = "images"
    imagenet_c = "imagenet-c"
    cifar10_c = "cifar10-c"
    imagenet_p = "imagenet-p"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or URI of a model, or a run, whose best model it is.")],
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Folder or URI of a labeled dataset (`ns data import` makes one).")
    ],
    root: Root = "runs",
    suites: Annotated[
        list[SuiteOption] | None, typer.Option("--suite", help="What to measure beside clean accuracy. Repeatable.")
    ] = None,
    kind: Annotated[
        DatasetKind,
        typer.Option(help="What DATASET is: a dataset, or the folder of a set of corrupted images as it was published."),
    ] = DatasetKind.images,
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
    from ns.config.schema import EvaluationConfig, with_overrides
    from ns.core import log
    from ns.evaluation.offline import evaluate_dataset, evaluate_published
    from ns.evaluation.result import Robustness
    from ns.evaluation.robustness.relative_scores import score_robustness
    from ns.runs import records as runs
    from ns.storage import open_store, split_uri

    log.configure_logging()
    config = with_overrides(EvaluationConfig(), overrides or [])
    fields = {"suites": tuple(suite.value for suite in suites)} if suites else {}
    config = config.model_copy(update=fields | ({} if images is None else {"images": images}))
    reference_scores = None
    if reference:
        folder, key = split_uri(reference)
        reference_scores = Robustness.load_file(open_store(folder), key)
    model_uri = runs.resolve_model_uri(open_store(root), model)
    if kind is DatasetKind.images:
        class_names = tuple(classes.split(",")) if classes else None
        result = evaluate_dataset(
            model_uri, dataset, out, config, batch=batch, classes=class_names, multi_label_uri=multi_label
        )
    elif classes or multi_label:
        raise ConfigError(f"--classes and --multi-label are for plain images; leave them out for {kind.value}")
    else:
        result = evaluate_published(model_uri, dataset, cast("Published", kind.value), out, config, batch=batch)
    comparison_scores = score_robustness(result.robustness, reference_scores) if result.robustness else None
    if as_json:
        document = {
            "place": result.uri,
            "evaluation": result.evaluation and result.evaluation.model_dump(mode="json"),
            "robustness": result.robustness and result.robustness.model_dump(mode="json"),
            "scores": comparison_scores and comparison_scores.model_dump(mode="json"),
        }
        typer.echo(json.dumps(document, indent=1))
        return
    console = Console()
    for table in evaluation_tables(result.evaluation, result.robustness, comparison_scores):
        console.print(table)
