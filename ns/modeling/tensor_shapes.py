"""Names and shapes of the tensors in a file of weights, without torch."""

from ns.core.errors import DataError
from ns.modeling.manifest import ModelManifest, split_weights_uri
from ns.storage import open_store
from ns.storage.documents import parse_json_object

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""As safetensors limits it."""
FOREIGN_MAGIC = {b"PK\x03\x04": "a zip archive with a pickle, as torch.save writes it", b"\x80": "a pickle"}
"""Beginnings of other files that are called .safetensors."""

Shape = tuple[int, ...]


def read_tensor_shapes(uri: str) -> dict[str, Shape]:
    """Name → shape of the tensors in a safetensors file, or in a model's folder, from its header alone.

    The format is a little-endian length of 8 bytes, and JSON of that length. Raises DataError for a file of another kind.
    """
    parent, key = split_weights_uri(uri)
    store = open_store(parent)
    key = key or ModelManifest.load(store).weights_key
    begin = store.get_range(key, 0, LENGTH_BYTES)
    length = int.from_bytes(begin, "little")
    try:
        if not 2 <= length <= MAX_HEADER_BYTES:
            foreign = next((kind for magic, kind in FOREIGN_MAGIC.items() if begin.startswith(magic)), None)
            cure = "which is not read, because it can run any program; convert it once with safetensors.torch.save_file"
            raise DataError(f"{foreign}, {cure}" if foreign else "no header")
        header = parse_json_object(store.get_range(key, LENGTH_BYTES, length), "header")
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        expected_size = LENGTH_BYTES + length + max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
        if store.size(key) != expected_size:
            raise DataError(
                f"has {store.size(key):,} bytes, must have {expected_size:,}; it was cut off: fetch or write it again"
            )
        return {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
    except (DataError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{uri}: not a safetensors file: {error}") from error
