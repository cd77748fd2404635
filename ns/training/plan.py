"""The plan of a training: its steps, its images, its learning rates, its frozen layers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ns.config.schema import FinetuneConfig, NoiseConfig, RoleConfig, TrainConfig
from ns.core import log
from ns.core.errors import ConfigError
from ns.data.augment.transforms import EvalTransform, TrainTransform
from ns.data.loading.decode import EncodedJpeg
from ns.training.optim import compute_learning_rate

FINETUNING_LR_SHARE = 0.97**145
"""Share of the peak learning rate that fine-tuning has: 0.0121, where the paper's schedule ends after 145 drops, and where the reference
code fine-tunes. The end of the training's own schedule would not do: a cosine ends at zero, and a short staircase near the peak."""


@dataclass(frozen=True)
class TrainingPlan:
    """What `train_model` is to do."""

    role: RoleConfig
    transform: TrainTransform
    steps: int
    lr_at: Callable[[int], float]
    """Learning rate of a step counted from 0."""
    frozen_share: float = 0.0
    """Share of the blocks, counted from the input, that are frozen."""
    unfreeze_step: int | None = None
    """Step from which all layers learn; None: never."""
    pseudo_transform: TrainTransform | None = None
    """For pseudo-labeled images; `transform` if None."""

    @property
    def train_config(self) -> TrainConfig:
        return self.role.train


def plan_training(role: RoleConfig, samples: int) -> TrainingPlan:
    """The training of a teacher or a student with `samples` labeled images."""
    config = role.train
    steps_per_epoch = samples / config.labeled_batch
    steps = max(1, math.ceil(config.epochs * steps_per_epoch))
    if config.labeled_batch > samples:
        log.get_logger().warning(
            "a batch is larger than the labeled images; lower labeled_batch, or raise epochs",
            labeled_batch=config.labeled_batch,
            labeled=samples,
            epochs=config.epochs,
            steps=steps,
        )
    if config.epochs <= config.optimizer.warmup_epochs:
        log.get_logger().warning(
            "the training ends before its learning rate has reached the peak; lower optimizer.warmup_epochs, or raise epochs",
            warmup_epochs=config.optimizer.warmup_epochs,
            epochs=config.epochs,
        )
    lr_at = partial(
        compute_learning_rate,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        labeled_batch=config.labeled_batch,
        config=config.optimizer,
    )
    transform = TrainTransform(role.noise, role.model.resolution, role.model.crop, role.model.interpolation)
    pseudo_transform = None if role.noise.pool == "same" else _PlainTransform(role)
    unfreeze_step = None if config.unfreeze_epoch is None else math.ceil(config.unfreeze_epoch * steps_per_epoch)
    return TrainingPlan(role, transform, steps, lr_at, config.frozen_share, unfreeze_step, pseudo_transform)


def make_finetuning_role(role: RoleConfig, finetune: FinetuneConfig) -> RoleConfig:
    """The role during and after its fine-tuning: another resolution, no noise, labeled images only."""
    changes = {"epochs": finetune.epochs, "unlabeled_ratio": 0.0, "finetune": None, "frozen_share": 0.0, "unfreeze_epoch": None}
    if finetune.labeled_batch is not None:
        changes["labeled_batch"] = finetune.labeled_batch
    return RoleConfig(
        model=role.model.model_copy(update={"resolution": finetune.resolution, "test_resolution": None}),
        noise=NoiseConfig(
            dropout=finetune.dropout, stochastic_depth=0, randaugment_layers=0, randaugment_magnitude=0, flip=False
        ),
        train=role.train.model_copy(update=changes),
    )


def plan_finetuning(role: RoleConfig, finetune: FinetuneConfig, samples: int) -> TrainingPlan:
    """Fixes the gap between the resolutions of training and test: trains a trained network on labeled images as evaluation sees
    them, with its first layers frozen (arXiv:1911.04252 §3, arXiv:1906.06423).

    Without a learning rate of its own it has FINETUNING_LR_SHARE of the training's peak, the rate that the paper's schedule ends with.
    """
    finetuning_role = make_finetuning_role(role, finetune)
    batch = finetuning_role.train.labeled_batch
    steps = max(1, math.ceil(finetune.epochs * samples / batch))
    base_lr = FINETUNING_LR_SHARE * role.train.optimizer.lr if finetune.lr is None else finetune.lr
    lr = base_lr * batch / 256
    return TrainingPlan(finetuning_role, _PlainTransform(finetuning_role), steps, lambda _: lr, finetune.frozen_share)


def freeze_layers(network: nn.Module, share: float) -> tuple[str, ...]:
    """Freezes the stem and the first `share` of the blocks. Returns the names of their batch-norm layers, which must stay in
    evaluation mode. Raises ConfigError for a network if timm does not know the order of its layers.
    """
    from timm.models import group_parameters

    if share == 0:
        return ()
    matcher: Any = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ConfigError("frozen_share: the order of this network's layers is unknown; must be 0")
    layer: dict[str, int] = group_parameters(network, matcher(), reverse=True)
    blocks = max(layer.values()) - 1  # the first layer is the stem, the last the head
    frozen = {name for name, index in layer.items() if index <= round(share * blocks)}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return tuple(
        prefix
        for prefix, module in network.named_modules()
        if isinstance(module, _BatchNorm) and {f"{prefix}.{name}" for name, _ in module.named_parameters()} <= frozen
    )


class _PlainTransform(TrainTransform):
    """Images as evaluation sees them, at the resolution of training. Of a `TrainTransform` it keeps how images are read, and no noise."""

    def __init__(self, role: RoleConfig) -> None:
        super().__init__(role.noise, role.model.resolution, role.model.crop)
        self.mixer = None
        self._plain = EvalTransform.for_model(role.model, resolution=role.model.resolution)

    def __call__(self, image: EncodedJpeg | npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:  # noqa: ARG002
        return self._plain(image)
