"""Scratch space: folders on the local disk that go when they are no longer needed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ns.core.errors import StoreError


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """An empty folder under TMPDIR. Raises StoreError when it cannot be made."""
    place = Path(os.environ.get("TMPDIR", "/tmp"))
    with writing(place, "write"):
        folder = Path(tempfile.mkdtemp(prefix=f"ns-{name}-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(place: Path, doing: str) -> Iterator[None]:
    """Turns an OSError inside into a StoreError that says what could not be done in scratch space, why, and the mend."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{place}: cannot {doing}: {error.strerror or error}; free some space there, or set TMPDIR to another folder"
        ) from error
