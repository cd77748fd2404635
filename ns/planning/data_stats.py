"""What the data of an experiment is like: how many images, how large, and some of them to measure with."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ns.config.schema import EvaluationConfig, EvaluationSet
from ns.core.errors import DataError, named
from ns.data.dataset import MANIFEST, Dataset, Role
from ns.data.digits import DIGITS, write_digits
from ns.data.importing.ingest import listed
from ns.data.importing.listing import Listing
from ns.data.importing.sources import Reader
from ns.data.loading.decode import Encoded, decode, look
from ns.data.loading.shard_reader import ImageSource
from ns.data.prepared import ROLES, Part
from ns.data.scratch import scratch
from ns.evaluation.robustness import published as readymade
from ns.storage import Store, open_store

Picture = Encoded | npt.NDArray[np.uint8]

SAMPLE = 64
"""Images to measure decoding and noise with."""


class Looked(NamedTuple):
    """One part of the data."""

    images: int
    image_bytes: float | None = None
    """Mean size of an image as it is read, with its share of the shard. None where the source does not say."""
    classes: int = 0
    """0 where there are no labels."""
    pictures: tuple[Picture, ...] = ()


@dataclass
class Counts:
    """Images, where the places are not to be asked: they may not exist yet, or take an hour to list."""

    known: dict[Part, int] = field(default_factory=dict)
    image_bytes: float | None = None
    classes: int = 1000
    """Where the labelled images do not say how many there are."""

    def of(self, part: Part, place: str) -> Looked:
        """Raises DataError or StoreError naming the field and what to do."""
        if part in self.known:
            return Looked(self.known[part], self.image_bytes)
        with named(f"data.{part}", f"; or say how many images there will be: --{part} N"):
            found = _look(part, place)
        if not found.images:
            raise DataError(f"data.{part}: {place}: has no images; import some, or say how many there will be: --{part} N")
        return found._replace(image_bytes=self.image_bytes or found.image_bytes)


def evaluation_set(name: str, wanted: EvaluationSet, config: EvaluationConfig) -> int:
    """Images of a further evaluation set; forward passes, if they come distorted. Raises DataError or StoreError naming the field."""
    with named(f"evaluation.sets.{name}", "; or plan without it: --set 'evaluation.sets={}'"):
        if wanted.kind != "images":
            return readymade.passes(open_store(wanted.place), wanted.kind, config)
        return _look("heldout", wanted.place).images


def _look(part: Part, place: str) -> Looked:
    if place.startswith(DIGITS):
        with scratch("plan") as made:
            store = open_store(str(made))
            return _dataset(store, write_digits(place.removeprefix(DIGITS), store))
    folder = open_store(place)
    if folder.exists(MANIFEST):
        return _dataset(folder, Dataset.load(folder))
    return _source(place, ROLES[part])


def _dataset(folder: Store, dataset: Dataset) -> Looked:
    source = ImageSource(folder, dataset)
    count = min(SAMPLE, dataset.shards[0].samples) if dataset.shards else 0
    pictures = tuple(source.image(0, row) for row in range(count))
    return Looked(dataset.samples, dataset.bytes / max(1, dataset.samples), len(dataset.classes), pictures)


def _source(place: str, role: Role) -> Looked:
    with listed(place, role) as listing:
        count = len(listing)
        size = sum(entry.size for entry in listing.entries(0, count))
        return Looked(count, size / max(1, count) or None, len(listing.labels()), tuple(_pictures(place, listing)))


def _pictures(place: str, listing: Listing) -> list[Picture]:
    """Readable images from all over the source."""
    found: list[Picture] = []
    reader = Reader(place)
    count = len(listing)
    try:
        for number in range(min(SAMPLE, count)):
            row = number * count // min(SAMPLE, count)
            for entry in listing.entries(row, row + 1):
                try:
                    data = reader.read(entry)
                    size = look(data)
                    found.append(Encoded(data, *size) if size[0] else decode(data))
                except DataError:
                    continue  # the import will list it
    finally:
        reader.close()
    return found
