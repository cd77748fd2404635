"""The loop as a Kubeflow pipeline, and the ways to run it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).with_name("noisy_student.yaml")
"""The compiled pipeline. Its path is here, so that submitting it does not load KFP's compiler, which takes half a second."""
GENERATION_PACKAGE = PACKAGE.with_name("noisy_student_generation.yaml")
"""The compiled pipeline of one generation."""


def load_yaml_documents(text: str) -> Iterator[Any]:
    """Yields the documents of a YAML text, parsed by libyaml where it is installed."""
    yield from yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def dump_yaml_documents(documents: Iterable[Any]) -> str:
    """Returns YAML, the same bytes for the same documents."""
    return yaml.dump_all(documents, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), width=120)
