"""An exported model's card: what it is, how good it is, what it was made from, how to feed it, and what nobody knows of it."""

from collections.abc import Sequence

from ns.export.exporter import ExportManifest
from ns.modeling.manifest import ModelManifest
from ns.reporting.markdown import escape_markdown, format_metric_table, format_table
from ns.reporting.metrics import Metric, align_metrics

CLASSES = 20
"""As many are listed; all are in config.json and in the ONNX file."""


def render_model_card(manifest: ModelManifest, exported: ExportManifest, metrics: Sequence[Metric], run: str | None) -> str:
    """README.md beside an exported model. `measures` are those of the run that made it, empty outside of one."""
    size, arch = exported.resolution, manifest.model.arch
    what = (
        f"student of generation {manifest.generation}"
        if manifest.generation
        else "first teacher, trained on labeled images alone"
    )
    class_names = ", ".join(escape_markdown(name) for name in manifest.classes[:CLASSES])
    more = f", and {len(manifest.classes) - CLASSES:,} more" if len(manifest.classes) > CLASSES else ""
    photographs = manifest.noise.crop == "resized"
    seen = size + manifest.model.test_margin_px
    crop = f"the center, {size} of {seen} parts of the short side" if photographs else "the whole image, made square"
    parts = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "---",
        "",
        f"# {escape_markdown(arch)}, Noisy Student",
        "",
        f"A {escape_markdown(arch)} with {manifest.parameters:,} parameters: the {what} of Noisy Student self-training.",
        f"It sorts images into {len(manifest.classes):,} classes: {class_names}{more}.",
        "",
        "## Input and output",
        "",
        f"RGB, {size} × {size} px: {crop}, resized with bicubic interpolation; scaled to 0–1, then less "
        f"{_format_numbers(manifest.mean)}, divided by {_format_numbers(manifest.std)}, channel by channel. Float32 [N, 3, {size}, {size}] gives logits "
        f"[N, {manifest.model.outputs or len(manifest.classes)}], in the order of the classes in config.json.",
        "",
        "## Measured",
    ]
    if metrics:
        about = f"In the run {escape_markdown(run or '')}; in brackets the 95 % interval, of the gain the gate's."
        parts += ["", about, *format_metric_table(("this model",), align_metrics([metrics]))]
    else:
        parts += ["", "Nothing is known here: it was exported outside of a run. `ns evaluate MODEL DATASET` measures it."]
    parts += ["", "## Forms", "", "Each was run beside the original on the same real images."]
    parts += format_table(
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
    lineage = {name: value for name, value in manifest.lineage.model_dump().items() if value}
    digests = {"model": manifest.digest, "weights": manifest.weights_sha256, **lineage, "images of the check": exported.dataset}
    parts += [
        "",
        "## Made from",
        "",
        "Digests (SHA-256) of what went into it.",
        *format_table(("what", "digest"), _digest_rows(digests)),
    ]
    parts += [
        "",
        "## Limits",
        "",
        "- It knows its classes only: any image gets one of them. Confidence is no measure of whether the image is any of them.",
        "- Pseudo-labels carry the mistakes and the biases of their teachers, and of the images that people labeled first, on to it. "
        "The numbers above are averages over such images as were held out; how it does on others, or on groups of people, is not known.",
        "- It was trained on images of which this card says nothing but digests: whose they are, and what may be done with a model "
        "made from them, is for those to say who own them.",
        "",
        f"Exported by noisy-student {exported.version}.",
    ]
    return "\n".join(parts) + "\n"


def _format_numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _digest_rows(digests: dict[str, str]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), f"`{value}`") for name, value in digests.items()]
