import io

from rich.console import Console

from ns.cli.progress import RunView

STORY = [
    {"event": "started", "step": "train", "generation": 0},
    {"event": "progress", "step": "train", "generation": 0, "done": 5, "total": 10, "unit": "images", "per_second": 2.0},
    {"event": "finished", "step": "train", "generation": 0, "seconds": 3.21, "steps": 7, "parameters": 1234, "reused": False},
    {"event": "started", "step": "resolve", "generation": 1},
    {"event": "finished", "step": "resolve", "generation": 1, "seconds": 0.1, "quiet": True},
    {"event": "started", "step": "label-shards", "generation": 1, "shards": "0-4"},
    {"event": "unreadable image", "step": "label-shards", "generation": 1, "level": "warning", "key": "[red]x", "pid": 3},
    {"event": "finished", "step": "label-shards", "generation": 1, "shards": "0-4", "seconds": 1, "images": 0, "reused": True},
    {"event": "failed", "step": "evaluate", "generation": 1, "error": "no", "exit_code": 3},
]


def drawn(terminal: bool) -> str:
    sink = io.StringIO()
    with RunView(Console(file=sink, force_terminal=terminal, width=120)) as view:
        for event in STORY:
            view.on_event(event)
    return sink.getvalue()


def test_without_a_terminal_there_is_a_plain_line_for_each_finished_step():
    lines = [" ".join(line.split_batch()) for line in drawn(terminal=False).splitlines()]
    assert lines == [
        "✓ teacher · train 7 steps, 1,234 parameters 3.2 s",
        "! generation 1 · label pool: unreadable image key=[red]x",
        "✓ generation 1 · label pool (shards 0–3) 0 images reused",
        "✗ generation 1 · evaluate failed",
    ]


def test_on_a_terminal_there_is_color():
    assert "\x1b[32m✓" in drawn(terminal=True)


def test_progress_that_comes_after_the_end_of_a_step_is_no_error():
    with RunView(Console(file=io.StringIO(), force_terminal=True)) as view:
        for event in [*STORY[:3], STORY[1]]:
            view.on_event(event)


def test_the_table_of_generations_fits_a_narrow_terminal():
    from ns.cli.progress import summary_table
    from ns.runs.records import GenerationSummary, RunSummary

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
        error=None,
        config_digest="0",
        started_at="",
        finished_at=None,
        teacher_top1=0.874,
        generations=[row],
        best_model=row.model,
        best_top1=0.926,
        label_sets=["0"],
        report=None,
        stages=[],
    )
    sink = io.StringIO()
    Console(file=sink, width=80).print(summary_table(summary))
    assert "…" not in sink.getvalue()
    assert "+5.2 [+3.2, +7.2]" in sink.getvalue()
