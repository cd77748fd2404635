"""How commands print: JSON, tables, paths that can be pasted into a shell, pages."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from ns.core.errors import StoreError
from ns.core.printable import escape_json_controls, make_printable

UNLIMITED_WIDTH = 10_000
"""Columns: more than any table needs."""


def print_line(text: str, *, mark: str = "", err: bool = False) -> None:
    """Prints one line after `mark`, which may have colors: a name in `text` neither ends the line nor steers the terminal."""
    _print(mark + make_printable(text, keep_newlines=False), err=err)


def print_text(text: str, *, err: bool = False) -> None:
    """Prints a document of several lines, which ends one: YAML, Markdown."""
    _print(make_printable(text), nl=False, err=err)


def print_json(value: Any) -> None:
    """Prints JSON on standard output. `value` may hold documents."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=lambda document: json.loads(document.model_dump_json()))
    _print(escape_json_controls(text))


def escape_text(text: str) -> str:
    """Text from outside for a line with markup of ours: nothing in it is markup, and nothing steers the terminal."""
    return escape(make_printable(text, keep_newlines=False))


def make_console(file: TextIO | None = None) -> Console:
    """A console, by default of standard output, that shows text as it is: without emoji for `:cat:`, numbers without colors."""
    return Console(file=file, emoji=False, highlight=False)


class PlainTable(Table):
    """A table whose cells show text as it is. A cell with a style of ours is a `Text`."""

    def add_row(self, *renderables: RenderableType | None, style: StyleType | None = None, end_section: bool = False) -> None:
        cells = (_make_text(cell) if isinstance(cell, str) else cell for cell in renderables)
        super().add_row(*cells, style=style, end_section=end_section)


def make_table(title: str, *headers: str, text_columns: Collection[int] = (0,), wrap: bool = True) -> PlainTable:
    """A plain table. The columns in `text_columns` hold text; the others hold numbers, at the right edge."""
    shown_title = _make_text(title, "bold") if title else None
    table = PlainTable(title=shown_title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column, header in enumerate(headers):
        table.add_column(header, justify="left" if column in text_columns else "right", no_wrap=not wrap)
    return table


def print_untruncated(table: Table) -> None:
    """Prints a table at its full width even where the terminal is narrower: tags and keys are there to be pasted."""
    console = make_console()
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


def _make_text(text: str, style: str = "") -> Text:
    return Text(make_printable(text, keep_newlines=False), style)


_print = typer.echo  # noqa: TID251
