"""Starts from existing weights: the teacher's, another run's, or any safetensors file."""

from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from ns.config.schema import is_weights_uri
from ns.core import log
from ns.core.errors import DataError
from ns.modeling import factory as models
from ns.modeling.manifest import ModelManifest, split_weights_uri
from ns.modeling.pretrained import describe_weights, locate_weights, read_fetched
from ns.modeling.weight_names import fit_weights, make_fit_error
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


def read_pretrained(pretrained: str, root: Store) -> InitialWeights:
    """The weights that `model.pretrained` names; those of a hub are in the root, or are fetched there."""
    if is_weights_uri(pretrained):
        weights = read_weights(pretrained)
    else:
        weights = _parse_weights(read_fetched(pretrained, root), locate_weights(pretrained, root))
    return weights._replace(classes=describe_weights(pretrained, root).classes)


def read_weights(uri: str) -> InitialWeights:
    """The weights in a safetensors file, or in a model's folder. Raises DataError for a file of another kind."""
    parent, key = split_weights_uri(uri)
    if key is None:
        return read_model_weights(open_store(parent))
    return _parse_weights(open_store(parent).get(key), uri)


def _parse_weights(data: bytes, uri: str) -> InitialWeights:
    try:
        return InitialWeights(uri, load_tensors(data), None)
    except SafetensorError as error:
        raise DataError(f"{uri}: not a safetensors file: {error}") from error


def copy_weights(network: nn.Module, weights: InitialWeights, classes: tuple[str, ...]) -> None:
    """Copies the tensors that fit. The rest, such as a wider layer, stays fresh, and so does the classifier if its outputs are other
    classes or the same ones in another order; the log says so.

    Raises ConfigError if nothing fits, since training would then start from scratch unnoticed.
    """
    has_other_classes = weights.classes not in (None, classes)
    fit = fit_weights(network, weights.tensors, with_classifier=not has_other_classes)
    if not fit.tensors or len(fit.missing) == fit.total:
        raise make_fit_error(network, weights.uri, len(weights.tensors))
    state = network.state_dict()
    network.load_state_dict({**state, **fit.tensors})
    logger = log.get_logger()
    logger.info("warm start", tensors=len(fit.tensors), of=len(state), weights=weights.uri)
    if remark := fit.describe():
        logger.warning("weights fit partly", weights=weights.uri, reason=remark)
    # A bare file names no classes, but may have another number of them.
    if has_other_classes or len(fit.tensors) + len(fit.missing) < len(state):
        logger.info("the weights have other classes, so the classifier starts from random weights", weights=weights.uri)
