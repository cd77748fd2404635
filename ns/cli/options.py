"""What several commands share: options and arguments, how places are printed, how pages are written."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ns.core.errors import StoreError

if TYPE_CHECKING:
    from ns.config.schema import Experiment

Root = Annotated[str, typer.Option("--root", help="Folder or s3://bucket/prefix that holds runs, models, labels and data.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field; list items by index. Repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a preset: quickstart.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, the beginning of it, or 'latest'.")]

Kfp = Annotated[
    str | None, typer.Option("--kfp", metavar="URL", help="Kubeflow Pipelines' UI or API; NS_KFP_URL if not given.")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=VALUE|@FILE",
        help="An input of the pipeline on Kubeflow, or a JSON object of several. Repeatable.",
    ),
]


def make_program(about: str) -> typer.Typer:
    """A command line of its own, not a group of commands in another."""
    return typer.Typer(
        help=about,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def to_shell_path(uri: str) -> str:
    """A path that can be pasted into a shell, relative where that is shorter."""
    from urllib.parse import unquote

    if not uri.startswith("file://"):
        return uri
    path = Path(unquote(uri.removeprefix("file://")))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def write_page(file: Path, page: str) -> None:
    """Raises StoreError when the file cannot be written."""
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{file}: cannot write: {error.strerror or error}; name another file") from error


def make_default_group(command: str) -> type[typer.core.TyperGroup]:
    """For a group one of whose commands is meant when none is named: `ns report latest` is `ns report show latest`."""

    class DefaultGroup(typer.core.TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if not args or args[0] not in (*self.commands, *ctx.help_option_names):
                args = [command, *args]
            return super().parse_args(ctx, args)

    return DefaultGroup


def load_experiment_argument(config: str, overrides: list[str] | None) -> "Experiment":
    """An experiment from a file or a preset, its places on this machine as absolute paths."""
    from ns.config import schema as configs

    experiment = configs.load_experiment(configs.resolve_preset(config), overrides or [])
    # Steps, and a resumed run, may stand in another folder.
    local_uris = {field: uri for field, uri in experiment.map_uris().items() if "://" not in uri}
    return configs.with_uris(experiment, {field: str(Path(uri).expanduser().absolute()) for field, uri in local_uris.items()})
