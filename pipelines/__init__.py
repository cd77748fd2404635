"""The loop as a Kubeflow pipeline, and the ways to run it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).with_name("noisy_student.yaml")
"""The compiled pipeline. Here, so that who submits it need not load KFP's compiler, which takes half a second."""
GENERATION_PACKAGE = PACKAGE.with_name("noisy_student_generation.yaml")
"""The compiled pipeline of one generation."""


def load_yaml_documents(text: str) -> Iterator[Any]:
    """The documents of a YAML text, one after the other as they are asked for; by libyaml, where that is."""
    yield from yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
