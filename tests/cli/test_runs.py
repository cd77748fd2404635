import io

from rich.console import Console

from ns.cli.runs import make_generations_table
from ns.runs.summary import GenerationSummary, RunSummary


def test_generations_table_fits_a_narrow_terminal():
    row = GenerationSummary(
        generation=1,
        model="store/models/0123456789abcdef",
        teacher_top1=0.874,
        student_top1=0.926,
        gain=0.052,
        gain_low=0.032,
        gain_high=0.072,
        labeled=130_000,
        kept=110_000,
        label_set="0",
        verdict="promoted",
        reason="",
        seconds=12345.6,
    )
    summary = RunSummary(
        run="quickstart-01234567",
        state="succeeded",
        config_digest="0",
        started_at="",
        version="0",
        teacher_top1=0.874,
        generations=[row],
        best_model=row.model,
        best_top1=0.926,
        label_sets=["0"],
        report=None,
        stages=[],
    )
    sink = io.StringIO()
    Console(file=sink, width=80).print(make_generations_table(summary))
    assert "…" not in sink.getvalue()
    assert "+5.2 [+3.2, +7.2]" in sink.getvalue()
