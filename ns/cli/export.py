"""`ns export`: a model in forms that other programs read."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from ns.cli.options import AsJson, Root
from ns.core.errors import ConfigError


class FormOption(StrEnum):
    timm = "timm"
    onnx = "onnx"
    torch = "torch"


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, whose best model it is, or the folder or URI of a model.")
    ] = "latest",
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier export in it is replaced.")] = Path("export"),
    forms: Annotated[
        list[FormOption] | None,
        typer.Option(
            "--form", help="timm: safetensors and config.json (the default); onnx; torch: a torch.export program. Repeatable."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="Dataset that the forms are checked on; a run's held-out images if not given."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=4096, help="Images that the forms are checked on.")] = 64,
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Export a model for programs that know only timm, ONNX or torch; each form is checked on real images first.

    Example: [cyan]ns export latest --out release --form timm --form onnx[/]
    """
    from rich.console import Console
    from rich.table import Table

    from ns.data.dataset import Dataset
    from ns.export.exporter import ExportForm, ExportManifest
    from ns.export.exporter import export_model as write
    from ns.modeling.manifest import MANIFEST, ModelManifest
    from ns.reporting.context import gather_context
    from ns.reporting.metrics import Metric, collect_metrics
    from ns.reporting.model_card import render_model_card
    from ns.runs import records as runs
    from ns.storage import open_store

    store = open_store(root)
    model_store = open_store(runs.resolve_model_uri(store, model))
    # A folder with a model is one, whatever runs are called.
    run = None if open_store(model).exists(MANIFEST) else runs.resolve_run_name(store, model)
    if images:
        folder = open_store(images)
        data = (folder, Dataset.load(folder))
    elif run:
        data = runs.read_prepared_data(store, run).heldout.open_dataset(store)
    else:
        raise ConfigError(
            "--images: must be given for a model outside of a run: a dataset of its classes to check the export on"
        )

    def describe_export(manifest: ModelManifest, exported: ExportManifest) -> str:
        model_measures: list[Metric] = []
        if run:
            facts = gather_context(store, run, pictures=0)
            model_measures = next(
                (collect_metrics(facts, model) for model in facts.models if model.manifest.digest == manifest.digest), []
            )
        return render_model_card(manifest, exported, model_measures, run)

    form_names = cast("list[ExportForm]", [form.value for form in dict.fromkeys(forms or [FormOption.timm])])
    exported = write(model_store, out, form_names, data, count=count, describe=describe_export)
    if as_json:
        typer.echo(exported.model_dump_json(indent=1))
        return
    table = Table("form", "file", "images", "largest difference of logits", "same class")
    for check in exported.checks:
        difference = f"{check.largest_difference:.2g} of {check.largest_logit:.3g}"
        table.add_row(check.form, str(out / check.file), str(check.images), difference, f"{check.same_top1:.1%}")
    console = Console()
    console.print(table)
    console.print(f"model card: {out / 'README.md'}", soft_wrap=True)
