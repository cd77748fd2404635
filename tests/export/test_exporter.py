"""Exports: what is written, how it is checked, and what is refused. ONNX and torch.export are in tests/integration."""

import json

import numpy as np
import pytest
import timm
import torch

from ns.config.schema import ModelConfig, NoiseConfig
from ns.core.errors import ConfigError, DataError, StoreError
from ns.data.dataset import Dataset
from ns.export import ExportManifest, export_model, exporter
from ns.export.forms import FORMS, make_timm_config
from ns.modeling import factory as models
from ns.modeling.manifest import Lineage, ModelManifest
from ns.storage import LocalStore


def save_model(folder: LocalStore, noise: NoiseConfig | None = None, **model) -> ModelManifest:
    torch.manual_seed(0)
    config = ModelConfig(**{"arch": "test_efficientnet", "resolution": 32, "crop": "pad", **model})
    noise = noise or NoiseConfig()
    network = models.build_model(config, noise, 2)
    fields = {"generation": 0, "model": config, "noise": noise, "classes": ("cat", "dog"), "parameters": 7, "steps": 1}
    return models.save_model(folder, network.state_dict(), {**fields, "lineage": Lineage(config="c", labeled="l")}, [])


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    from ns.config.schema import ImportConfig
    from ns.data.importing.ingest import import_images

    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = draw.integers(0, 256, (40, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    folder = LocalStore(tmp_path / "data")
    import_images(str(tmp_path / "images"), folder, name="data", role="evaluation", config=ImportConfig(), workers=1)
    return folder, Dataset.load(folder)


def test_export_model_is_loaded_by_timm(tmp_path, images):
    folder = LocalStore(tmp_path / "model")
    card = save_model(folder)
    exported = export_model(
        folder, tmp_path / "out", ["timm"], images, count=5, describe=lambda card, _: f"card of {card.parameters}"
    )
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours, _ = models.load_model(folder)
    batch = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(network(batch), ours(batch), atol=1e-6)
    assert network.pretrained_cfg["label_names"] == ["cat", "dog"]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    assert "Normalize(mean=tensor([0.4850, 0.4560, 0.4060])" in repr(transform)
    assert (tmp_path / "out" / "README.md").read_text() == "card of 7"
    (check,) = exported.checks
    assert (check.form, check.images, check.same_top1) == ("timm", 5, 1.0)
    assert check.largest_difference <= exporter.TOLERANCE * check.largest_logit
    assert ExportManifest.load(LocalStore(tmp_path / "out")) == exported
    assert (exported.model, exported.dataset) == (card.digest, images[1].digest)


def test_make_timm_config_lists_reduced_strides(tmp_path, images):
    folder = LocalStore(tmp_path / "model")
    card = save_model(folder, arch="resnet18", args={"channels": [8, 8, 8, 8]}, reduce_stride=2)
    assert export_model(folder, tmp_path / "out", ["timm"], images).checks[0].same_top1 == 1.0
    dense = make_timm_config(card)["noisy_student"]["dense"]
    assert dense
    assert all(attributes == {"stride": 1} for attributes in dense.values())
    assert not make_timm_config(save_model(LocalStore(tmp_path / "plain")))["noisy_student"]["dense"]


def test_make_timm_config_fixes_input_size_of_vit(tmp_path):
    card = save_model(LocalStore(tmp_path / "model"), arch="test_vit", resolution=160)
    assert make_timm_config(card)["pretrained_cfg"]["fixed_input_size"] is True
    assert make_timm_config(card)["pretrained_cfg"]["input_size"] == [3, 160, 160]


def test_make_timm_config_crop_is_that_of_evaluation(tmp_path):
    photographs = make_timm_config(save_model(LocalStore(tmp_path / "a"), crop="resized", resolution=224))["pretrained_cfg"]
    assert (photographs["crop_mode"], photographs["crop_pct"]) == ("center", 224 / 256)
    small = make_timm_config(save_model(LocalStore(tmp_path / "b")))["pretrained_cfg"]
    assert (small["crop_mode"], small["crop_pct"]) == ("squash", 1.0)


def test_export_model_refuses_other_logits(tmp_path, images, monkeypatch):
    folder = LocalStore(tmp_path / "model")
    save_model(folder)
    read = FORMS["timm"].read
    monkeypatch.setitem(FORMS, "timm", FORMS["timm"]._replace(read=lambda file: lambda batch: read(file)(batch) * 1.01))
    with pytest.raises(DataError, match=r"--form timm: logits differ .* nothing was written"):
        export_model(folder, tmp_path / "out", ["timm"], images)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "images", "model"]


def test_export_model_replaces_earlier_export_only(tmp_path, images):
    folder, out = LocalStore(tmp_path / "model"), tmp_path / "out"
    save_model(folder)
    export_model(folder, out, ["timm"], images)
    (out / "model.onnx").write_bytes(b"of an earlier export")
    export_model(folder, out, ["timm"], images)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "export.json", "model.safetensors", "preprocess.py"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"mine: is not empty and holds no export.json"):
        export_model(folder, tmp_path / "mine", ["timm"], images)
    with pytest.raises(StoreError, match=r"thesis.tex: is a file"):
        export_model(folder, tmp_path / "mine" / "thesis.tex", ["timm"], images)


def test_export_model_is_reproducible(tmp_path, images):
    folder = LocalStore(tmp_path / "model")
    save_model(folder)
    for name in ("a", "b"):
        export_model(folder, tmp_path / name, ["timm"], images)
    for file in ("config.json", "model.safetensors", "export.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    json.loads((tmp_path / "a" / "config.json").read_text())


def test_export_model_names_missing_libraries(tmp_path, images, monkeypatch):
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name.startswith("onnx") else object())
    message = r"--form onnx: onnx and onnxscript and onnxruntime not installed; pip install 'noisy-student\[export\]'"
    with pytest.raises(ConfigError, match=message):
        export_model(LocalStore(tmp_path / "model"), tmp_path / "out", ["onnx"], images)
