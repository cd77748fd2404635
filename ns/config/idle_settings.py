"""Settings that an experiment gives, and that have no effect beside its others."""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

from ns.config.schema import Experiment, RoleConfig, SelectionConfig


class _Need(NamedTuple):
    field: str
    """Path of the field in its section."""
    needed: str
    """What it has no effect without."""
    is_met: Callable[[Any], bool]
    """Whether the section has that."""


SELECTION_NEEDS = (
    _Need("adaptive_scale", "policy: adaptive", lambda selection: selection.policy == "adaptive"),
    _Need("alignment", "policy: aligned", lambda selection: selection.policy == "aligned"),
    _Need("per_class", "a policy that balances, which all does not", lambda selection: selection.policy != "all"),
    _Need("max_repeat", "repeats", lambda selection: selection.policy != "all" and selection.repeat),
    _Need("confidence", "precision", lambda selection: selection.precision is not None),
    _Need("fallback_share", "precision", lambda selection: selection.precision is not None),
)
ROLE_NEEDS = (
    _Need("noise.crop_area", "model.crop: resized", lambda role: role.model.crop == "resized"),
    _Need("noise.crop_aspect", "model.crop: resized", lambda role: role.model.crop == "resized"),
    _Need("noise.pad_px", "model.crop: pad", lambda role: role.model.crop == "pad"),
    _Need("train.temperature", "train.pseudo_labels: soft", lambda role: role.train.pseudo_labels == "soft"),
    _Need("train.unfreeze_epoch", "train.frozen_share above 0", lambda role: role.train.frozen_share > 0),
    _Need("train.optimizer.momentum", "rmsprop or sgd", lambda role: role.train.optimizer.name in ("rmsprop", "sgd")),
)


def describe_idle_settings(experiment: Experiment) -> list[str]:
    """A line for each setting that is not the default and has no effect, with what it needs."""
    lines = [*_list_idle("selection", experiment.selection, SelectionConfig(), SELECTION_NEEDS)]
    quantile = experiment.selection.foreign_quantile
    if quantile != SelectionConfig().foreign_quantile and experiment.labeling.foreign_score == "none":
        lines.append(f"selection.foreign_quantile: {quantile}: has no effect without labeling.foreign_score")
    for field, role in experiment.map_roles().items():
        lines += _list_idle(field, role, RoleConfig(), ROLE_NEEDS)
    return lines


def _list_idle(field: str, section: Any, defaults: Any, needs: Sequence[_Need]) -> Iterator[str]:
    for need in needs:
        value, default = (reduce(getattr, need.field.split("."), given) for given in (section, defaults))
        if value != default and not need.is_met(section):
            yield f"{field}.{need.field}: {value}: has no effect without {need.needed}"
