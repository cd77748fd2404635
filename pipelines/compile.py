"""Compiles the pipeline: `python -m pipelines.compile [--check]`. The YAML is committed; `--check` compares and fails."""

import sys
import tempfile
from pathlib import Path

from kfp import compiler

from pipelines.noisy_student import noisy_student

PACKAGE = Path(__file__).with_name("noisy_student.yaml")


def compiled() -> str:
    """The pipeline as YAML, the same bytes every time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PACKAGE.name
        compiler.Compiler().compile(noisy_student, str(path))
        return path.read_text()


def main() -> int:
    text = compiled()
    if "--check" not in sys.argv:
        PACKAGE.write_text(text)
    elif not PACKAGE.exists() or PACKAGE.read_text() != text:
        sys.stderr.write(f"{PACKAGE.name} is not what pipelines/noisy_student.py compiles to: run `make compile`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
