"""What the data of an experiment is like: how many images, how large, and some of them to measure with."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ns.config.schema import EvaluationConfig, EvaluationSet
from ns.core.errors import DataError, prefix_errors
from ns.data.dataset import Dataset, DatasetRole
from ns.data.digits import DIGITS_SCHEME, write_digits
from ns.data.importing.ingest import open_listing
from ns.data.importing.listing import Listing
from ns.data.importing.sources import SourceReader
from ns.data.loading.decode import EncodedJpeg, decode_image, read_jpeg_size
from ns.data.loading.shard_reader import ImageSource
from ns.data.prepared import PART_ROLES, DataPart
from ns.data.scratch import make_scratch_dir
from ns.evaluation.robustness import published as readymade
from ns.storage import Store, open_store

SampleImage = EncodedJpeg | npt.NDArray[np.uint8]

SAMPLE_IMAGES = 64
"""Images to measure decoding and noise with."""


class DataStats(NamedTuple):
    """One part of the data."""

    images: int
    image_bytes: float | None = None
    """Mean size of an image as it is read, with its share of the shard. None where the source does not say."""
    classes: int = 0
    """0 where there are no labels."""
    sample_images: tuple[SampleImage, ...] = ()


@dataclass
class KnownCounts:
    """Images, where the places are not to be asked: they may not exist yet, or take an hour to list."""

    images_by_part: dict[DataPart, int] = field(default_factory=dict)
    image_bytes: float | None = None
    classes: int = 1000
    """Where the labeled images do not say how many there are."""

    def get_stats(self, part: DataPart, uri: str) -> DataStats:
        """Raises DataError or StoreError naming the field and what to do."""
        if part in self.images_by_part:
            return DataStats(self.images_by_part[part], self.image_bytes)
        with prefix_errors(f"data.{part}", f"; or say how many images there will be: --{part} N"):
            stats = _inspect_data(part, uri)
        if not stats.images:
            raise DataError(f"data.{part}: {uri}: has no images; import some, or say how many there will be: --{part} N")
        return stats._replace(image_bytes=self.image_bytes or stats.image_bytes)


def count_evaluation_images(name: str, set_config: EvaluationSet, config: EvaluationConfig) -> int:
    """Images of a further evaluation set; forward passes, if they come distorted. Raises DataError or StoreError naming the field."""
    with prefix_errors(f"evaluation.sets.{name}", "; or plan without it: --set 'evaluation.sets={}'"):
        if set_config.kind != "images":
            return readymade.count_published_passes(open_store(set_config.uri), set_config.kind, config)
        return _inspect_data("heldout", set_config.uri).images


def _inspect_data(part: DataPart, uri: str) -> DataStats:
    if uri.startswith(DIGITS_SCHEME):
        with make_scratch_dir("plan") as scratch_path:
            store = open_store(str(scratch_path))
            return _inspect_dataset(store, write_digits(uri.removeprefix(DIGITS_SCHEME), store))
    dataset_store = open_store(uri)
    if dataset_store.exists(Dataset.filename):
        return _inspect_dataset(dataset_store, Dataset.load(dataset_store))
    return _inspect_source(uri, PART_ROLES[part])


def _inspect_dataset(store: Store, dataset: Dataset) -> DataStats:
    source = ImageSource(store, dataset)
    count = min(SAMPLE_IMAGES, dataset.shards[0].samples) if dataset.shards else 0
    sample_images = tuple(source.read_image(0, row) for row in range(count))
    return DataStats(dataset.samples, dataset.bytes / max(1, dataset.samples), len(dataset.classes), sample_images)


def _inspect_source(uri: str, role: DatasetRole) -> DataStats:
    with open_listing(uri, role) as listing:
        count = len(listing)
        size = sum(entry.size for entry in listing.read_entries(0, count))
        return DataStats(
            count, size / max(1, count) or None, len(listing.count_class_labels()), tuple(_read_sample_images(uri, listing))
        )


def _read_sample_images(uri: str, listing: Listing) -> list[SampleImage]:
    """Readable images from all over the source."""
    sample_images: list[SampleImage] = []
    reader = SourceReader(uri)
    count = len(listing)
    try:
        for number in range(min(SAMPLE_IMAGES, count)):
            row = number * count // min(SAMPLE_IMAGES, count)
            for entry in listing.read_entries(row, row + 1):
                try:
                    data = reader.read_entry(entry)
                    size = read_jpeg_size(data)
                    sample_images.append(EncodedJpeg(data, *size) if size[0] else decode_image(data))
                except DataError:
                    continue  # the import will list it
    finally:
        reader.close()
    return sample_images
