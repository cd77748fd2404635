"""The loop as a Kubeflow pipeline, and the ways to run it."""
