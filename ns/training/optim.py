"""Optimizers and learning-rate schedules of the paper (arXiv:1911.04252 §3.1) and its reference code."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ns.config.schema import OptimizerConfig


def make_parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters that learn, in groups with their weight decay and, with `layer_decay`, the factor `lr_scale` of their rate.

    The rule `paper` decays everything but batch-norm parameters, biases too, as the reference code does.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    rule = config.decay_rule
    if rule == "auto":
        rule = "paper" if config.name in ("rmsprop", "sgd") else "timm"
    if rule == "paper":
        norms = (module for module in network.modules() if isinstance(module, _BatchNorm))
        exempt_ids = {id(parameter) for norm in norms for parameter in norm.parameters()}
        exempt = [name for name, parameter in network.named_parameters() if id(parameter) in exempt_ids]
    else:
        spare: Any = getattr(network, "no_weight_decay", set)
        exempt = list(spare())
    rules: dict[str, Any] = {"no_weight_decay_list": exempt, "weight_decay_exclude_1d": rule == "timm"}
    groups: list[dict[str, Any]]
    if config.layer_decay is not None:
        groups = param_groups_layer_decay(network, config.weight_decay, layer_decay=config.layer_decay, **rules)
    else:
        groups = param_groups_weight_decay(network, config.weight_decay, **rules)
    return groups


def make_optimizer(network: nn.Module, config: OptimizerConfig, peak_lr: float) -> torch.optim.Optimizer:
    """An optimizer; `compute_learning_rate` gives the rate of each step, `lr_scale` of a group its share, 1 if it has none.

    `peak_lr`: the largest rate, which some of timm's optimizers scale weight decay by.

    Weight decay is the gradient of weight_decay · Σ w² / 2 in `rmsprop` and `sgd`, and decoupled in `adamw`. All tensors are
    updated together, which takes half the time of one after the other and gives the same bits.
    """
    groups = make_parameter_groups(network, config)
    match config.name:
        case "rmsprop":
            from timm.optim import RMSpropTF

            # TF1: eps inside the square root, second moment starts at 1, learning rate applied before momentum.
            rmsprop: torch.optim.Optimizer = RMSpropTF(
                groups, lr=peak_lr, alpha=config.rms_decay, eps=config.rms_epsilon, momentum=config.momentum, foreach=True
            )
            return rmsprop
        case "sgd":
            return torch.optim.SGD(groups, lr=peak_lr, momentum=config.momentum, nesterov=config.momentum > 0, foreach=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=peak_lr, foreach=True)
        case _:
            from timm.optim import create_optimizer_v2

            for group in groups:
                group["lr"] = peak_lr * group.get("lr_scale", 1)
            # The groups have their decay; that of the call is only for what has none.
            optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, config.name, lr=peak_lr, weight_decay=0.0)
            return optimizer


def compute_peak_rate(config: OptimizerConfig, labeled_batch: int) -> float:
    return config.lr * labeled_batch / 256


def compute_learning_rate(
    step: int, *, steps: int, steps_per_epoch: float, labeled_batch: int, config: OptimizerConfig
) -> float:
    """Learning rate of a step counted from 0. Pseudo-labeled images do not count in the batch that scales it."""
    peak = compute_peak_rate(config, labeled_batch)
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * step / warmup
    if config.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
    # The decay clock starts with training, not after the warm-up.
    return float(peak * config.staircase_factor ** math.floor(step / (steps / config.staircase_drops)))
