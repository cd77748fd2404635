"""Training of teachers and students: the loop, its plan, loss, optimizer, checkpoints.
It may import `labeling`, `modeling`, `data`, and what is below them; not `runs`."""
