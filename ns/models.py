"""Networks from timm, and their weights as safetensors. No pickle is ever read."""

import difflib
from itertools import pairwise
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ns.card import HISTORY, MANIFEST, WEIGHTS, ModelCard
from ns.config import Experiment, ModelConfig, NoiseConfig, RoleConfig
from ns.digest import sha256_bytes
from ns.document import pretty
from ns.errors import ConfigError, DataError
from ns.store import Store


def build(config: ModelConfig, noise: NoiseConfig, outputs: int) -> nn.Module:
    """A freshly initialised network in channels_last. Raises ConfigError for what timm does not know.

    Draws from torch's global generator: seed it first for a repeatable network.
    """
    import timm

    try:
        network: nn.Module = timm.create_model(
            config.arch,
            pretrained=False,
            num_classes=config.outputs or outputs,
            drop_rate=noise.dropout,
            drop_path_rate=noise.stochastic_depth,
            **config.args,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        hint = ""
        if not timm.is_model(config.arch):
            similar = difflib.get_close_matches(config.arch, timm.list_models(), n=3)
            hint = f"; did you mean {' or '.join(similar)}?" if similar else "; see timm.list_models()"
        raise ConfigError(f"model.arch: invalid value {config.arch!r} with args {config.args}: {error}{hint}") from error
    _reduce_stride(network, config.reduce_stride)
    return network.to(memory_format=torch.channels_last)


def total_stride(network: nn.Module) -> int:
    """Input px per px of the last feature map, 1 where the network does not say."""
    info = getattr(network, "feature_info", None)
    if not info:
        return 1
    last = info[-1] if isinstance(info, list) else info.info[-1]
    return int(last["reduction"])


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def check(experiment: Experiment, classes: int | None = None) -> None:
    """Refuses networks that timm cannot build, resolutions below their stride, students smaller than their teacher, and more
    label classes than model outputs. Builds no weights. Raises ConfigError naming the field, the value and what would be right.
    """
    roles = [("teacher", experiment.teacher)]
    roles += [(f"students.{index}", role) for index, role in enumerate(experiment.students)]
    sizes = {field: _check_role(field, role, classes) for field, role in roles}
    chain = ["teacher"]
    chain += [f"students.{min(g, len(experiment.students)) - 1}" for g in range(1, experiment.generations + 1)]
    if not experiment.allow_smaller_student:
        for teacher, student in pairwise(chain):
            if sizes[student] < sizes[teacher]:
                raise ConfigError(
                    f"{student}.model: {sizes[student]:,} parameters, its teacher ({teacher}.model) has {sizes[teacher]:,}: "
                    "must be equal or larger; for distillation into a smaller network set allow_smaller_student: true"
                )


def _check_role(field: str, role: RoleConfig, classes: int | None) -> int:
    model = role.model
    if classes and model.outputs and model.outputs < classes:
        raise ConfigError(
            f"{field}.model.outputs: invalid value {model.outputs}: the labelled data has {classes} classes; "
            f"must be at least {classes}, or be left out"
        )
    try:
        with torch.device("meta"):
            network = build(model, role.noise, classes or 2)
    except ConfigError as error:
        raise ConfigError(f"{field}.{error}") from error
    stride = max(1, total_stride(network) // model.reduce_stride)
    for name, resolution in (("resolution", model.resolution), ("test_resolution", model.inference_resolution)):
        if resolution < stride:
            raise ConfigError(
                f"{field}.model.{name}: invalid value {resolution}: below the total stride of {model.arch}, {stride} px; "
                f"must be at least {stride}, or set reduce_stride"
            )
    return parameter_count(network)


def save(
    folder: Store, network_state: dict[str, Tensor], card_fields: dict[str, Any], history: list[dict[str, float]]
) -> ModelCard:
    """Writes weights, history, and last the card, which makes the folder a model."""
    weights = save_tensors({name: tensor.contiguous() for name, tensor in network_state.items()})
    card = ModelCard(weights_sha256=sha256_bytes(weights), **card_fields)
    folder.put(WEIGHTS, weights)
    folder.put(HISTORY, pretty(history))
    card.write(folder, MANIFEST)
    return card


def load_weights(folder: Store, card: ModelCard) -> dict[str, Tensor]:
    """The averaged weights, on the CPU. Raises DataError if their bytes are not the card's."""
    data = folder.get(WEIGHTS)
    if sha256_bytes(data) != card.weights_sha256:
        raise DataError(f"{folder.uri}/{WEIGHTS}: sha256 differs from {MANIFEST}; the file is damaged or was replaced")
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise DataError(f"{folder.uri}/{WEIGHTS}: not a safetensors file: {error}") from error


def load(folder: Store) -> tuple[nn.Module, ModelCard]:
    """A model for inference: averaged weights, evaluation mode, no noise."""
    card = ModelCard.read(folder, MANIFEST)
    network = build(card.model, card.noise, len(card.classes))
    network.load_state_dict(load_weights(folder, card))
    return network.eval(), card


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Normalize(nn.Module):
    """uint8 images [N, H, W, 3] → float32 [N, 3, H, W] in channels_last, zero mean and unit variance; on the images' device."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        # Folded with the division by 255, so that one pass over the pixels does it all.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        # A permuted view of NHWC bytes is channels_last already: no copy here, and none in the network.
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std


def _reduce_stride(network: nn.Module, factor: int) -> None:
    """Makes the first strided convolutions dense until the total stride is divided by `factor` (2, 4, 8)."""
    remaining = factor
    for module in network.modules():
        if remaining == 1:
            return
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)
            remaining //= 2
    if remaining != 1:
        raise ConfigError(
            f"model.reduce_stride: invalid value {factor}: the network has too few convolutions of stride 2 for it"
        )
