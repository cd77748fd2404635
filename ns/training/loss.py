"""The loss of training: cross-entropy on labels plus cross-entropy on pseudo-labels (arXiv:1911.04252, Algorithm 1)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ns.config.schema import TrainConfig
from ns.data.loading.stream import MixedLabels


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


def compute_losses(
    logits: Tensor, class_ids: Tensor, targets: Tensor, train: TrainConfig, mixed: MixedLabels | None = None
) -> Losses:
    """Loss of one concatenated batch.

    logits float32 [B+U, C], labeled images first; class_ids int64 [B]; targets float32 [U, C], rows summing to the weight
    of the image in the mean (1, or around 1). An image that is `mixed` learns both labels, weighted by their shares. The weights of
    the two means follow `train.loss_weighting`, with r = U / B.
    """
    batch, pseudo_batch = len(class_ids), len(targets)
    labeled = _mean_loss(_labeled_losses, logits[:batch], class_ids, train, mixed and (mixed.class_ids, mixed.shares[:batch]))
    if pseudo_batch == 0:
        return Losses(labeled, labeled.detach(), torch.zeros_like(labeled))
    pseudo = _mean_loss(_pseudo_losses, logits[batch:], targets, train, mixed and (mixed.targets, mixed.shares[batch:]))
    ratio = pseudo_batch / batch
    if train.loss_weighting == "equal":
        total = labeled + pseudo
    else:
        total = labeled + ratio * pseudo
        if train.loss_weighting == "mean":
            total = total / (1 + ratio)
    return Losses(total, labeled.detach(), pseudo.detach())


def sum_loss_weights(train: TrainConfig, ratio: float) -> float:
    """Sum of the weights of the two means in the loss, with `ratio` pseudo-labeled images per labeled one: the factor by which
    gradients are larger than those of a mean over images."""
    if ratio == 0 or train.loss_weighting == "mean":
        return 1.0
    return 2.0 if train.loss_weighting == "equal" else 1 + ratio


def find_main_labels(class_ids: Tensor, targets: Tensor, mixed: MixedLabels | None) -> tuple[Tensor, Tensor]:
    """Class ids [B] and targets [U, C] of what each image shows most of: of itself, unless it is `mixed` with a share below a half."""
    if mixed is None:
        return class_ids, targets
    shows_itself = mixed.shares >= 0.5
    batch = len(class_ids)
    main_class_ids = torch.where(shows_itself[:batch], class_ids, mixed.class_ids)
    return main_class_ids, torch.where(shows_itself[batch:, None], targets, mixed.targets)


def _labeled_losses(logits: Tensor, class_ids: Tensor, train: TrainConfig) -> Tensor:
    """float32 [N]"""
    return F.cross_entropy(logits, class_ids, label_smoothing=train.label_smoothing, reduction="none")


def _pseudo_losses(logits: Tensor, targets: Tensor, train: TrainConfig) -> Tensor:
    """float32 [N], each times the weight of its image."""
    if train.pseudo_labels == "hard":
        return _labeled_losses(logits, targets.argmax(1), train) * targets.sum(1)
    # Without smoothing: soft labels are smooth already, and the reference code adds none. The loss is linear in the targets, so
    # that their sum is the weight.
    return F.cross_entropy(logits, apply_temperature(targets, train.temperature), reduction="none")


def _mean_loss(
    compute_image_losses: Callable[[Tensor, Tensor, TrainConfig], Tensor],
    logits: Tensor,
    labels: Tensor,
    train: TrainConfig,
    partners: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Mean over images; if there are `partners`, their labels and the shares of the images, of both losses of each image by its share."""
    losses = compute_image_losses(logits, labels, train)
    if partners is not None:
        partner_labels, shares = partners
        losses = shares * losses + (1 - shares) * compute_image_losses(logits, partner_labels, train)
    return losses.mean()
