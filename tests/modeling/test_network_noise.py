"""Dropout and stochastic depth of the labeled images alone, in a joint batch."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from ns.config.schema import ModelConfig, NoiseConfig
from ns.core.errors import ConfigError
from ns.modeling.factory import build_model
from ns.modeling.network_noise import FirstImagesNoise, confine_drop_paths

ARCHITECTURES = ("test_efficientnet", "test_resnet", "test_convnext", "test_vit", "test_mambaout", "test_nfnet")
NOISE = NoiseConfig(dropout=0.5, stochastic_depth=0.5)


def build(arch: str, **args) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(arch=arch, args=args), NOISE, 5).train()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 160, 160, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


def freeze_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_noise_changes_the_first_images_only(arch):
    network = build(arch)
    freeze_statistics(network)
    clean = build(arch).eval()
    confine_drop_paths(network)
    batch, outputs = images(6), []
    with torch.no_grad():
        for seed in range(2):
            torch.manual_seed(seed)
            with FirstImagesNoise(4, 6):
                outputs.append(network(batch))
        expected = clean(batch)
    torch.testing.assert_close(outputs[0][4:], expected[4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[1][4:], expected[4:], rtol=1e-4, atol=1e-5)
    for index in range(4):
        assert not torch.allclose(outputs[0][index], outputs[1][index], rtol=1e-3, atol=1e-4), index


def test_batch_norm_statistics_are_joint():
    noiseless = NoiseConfig(dropout=0, stochastic_depth=0)
    torch.manual_seed(0)
    plain = build_model(ModelConfig(arch="test_efficientnet"), noiseless, 5).train()
    confined = build("test_efficientnet")
    confine_drop_paths(confined)
    first_norms = [next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d)) for network in (plain, confined)]
    batch = images(6)
    with torch.no_grad():
        plain(batch)
        with FirstImagesNoise(4, 6):
            confined(batch)
    # Before the first block that drops, statistics are those of all six images.
    assert torch.equal(first_norms[0].running_mean, first_norms[1].running_mean)


def test_drop_path_has_timms_rate_and_scale():
    network = nn.Sequential(DropPath(0.25))
    confine_drop_paths(network)
    ones = torch.ones(4000, 2, 3, 3)
    torch.manual_seed(0)
    everywhere = network.train()(ones)
    with FirstImagesNoise(3000, 4000):
        confined = network(ones)
    for values in (everywhere, confined[:3000]):
        kept = values[:, 0, 0, 0] > 0
        assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
        assert torch.equal(values, (kept / 0.75)[:, None, None, None].expand_as(values))
    assert torch.equal(confined[3000:], ones[3000:])
    assert torch.equal(network.eval()(ones), ones)


def test_dropout_has_its_rate_and_scale():
    ones = torch.ones(20, 5000)
    torch.manual_seed(0)
    with FirstImagesNoise(15, 20):
        dropped = F.dropout(ones, 0.2)
        evaluated = F.dropout(ones, 0.2, training=False)
    assert (dropped[:15] > 0).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert set(dropped[:15].unique().tolist()) == {0.0, 1.25}
    assert torch.equal(dropped[15:], ones[15:])
    assert torch.equal(evaluated, ones)


def test_weights_and_their_names_stay():
    network, confined = build("test_efficientnet"), build("test_efficientnet")
    confine_drop_paths(confined)
    assert {name: value.sum().item() for name, value in network.state_dict().items()} == {
        name: value.sum().item() for name, value in confined.state_dict().items()
    }


@pytest.mark.parametrize(
    ("arch", "args", "kind"),
    [
        ("test_vit", {"attn_drop_rate": 0.3}, "scaled_dot_product_attention|dropout"),
        ("test_resnet", {"drop_block_rate": 0.3}, "bernoulli"),
    ],
)
def test_noise_of_unknown_images_is_refused(arch, args, kind):
    network = build(arch, **args)
    confine_drop_paths(network)
    batch = images(4)
    with pytest.raises(ConfigError, match=rf"noise.pool: invalid value 'none' .*({kind})"), FirstImagesNoise(2, 4):
        network(batch)


def test_dropout_of_other_rows_than_images_is_refused():
    with pytest.raises(ConfigError, match="it drops from 8 rows for 4 images"), FirstImagesNoise(2, 4):
        F.dropout(torch.ones(8, 3))


@pytest.mark.integration
def test_compiled_networks_are_confined_too():
    """As inductor's graphs, which begin with this backend and need a compiler. (The backend `eager` would call F.dropout again.)"""
    network = build("test_efficientnet")
    freeze_statistics(network)
    confine_drop_paths(network)
    compiled = torch.compile(network, backend="aot_eager")
    batch = images(6)
    with torch.no_grad():
        expected = network.eval()(batch)
        network.train()
        freeze_statistics(network)
        for seed in range(2):
            torch.manual_seed(seed)
            with FirstImagesNoise(4, 6):
                got = compiled(batch)
            torch.testing.assert_close(got[4:], expected[4:], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(got[:4], expected[:4], rtol=1e-3, atol=1e-4)


def test_architectures_are_known():
    assert set(ARCHITECTURES) <= set(timm.list_models("test_*"))
