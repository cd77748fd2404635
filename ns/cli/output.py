"""How commands print: JSON, tables, paths that can be pasted into a shell, pages."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ns.core.errors import StoreError
from ns.core.printable import make_printable

UNLIMITED_WIDTH = 10_000
"""Columns: more than any table needs."""


def print_json(value: Any) -> None:
    """Prints JSON on standard output. `value` may hold documents."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=lambda document: json.loads(document.model_dump_json())))


def escape_text(text: str) -> str:
    """Text from outside for a console of rich: nothing in it is markup, and nothing steers the terminal."""
    return escape(make_printable(text, keep_newlines=False))


def make_table(title: str, *headers: str, text_columns: Collection[int] = (0,), wrap: bool = True) -> Table:
    """A plain table. The columns in `text_columns` hold text; the others hold numbers, at the right edge."""
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column, header in enumerate(headers):
        table.add_column(header, justify="left" if column in text_columns else "right", no_wrap=not wrap)
    return table


def print_untruncated(table: Table) -> None:
    """Prints a table at its full width even where the terminal is narrower: tags and keys are there to be pasted."""
    console = Console()
    table_width = console.measure(table, options=console.options.update(width=UNLIMITED_WIDTH)).maximum
    Console(width=max(console.width, table_width)).print(table)


def shorten_key(key: str) -> str:
    """The first six letters of the last part of a key."""
    return key.rpartition("/")[2][:6]


def to_shell_path(uri: str) -> str:
    """A path that can be pasted into a shell, relative where that is shorter; a URI of S3 as it is."""
    if not uri.startswith("file://"):
        return uri
    path = Path(unquote(uri.removeprefix("file://")))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def write_page(path: Path, page: str) -> None:
    """Raises StoreError when the file cannot be written."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}; name another file") from error
