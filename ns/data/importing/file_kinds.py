"""What a file is, as far as its name tells: an image, a document beside images, or something that another program left there."""

import os
import re
import unicodedata

from ns.data.key_list import IMAGE_EXTENSIONS

LEFT_BY_PROGRAMS = re.compile(
    # Hidden files, and so AppleDouble (._a.jpg), .DS_Store, .git, .ipynb_checkpoints, .thumbnails, .@__thumb.
    r"\..*"
    # macOS, in archives and on shares.
    r"|__macosx|icon\r|network trash folder|temporary items"
    # Windows.
    r"|(eh)?thumbs(_vista)?\.db(:.*)?|desktop\.ini|\$recycle\.bin|system volume information|found\.\d{3}"
    # Linux, Python, editors, Office.
    r"|lost\+found|__pycache__|.*~|~\$.*|~lock\..*"
    # Network storage by Synology and QNAP.
    r"|@eadir|@recycle|#recycle|#snapshot|@recently-snapshot|@__thumb|@tmp"
    # Albums.
    r"|picasa\.ini|zbthumbnail\.info|pspbrwse\.jbf"
    # Spark, Hadoop and Databricks, in buckets.
    r"|_success|_temporary|_metadata|_common_metadata|_(committed|started)_\d.*|.*_\$folder\$",
    re.IGNORECASE | re.DOTALL,
)
"""Names of files and folders that are not a person's: they are passed over, with all that is in them."""
DOCUMENT_EXTENSIONS = re.compile(
    # Texts, labels and annotations.
    r"txt|md|rst|rtf|pdf|docx?|odt|html?|tex|(geo|nd)?json|jsonl|xml|ya?ml|toml|[ct]sv|xlsx?|ods|parquet|arrow|cls|lst|names|prototxt"
    # Programs and their settings, logs, checksums, links.
    r"|py|ipynb|m|sh|bat|r|js|ini|cfg|conf|log|md5|sha(1|256|512)|crc|sfv|url|lnk|webloc|torrent"
    # Arrays, indices and databases.
    r"|np[yz]|mat|h5|hdf5|pkl|pickle|pth?|idx|index|db|sqlite3?|[lm]db|tfrecord"
)
"""Files beside images that are none, by their names alone: they are passed over, and their number is told."""
DOCUMENT_NAMES = re.compile(
    r"(readme|licen[sc]e|copying|notice|authors|changelog|citation|manifest|(md5|sha1|sha256|sha512)sums?)([.-].*)?",
    re.IGNORECASE,
)


def is_left_by_program(path: str) -> bool:
    """Whether a file, or a folder that it lies in, was left there by an operating system or another program."""
    return any(LEFT_BY_PROGRAMS.fullmatch(part) for part in path.split("/") if part != ".")


def classify_document(path: str) -> str | None:
    """A document's kind, as `.txt`; None for all other files, which must be images."""
    base = path.rpartition("/")[2]
    extension = get_extension(base)
    if DOCUMENT_EXTENSIONS.fullmatch(extension):
        return f".{extension}"
    if extension not in IMAGE_EXTENSIONS and (name := DOCUMENT_NAMES.fullmatch(base)):
        return name[1].upper()
    return None


def get_extension(name: str) -> str:
    """`a.b.PNG` → `png`; empty if there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


def escape_path(path: str) -> str:
    """Escapes bytes that are not UTF-8, which could not be written to a file, and characters that a terminal obeys."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(repr(letter)[1:-1] if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
