"""Sets apart a part of the held-out images on which thresholds are found; the gate decides on the rest.

The draw depends on the seed and the images' keys, not on how they are sharded. Both parts are written as datasets of their own, so
that everything else treats them as any other.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from ns.config.schema import ImportConfig
from ns.core.digest import hash_text
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.data.loading.decode import EncodedJpeg
from ns.data.loading.shard_reader import ImageSource
from ns.storage import Store

SplitPart = Literal["calibration", "rest"]


def copy_split_part(
    store: Store, dataset: Dataset, target: Store, part: SplitPart, share: float, seed: int, config: ImportConfig
) -> Dataset:
    """Writes one part of a labeled dataset into `target`; the calibration part holds `share` (0 to 1) of each class.

    Raises DataError if the images are too few to be divided.
    """
    source = ImageSource(store, dataset, max_open_shards=2)
    shards = range(len(dataset.shards))
    keys = [key for shard in shards for key in source.read_index(shard).keys]
    class_ids = np.concatenate([source.read_class_ids(shard, len(dataset.classes)) for shard in shards])
    is_calibration = draw_calibration_images(keys, class_ids, share, seed)
    if not is_calibration.any():
        raise DataError(
            f"{store.uri}: no class has the two images that it takes to set one apart for calibration; hold out more, or name "
            "other images in data.calibration"
        )
    selected = is_calibration if part == "calibration" else ~is_calibration
    row = 0
    with ShardWriter(target, max_samples=config.shard_samples, max_bytes=config.shard_mib << 20) as writer:
        for shard in shards:
            extensions = source.read_index(shard).table["extension"].to_pylist()
            for extension, image in zip(extensions, source.read_encoded(shard), strict=True):
                if selected[row]:
                    data = bytes(image.data) if isinstance(image, EncodedJpeg) else image
                    writer.add_image(keys[row], extension, data, int(class_ids[row]))
                row += 1
    copied = Dataset(name=f"{dataset.name}-{part}", role="evaluation", classes=dataset.classes, shards=writer.shards)
    copied.save(target)
    return copied


def draw_calibration_images(
    keys: list[str], class_ids: npt.NDArray[np.int64], share: float, seed: int
) -> npt.NDArray[np.bool_]:
    """bool [N]: the `share` of each class whose keys have the least hashes, rounded. A class keeps an image in either part if it has
    two, and its only image stays with the gate. `class_ids`: int64 [N], one per key."""
    hashes = np.array([hash_text(f"{seed}/calibration/{key}", size=8) for key in keys], np.uint64)
    order = np.lexsort((hashes, class_ids))
    _, starts, counts = np.unique(class_ids[order], return_index=True, return_counts=True)
    drawn = np.minimum(np.maximum(np.floor(share * counts + 0.5).astype(np.int64), 1), counts - 1)
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    is_drawn = np.zeros(len(order), np.bool_)
    is_drawn[order] = rank < np.repeat(drawn, counts)
    return is_drawn
