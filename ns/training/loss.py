"""The loss of training: cross-entropy on labels plus cross-entropy on pseudo-labels (arXiv:1911.04252, Algorithm 1)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ns.config.schema import TrainConfig


class Losses(NamedTuple):
    total: Tensor
    labeled: Tensor
    """Mean cross-entropy over the labeled images."""
    pseudo: Tensor
    """Mean cross-entropy over the pseudo-labeled images; 0 without any."""


def apply_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T), renormalized to the sum of p's row, float32 [N, C]: the softmax at temperature T of the logits behind p.

    It uses logarithms, since at a low temperature all powers of an unsure image would underflow to 0.
    """
    if temperature == 1:
        return probabilities
    # A factor of a row cancels in the softmax.
    return (probabilities.log() / temperature).softmax(1) * probabilities.sum(1, keepdim=True)


def compute_losses(logits: Tensor, class_ids: Tensor, targets: Tensor, train: TrainConfig) -> Losses:
    """Loss of one concatenated batch.

    logits float32 [B+U, C], labeled images first; class_ids int64 [B]; targets float32 [U, C], rows summing to the weight
    of the image in the mean (1, or around 1). The weights of the two means follow `train.weighting`, with r = U / B.
    """
    batch, pseudo_batch = len(class_ids), len(targets)
    labeled = F.cross_entropy(logits[:batch], class_ids, label_smoothing=train.label_smoothing)
    if pseudo_batch == 0:
        return Losses(labeled, labeled.detach(), torch.zeros_like(labeled))
    image_weights = targets.sum(1)  # [U] float32
    if train.pseudo_labels == "hard":
        smoothing = train.label_smoothing
        losses = F.cross_entropy(logits[batch:], targets.argmax(1), label_smoothing=smoothing, reduction="none")
        pseudo = (losses * image_weights).mean()
    else:
        # Without smoothing: soft labels are smooth already, and the reference code adds none. The loss is linear in the targets, so
        # that their sum is the weight.
        pseudo = F.cross_entropy(logits[batch:], apply_temperature(targets, train.temperature))
    ratio = pseudo_batch / batch
    if train.weighting == "equal":
        total = labeled + pseudo
    else:
        total = labeled + ratio * pseudo
        if train.weighting == "mean":
            total = total / (1 + ratio)
    return Losses(total, labeled.detach(), pseudo.detach())
