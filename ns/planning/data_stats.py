"""The data of an experiment: how many images, how large, and some of them to measure with."""

import contextlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ns.config.schema import EvaluationConfig, EvaluationSet
from ns.core.errors import DataError, prefix_errors
from ns.data.dataset import Dataset
from ns.data.importing.listing import Listing
from ns.data.importing.sources import SourceReader
from ns.data.loading.decode import EncodedJpeg, decode_image, read_jpeg_size
from ns.data.loading.shard_reader import ImageSource
from ns.data.locate import open_data
from ns.data.prepared import PART_ROLES, DataPart
from ns.evaluation.robustness.published import count_published_passes
from ns.storage import Store, open_store

SampleImage = EncodedJpeg | npt.NDArray[np.uint8]

SAMPLE_IMAGES = 64
"""Number of images to measure decoding and noise with."""


class DataStats(NamedTuple):
    """Statistics of one part of the data."""

    images: int
    image_bytes: float | None = None
    """Mean size of an image, with its share of the shard's overhead. None where the source does not say."""
    classes: int = 0
    """Number of classes; 0 where there are none."""
    sample_images: tuple[SampleImage, ...] = ()


@dataclass
class KnownCounts:
    """Counts that are given, not read: the data may not exist yet, or take an hour to list."""

    images_by_part: dict[DataPart, int] = field(default_factory=dict)
    image_bytes: float | None = None
    classes: int = 1000
    """Number of classes, if the labeled images are not read."""
    sample_images: tuple[SampleImage, ...] = ()
    """Images to measure decoding and noise with."""

    def get_stats(self, part: DataPart, uri: str) -> DataStats:
        """The statistics of a part of the data. Raises DataError or StoreError naming the field and what to do."""
        if part in self.images_by_part:
            return DataStats(self.images_by_part[part], self.image_bytes, sample_images=self.sample_images)
        with prefix_errors(f"data.{part}", f"; or give the number of images: --{part} N"):
            stats = inspect_data(part, uri)
        return stats._replace(image_bytes=self.image_bytes or stats.image_bytes)


def count_evaluation_images(name: str, set_config: EvaluationSet, config: EvaluationConfig) -> int:
    """Images of a further evaluation set, or forward passes if they come distorted.

    Raises DataError or StoreError naming the field.
    """
    with prefix_errors(f"evaluation.sets.{name}", "; or plan without it: --set 'evaluation.sets={}'"):
        if set_config.kind != "images":
            return count_published_passes(open_store(set_config.uri), set_config.kind, config)
        return inspect_data("heldout", set_config.uri).images


def inspect_data(part: DataPart, uri: str) -> DataStats:
    """Reads the statistics of a part of the data, and some of its images. Raises DataError or StoreError naming the URI."""
    with open_data(uri, PART_ROLES[part]) as data:
        stats = _inspect_source(part, uri, data) if isinstance(data, Listing) else _inspect_dataset(*data)
    if not stats.images:
        raise DataError(f"{uri}: has no images")
    return stats


def _inspect_dataset(store: Store, dataset: Dataset) -> DataStats:
    source = ImageSource(store, dataset)
    count = min(SAMPLE_IMAGES, dataset.shards[0].samples) if dataset.shards else 0
    sample_images = tuple(source.read_image(0, row) for row in range(count))
    return DataStats(dataset.samples, dataset.bytes / max(1, dataset.samples), len(dataset.classes), sample_images)


def _inspect_source(part: DataPart, uri: str, listing: Listing) -> DataStats:
    count = len(listing)
    size = sum(entry.size for entry in listing.read_entries(0, count))
    sample_images = tuple(_read_sample_images(uri, listing))
    class_counts = listing.count_class_labels()
    # The import leaves out what it knows to be no image, and labeled images without a label.
    images = listing.count_candidates() if PART_ROLES[part] == "unlabeled" else sum(class_counts.values())
    return DataStats(images, size / max(1, count) or None, len(class_counts), sample_images)


def _read_sample_images(uri: str, listing: Listing) -> list[SampleImage]:
    """Readable images from all over the source."""
    sample_images: list[SampleImage] = []
    count = len(listing)
    rows = [number * count // min(SAMPLE_IMAGES, count) for number in range(min(SAMPLE_IMAGES, count))]
    with contextlib.closing(SourceReader(uri)) as reader:
        for entry in (entry for row in rows for entry in listing.read_entries(row, row + 1)):
            with contextlib.suppress(DataError):  # the import will list it
                data = reader.read_entry(entry)
                size = read_jpeg_size(data)
                sample_images.append(EncodedJpeg(data, *size) if size[0] else decode_image(data))
    return sample_images
