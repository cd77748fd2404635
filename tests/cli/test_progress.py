import io

from rich.console import Console

from ns.cli.progress import RunView

STORY = [
    {"event": "started", "stage": "train", "generation": 0},
    {"event": "progress", "stage": "train", "generation": 0, "done": 5, "total": 10, "unit": "images", "per_second": 2.0},
    {"event": "finished", "stage": "train", "generation": 0, "seconds": 3.21, "steps": 7, "parameters": 1234, "reused": False},
    {"event": "started", "stage": "next-teacher", "generation": 1},
    {"event": "finished", "stage": "next-teacher", "generation": 1, "seconds": 0.1},
    {"event": "started", "stage": "label", "generation": 1, "shards": "0-4"},
    {
        "event": "unreadable image",
        "stage": "label",
        "generation": 1,
        "level": "warning",
        "key": f"[red]x/{'y' * 120}",
        "pid": 3,
    },
    {"event": "finished", "stage": "label", "generation": 1, "shards": "0-4", "seconds": 1, "images": 0, "reused": True},
    {"event": "failed", "stage": "evaluate", "generation": 1, "error": "no", "exit_code": 3},
]


def draw_story(terminal: bool) -> str:
    sink = io.StringIO()
    with RunView(Console(file=sink, force_terminal=terminal, width=120)) as view:
        for event in STORY:
            view.on_event(event)
    return sink.getvalue()


def test_run_view_prints_plain_lines_without_a_terminal():
    lines = [" ".join(line.split()) for line in draw_story(terminal=False).splitlines()]
    assert lines == [
        "✓ teacher · train 7 steps, 1,234 parameters 3.2 s",
        "! generation 1 · label pool: unreadable image key=[red]x/" + "y" * 120,
        "✓ generation 1 · label pool (shards 0–3) 0 images reused",
        "✗ generation 1 · evaluate failed",
    ]


def test_run_view_uses_color_on_a_terminal():
    assert "\x1b[32m✓" in draw_story(terminal=True)


def test_run_view_accepts_late_progress():
    with RunView(Console(file=io.StringIO(), force_terminal=True)) as view:
        for event in [*STORY[:3], STORY[1]]:
            view.on_event(event)
