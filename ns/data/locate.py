"""What a URI of the experiment names: a part of the digits, a dataset, or a source to be imported."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ns.data.dataset import Dataset, DatasetRole
from ns.data.importing.digits import DIGITS_SCHEME, write_digits
from ns.data.importing.ingest import open_listing
from ns.data.importing.listing import Listing
from ns.storage import Store, open_store
from ns.storage.scratch import make_scratch_dir


def classify_uri(uri: str) -> Literal["digits", "dataset", "source"]:
    """`digits` for `digits:PART`, `dataset` for a folder with dataset.json, `source` for all else. Raises StoreError."""
    if uri.startswith(DIGITS_SCHEME):
        return "digits"
    return "dataset" if open_store(uri).exists(Dataset.filename) else "source"


@contextmanager
def open_data(uri: str, role: DatasetRole) -> Iterator[tuple[Store, Dataset] | Listing]:
    """Opens what a URI names: a dataset and its store, or the listing of a source. Digits are written to scratch space.

    `role` is that of the images of a source. Raises DataError or StoreError.
    """
    kind = classify_uri(uri)
    if kind == "source":
        with open_listing(uri, role) as listing:
            yield listing
    elif kind == "dataset":
        store = open_store(uri)
        yield store, Dataset.load(store)
    else:
        with make_scratch_dir("digits") as path:
            store = open_store(str(path))
            yield store, write_digits(uri, store)
