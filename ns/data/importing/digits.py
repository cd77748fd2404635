"""scikit-learn's handwritten digits, 1,797 real 8 × 8 px images, split for the quickstart.

50 are labeled (5 per class), 500 are held out (50 per class), 400 are for the test (40 per class), which decides nothing, and the other
847 are the unlabeled pool. The split is fixed.
"""

import importlib.util
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.data.prepared import PART_ROLES
from ns.storage import Store

DIGITS_SCHEME = "digits:"
"""Prefix of the URIs of the parts: `digits:labeled`, `digits:pool`, `digits:heldout`, `digits:test`."""
PARTS = {part: PART_ROLES[part] for part in ("labeled", "pool", "heldout", "test")}
LABELED_PER_CLASS = 5
HELDOUT_PER_CLASS = 50
TEST_PER_CLASS = 40
SPLIT_SEED = 0
SHARD_SAMPLES = 425
"""Gives the pool two shards, so that labeling can be shared between two tasks."""


def write_digits(uri: str, store: Store, shard_samples: int = SHARD_SAMPLES) -> Dataset:
    """Writes the dataset that `digits:PART` names, in shards of at most so many images. Raises DataError for an unknown part, or without
    scikit-learn."""
    part = uri.removeprefix(DIGITS_SCHEME)
    if part not in PARTS:
        raise DataError(f"{uri}: no such part; there are {', '.join(DIGITS_SCHEME + name for name in PARTS)}")
    images, class_ids = _read_digits()
    rng = np.random.default_rng(SPLIT_SEED)
    parts: dict[str, list[int]] = {name: [] for name in PARTS}
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(class_ids == digit)).tolist()
        heldout_end = LABELED_PER_CLASS + HELDOUT_PER_CLASS
        parts["labeled"] += indices[:LABELED_PER_CLASS]
        parts["heldout"] += indices[LABELED_PER_CLASS:heldout_end]
        parts["test"] += indices[heldout_end : heldout_end + TEST_PER_CLASS]
        parts["pool"] += indices[heldout_end + TEST_PER_CLASS :]
    with ShardWriter(store, max_samples=shard_samples, max_bytes=256 << 20) as writer:
        for index in sorted(parts[part]):
            # Gray levels 0–16 → 0–255.
            pixels = np.rint(images[index] * (255 / 16)).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            class_id = None if part == "pool" else int(class_ids[index])
            writer.add_image(f"digit-{index:04d}", "png", png.getvalue(), class_id)
    dataset = Dataset(
        name=f"digits-{part}",
        role=PARTS[part],
        classes=() if part == "pool" else tuple(str(digit) for digit in range(10)),
        shards=writer.shards,
    )
    dataset.save(store)
    return dataset


def _read_digits() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Gray levels 0–16 [1797, 8, 8] and class indices [1797] of `sklearn.datasets.load_digits`, from its file.

    To import scikit-learn takes two seconds, a tenth of the quickstart.
    """
    spec = importlib.util.find_spec("sklearn")
    folders = (spec and spec.submodule_search_locations) or []
    files = [path for folder in folders if (path := Path(folder, "datasets", "data", "digits.csv.gz")).is_file()]
    if not files:
        raise DataError("the digits need scikit-learn; run pip install 'noisy-student[quickstart]'")
    rows = np.loadtxt(files[0], np.int64, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
