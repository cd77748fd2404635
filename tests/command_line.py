"""`ns` as something to parse with: which commands there are, and whether a command line is one of them."""

from collections.abc import Iterator
from typing import Any

from ns.cli.app import app, build_command


def parse(arguments: list[str]) -> None:
    """Lets the command line read the arguments, and stops before it acts. Raises `ns.cli.app.UsageError`."""
    command = build_command(app)
    name, context = "ns", None
    while True:
        context = command.make_context(name, list(arguments), parent=context)
        if not hasattr(command, "commands"):
            return
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


def commands(command: Any = None, *names: str) -> Iterator[tuple[str, Any]]:
    """All commands that do something, by what is written after `ns`."""
    command = command or build_command(app)
    for name, one in command.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, *names, name)
        else:
            yield " ".join([*names, name]), one
