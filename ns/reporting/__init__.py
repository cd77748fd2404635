"""What a run tells people: a self-contained HTML report, Markdown, comparisons, galleries, and metrics of finished stages.
It may import `runs`, `training`, `export`, and what is below them; not `stages`."""
