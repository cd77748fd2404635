"""`ns evaluate`: evaluates any model on any dataset, outside of a run."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from ns.cli.options import AsJson, ModelArgument, Root, override_option
from ns.cli.output import make_console, make_table, print_json
from ns.core.errors import ConfigError
from ns.storage import open_store, read_uri

if TYPE_CHECKING:
    from ns.evaluation.result import Evaluation, Robustness
    from ns.evaluation.robustness.scores import RobustnessScores

WORST_CLASSES = 5
"""Number of classes in the table. evaluation.json has them all."""

SuiteOption = StrEnum("SuiteOption", ["clean", "corruptions", "perturbations", "attacks"])


def evaluate(
    model: ModelArgument,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A labeled dataset, as `ns data import` makes one.")],
    root: Root = "runs",
    suites: Annotated[list[SuiteOption] | None, typer.Option("--suite", help="What else to measure. Repeatable.")] = None,
    kind: Annotated[
        Literal["images", "imagenet-c", "cifar10-c", "imagenet-p"],
        typer.Option(help="What DATASET is: a dataset, or a published set."),
    ] = "images",
    images: Annotated[int | None, typer.Option(min=1, help="Images to draw, evenly over the classes. Default: all.")] = None,
    out: Annotated[str, typer.Option(help="Folder or URI of results; the same command continues from them.")] = "evaluation",
    classes: Annotated[
        str | None,
        typer.Option(metavar="own|NAMES", help="Choose answers from the dataset's classes only, or from these: A,B,C."),
    ] = None,
    multi_label: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSON or Parquet file that names all right classes of each image (ReaL).")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The robustness.json that scores are relative to. Default: AlexNet's, for ImageNet."),
    ] = None,
    overrides: Annotated[list[str] | None, override_option("evaluation, as in severities=[3]")] = None,
    batch: Annotated[int, typer.Option(min=1, max=8192, help="Images per forward pass.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model on a dataset: accuracy, calibration, corruptions, perturbations, attacks. Run the same command again to continue.

    Example: [cyan]ns evaluate latest data/test --suite corruptions --suite attacks --images 1000[/]
    """
    from ns.config.loader import with_overrides
    from ns.config.schema import EvaluationConfig
    from ns.core.log import configure_logging
    from ns.evaluation.offline import evaluate_dataset, evaluate_published
    from ns.evaluation.result import Robustness
    from ns.evaluation.robustness.scores import score_robustness
    from ns.runs.lookup import resolve_model_uri

    configure_logging()
    fields = {"suites": suites and tuple(suite.value for suite in suites), "images": images}
    config = with_overrides(EvaluationConfig(), overrides or [])
    config = config.model_copy(update={field: value for field, value in fields.items() if value})
    reference_robustness = Robustness.parse(read_uri(reference), reference) if reference else None
    model_uri = resolve_model_uri(open_store(root), model)
    if kind == "images":
        class_names = tuple(classes.split(",")) if classes else None
        result = evaluate_dataset(
            model_uri, dataset, out, config, batch=batch, classes=class_names, multi_label_uri=multi_label
        )
    elif classes or multi_label:
        raise ConfigError(f"--classes and --multi-label are for plain images; leave them out for {kind}")
    else:
        result = evaluate_published(model_uri, dataset, kind, out, config, batch=batch)
    scores = score_robustness(result.robustness, reference_robustness) if result.robustness else None
    if as_json:
        measured = {"evaluation": result.evaluation, "robustness": result.robustness, "scores": scores}
        print_json({"uri": result.uri, **measured})
        return
    if result.evaluation:
        make_console().print(_make_accuracy_table(result.evaluation))
    if result.robustness and scores:
        make_console().print(*_make_robustness_tables(result.robustness, scores))


def _make_accuracy_table(evaluation: "Evaluation") -> Table:
    """Accuracy, calibration, and the worst classes."""
    clean = make_table(evaluation.name, "accuracy", "")
    seed = f", seed {evaluation.subsample.seed}" if evaluation.subsample else ""
    clean.add_row("images (drawn evenly)" if evaluation.subsample else "images", f"{evaluation.images:,}{seed}")
    if evaluation.unreadable:
        clean.add_row("unreadable", f"{evaluation.unreadable:,}")
    clean.add_row("top-1", f"{evaluation.top1:.2%}")
    clean.add_row("top-5", f"{evaluation.top5:.2%}")
    clean.add_row("balanced accuracy", f"{evaluation.balanced_accuracy:.2%}")
    if evaluation.multi_label_top1 is not None:
        clean.add_row(f"any right class ({evaluation.multi_label_images:,} images)", f"{evaluation.multi_label_top1:.2%}")
    clean.add_row("calibration error (ECE)", f"{evaluation.calibration.ece:.2%}")
    if evaluation.scored_classes:
        clean.add_row("answers chosen from", f"{len(evaluation.scored_classes):,} classes")
    if evaluation.never_predicted:
        clean.add_row("classes never predicted", f"{len(evaluation.never_predicted):,}")
    class_accuracies = [
        (share, name) for share, name in zip(evaluation.class_accuracy, evaluation.classes, strict=True) if share is not None
    ]
    for share, name in sorted(class_accuracies)[:WORST_CLASSES]:
        clean.add_row(f"class {name}", f"{share:.1%}")
    return clean


def _make_robustness_tables(robustness: "Robustness", scores: "RobustnessScores") -> list[Table]:
    """Raw numbers, with the scores relative to a reference in the titles."""
    tables: list[Table] = []
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
