"""Whether weights fit a network, by the names and shapes of their tensors: known before anything is trained."""

from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

from ns.core.errors import ConfigError, DataError
from ns.modeling.manifest import ModelManifest, split_weights_uri
from ns.storage import open_store
from ns.storage.documents import parse_json_object

WRAPPERS = ("module.", "_orig_mod.", "model.", "state_dict.", "net.", "network.", "backbone.")
"""What stands before the names of tensors if a wrapped network was saved."""
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""As safetensors limits it."""

Shape = tuple[int, ...]
Value = TypeVar("Value")


def read_tensor_shapes(uri: str) -> dict[str, Shape]:
    """Name → shape of the tensors in a safetensors file, or in a model's folder, from its header alone.

    The format is a little-endian length of 8 bytes, and JSON of that length. Raises DataError for a file of another kind.
    """
    parent, key = split_weights_uri(uri)
    store = open_store(parent)
    key = key or ModelManifest.load(store).weights_key
    length = int.from_bytes(store.get_range(key, 0, LENGTH_BYTES), "little")
    try:
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise DataError("no header")
        header = parse_json_object(store.get_range(key, LENGTH_BYTES, length), "header")
        return {name: tuple(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{uri}: not a safetensors file: {error}") from error


def check_weights_fit(network: nn.Module, uri: str) -> None:
    """Raises ConfigError if no tensor in the weights has the name and the shape of one in the network."""
    own_shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = strip_wrappers(read_tensor_shapes(uri), own_shapes.keys())
    if not any(own_shapes.get(name) == shape for name, shape in shapes.items()):
        raise make_fit_error(network, uri, len(shapes))


def make_fit_error(network: nn.Module, uri: str, tensors: int) -> ConfigError:
    return ConfigError(
        f"train.init: {uri}: none of its {tensors} tensors has the name and shape of one in "
        f"{type(network).__name__}; give weights of the same architecture, or train.init: scratch"
    )


def strip_wrappers(tensors: Mapping[str, Value], own_names: Collection[str]) -> dict[str, Value]:
    """The tensors without what DistributedDataParallel, torch.compile and other programs put before all of their names."""
    stripped = dict(tensors)
    while stripped and not any(name in own_names for name in stripped):
        wrapper = next((wrapper for wrapper in WRAPPERS if all(name.startswith(wrapper) for name in stripped)), None)
        if wrapper is None:
            break
        stripped = {name.removeprefix(wrapper): value for name, value in stripped.items()}
    return stripped
