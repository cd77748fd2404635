import pytest

from ns.config.schema import ModelConfig, NoiseConfig
from ns.modeling import factory as models
from ns.modeling.precision import PrecisionMode
from ns.training import runner as training

SMALL = ModelConfig(arch="test_efficientnet", resolution=32, test_resolution=40)


def test_a_trained_model_says_how_it_is_to_be_run(monkeypatch):
    network = models.build_model(SMALL, NoiseConfig(), 3)

    def choose(workload, *, images):
        assert (workload.kind, workload.batch, workload.resolution, images) == ("infer", 16, 40, 0)
        return PrecisionMode("bfloat16")

    monkeypatch.setattr(training, "choose_target", choose)
    decided = training._with_inference_precision(SMALL, network, batch=16)
    assert decided == SMALL.model_copy(update_weights={"inference_precision": "bfloat16"})
    monkeypatch.setattr(training, "choose_target", lambda *_, **__: pytest.fail("measured"))
    assert training._with_inference_precision(decided, network, batch=16) is decided
