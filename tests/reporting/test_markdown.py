"""The report as Markdown."""

from ns.reporting.context import gather_context
from ns.reporting.markdown import render_markdown
from ns.runs.summary import summarize_run
from tests.reporting.conftest import RUN


def tables(text: str) -> list[list[str]]:
    """Lines of each table."""
    result: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            result[-1].append(line)
        elif result[-1]:
            result.append([])
    return [table for table in result if table]


def test_render_markdown_matches_page(unchanged):
    text = render_markdown(gather_context(unchanged, RUN, pictures=0))
    summary = summarize_run(unchanged, RUN)
    (row,) = summary.generations
    lines = text.splitlines()
    assert lines[0] == f"### made-up: {100 * summary.teacher_top1:.1f} % → {100 * row.student_top1:.1f} % on 30 test images"
    assert lines[2].startswith(f"- **Generation 1 {row.verdict}: ")
    assert "| mCE, % of the first teacher's | 100.0 | **75.0** |" in lines
    assert "Robustness: 20 of the images of held \\<i\\>out." in lines
    assert any(line.startswith("| gain | ") for line in lines)


def test_render_markdown_escapes_names(unchanged):
    text = render_markdown(gather_context(unchanged, RUN, pictures=0))
    for table in tables(text):
        columns = {line.replace("\\|", "").count("|") for line in table}
        assert len(columns) == 1
    assert "<script>" not in text
    assert "\\<script\\>" in text
