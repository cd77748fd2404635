"""Options and arguments that several commands take, and places as they all print them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ns.config import Experiment, RoleConfig

Root = Annotated[str, typer.Option("--root", help="Folder that holds runs, models, labels and data.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field; list items by index. Repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a preset: quickstart.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, the beginning of it, or 'latest'.")]

Kfp = Annotated[
    str | None, typer.Option("--kfp", metavar="URL", help="Of Kubeflow Pipelines' UI or API; NS_KFP_URL if not given.")
]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", metavar="NAME=VALUE", help="An input of the pipeline on Kubeflow. Repeatable.")
]


def plain(uri: str) -> str:
    """A path that can be pasted into a shell, relative where that is shorter."""
    from urllib.parse import unquote

    if not uri.startswith("file://"):
        return uri
    path = Path(unquote(uri.removeprefix("file://")))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def group_with_default(command: str) -> type[typer.core.TyperGroup]:
    """For a group one of whose commands is meant when none is named: `ns report latest` is `ns report show latest`."""

    class Group(typer.core.TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if not args or args[0] not in (*self.commands, *ctx.help_option_names):
                args = [command, *args]
            return super().parse_args(ctx, args)

    return Group


def load(config: str, overrides: list[str] | None) -> "Experiment":
    """An experiment from a file or a preset, its local data folders as absolute paths."""
    from ns import config as configs

    experiment = configs.load(configs.located(config), overrides or [])
    data = experiment.data
    # Steps, and a resumed run, may stand in another folder.
    places = {
        part: _absolute(place)
        for part, place in data.model_dump(include={"labelled", "pool", "heldout", "test"}).items()
        if place is not None and not place.startswith("digits:")
    }
    if data.exclude:
        places["exclude"] = _absolute(data.exclude)
    ensemble = tuple(_absolute(place) for place in experiment.labelling.ensemble)
    sets = {
        name: asked.model_copy(
            update={"place": _absolute(asked.place), "multi_label": asked.multi_label and _absolute(asked.multi_label)}
        )
        for name, asked in experiment.evaluation.sets.items()
    }
    return experiment.model_copy(
        update={
            "data": data.model_copy(update=places),
            "labelling": experiment.labelling.model_copy(update={"ensemble": ensemble}),
            "evaluation": experiment.evaluation.model_copy(update={"sets": sets}),
            "teacher": _with_absolute_init(experiment.teacher),
            "students": tuple(map(_with_absolute_init, experiment.students)),
        }
    )


def _with_absolute_init(role: "RoleConfig") -> "RoleConfig":
    if role.train.init_place is None:
        return role
    train = role.train.model_copy(update={"init": _absolute(role.train.init_place)})
    return role.model_copy(update={"train": train})


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).expanduser().absolute())
