"""Whether weights fit a network, by the names and shapes of their tensors: known before anything is trained."""

import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ns.core.errors import ConfigError
from ns.modeling.tensor_shapes import Shape

WRAPPERS = ("module.", "_orig_mod.", "model.", "state_dict.", "net.", "network.", "backbone.")
"""What stands before the names of tensors if a wrapped network was saved."""
NAMED_TENSORS = 5
"""Tensors that do not fit and are named."""
Value = TypeVar("Value")


class WeightsFit(NamedTuple):
    """How weights fit a network."""

    tensors: dict[str, Tensor]
    """Those that fit, by the network's names."""
    missing: list[str]
    """Tensors of the network that stay as they are, without those of the classifier."""
    total: int
    """Number of the network's tensors, without those of the classifier."""

    def describe(self) -> str | None:
        """What does not fit, in a line; None if all but the classifier does."""
        if not self.missing:
            return None
        names = ", ".join(self.missing[:NAMED_TENSORS]) + (", …" if len(self.missing) > NAMED_TENSORS else "")
        return f"{self.total - len(self.missing)} of {self.total} tensors fit; from random weights start {names}"


def fit_weights(network: nn.Module, tensors: Mapping[str, Tensor], *, with_classifier: bool = True) -> WeightsFit:
    """The tensors whose names and shapes are the network's, if need be as timm itself adapts those of other programs and image sizes.

    Works on the meta device too. Without `with_classifier`, the classifier's are left out.
    """
    own_shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    classifier = _list_classifier_prefixes(network)
    candidates = strip_wrappers(tensors, own_shapes.keys())
    fitting = _match_shapes(own_shapes, candidates)
    if any(name not in fitting and not name.startswith(classifier) for name in own_shapes):
        adapted = _match_shapes(own_shapes, _apply_timm_filter(network, candidates))
        fitting = max(fitting, adapted, key=len)
    if not with_classifier:
        fitting = {name: tensor for name, tensor in fitting.items() if not name.startswith(classifier)}
    body = [name for name in own_shapes if not name.startswith(classifier)]
    return WeightsFit(fitting, [name for name in body if name not in fitting], len(body))


def check_weights_fit(network: nn.Module, uri: str, shapes: Mapping[str, Shape]) -> WeightsFit:
    """How weights fit whose header `read_tensor_shapes` has read. Raises ConfigError if none does but those of the classifier."""

    fit = fit_weights(network, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    if len(fit.missing) == fit.total:
        raise make_fit_error(network, uri, len(shapes))
    return fit


def make_fit_error(network: nn.Module, uri: str, tensors: int) -> ConfigError:
    return ConfigError(
        f"model.pretrained: {uri}: none of its {tensors} tensors has the name and shape of one in "
        f"{type(network).__name__}; give weights of the same architecture, or leave it out"
    )


def _match_shapes(own_shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if own_shapes.get(name) == tensor.shape}


def _list_classifier_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's tensors."""
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _apply_timm_filter(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as timm brings them into the names and shapes of a network: position embeddings are resampled to its image size, for
    instance. Unchanged if timm has nothing for the family, or does not know what to do with them."""
    module = sys.modules[type(network).__module__]
    adapt = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if adapt is None:
        return tensors
    for arguments in ((dict(tensors), network), (dict(tensors),)):
        # Whatever it expects of tensors that are none of timm's.
        with suppress(Exception):
            return dict(adapt(*arguments))
    return tensors


def strip_wrappers(tensors: Mapping[str, Value], own_names: Collection[str]) -> dict[str, Value]:
    """The tensors without what DistributedDataParallel, torch.compile and other programs put before all of their names."""
    stripped = dict(tensors)
    while stripped and not any(name in own_names for name in stripped):
        wrapper = next((wrapper for wrapper in WRAPPERS if all(name.startswith(wrapper) for name in stripped)), None)
        if wrapper is None:
            break
        stripped = {name.removeprefix(wrapper): value for name, value in stripped.items()}
    return stripped
