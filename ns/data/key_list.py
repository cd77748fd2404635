"""Lists of images by key."""

from ns.core.errors import DataError
from ns.storage import read_uri


def read_keys(uri: str) -> frozenset[str]:
    """Keys from a text file, one a line; empty lines do not count. Raises DataError for a file without any."""
    try:
        text = read_uri(uri).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not UTF-8: {error}; must be a text file with a key a line") from error
    keys = frozenset(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise DataError(f"{uri}: there are no keys in it; must have one a line")
    return keys
