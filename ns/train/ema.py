"""Exponential moving average of weights and batch-norm statistics: what evaluates, teaches, and is kept."""

import torch
from torch import Tensor, nn


class Ema:
    """Shadow of a network's whole state. Integer state (batch counters) is copied, not averaged."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {name: value.detach().clone() for name, value in network.state_dict().items()}

    def decay_at(self, step: int) -> float:
        """TensorFlow's ramp: min(decay, (1 + step) / (10 + step)), `step` counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        state = network.state_dict()
        floats = [name for name, value in self.shadow.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.shadow[name] for name in floats], [state[name] for name in floats], 1 - self.decay_at(step))
        for name, value in self.shadow.items():
            if not value.is_floating_point():
                value.copy_(state[name])
