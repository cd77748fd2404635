"""Foreign scores: how unlike the labeled images an image is, by what a network makes of it.

Confidence cannot tell: a softmax gives every image to some class, and images of none of the classes often with high confidence. The
last features alone tell little, since they keep only what separates the classes; the outputs of earlier stages keep more. So the
distance is the mean of Mahalanobis distances over all stages (arXiv:1807.03888, without its weights, which need foreign images).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_SCALE = 1e-3
"""A channel that hardly varies over the labeled images counts as one with this share of the mean standard deviation of its stage."""
LEAST_SHRINKAGE = 1e-3


class NetworkOutputs(NamedTuple):
    """What a network says of a batch of images."""

    stages: Sequence[Tensor]
    """Output of each stage, [N, D, H, W] each; none unless they were asked for."""
    logits: Tensor
    """[N, outputs]"""


class FeatureNetwork(nn.Module):
    """A network of timm whose forward pass returns the outputs of its stages too. The logits stay the same."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network: Any = network

    def forward(self, images: Tensor) -> NetworkOutputs:
        final_map, stages = self._network.forward_intermediates(images)
        return NetworkOutputs(stages, self._network.forward_head(final_map))


class ForeignScorer(nn.Module):
    """Scores images, float32 [N]: higher for images that are less like the labeled ones."""

    needs_stages = False
    """Whether the network must be run as a `FeatureNetwork`."""


class EnergyScorer(ForeignScorer):
    """The free energy of the logits, -log Σ exp(logit) (arXiv:2010.03759). It needs no labeled images."""

    def forward(self, outputs: NetworkOutputs) -> Tensor:
        return -outputs.logits.logsumexp(1)


class StageStatistics(nn.Module):
    """The labeled images of C classes in one description of a stage's output: D channels."""

    whitening: Tensor
    """[D, D]: brings the deviations from the means of the classes to unit covariance."""
    centers: Tensor
    """[C, D]: the means of the classes, whitened."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("whitening", torch.eye(channels))
        self.register_buffer("centers", torch.zeros(classes, channels))

    @classmethod
    def fit_features(cls, features: Tensor, class_ids: Tensor) -> Self:
        """Takes the statistics from the labeled images: float32 [N, D], N > 1, and int64 [N].

        Correlations are shrunk towards none, by more the fewer images there are (oracle approximating shrinkage, arXiv:0907.4698).
        """
        values = features.double()
        count, channels = values.shape
        present = sorted(set(class_ids.tolist()))
        means = torch.stack([values[class_ids == class_id].mean(0) for class_id in present])
        deviations = values - means[torch.searchsorted(torch.tensor(present), class_ids)]
        scale = deviations.std(0, correction=0)
        deviations /= scale.clamp_(min=max(LEAST_SCALE * float(scale.mean()), torch.finfo(torch.float32).tiny))
        correlations = deviations.T @ deviations / count
        squared, trace = float((correlations**2).sum()), float(correlations.trace())
        excess = (count + 1) * (squared - trace**2 / channels)
        shrinkage = min(1.0, (squared + trace**2) / excess) if excess > 0 else 1.0
        # Never quite 0: correlations of channels that are always equal have no inverse.
        shrinkage = max(shrinkage, LEAST_SHRINKAGE)
        identity = torch.eye(channels, dtype=values.dtype)
        factor = torch.linalg.cholesky((1 - shrinkage) * correlations + shrinkage * identity)
        whitening = torch.linalg.solve_triangular(factor, identity, upper=False).T / scale[:, None]
        statistics = cls(*means.shape)
        statistics.load_state_dict({"whitening": whitening, "centers": means @ whitening})
        return statistics

    def forward(self, features: Tensor) -> Tensor:
        """float32 [N]: √(d² / D) for the squared Mahalanobis distance d² of each image to the nearest class. `features`: [N, D]."""
        whitened = features @ self.whitening
        nearest = torch.cdist(whitened, self.centers).min(1).values
        scores: Tensor = nearest / len(self.whitening) ** 0.5
        return scores


class DistanceScorer(ForeignScorer):
    """The mean over the stages of an image's distance to the labeled images: about 1 for an image that is like them."""

    needs_stages = True

    def __init__(self, stages: Sequence[StageStatistics]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        """Statistics of each description of each stage."""

    @classmethod
    def fit_stages(cls, stages: Sequence[Tensor], class_ids: Tensor) -> Self:
        """Takes the statistics from the labeled images: float32 [N, D] per stage, averaged over the positions, and int64 [N]."""
        descriptions = (features for stage in stages for features in _describe_stage(stage))
        return cls([StageStatistics.fit_features(features, class_ids) for features in descriptions])

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The scorer whose `state_dict` this is."""
        centers = [tensors[name] for name in sorted(tensors, key=_stage_number) if name.endswith(".centers")]
        scorer = cls([StageStatistics(*stage_centers.shape) for stage_centers in centers])
        scorer.load_state_dict(tensors)
        return scorer

    def forward(self, outputs: NetworkOutputs) -> Tensor:
        descriptions = (features for stage in outputs.stages for features in _describe_stage(average_positions(stage)))
        distances = [statistics(features) for statistics, features in zip(self.stages, descriptions, strict=True)]
        return torch.stack(distances).mean(0)


def _describe_stage(features: Tensor) -> tuple[Tensor, Tensor]:
    """The features [N, D] as they are and at length 1 (arXiv:2505.18032): digits among photographs stand out in the first, noise in the
    second."""
    return features, F.normalize(features)


def _stage_number(name: str) -> int:
    return int(name.split(".")[1])


def average_positions(output: Tensor) -> Tensor:
    """float32 [N, D]: the mean of a stage's output [N, D, H, W] over its positions."""
    return output.float().mean((2, 3))
