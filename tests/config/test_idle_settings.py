"""Settings without an effect."""

from typing import get_args

import pytest

from ns.config.idle_settings import describe_idle_settings
from ns.config.loader import parse_experiment
from ns.config.schema import Preset

MINIMAL = {"name": "x", "data": {"labeled": "a", "pool": "b", "heldout": "c"}}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"selection": {"adaptive_scale": 0.5}}, "selection.adaptive_scale: 0.5: has no effect without policy: adaptive"),
        (
            {"selection": {"policy": "all", "per_class": 9}},
            "selection.per_class: 9: has no effect without a policy that balances",
        ),
        ({"selection": {"foreign_quantile": 0.5}}, "selection.foreign_quantile: 0.5: has no effect without labeling.foreign"),
        (
            {"teacher": {"train": {"unfreeze_epoch": 2}}},
            "teacher.train.unfreeze_epoch: 2.0: has no effect without train.frozen_share",
        ),
        (
            {"students": [{"train": {"pseudo_labels": "hard", "temperature": 2}}]},
            "students.0.train.temperature: 2.0: has no effect without train.pseudo_labels: soft",
        ),
    ],
)
def test_settings_without_effect_are_told_with_what_they_need(fields, line):
    (told,) = describe_idle_settings(parse_experiment({**MINIMAL, **fields}, "x.yaml"))
    assert told.startswith(line)


@pytest.mark.parametrize("preset", get_args(Preset))
def test_no_setting_of_a_preset_is_idle(preset):
    role = {"preset": preset, "train": {"frozen_share": 0.5, "unfreeze_epoch": 2}}
    selection = {"policy": "adaptive", "adaptive_scale": 0.5, "precision": 0.9, "fallback_share": 0}
    fields = {"teacher": role, "students": [role], "selection": selection}
    assert describe_idle_settings(parse_experiment({**MINIMAL, **fields}, "x.yaml")) == []
