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
    """An empty folder under TMPDIR, removed at the end. Raises StoreError when it cannot be made."""
    parent = Path(os.environ.get("TMPDIR", "/tmp"))
    with explain_scratch_errors(parent, "write"):
        path = Path(tempfile.mkdtemp(prefix=f"ns-{name}-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def explain_scratch_errors(path: Path, action: str) -> Iterator[None]:
    """Turns an OSError inside into the StoreError of `make_scratch_error`."""
    try:
        yield
    except OSError as error:
        raise make_scratch_error(path, action, error) from error


def make_scratch_error(path: Path, action: str, error: Exception) -> StoreError:
    """An error that says which action failed in scratch space, why, and what to do."""
    reason = getattr(error, "strerror", None) or error
    return StoreError(f"{path}: cannot {action}: {reason}; free some space there, or set TMPDIR to another folder")
