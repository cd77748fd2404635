"""Adversarial attacks: changes of an image, too small to see, that mislead the network (arXiv:1911.04252 §3.4).

FGSM (arXiv:1412.6572) takes one step along the sign of the loss's gradient; PGD (arXiv:1706.06083) takes many small steps from a random
start and returns to within epsilon of the image after each. Sizes are in pixel values, 0–255. All computations are in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ns.core.digest import hash_text

LogitsFunction = Callable[[Tensor], Tensor]
"""Images, float32 [N, H, W, 3] in 0–255 → logits float32 [N, classes]."""


@dataclass(frozen=True)
class AttackPlan:
    """An attack and its parameters; sizes in pixel values."""

    name: Literal["fgsm", "pgd"]
    epsilon: float
    steps: int
    step_size: float

    @classmethod
    def fgsm(cls, epsilon: float) -> "AttackPlan":
        return cls("fgsm", epsilon, 1, epsilon)

    @classmethod
    def pgd(cls, epsilon: float, steps: int, step_size: float | None = None) -> "AttackPlan":
        """The default step size is 2.5 · epsilon / steps: such steps reach any point within epsilon from any start."""
        return cls("pgd", epsilon, steps, step_size or 2.5 * epsilon / steps)

    def __str__(self) -> str:
        return f"{self.name}-{self.epsilon:g}" + (f"-{self.steps}x{self.step_size:g}" if self.name == "pgd" else "")


def attack_images(
    logits: LogitsFunction, images: Tensor, class_ids: Tensor, plan: AttackPlan, keys: Sequence[str], seed: int
) -> Tensor:
    """Adversarial images. uint8 [N, H, W, 3] and int64 [N] on one device → float32 [N, H, W, 3], in 0–255, within `plan.epsilon` of
    the images.

    The loss is the cross-entropy of the true class; `logits` must be differentiable in the images. PGD's random start follows from seed
    and key, so it does not depend on the rest of the batch.
    """
    clean = images.float()
    low, high = (clean - plan.epsilon).clamp_(min=0), (clean + plan.epsilon).clamp_(max=255)
    adversarial = clean
    if plan.name == "pgd":
        adversarial = (clean + _draw_starts(images, plan, keys, seed)).clamp_(0, 255)
    for _ in range(plan.steps):
        adversarial = adversarial.detach().requires_grad_()
        with torch.enable_grad():
            # A sum, so that no image's gradient depends on how many there are.
            loss = F.cross_entropy(logits(adversarial), class_ids, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = torch.minimum(torch.maximum(adversarial.detach() + plan.step_size * gradient.sign(), low), high)
    return adversarial.detach()


def _draw_starts(images: Tensor, plan: AttackPlan, keys: Sequence[str], seed: int) -> Tensor:
    shape = tuple(images.shape[1:])
    starts = np.empty((len(keys), *shape), np.float32)
    for row, key in enumerate(keys):
        entropy = hash_text(f"{seed}/{plan}/{key}", size=16)
        starts[row] = np.random.default_rng(entropy).random(shape, np.float32)
    return torch.from_numpy(starts).to(images.device) * (2 * plan.epsilon) - plan.epsilon
