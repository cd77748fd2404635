"""The model card of an exported model: input, output, metrics, lineage and limits."""

from collections.abc import Sequence

from ns.export.exporter import ExportManifest
from ns.modeling.manifest import ModelManifest
from ns.reporting.markdown import render_text
from ns.reporting.metrics import Metric, align_metrics


def render_model_card(manifest: ModelManifest, exported: ExportManifest, metrics: Sequence[Metric], run: str | None) -> str:
    """The README.md of an exported model. `metrics`: those of the run that trained it; empty for a model outside of a run."""
    return render_text(
        "model_card.md.j2",
        manifest=manifest,
        exported=exported,
        run=run,
        metric_rows=align_metrics([metrics]),
        digests={
            "model": manifest.digest,
            "weights": manifest.weights_sha256,
            **manifest.lineage.model_dump(exclude={"init_source", "init_license"}),
            "images of the comparison": exported.dataset,
        },
    )
