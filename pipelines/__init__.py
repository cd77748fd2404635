"""The loop as a Kubeflow pipeline, and the ways to run it."""

from pathlib import Path

PACKAGE = Path(__file__).with_name("noisy_student.yaml")
"""The compiled pipeline. Here, so that who submits it need not load KFP's compiler, which takes half a second."""
