"""`ns evaluate`: evaluates any model on any dataset, outside of a run."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from ns.cli.options import AsJson, Root
from ns.cli.output import make_table
from ns.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from ns.evaluation.result import Evaluation, Robustness
    from ns.evaluation.robustness.published import PublishedKind
    from ns.evaluation.robustness.scores import RobustnessScores


WORST_CLASSES = 5
"""Number of classes in the table. evaluation.json has them all."""


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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or URI of a model, or a run, for its best model.")],
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Folder or URI of a labeled dataset (`ns data import` makes one).")
    ],
    root: Root = "runs",
    suites: Annotated[
        list[SuiteOption] | None, typer.Option("--suite", help="What to measure in addition to clean accuracy. Repeatable.")
    ] = None,
    kind: Annotated[
        DatasetKind,
        typer.Option(help="What DATASET is: a dataset, or the folder of a published set of corrupted images."),
    ] = DatasetKind.images,
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of images, drawn evenly over the classes. Default: all.")
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder or URI for results and predictions; the same command continues from them.")
    ] = "evaluation",
    classes: Annotated[
        str | None,
        typer.Option(metavar="own|NAMES", help="Choose answers from the dataset's classes only, or from these: A,B,C."),
    ] = None,
    multi_label: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSON or Parquet file that names all right classes of each image (ReaL).")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A robustness.json to which mCE, mFR and mT5D are relative. Default: AlexNet on ImageNet's classes.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A=B", help="Override a field of evaluation: severities=[3]. Repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=8192, help="Images per forward pass.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model on a dataset: accuracy, calibration, corruptions, perturbations, attacks. Run the same command again to continue.

    Example: [cyan]ns evaluate latest data/test --suite corruptions --suite attacks --images 1000[/]
    """
    from rich.console import Console

    from ns.config.loader import with_overrides
    from ns.config.schema import EvaluationConfig
    from ns.core import log
    from ns.evaluation.offline import evaluate_dataset, evaluate_published
    from ns.evaluation.result import Robustness
    from ns.evaluation.robustness.scores import score_robustness
    from ns.runs.lookup import resolve_model_uri
    from ns.storage import open_store, split_uri

    log.configure_logging()
    config = with_overrides(EvaluationConfig(), overrides or [])
    fields = {"suites": tuple(suite.value for suite in suites)} if suites else {}
    config = config.model_copy(update=fields | ({} if images is None else {"images": images}))
    reference_robustness = None
    if reference:
        folder_uri, key = split_uri(reference)
        reference_robustness = Robustness.load_file(open_store(folder_uri), key)
    model_uri = resolve_model_uri(open_store(root), model)
    if kind is DatasetKind.images:
        class_names = tuple(classes.split(",")) if classes else None
        result = evaluate_dataset(
            model_uri, dataset, out, config, batch=batch, classes=class_names, multi_label_uri=multi_label
        )
    elif classes or multi_label:
        raise ConfigError(f"--classes and --multi-label are for plain images; leave them out for {kind.value}")
    else:
        result = evaluate_published(model_uri, dataset, cast("PublishedKind", kind.value), out, config, batch=batch)
    scores = score_robustness(result.robustness, reference_robustness) if result.robustness else None
    if as_json:
        document = {
            "uri": result.uri,
            "evaluation": result.evaluation and result.evaluation.model_dump(mode="json"),
            "robustness": result.robustness and result.robustness.model_dump(mode="json"),
            "scores": scores and scores.model_dump(mode="json"),
        }
        typer.echo(json.dumps(document, indent=1))
        return
    console = Console()
    for table in make_evaluation_tables(result.evaluation, result.robustness, scores):
        console.print(table)


def make_evaluation_tables(
    evaluation: "Evaluation | None", robustness: "Robustness | None", scores: "RobustnessScores | None"
) -> "list[Table]":
    """Accuracy with the worst classes, and accuracy under corruptions, perturbations and attacks."""
    tables = [] if evaluation is None else [_make_accuracy_table(evaluation)]
    return [*tables, *(_make_robustness_tables(robustness, scores) if robustness and scores else [])]


def _make_accuracy_table(evaluation: "Evaluation") -> "Table":
    """Accuracy, calibration, and the worst classes."""
    clean = make_table(evaluation.name, "accuracy", "")
    seed = f", seed {evaluation.subsample.seed}" if evaluation.subsample else ""
    clean.add_row("images (drawn evenly)" if evaluation.subsample else "images", f"{evaluation.images:,}{seed}")
    if evaluation.unreadable:
        clean.add_row("unreadable", f"{evaluation.unreadable:,}")
    clean.add_row("top-1", f"{evaluation.top1:.2%}")
    clean.add_row("top-5", f"{evaluation.top5:.2%}")
    if evaluation.multi_label_top1 is not None:
        clean.add_row(f"any right class ({evaluation.multi_label_images:,} images)", f"{evaluation.multi_label_top1:.2%}")
    clean.add_row("calibration error (ECE)", f"{evaluation.calibration.ece:.2%}")
    if evaluation.scored_classes:
        clean.add_row("answers chosen from", f"{len(evaluation.scored_classes):,} classes")
    class_accuracies = [
        (share, name) for share, name in zip(evaluation.class_accuracy, evaluation.classes, strict=True) if share is not None
    ]
    for share, name in sorted(class_accuracies)[:WORST_CLASSES]:
        clean.add_row(f"class {escape(name)}", f"{share:.1%}")
    return clean


def _make_robustness_tables(robustness: "Robustness", scores: "RobustnessScores") -> "list[Table]":
    """Raw numbers, with the scores relative to a reference in the titles."""
    tables = []
    image_count = f"{robustness.images:,} images"
    if robustness.corruptions:
        relative = "" if scores.mce is None else f"mCE {scores.mce:.1f} relative to {scores.mce_relative_to}, "
        title = f"corruptions: {relative}mean error {scores.corruption_error or 0:.1%}, {image_count}"
        table = make_table(title, "error at severity", *map(str, robustness.severities), "mean")
        for kind, mean in robustness.mean_corruption_errors().items():
            table.add_row(kind.replace("_", " "), *(f"{rate:.1%}" for rate in robustness.corruptions[kind]), f"{mean:.1%}")
        tables.append(table)
    if robustness.perturbations:
        relative = "" if scores.mfr is None else f"mFR {scores.mfr:.1f} relative to {scores.mfr_relative_to}, "
        title = f"perturbations: {relative}mean flip probability {scores.flip_probability or 0:.2%}, {image_count}"
        table = make_table(title, "along a sequence", "flip probability", "top-5 distance")
        for kind, flips in robustness.perturbations.items():
            table.add_row(kind.replace("_", " "), f"{flips.flip_probability:.2%}", f"{flips.top5_distance:.3f}")
        tables.append(table)
    if robustness.attacks:
        table = make_table(f"attacks: {image_count}", "", "epsilon, of 255", "steps", "step size", "top-1")
        clean = "" if robustness.top1 is None else f"{robustness.top1:.1%}"
        table.add_row("none", "0", "", "", clean)
        for attack in robustness.attacks:
            table.add_row(
                attack.name.upper(), f"{attack.epsilon:g}", str(attack.steps), f"{attack.step_size:.3g}", f"{attack.top1:.1%}"
            )
        tables.append(table)
    return tables
