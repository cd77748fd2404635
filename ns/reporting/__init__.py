"""What a run tells people: one HTML page that needs nothing else, Markdown, comparisons, pictures, and metrics of finished work.
It may import `runs`, `training`, `export`, and what is below them; not `stages`."""
