import pytest

from ns.config.schema import ModelConfig, NoiseConfig
from ns.export.exporter import ExportManifest
from ns.modeling.manifest import Lineage, ModelManifest
from ns.reporting.model_card import render_model_card


@pytest.mark.parametrize(
    ("crop", "margin", "said"),
    [
        ("resized", 32, "the center, 64 of 96 parts of the short side"),
        ("resized", 8, "the center, 64 of 72 parts of the short side"),
        ("none", 32, "the whole image, made square"),
    ],
)
def test_render_model_card_states_crop(crop, margin, said):
    card = ModelManifest(
        generation=1,
        model=ModelConfig(arch="test_efficientnet", resolution=64, test_margin_px=margin, crop=crop),
        noise=NoiseConfig(),
        classes=("cat", "dog"),
        parameters=1,
        steps=1,
        lineage=Lineage(config="c", labeled="l"),
        weights_sha256="w",
    )
    exported = ExportManifest(
        model="m",
        weights_sha256="w",
        dataset="d",
        resolution=64,
        crop=crop,
        test_margin_px=margin,
        mean=card.mean,
        std=card.std,
        classes=card.classes,
        checks=(),
        version="0",
    )
    assert said in render_model_card(card, exported, [], None)
