"""Foreign scores."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from sklearn.covariance import OAS
from sklearn.datasets import load_digits
from torch.nn import functional as F

from ns.modeling.foreign import (
    DistanceScorer,
    EnergyScorer,
    FeatureNetwork,
    NetworkOutputs,
    StageStatistics,
    average_positions,
)


def make_maps(features):
    """A stage's output whose mean over the positions is `features`."""
    spread = torch.tensor([-1.0, 0.0, 0.5, 0.5]).reshape(1, 1, 2, 2)
    return features[:, :, None, None] + spread


@pytest.mark.parametrize("count", [12, 400])
def test_stage_distance_is_that_of_scikit_learn(count):
    """With fewer images than channels, too: there the correlations alone have no inverse."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(20, 20, generator=generator)
    class_ids = torch.arange(count) % 3
    labeled = torch.randn(count, 20, generator=generator) @ mixing + 3 * class_ids[:, None]
    others = torch.randn(50, 20, generator=generator) @ mixing.flip(0)
    means = torch.stack([labeled[class_ids == class_id].mean(0) for class_id in range(3)])
    deviations = (labeled - means[class_ids]).double()
    scale = deviations.std(0, correction=0)
    expected = OAS(assume_centered=True).fit((deviations / scale).numpy())
    squared = np.min([expected.mahalanobis(((others - mean) / scale).numpy()) for mean in means], axis=0)
    scores = StageStatistics.fit_features(labeled, class_ids)(others)
    np.testing.assert_allclose(scores.numpy(), np.sqrt(squared / 20), rtol=1e-3)


def test_constant_channel_does_not_decide_alone():
    labeled = torch.cat([torch.randn(100, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(100, 1)], 1)
    statistics = StageStatistics.fit_features(labeled, torch.zeros(100, dtype=torch.int64))
    scores = statistics(labeled + torch.tensor([0, 0, 0, 1e-4]))
    assert torch.isfinite(scores).all()
    assert scores.mean() == pytest.approx(np.sqrt(3 / 4), rel=0.1)


def test_distance_scorer_survives_a_file():
    """Of more than ten stages, whose names do not sort as their numbers do."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(50, channels, generator=generator) for channels in range(2, 14)]
    class_ids = torch.arange(50) % 2
    scorer = DistanceScorer.fit_stages(features, class_ids)
    again = DistanceScorer.from_tensors(load_tensors(save_tensors(scorer.state_dict())))
    outputs = NetworkOutputs([make_maps(stage) for stage in features], torch.zeros(50, 3))
    assert torch.equal(scorer(outputs), again(outputs))
    assert scorer(outputs).mean() == pytest.approx(1, abs=0.1)


def test_energy_is_the_free_energy_of_the_logits():
    logits = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    scores = EnergyScorer()(NetworkOutputs((), logits))
    np.testing.assert_allclose(scores, [-np.log(2), -10 - np.log1p(np.exp(-10))], rtol=1e-6)


@pytest.mark.parametrize("arch", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext"])
def test_feature_network_leaves_the_logits_as_they_are(arch):
    torch.manual_seed(0)
    network = timm.create_model(arch, num_classes=3).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        stages, logits = FeatureNetwork(network)(images)
        np.testing.assert_allclose(logits, network(images), atol=1e-5)
    assert all(average_positions(stage).shape[0] == 2 for stage in stages)


def train_digit_teacher(pixels, class_ids, classes):
    """A network after a few epochs of digits, float32 [N, 3, 32, 32]."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
    for _ in range(6):
        for batch in torch.randperm(len(pixels)).split(64):
            loss = F.cross_entropy(network(pixels[batch]), class_ids[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@pytest.mark.integration
def test_polluted_pool_is_as_clean_as_without_pollution():
    """Digits of seven classes; the other half of the pool are the three other digits, noise, and blank images. At a confidence above
    0.5, what is kept of it is right as often as in the clean pool, within three points."""
    bunch = load_digits()
    pixels = (
        F.interpolate(torch.from_numpy(bunch["images"] / 8 - 1).float()[:, None], size=32).expand(-1, 3, -1, -1).contiguous()
    )
    class_ids = torch.from_numpy(bunch["target"])
    order = torch.from_numpy(np.random.default_rng(0).permutation(np.flatnonzero(bunch["target"] < 7)))
    labeled, calibration, pool = order.split([500, 250, len(order) - 750])
    third = len(pool) // 3
    generator = torch.Generator().manual_seed(1)
    withheld = pixels[class_ids >= 7][:third]
    noise = torch.rand(third, 1, 32, 32, generator=generator).expand(-1, 3, -1, -1) * 2 - 1
    blank = torch.rand(len(pool) - 2 * third, 1, 1, 1, generator=generator).expand(-1, 3, 32, 32) * 2 - 1
    network = FeatureNetwork(train_digit_teacher(pixels[labeled], class_ids[labeled], 7))
    with torch.inference_mode():
        stages, _ = network(pixels[labeled])
        scorer = DistanceScorer.fit_stages([average_positions(stage) for stage in stages], class_ids[labeled])
        limit = scorer(NetworkOutputs(*network(pixels[calibration]))).quantile(0.9)
        outputs = NetworkOutputs(*network(torch.cat([pixels[pool], withheld, noise, blank])))
        scores, (confidence, predicted) = scorer(outputs), outputs.logits.softmax(1).max(1)
    truth = torch.cat([class_ids[pool], torch.full((len(pool),), -1)])
    confident, familiar = confidence > 0.5, scores <= limit

    def measure_precision(mask):
        return float((predicted == truth)[mask].float().mean())

    clean = measure_precision(confident & (truth >= 0))
    assert measure_precision(confident) < clean - 0.3
    assert measure_precision(confident & familiar) > clean - 0.03
    # Of the images of the classes, about a tenth is lost, as the quantile says.
    assert (confident & familiar & (truth >= 0)).sum() > 0.85 * (confident & (truth >= 0)).sum()
