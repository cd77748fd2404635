"""Exponential moving average of weights and batch-norm statistics. The averaged model is what is evaluated, labels, and is kept."""

import torch
from torch import Tensor, nn


class Ema:
    """The average of a network's whole state. State that has no average is copied: integers (batch counters) and
    infinite limits.

    It keeps references to the network's tensors: move the network to its device first, and change values only in place.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        live = network.state_dict()
        self.shadow: dict[str, Tensor] = {name: value.clone() for name, value in live.items()}
        # Collected once: to walk through the modules at every step takes as long as the average itself.
        # Of two infinite values the average would be no number.
        averaged = [name for name, value in live.items() if value.is_floating_point() and value.isfinite().all()]
        self._averaged = [self.shadow[name] for name in averaged], [live[name] for name in averaged]
        self._copied = [(self.shadow[name], live[name]) for name in live.keys() - set(averaged)]

    def decay_at(self, step: int) -> float:
        """The decay of a step counted from 0, with TensorFlow's ramp: min(decay, (1 + step) / (10 + step))."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """shadow ← d · shadow + (1 - d) · network, with d = decay_at(step)."""
        shadows, values = self._averaged
        torch._foreach_lerp_(shadows, values, 1 - self.decay_at(step))
        for shadow, value in self._copied:
            shadow.copy_(value)
