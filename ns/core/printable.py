"""Text from outside (names of files and classes, messages of servers) on its way to a terminal or a log."""

import re

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What moves the cursor, ends a line, or turns the direction of what follows; not tab and newline."""


CREDENTIALS = re.compile(r"(?<=//)([^/\s]*|[^/\s:@]+:(?!\d+/)[^\s@]*)@")
"""User and password of a URL, whose password may have slashes, as many of S3's keys do; the number of a port is none."""


def redact_credentials(text: str) -> str:
    """`text` with `…` for user and password in URLs."""
    return CREDENTIALS.sub("…@", text)


def holds_credentials(uri: str) -> bool:
    """Whether a URL has a user or a password."""
    return CREDENTIALS.search(uri) is not None


def escape_controls(text: str, *, keep_newlines: bool = True) -> str:
    r"""`text` with `\x1b` for an escape, and so on: a name must not steer the terminal that shows it."""
    escaped = CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)
    return escaped if keep_newlines else escaped.replace("\n", "\\n")


def escape_json_controls(text: str) -> str:
    r"""JSON with `\u009b` for what `json.dumps` leaves as it is and steers a terminal."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def make_printable(text: str, *, keep_newlines: bool = True) -> str:
    """`text` without passwords and without what steers a terminal."""
    return escape_controls(redact_credentials(text), keep_newlines=keep_newlines)


FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def escape_formula(text: str) -> str:
    """A cell of a table, with an apostrophe in front of what a spreadsheet would compute: names of files may be formulas."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def unescape_formula(cell: str) -> str:
    """What `escape_formula` made a cell of."""
    return cell[1:] if cell.startswith("'") and cell.startswith(FORMULA_STARTS, 1) else cell
