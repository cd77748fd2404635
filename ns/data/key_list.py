"""Lists of the keys of images, in text files."""

from ns.core.errors import DataError
from ns.storage import read_uri


def read_keys(uri: str) -> frozenset[str]:
    """Reads a text file with one key per line; empty lines do not count. Raises DataError for a file without keys."""
    try:
        text = read_uri(uri).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not UTF-8: {error}; must be a text file with one key per line") from error
    keys = frozenset(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise DataError(f"{uri}: has no keys; must have one per line")
    return keys
