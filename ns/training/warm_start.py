"""Starts from existing weights: the teacher's, another run's, or any safetensors file."""

from collections.abc import Collection
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from ns.core import log
from ns.core.errors import ConfigError, DataError
from ns.modeling import factory as models
from ns.modeling.manifest import ModelManifest, split_weights_uri
from ns.storage import Store, open_store

WRAPPERS = ("module.", "_orig_mod.", "model.", "state_dict.", "net.", "network.", "backbone.")
"""What stands before the names of tensors if a wrapped network was saved."""


class InitialWeights(NamedTuple):
    uri: str
    tensors: dict[str, Tensor]
    classes: tuple[str, ...] | None
    """Names of the outputs in their order; None if they are unknown."""


def read_model_weights(store: Store) -> InitialWeights:
    """The averaged weights of a model that this project trained."""
    manifest = ModelManifest.load(store)
    return InitialWeights(store.uri, models.load_weights(store, manifest), manifest.classes)


def read_weights(uri: str) -> InitialWeights:
    """The weights in a safetensors file, or in a model's folder. Raises DataError for a file of another kind."""
    parent, key = split_weights_uri(uri)
    if key is None:
        return read_model_weights(open_store(parent))
    try:
        return InitialWeights(uri, load_tensors(open_store(parent).get(key)), None)
    except SafetensorError as error:
        raise DataError(f"{uri}: not a safetensors file: {error}") from error


def copy_weights(network: nn.Module, weights: InitialWeights, classes: tuple[str, ...]) -> None:
    """Copies the tensors whose names and shapes agree. The rest, such as a wider layer, stays fresh, and so does the classifier if its
    outputs are other classes or the same ones in another order.

    Raises ConfigError if nothing fits, since training would then start from scratch unnoticed.
    """
    state = network.state_dict()
    weights = weights._replace(tensors=_strip_wrappers(weights.tensors, state.keys()))
    fresh_prefixes = _classifier_prefixes(network) if weights.classes not in (None, classes) else ()
    fitting = {
        name: value
        for name, value in weights.tensors.items()
        if name in state and state[name].shape == value.shape and not name.startswith(fresh_prefixes)
    }
    if not fitting:
        raise ConfigError(
            f"train.init: {weights.uri}: none of its {len(weights.tensors)} tensors has the name and shape of one in "
            f"{type(network).__name__}; give weights of the same architecture, or train.init: scratch"
        )
    network.load_state_dict({**state, **fitting})
    log.get_logger().info("warm start", tensors=len(fitting), of=len(state), weights=weights.uri)


def _strip_wrappers(tensors: dict[str, Tensor], own_names: Collection[str]) -> dict[str, Tensor]:
    """The tensors without what DistributedDataParallel, torch.compile and other programs put before all of their names."""
    while tensors and not any(name in own_names for name in tensors):
        wrapper = next((wrapper for wrapper in WRAPPERS if all(name.startswith(wrapper) for name in tensors)), None)
        if wrapper is None:
            break
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def _classifier_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's tensors."""
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
