"""Pages about label sets: the comparison of two, also as Markdown, and the audit of one."""

from markupsafe import Markup

from ns.data.dataset import Dataset
from ns.labeling.audit import AuditSheet
from ns.labeling.diff import LabelDiff
from ns.reporting import charts
from ns.reporting.markdown import render_text
from ns.reporting.page import MATRIX_CLASSES
from ns.reporting.pictures import make_thumbnails, read_flip_pictures
from ns.reporting.templates import load_script, render_page
from ns.storage import Store

AUDIT_PX = 160
"""Size of a picture: large enough to judge a photograph, small enough for 400 of them in a page of a few MB."""


def render_diff_page(diff: LabelDiff, names: tuple[str, str], store: Store, pool: Dataset) -> str:
    """One HTML page that loads nothing. `names`: the two label sets as the user named them."""
    return render_page(
        "diff.html.j2",
        title=f"{names[0]} → {names[1]}",
        diff=diff,
        names=names,
        chart=charts.draw_confidence_shift(diff.histogram_before, diff.histogram_after),
        rows=_flip_matrix(diff),
        shown=read_flip_pictures(store, pool, diff),
    )


def render_audit_page(sheet: AuditSheet, classes: tuple[str, ...], name: str, store: Store, pool: Dataset) -> str:
    """One HTML page that loads nothing: the sample's pictures, and a form to mark wrong labels. `name`: the label set's."""
    sources = make_thumbnails(store, pool, [(image.shard, image.row) for image in sheet.images], AUDIT_PX)
    script_text, policy = load_script("audit.js")
    return render_page(
        "audit.html.j2",
        title=f"Audit of {name}",
        scripts=policy,
        sheet=sheet,
        name=name,
        classes=classes,
        images=zip(sheet.images, sources, strict=True),
        script=Markup(script_text),
    )


def _flip_matrix(diff: LabelDiff) -> list[tuple[str, list[tuple[int, float]]]]:
    """Rows (class before, cells): each cell holds images, and their share of the row divided by the largest share of the matrix.

    Empty for more than `MATRIX_CLASSES` classes or without flips."""
    if len(diff.classes) > MATRIX_CLASSES or not diff.matrix:
        return []
    images = {(cell.old_class_id, cell.new_class_id): cell.images for cell in diff.matrix}
    before = [max(1, row.before) for row in diff.by_class]
    # Flips are a small part of a class: the scale of colors ends at the largest share.
    largest = max(count / before[old] for (old, _), count in images.items())
    return [
        (
            row.name,
            [
                (images.get((old, new), 0), images.get((old, new), 0) / before[old] / largest)
                for new in range(len(diff.classes))
            ],
        )
        for old, row in enumerate(diff.by_class)
    ]


def render_diff_markdown(diff: LabelDiff, names: tuple[str, str]) -> str:
    """The comparison as GitHub Flavored Markdown, for an issue or a pull request."""
    return render_text("diff.md.j2", diff=diff, names=names)
