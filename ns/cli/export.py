"""`ns export`: writes a model in forms that other programs read."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from ns.cli.options import AsJson, Root
from ns.cli.output import make_console, make_table, print_json, print_line
from ns.core.errors import ConfigError, DataError, StoreError
from ns.storage import open_store

FormOption = StrEnum("FormOption", ["timm", "onnx", "torch"])


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run, for its best model, a model's folder or URI, or a pointer: models/production.yaml."
        ),
    ] = "latest",
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier export in it is replaced.")] = Path("export"),
    forms: Annotated[
        list[FormOption] | None,
        typer.Option("--form", help="timm (the default), onnx, or torch: a torch.export program. Repeatable."),
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Dataset to check the forms on. Default: the run's held-out images.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=4096, help="Images that the forms are checked on.")] = 64,
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Export a model for programs that use plain timm, ONNX or torch. Each form is checked on real images first.

    Example: [cyan]ns export latest --out release --form timm --form onnx[/]
    """
    from ns.data.dataset import Dataset
    from ns.export import ExportForm, ExportManifest, export_model
    from ns.modeling.manifest import ModelManifest
    from ns.promotion.promote import read_pointer
    from ns.reporting.context import gather_context
    from ns.reporting.metrics import Metric, collect_metrics
    from ns.reporting.model_card import render_model_card
    from ns.runs.lookup import read_prepared_data, resolve_model_uri, resolve_run_name

    pointer = None
    if model.endswith((".yaml", ".yml")):
        pointer = read_pointer(Path(model))
        if pointer is None:
            raise StoreError(f"{model}: no such file; `ns promote RUN --to {model}` writes it")
        root, model = pointer.root, pointer.model
    store = open_store(root)
    model_store = open_store(resolve_model_uri(store, model))
    if pointer and ModelManifest.load(model_store).digest != pointer.digest:
        raise DataError(f"{model}: is not the model with the digest that the pointer names; run `ns promote check`")
    # A folder that holds a model wins over a run of the same name.
    is_folder = open_store(model).exists(ModelManifest.filename)
    run = pointer.run if pointer else None if is_folder else resolve_run_name(store, model)
    if images:
        image_store = open_store(images)
        data = (image_store, Dataset.load(image_store))
    elif run:
        data = read_prepared_data(store, run).heldout.open_dataset(store)
    else:
        raise ConfigError(
            "--images: required for a model outside of a run; name a dataset of its classes to check the export on"
        )

    def describe_export(manifest: ModelManifest, exported: ExportManifest) -> str:
        metrics: list[Metric] = []
        if run:
            context = gather_context(store, run, pictures=0)
            trained = next((model for model in context.models if model.manifest.digest == manifest.digest), None)
            metrics = collect_metrics(context, trained) if trained else []
        return render_model_card(manifest, exported, metrics, run)

    form_names = cast("list[ExportForm]", [form.value for form in dict.fromkeys(forms or [FormOption.timm])])
    exported = export_model(model_store, out, form_names, data, count=count, describe=describe_export)
    if as_json:
        print_json(exported)
        return
    headers = ("form", "file", "images", "largest difference of logits", "same class")
    table = make_table("", *headers, text_columns=range(2))
    for check in exported.checks:
        difference = f"{check.largest_difference:.2g} of {check.largest_logit:.3g}"
        table.add_row(check.form, str(out / check.file), str(check.images), difference, f"{check.same_top1:.1%}")
    make_console().print(table)
    print_line(f"model card: {out / 'README.md'}")
