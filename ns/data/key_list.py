"""Keys of images: how they are made of paths, and lists of them in text files."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable

from ns.core.errors import DataError
from ns.data.shards import SHARD_EXTENSIONS
from ns.storage import read_uri

IMAGE_EXTENSIONS = frozenset((
    *SHARD_EXTENSIONS, "jfif", "jpe", "jif", "pjpeg", "pjp", "apng", "bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm",
    "jp2", "j2k", "jpf", "jpx", "avif", "heic", "heif",
))  # fmt: skip
"""Extensions of images. They are left out of keys."""


class KeyList:
    """The images that a text file names, each by its key or by the path of its file."""

    def __init__(self, uri: str, lines: Iterable[str]) -> None:
        self.uri = uri
        self._lines = {spelling: line for line in lines for spelling in spell_key(line)}

    @property
    def spellings(self) -> frozenset[str]:
        """All keys that the lines may mean."""
        return frozenset(self._lines)

    def match_keys(self, keys: Iterable[str]) -> tuple[frozenset[str], list[str]]:
        """Those of `keys` that the lines name, and the lines that name none of them, in order."""
        matched = frozenset(key for key in keys if key in self._lines)
        return matched, sorted(set(self._lines.values()) - {self._lines[key] for key in matched})


def read_keys(uri: str) -> KeyList:
    """Reads a text file with one key, or the path of an image's file, per line; empty lines do not count.

    Raises DataError for a file without keys.
    """
    try:
        text = read_uri(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not UTF-8: {error}; must be a text file with one key per line") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{uri}: has no keys; must have one per line")
    return KeyList(uri, lines)


def make_key(path: str) -> str:
    """`cat/IMG.1.jpg` → `cat/IMG_1`: WebDataset's keys have no dot in their last part. Composed (NFC), as names are compared."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace").partition("://")
    folder, slash, base = (text[2] or text[0]).lstrip("/").rpartition("/")
    stem, dot, extension = base.rpartition(".")
    plain = folder + slash + (stem if dot and extension.lower() in IMAGE_EXTENSIONS else base)
    parts = (part.strip() for part in re.sub(r"[\x00-\x1f\\]", "_", unicodedata.normalize("NFC", plain)).split("/"))
    # `..` leads out of the folder and a leading dot hides a file; readers would skip both.
    return "/".join(part.replace(".", "_") or "_" for part in parts)


def make_key_suffix(path: bytes) -> str:
    """Makes the keys of two paths different that would be equal."""
    return f"-{hashlib.sha256(path).hexdigest()[:8]}"


def spell_key(text: str) -> tuple[str, ...]:
    """The keys that a person's text may mean: it may be a key, or the path of an image's file."""
    path = text.removeprefix("./")
    key = make_key(path)
    return text, key, key + make_key_suffix(os.fsencode(path))
