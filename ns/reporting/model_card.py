"""An exported model's card: what it is, how good it is, what it was made from, how to feed it, and what nobody knows of it."""

from collections.abc import Sequence

from ns.export.exporter import Exported
from ns.modeling.manifest import ModelCard
from ns.reporting.markdown import measured, plain, table
from ns.reporting.metrics import Measure, lines

CLASSES = 20
"""As many are listed; all are in config.json and in the ONNX file."""


def model_card(card: ModelCard, exported: Exported, measures: Sequence[Measure], run: str | None) -> str:
    """README.md beside an exported model. `measures` are those of the run that made it, empty outside of one."""
    size, arch = exported.resolution, card.model.arch
    what = f"student of generation {card.generation}" if card.generation else "first teacher, trained on labelled images alone"
    named = ", ".join(plain(name) for name in card.classes[:CLASSES])
    more = f", and {len(card.classes) - CLASSES:,} more" if len(card.classes) > CLASSES else ""
    photographs = card.noise.crop == "resized"
    seen = size + card.model.test_margin_px
    crop = f"the centre, {size} of {seen} parts of the short side" if photographs else "the whole image, made square"
    made = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "---",
        "",
        f"# {plain(arch)}, Noisy Student",
        "",
        f"A {plain(arch)} with {card.parameters:,} parameters: the {what} of Noisy Student self-training.",
        f"It sorts images into {len(card.classes):,} classes: {named}{more}.",
        "",
        "## Input and output",
        "",
        f"RGB, {size} × {size} px: {crop}, resized with bicubic interpolation; scaled to 0–1, then less "
        f"{_numbers(card.mean)}, divided by {_numbers(card.std)}, channel by channel. Float32 [N, 3, {size}, {size}] gives logits "
        f"[N, {card.model.outputs or len(card.classes)}], in the order of the classes in config.json.",
        "",
        "## Measured",
    ]
    if measures:
        about = f"In the run {plain(run or '')}; in brackets the 95 % interval, of the gain the gate's."
        made += ["", about, *measured(("this model",), lines([measures]))]
    else:
        made += ["", "Nothing is known here: it was exported outside of a run. `ns evaluate MODEL DATASET` measures it."]
    made += ["", "## Forms", "", "Each was run beside the original on the same real images."]
    made += table(
        ("form", "file", "images", "largest difference of logits", "same class", "sha256"),
        (
            (
                check.form,
                f"`{check.file}`",
                str(check.images),
                f"{check.largest_difference:.2g} of {check.largest_logit:.3g}",
                f"{100 * check.same_top1:.1f} %",
                f"`{check.sha256[:16]}`",
            )
            for check in exported.checks
        ),
    )
    lineage = {name: value for name, value in card.lineage.model_dump().items() if value}
    facts = {"model": card.digest, "weights": card.weights_sha256, **lineage, "images of the check": exported.dataset}
    made += ["", "## Made from", "", "Digests (SHA-256) of what went into it.", *table(("what", "digest"), _digests(facts))]
    made += [
        "",
        "## Limits",
        "",
        "- It knows its classes only: any image gets one of them. Confidence is no measure of whether the image is any of them.",
        "- Pseudo-labels carry the mistakes and the biases of their teachers, and of the images that people labelled first, on to it. "
        "The numbers above are averages over such images as were held out; how it does on others, or on groups of people, is not known.",
        "- It was trained on images of which this card says nothing but digests: whose they are, and what may be done with a model "
        "made from them, is for those to say who own them.",
        "",
        f"Exported by noisy-student {exported.version}.",
    ]
    return "\n".join(made) + "\n"


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _digests(facts: dict[str, str]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), f"`{value}`") for name, value in facts.items()]
