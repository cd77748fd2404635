"""Exponential moving average of weights and batch-norm statistics: what evaluates, teaches, and is kept."""

import torch
from torch import Tensor, nn


class Ema:
    """Shadow of a network's whole state. Integer state (batch counters) is copied, not averaged.

    Holds on to the network's tensors: move it to its device before, and change its values only in place.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        live = network.state_dict()
        self.shadow: dict[str, Tensor] = {name: value.clone() for name, value in live.items()}
        # Collected once: walking through the modules at every step costs as much as the average itself.
        averaged = [name for name, value in live.items() if value.is_floating_point()]
        self._averaged = [self.shadow[name] for name in averaged], [live[name] for name in averaged]
        self._copied = [(self.shadow[name], value) for name, value in live.items() if not value.is_floating_point()]

    def decay_at(self, step: int) -> float:
        """TensorFlow's ramp: min(decay, (1 + step) / (10 + step)), `step` counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """shadow ← d · shadow + (1 - d) · network, with d = decay_at(step)."""
        shadows, values = self._averaged
        torch._foreach_lerp_(shadows, values, 1 - self.decay_at(step))
        for shadow, value in self._copied:
            shadow.copy_(value)
