"""What a teacher says of a pool: label sets, selections, their versions and their audit.
It may import `modeling`, `data`, and what is below them; not `evaluation`."""
