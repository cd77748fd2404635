from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save as save_tensors

from ns.config.schema import ModelConfig, NoiseConfig
from ns.core.digest import sha256_file
from ns.modeling import factory as models
from ns.modeling.precision import PrecisionMode
from ns.storage import LocalStore
from ns.training import runner

SMALL = ModelConfig(arch="test_efficientnet", resolution=32, test_resolution=40)


def test_inference_precision_is_decided_once(monkeypatch):
    monkeypatch.setattr(runner, "resolve_mode", lambda *_, **__: PrecisionMode("bfloat16"))
    decided = runner._describe_model(SMALL)
    assert decided == SMALL.model_copy(update={"inference_precision": "bfloat16"})
    monkeypatch.setattr(runner, "resolve_mode", lambda *_, **__: pytest.fail("chosen again"))
    assert runner._describe_model(decided) == decided


def test_fine_tuning_resamples_the_position_embeddings_of_another_resolution(tmp_path):
    network, larger = (
        models.build_model(ModelConfig(arch="test_vit", resolution=resolution), NoiseConfig(), 3) for resolution in (64, 96)
    )
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    (tmp_path / "weights").write_bytes(save_tensors(tensors))
    manifest = SimpleNamespace(weights_key="weights", weights_sha256=sha256_file(tmp_path / "weights"))
    runner.load_trained_weights(larger, LocalStore(tmp_path), manifest)
    loaded = larger.state_dict()
    assert loaded.pop("pos_embed").shape[1] > tensors["pos_embed"].shape[1]
    assert all(torch.equal(value, tensors[name]) for name, value in loaded.items())
