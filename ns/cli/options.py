"""Options and arguments that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ns.config.schema import Experiment

Root = Annotated[str, typer.Option("--root", metavar="FOLDER|URI", help="Store of runs, models, label sets and datasets.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field; list items by index. Repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the preset quickstart.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, the beginning of its name, or 'latest'.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A run, for its best model, or a model's folder or URI.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown for an issue or a pull request.")]
RegistryOption = Annotated[
    str | None, typer.Option("--registry", envvar="NS_LABEL_REGISTRY", metavar="GIT", help="URL or path of the label registry.")
]
RemoteOption = Annotated[
    str | None,
    typer.Option("--remote", envvar="NS_LABEL_REMOTE", metavar="URI", help="Store of its data; needed while it is empty."),
]

Kfp = Annotated[str | None, typer.Option("--kfp", metavar="URL", help="UI or API of Kubeflow Pipelines; default: NS_KFP_URL.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="NAME=VALUE|@FILE", help="Input of the pipeline, or a JSON file of several. Repeatable."),
]


def override_option(part: str) -> Any:
    """`--set` of a command that has the settings of one part of an experiment, such as `labeling`."""
    return typer.Option("--set", metavar="A=B", help=f"Override a field of {part}. Repeatable.")


def make_program(about: str) -> typer.Typer:
    """A command line of its own, not a group of commands in another one."""
    return typer.Typer(
        help=about,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def make_default_group(command: str) -> type[typer.core.TyperGroup]:
    """A group that runs `command` when its first argument names no command: `ns report latest` is `ns report show latest`."""

    class DefaultGroup(typer.core.TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if not args or args[0] not in (*self.commands, *ctx.help_option_names):
                args = [command, *args]
            return super().parse_args(ctx, args)

    return DefaultGroup


def load_experiment_argument(config: str, overrides: list[str] | None, root: str | None = None) -> "Experiment":
    """An experiment from a file or a preset, with absolute paths in place of relative ones, and all that its weights say of its networks.

    `root`: the store where fetched weights are. Raises ConfigError naming the field and the value.
    """
    from ns.config.loader import load_experiment, resolve_preset, with_uris
    from ns.storage import open_store

    experiment = load_experiment(resolve_preset(config), overrides or [])
    if any(role.model.pretrained or role.train.init == "teacher" for role in experiment.map_roles().values()):
        from ns.modeling.pretrained import complete_models

        experiment = complete_models(experiment, open_store(root) if root else None)
    # Stages, and a resumed run, may have another working directory.
    local_uris = {field: uri for field, uri in experiment.map_uris().items() if "://" not in uri}
    return with_uris(experiment, {field: str(Path(uri).expanduser().absolute()) for field, uri in local_uris.items()})
