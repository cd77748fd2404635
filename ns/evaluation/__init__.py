"""What a model is worth: accuracy, robustness, and the gate that compares a student with its teacher.
It may import `modeling`, `data`, and what is below them; not `labeling`."""
