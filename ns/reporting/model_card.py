"""The model card of an exported model: input, output, metrics, lineage and limits."""

from collections.abc import Sequence

from ns.export.exporter import ExportManifest
from ns.modeling.manifest import ModelManifest
from ns.reporting.markdown import escape_markdown, format_metric_table, format_table
from ns.reporting.metrics import Metric, align_metrics

CLASSES = 20
"""Classes that the card lists; all are in config.json and in the ONNX file."""


def render_model_card(manifest: ModelManifest, exported: ExportManifest, metrics: Sequence[Metric], run: str | None) -> str:
    """The README.md of an exported model. `metrics`: those of the run that trained it; empty for a model outside of a run."""
    size, arch = exported.resolution, manifest.model.arch
    what = (
        f"student of generation {manifest.generation}"
        if manifest.generation
        else "first teacher, trained on labeled images alone"
    )
    class_names = ", ".join(escape_markdown(name) for name in manifest.classes[:CLASSES])
    more = f", and {len(manifest.classes) - CLASSES:,} more" if len(manifest.classes) > CLASSES else ""
    photographs = manifest.model.crop == "resized"
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
        f"It classifies images into {len(manifest.classes):,} classes: {class_names}{more}.",
        "",
        "## Input and output",
        "",
        f"RGB, {size} × {size} px: {crop}, resized with bicubic interpolation; scaled to 0–1, minus "
        f"{_format_numbers(manifest.mean)}, divided by {_format_numbers(manifest.std)}, per channel. Float32 "
        f"[N, 3, {size}, {size}] gives logits [N, {manifest.model.outputs or len(manifest.classes)}], in the order "
        "of the classes in config.json.",
        "",
        "## Metrics",
    ]
    if metrics:
        about = f"Measured in the run {escape_markdown(run or '')}; brackets hold 95 % intervals, for the gain the gate's."
        parts += ["", about, *format_metric_table(("this model",), align_metrics([metrics]))]
    else:
        parts += ["", "Not measured: the model was exported outside of a run. `ns evaluate MODEL DATASET` measures it."]
    parts += ["", "## Forms", "", "Each form was compared with the original on the same real images."]
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
    digests = {
        "model": manifest.digest,
        "weights": manifest.weights_sha256,
        **lineage,
        "images of the comparison": exported.dataset,
    }
    parts += [
        "",
        "## Lineage",
        "",
        "Digests (SHA-256) of the model and its inputs.",
        *format_table(("what", "digest"), _digest_rows(digests)),
    ]
    parts += [
        "",
        "## Limits",
        "",
        "- The model assigns one of its classes to any image. Its confidence does not tell whether the image shows any of them.",
        "- The model inherits the mistakes and biases of its teachers' pseudo-labels, and of the first labeled images. "
        "The metrics are averages over the held-out images; accuracy on other images, or on groups of people, is not known.",
        "- The card identifies the training images only by digests. Their owners decide how a model trained on them may be used.",
        "",
        f"Exported by noisy-student {exported.version}.",
    ]
    return "\n".join(parts) + "\n"


def _format_numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _digest_rows(digests: dict[str, str]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), f"`{value}`") for name, value in digests.items()]
