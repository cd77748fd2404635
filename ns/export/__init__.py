"""Models for programs that do not know this package. It may import `modeling`, `data`, and what is below them."""

from ns.export.exporter import ExportManifest, export_model
from ns.export.forms import ExportForm

__all__ = ["ExportForm", "ExportManifest", "export_model"]
