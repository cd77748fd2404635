"""Starts from existing weights: the teacher's, another run's, or any safetensors file."""

from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from ns.core import log
from ns.core.errors import DataError
from ns.modeling import factory as models
from ns.modeling.manifest import ModelManifest, split_weights_uri
from ns.modeling.weight_names import make_fit_error, strip_wrappers
from ns.storage import Store, open_store


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
    weights = weights._replace(tensors=strip_wrappers(weights.tensors, state.keys()))
    fresh_prefixes = _classifier_prefixes(network) if weights.classes not in (None, classes) else ()
    fitting = {
        name: value
        for name, value in weights.tensors.items()
        if name in state and state[name].shape == value.shape and not name.startswith(fresh_prefixes)
    }
    if not fitting:
        raise make_fit_error(network, weights.uri, len(weights.tensors))
    network.load_state_dict({**state, **fitting})
    log.get_logger().info("warm start", tensors=len(fitting), of=len(state), weights=weights.uri)


def _classifier_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's tensors."""
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
