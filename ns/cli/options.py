"""Options and arguments that several commands take, and places as they all print them."""

from pathlib import Path
from typing import Annotated

import typer

Root = Annotated[str, typer.Option("--root", help="Folder that holds runs, models, labels and data.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field; list items by index. Repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a preset: quickstart.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, the beginning of it, or 'latest'.")]


def plain(uri: str) -> str:
    """A path that can be pasted into a shell, relative where that is shorter."""
    from urllib.parse import unquote

    if not uri.startswith("file://"):
        return uri
    path = Path(unquote(uri.removeprefix("file://")))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
