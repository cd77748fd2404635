"""The tables of `ns labels`."""

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from ns.cli.output import make_table, shorten_key
from ns.core.digest import shorten_digest
from ns.labeling.audit import LabelAudit
from ns.labeling.diff import LabelDiff
from ns.labeling.label_set import HISTOGRAM_BINS, LabelSet, read_histogram
from ns.labeling.registry import VersionSummary
from ns.labeling.selection import Selection
from ns.runs.lineage import ImageTrace
from ns.runs.lookup import RunLabelSet


def make_label_set_table(resolved: RunLabelSet) -> Table:
    """The classes of a label set, one per row."""
    label_set, selection = resolved.label_set, resolved.selection
    counts = read_histogram(resolved.store, len(label_set.classes))
    middles = (np.arange(HISTOGRAM_BINS) + 0.5) / HISTOGRAM_BINS
    title = f"{label_set.rows:,} images, {label_set.unreadable:,} unreadable, {label_set.left_out:,} left out"
    has_limit = selection is not None and selection.foreign_limit is not None
    kept_headers = ("kept", "least confidence kept", "seen", *(["foreign"] if has_limit else [])) if selection else ()
    table = make_table(title, "class", "images", "mean confidence", *kept_headers)
    for class_id, (name, histogram) in enumerate(zip(label_set.classes, counts.astype(float), strict=True)):
        images = histogram.sum()
        cells = [name, f"{images:,.0f}", f"{histogram @ middles / images:.1%}" if images else ""]
        if selection:
            rule = selection.rules[class_id]
            cells += [f"{rule.kept:,}", f"{rule.last_kept.confidence:.1%}" if rule.last_kept else "", f"{rule.images:,}"]
            cells += [f"{rule.foreign:,}"] if has_limit else []
        table.add_row(*cells)
    return table


def make_selection_table(label_set: LabelSet, selection: Selection) -> Table:
    """What a selection keeps, drops and repeats, one class per row; with a wanted precision also its evidence."""
    has_limit = selection.foreign_limit is not None
    foreign = f"{selection.foreign:,} foreign, " if has_limit else ""
    unproven = f"{selection.unproven:,} without evidence of the precision, " if selection.thresholds else ""
    title = (
        f"{selection.kept:,} of {label_set.rows:,} images kept, {selection.images:,} with repeats; {selection.low_confidence:,} "
        f"below the threshold, {unproven}{selection.balanced_out:,} balanced out, {foreign}{selection.unreadable:,} unreadable, "
        f"{selection.left_out:,} left out"
    )
    headers = ["class", "above threshold", "threshold", "kept", "dropped", "each seen", "seen"]
    if has_limit:
        headers.append("foreign")
    if selection.thresholds:
        headers += ["calibration", "right", "at least"]
    table = make_table(title, *headers)
    for class_id, (name, rule) in enumerate(zip(label_set.classes, selection.rules, strict=True)):
        times = f"{rule.copies}–{rule.copies + 1}×" if rule.last_extra else f"{rule.copies}×"
        cells = [
            name,
            f"{rule.candidates:,}",
            f"{rule.threshold:.1%}{' fallback' if rule.fallback else ''}" if rule.threshold <= 1 else "never",
            f"{rule.kept:,}",
            f"{rule.candidates - rule.kept:,}",
            times,
            f"{rule.images:,}",
            *([f"{rule.foreign:,}"] if has_limit else []),
        ]
        if selection.thresholds:
            class_thresholds = selection.thresholds.classes[class_id]
            cells += [
                f"{class_thresholds.calibration:,}{' pooled' if class_thresholds.pooled else ''}",
                f"{class_thresholds.correct:,}",
                f"{class_thresholds.bound:.1%}",
            ]
        table.add_row(*cells)
    return table


def make_trace_table(trace: ImageTrace) -> Table:
    """The labels that each teacher gave one image."""
    table = make_table(trace.key, "run", "gen", "label", "threshold", "seen", "student", "label set")
    for view in trace.answers:
        predictions = ", ".join(f"{name} {probability:.1%}" for name, probability in list(view.probabilities.items())[:3])
        table.add_row(
            view.run,
            str(view.generation),
            predictions or view.reason or "",
            "" if view.threshold is None else f"{view.threshold:.1%}",
            f"{view.times_per_epoch}×",
            "" if view.student is None else shorten_key(view.student),
            view.label_set[:6],
        )
    return table


def make_diff_parts(diff: LabelDiff) -> list[RenderableType]:
    """What changed between two label sets: by confidence, by class, and the most frequent flips."""
    lines = [
        f"{diff.changed:,} of {diff.compared:,} labels changed ({diff.churn:.1%}), confidence {100 * diff.confidence_shift:+.1f} points"
    ]
    if diff.entered is not None:
        lines.append(f"selected: {diff.stayed:,} stayed, {diff.entered:,} entered, {diff.left:,} left")
    by_band = make_table("", "confidence before", "images", "changed", "churn")
    for band in diff.churn_bins:
        if band.images:
            by_band.add_row(f"{band.low:.1f} … {band.high:.1f}", f"{band.images:,}", f"{band.changed:,}", f"{band.churn:.1%}")
    has_selection = diff.entered is not None
    kept_headers = ("kept before", "kept after") if has_selection else ()
    by_class = make_table("", "class", "before", "after", "lost", "gained", *kept_headers, "confidence, points")
    for row in diff.list_changed_classes():
        kept = (row.kept_before, row.kept_after) if has_selection else ()
        by_class.add_row(
            row.name,
            *(f"{value:,}" for value in (row.before, row.after, row.lost, row.gained, *kept)),
            "" if row.shift is None else f"{100 * row.shift:+.1f}",
        )
    flips = make_table("most frequent flips", "before", "after", "images", text_columns=range(2))
    for old, new, images in diff.list_frequent_flips():
        flips.add_row(old, new, f"{images:,}")
    return [*(f"[bold]{line}[/]" for line in lines), by_band, by_class, *([flips] if diff.matrix else [])]


def make_audits_table(audits: list[LabelAudit]) -> Table:
    """Audits of one label set, one per row."""
    title = "audits: labels that are right, with 95 % intervals"
    table = make_table(title, "audit", "of", "looked at", "wrong", "right", "interval", text_columns=range(2))
    for audit in audits:
        table.add_row(
            shorten_digest(audit.digest),
            f"selection {audit.selection[:6]}" if audit.selection else "all labels",
            f"{audit.reviewed:,} of {audit.images:,}",
            f"{audit.wrong:,}",
            f"{audit.precision:.1%}",
            f"{audit.precision_low:.1%} … {audit.precision_high:.1%}",
        )
    return table


def make_audit_tables(audit: LabelAudit) -> list[Table]:
    """The strata of an audit, and the audit."""
    strata = make_table("", "class", "confidence", "images", "looked at", "right", "interval")
    for stratum in audit.strata:
        strata.add_row(
            stratum.class_name if stratum.class_name is not None else "all",
            f"{stratum.low:.1f} … {stratum.high:.1f}",
            f"{stratum.images:,}",
            f"{stratum.reviewed:,}",
            "" if stratum.precision is None else f"{stratum.precision:.1%}",
            f"{stratum.precision_low:.1%} … {stratum.precision_high:.1%}",
        )
    return [strata, make_audits_table([audit])]


def make_versions_table(versions: list[VersionSummary]) -> Table:
    """Versions in a label registry, one per row."""
    table = make_table("", "version", "committed", "rows", "kept", "")
    for version, date, current in versions:
        kept = "" if version.kept is None else f"{version.kept:,}"
        table.add_row(str(version.tag), date[:10], f"{version.rows:,}", kept, "in use" if current else "")
    return table
