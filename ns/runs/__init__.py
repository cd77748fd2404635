"""Runs: their notes, locks, names, results and lineage.
It may import `labeling`, `evaluation`, and what is below them; neither `training` nor `export`."""
