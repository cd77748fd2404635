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
    from ns.export.exporter import Exported, Form
    from ns.export.exporter import export as write
    from ns.modeling.manifest import MANIFEST, ModelCard
    from ns.reporting.context import gather
    from ns.reporting.metrics import Measure, measures
    from ns.reporting.model_card import model_card
    from ns.runs import records as runs
    from ns.storage import open_store

    store = open_store(root)
    place = open_store(runs.model_place(store, model))
    # A folder with a model is one, whatever runs are called.
    run = None if open_store(model).exists(MANIFEST) else runs.find(store, model)
    if images:
        folder = open_store(images)
        data = (folder, Dataset.load(folder))
    elif run:
        data = runs.prepared(store, run).heldout.open(store)
    else:
        raise ConfigError(
            "--images: must be given for a model outside of a run: a dataset of its classes to check the export on"
        )

    def describe(card: ModelCard, exported: Exported) -> str:
        known: list[Measure] = []
        if run:
            facts = gather(store, run, pictures=0)
            known = next((measures(facts, one) for one in facts.trained if one.card.digest == card.digest), [])
        return model_card(card, exported, known, run)

    wanted = cast("list[Form]", [form.value for form in dict.fromkeys(forms or [FormOption.timm])])
    exported = write(place, out, wanted, data, count=count, describe=describe)
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
