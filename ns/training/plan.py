"""What a training consists of: how long, on which images, at which learning rate, with what held still."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ns.config.schema import FinetuneConfig, NoiseConfig, RoleConfig, TrainConfig
from ns.core.errors import ConfigError
from ns.data.augment.transforms import EvalTransform, TrainTransform
from ns.data.loading.decode import Encoded
from ns.training.optim import learning_rate


@dataclass(frozen=True)
class Course:
    role: RoleConfig
    transform: TrainTransform
    steps: int
    rate: Callable[[int], float]
    """Learning rate of a step counted from 0."""
    still: tuple[str, ...] = ()
    """Names of the layers that use their batch-norm statistics instead of gathering them."""

    @property
    def train(self) -> TrainConfig:
        return self.role.train


def training(role: RoleConfig, samples: int) -> Course:
    """The training of a teacher or student on `samples` labelled images."""
    config = role.train
    steps_per_epoch = samples / config.labelled_batch
    steps = max(1, math.ceil(config.epochs * steps_per_epoch))

    def rate(step: int) -> float:
        return learning_rate(
            step,
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            labelled_batch=config.labelled_batch,
            config=config.optimizer,
        )

    return Course(role, TrainTransform(role.noise, role.model.resolution), steps, rate)


def finetuned_role(role: RoleConfig, finetune: FinetuneConfig) -> RoleConfig:
    """The role during and after its fine-tuning: another resolution, no noise, labelled images only."""
    changes = {"epochs": finetune.epochs, "unlabelled_ratio": 0.0, "finetune": None}
    if finetune.labelled_batch is not None:
        changes["labelled_batch"] = finetune.labelled_batch
    return RoleConfig(
        model=role.model.model_copy(update={"resolution": finetune.resolution, "test_resolution": None}),
        noise=NoiseConfig(
            dropout=finetune.dropout,
            stochastic_depth=0,
            randaugment_layers=0,
            randaugment_magnitude=0,
            crop=role.noise.crop,
            flip=False,
        ),
        train=role.train.model_copy(update=changes),
    )


def finetuning(role: RoleConfig, finetune: FinetuneConfig, network: nn.Module, samples: int) -> Course:
    """The train/test resolution fix: `network` (trained) on plain labelled images as evaluation sees them, its first layers
    frozen (arXiv:1911.04252 §3; `noisy_student.md` §1.6).

    Without a learning rate of its own it gets the last ones of the training's schedule, as the reference code does it.
    """
    tuned = finetuned_role(role, finetune)
    batch = tuned.train.labelled_batch
    steps = max(1, math.ceil(finetune.epochs * samples / batch))
    main = training(role, samples)

    def rate(step: int) -> float:
        if finetune.lr is not None:
            return finetune.lr * batch / 256
        # Both count in their own batches; a fine-tuning longer than its training begins where that began.
        passed = main.steps - (steps - step) * batch / role.train.labelled_batch
        return main.rate(max(0, math.floor(passed))) * batch / role.train.labelled_batch

    still = freeze(network, finetune.frozen_share)
    return Course(tuned, _Plain(tuned), steps, rate, still)


def freeze(network: nn.Module, share: float) -> tuple[str, ...]:
    """Stops the gradient of the stem and of the first `share` of the blocks. Returns the names of their batch-norm layers, which
    are to be kept in evaluation mode. Raises ConfigError for a network of which timm does not know the order of layers.
    """
    from timm.models import group_parameters

    if share == 0:
        return ()
    matcher: Any = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ConfigError("train.finetune.frozen_share: the order of this network's layers is unknown; must be 0")
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


class _Plain(TrainTransform):
    """Images as evaluation sees them."""

    def __init__(self, role: RoleConfig) -> None:
        super().__init__(role.noise, role.model.resolution)
        self._plain = EvalTransform(role.model.resolution, role.noise.crop, role.model.test_margin_px)

    def __call__(self, image: Encoded | npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:  # noqa: ARG002
        return self._plain(image)
