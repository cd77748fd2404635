import pytest

from ns.config.schema import ModelConfig
from ns.modeling.precision import PrecisionMode
from ns.training import runner

SMALL = ModelConfig(arch="test_efficientnet", resolution=32, test_resolution=40)


def test_inference_precision_is_decided_once(monkeypatch):
    monkeypatch.setattr(runner, "resolve_mode", lambda *_, **__: PrecisionMode("bfloat16"))
    decided = runner._describe_model(SMALL)
    assert decided == SMALL.model_copy(update={"inference_precision": "bfloat16"})
    monkeypatch.setattr(runner, "resolve_mode", lambda *_, **__: pytest.fail("chosen again"))
    assert runner._describe_model(decided) == decided
