"""Labels that name several right classes per image, as in "Are we done with ImageNet?" (ReaL, arXiv:2006.07159)."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ns.core.errors import DataError
from ns.data.class_names import normalize_name
from ns.data.key_list import make_key
from ns.storage import read_uri
from ns.storage.documents import decode_json
from ns.storage.parquet import read_table

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_\d{8}")


class MultiLabels:
    """The right classes of images, by key."""

    def __init__(self, by_key: Mapping[str, frozenset[int]], uri: str = "multi_label") -> None:
        self._uri = uri
        # A person may write the path of an image's file.
        self._by_key = {make_key(key): class_ids for key, class_ids in by_key.items()} | dict(by_key)

    @classmethod
    def load(cls, uri: str, classes: tuple[str, ...]) -> "MultiLabels":
        """Reads ReaL's `real.json`, a JSON object `{"KEY": [class, …]}`, or Parquet with the columns `key` and `labels` (a list).

        A class is an index or a name; a key is that of the dataset, the path of the image's file, or the last part of either. Raises
        DataError for any other content.
        """
        data = read_uri(uri)
        if data.startswith(b"PAR1"):
            try:
                table = read_table(data, columns=["key", "labels"])
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{uri}: {error}; must have the columns key and labels (a list)") from error
            document: Any = dict(zip(table["key"].to_pylist(), table["labels"].to_pylist(), strict=True))
        else:
            try:
                document = decode_json(data)
            except ValueError as error:
                raise DataError(f"{uri}: neither Parquet nor JSON ({error})") from error
        if isinstance(document, list):
            # As ReaL's own file: in the order of the numbers in the names of ImageNet's validation images.
            document = {f"ILSVRC2012_val_{number:08d}": labels for number, labels in enumerate(document, 1)}
        if not isinstance(document, dict):
            raise DataError(f"{uri}: must be a JSON object, or a list as ReaL's, got {type(document).__name__}")
        index = {normalize_name(name): number for number, name in enumerate(classes)}
        return cls({key: _parse_class_ids(uri, key, labels, index) for key, labels in document.items()}, uri)

    def score_predictions(self, keys: Iterable[str], predicted: npt.NDArray[np.integer[Any]]) -> tuple[float, int]:
        """The share of right answers among the images that have a right class, and the number of these images.

        Raises DataError if the labels name none of the images.
        """
        right = images = named = 0
        key = ""
        for key, answer in zip(keys, predicted.tolist(), strict=True):
            name = key.rpartition("/")[2]
            number = VALIDATION_NAME.search(name)
            candidates = (key, name, number[0]) if number else (key, name)
            matching = next((candidate for candidate in candidates if candidate in self._by_key), None)
            named += matching is not None
            class_ids = frozenset() if matching is None else self._by_key[matching]
            images += bool(class_ids)
            right += answer in class_ids
        if key and not named:
            example = next(iter(self._by_key), "none")
            raise DataError(f"{self._uri}: names no image of this set: its first key is {example}, that of an image is {key}")
        return (right / images if images else 0.0), images


def _parse_class_ids(uri: str, key: str, values: Any, index: Mapping[str, int]) -> frozenset[int]:
    class_ids = (
        [index.get(normalize_name(value)) if isinstance(value, str) else value for value in values]
        if isinstance(values, list)
        else [None]
    )
    if not all(type(value) is int and 0 <= value < len(index) for value in class_ids):
        raise DataError(f"{uri}: {key}: {values!r:.80}: must be a list of class names, or of indices below {len(index)}")
    return frozenset(value for value in class_ids if value is not None)
