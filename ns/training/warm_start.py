"""Starting from weights that are there: the teacher's, another run's, or anybody's safetensors."""

from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from ns.core import log
from ns.core.errors import ConfigError, DataError
from ns.modeling import factory as models
from ns.modeling.manifest import MANIFEST, ModelCard, weights_place
from ns.storage import Store, open_store


class Weights(NamedTuple):
    place: str
    tensors: dict[str, Tensor]
    classes: tuple[str, ...] | None
    """What the outputs mean, in their order; None if nobody wrote it down."""


def model_weights(folder: Store) -> Weights:
    """The averaged weights of a model of ours."""
    card = ModelCard.read(folder, MANIFEST)
    return Weights(folder.uri, models.load_weights(folder, card), card.classes)


def weights_at(place: str) -> Weights:
    """The weights in a safetensors file, or in a model's folder. Raises DataError for what is no safetensors file."""
    folder, key = weights_place(place)
    if key is None:
        return model_weights(open_store(folder))
    try:
        return Weights(place, load_tensors(open_store(folder).get(key)), None)
    except SafetensorError as error:
        raise DataError(f"{place}: not a safetensors file: {error}") from error


def start_from(network: nn.Module, weights: Weights, classes: tuple[str, ...]) -> None:
    """Copies the tensors whose names and shapes agree; the rest (a wider layer) stays fresh, and so does the classifier if the
    outputs are other classes, or the same in another order.

    Raises ConfigError if nothing fits: training would start from scratch, unnoticed.
    """
    own = network.state_dict()
    fresh = _classifier(network) if weights.classes not in (None, classes) else ()
    fitting = {
        name: value
        for name, value in weights.tensors.items()
        if name in own and own[name].shape == value.shape and not name.startswith(fresh)
    }
    if not fitting:
        raise ConfigError(
            f"train.init: {weights.place}: none of its {len(weights.tensors)} tensors has the name and shape of one in "
            f"{type(network).__name__}; give weights of the same architecture, or train.init: scratch"
        )
    network.load_state_dict({**own, **fitting})
    log.get().info("warm start", tensors=len(fitting), of=len(own), weights=weights.place)


def _classifier(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's tensors."""
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
