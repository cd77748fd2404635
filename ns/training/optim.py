"""Optimizers and learning-rate schedules of the paper (arXiv:1911.04252 §3.1) and its reference code."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ns.config.schema import OptimizerConfig


def make_parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on everything but batch-norm parameters; biases are decayed, as in the reference code."""
    exempt = {id(p) for module in network.modules() if isinstance(module, _BatchNorm) for p in module.parameters()}
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in exempt], "weight_decay": 0.0},
    ]


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer with learning rate 0; `compute_learning_rate` gives the rate of each step.

    Weight decay is the gradient of weight_decay · Σ w² / 2 in `rmsprop` and `sgd`, and decoupled in `adamw`. All tensors are
    updated together, which takes half the time of one after the other and gives the same bits.
    """
    groups = make_parameter_groups(network, config.weight_decay)
    match config.name:
        case "rmsprop":
            from timm.optim import RMSpropTF

            # TF1: eps inside the square root, second moment starts at 1, learning rate applied before momentum.
            rmsprop: torch.optim.Optimizer = RMSpropTF(
                groups, lr=0.0, alpha=config.rms_decay, eps=config.rms_epsilon, momentum=config.momentum, foreach=True
            )
            return rmsprop
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.momentum > 0, foreach=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, foreach=True)


def compute_learning_rate(
    step: int, *, steps: int, steps_per_epoch: float, labeled_batch: int, config: OptimizerConfig
) -> float:
    """Learning rate of a step counted from 0. Pseudo-labeled images do not count in the batch that scales it."""
    peak = config.lr * labeled_batch / 256
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * step / warmup
    if config.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
    # The decay clock starts with training, not after the warm-up.
    return float(peak * config.staircase_factor ** math.floor(step / (steps / config.staircase_drops)))
