"""Scratch space: folders on the local disk that go when they are no longer needed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ns.core.errors import StoreError


@contextmanager
def make_scratch_dir(name: str) -> Iterator[Path]:
    """An empty folder under TMPDIR. Raises StoreError when it cannot be made."""
    parent = Path(os.environ.get("TMPDIR", "/tmp"))
    with explain_scratch_errors(parent, "write"):
        path = Path(tempfile.mkdtemp(prefix=f"ns-{name}-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def explain_scratch_errors(path: Path, action: str) -> Iterator[None]:
    """Turns an OSError inside into a StoreError that says what could not be done in scratch space, why, and the mend."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path}: cannot {action}: {error.strerror or error}; free some space there, or set TMPDIR to another folder"
        ) from error
