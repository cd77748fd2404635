"""scikit-learn's handwritten digits, 1,797 real 8 × 8 px images, split for the quickstart.

50 labelled (5 of each class), 500 held out (50 of each), the other 1,247 the unlabelled pool. The split is fixed.
"""

import io

import numpy as np
from PIL import Image

from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.data.prepared import ROLES
from ns.storage import Store

DIGITS = "digits:"
"""What an experiment writes before the part that it means."""
PARTS = {part: ROLES[part] for part in ("labelled", "pool", "heldout")}
LABELLED_PER_CLASS = 5
HELDOUT_PER_CLASS = 50
SPLIT_SEED = 0
SHARD_SAMPLES = 625
"""So that the pool has two shards, and labelling has something to share out."""


def write_digits(part: str, folder: Store) -> Dataset:
    """Writes one part as a dataset. Raises DataError for another one, or if scikit-learn is not installed."""
    if part not in PARTS:
        raise DataError(f"digits:{part}: no such part; there are {', '.join(f'digits:{name}' for name in PARTS)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits need scikit-learn: pip install 'noisy-student[quickstart]'") from error
    bunch = load_digits()
    images, labels = bunch["images"], bunch["target"]
    rng = np.random.default_rng(SPLIT_SEED)
    parts: dict[str, list[int]] = {name: [] for name in PARTS}
    for label in range(10):
        own = rng.permutation(np.flatnonzero(labels == label)).tolist()
        heldout_end = LABELLED_PER_CLASS + HELDOUT_PER_CLASS
        parts["labelled"] += own[:LABELLED_PER_CLASS]
        parts["heldout"] += own[LABELLED_PER_CLASS:heldout_end]
        parts["pool"] += own[heldout_end:]
    with ShardWriter(folder, max_samples=SHARD_SAMPLES, max_bytes=256 << 20) as writer:
        for index in sorted(parts[part]):
            # Grey levels 0–16 → 0–255.
            pixels = np.rint(images[index] * (255 / 16)).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            known = None if part == "pool" else int(labels[index])
            writer.add(f"digit-{index:04d}", "png", png.getvalue(), known)
    dataset = Dataset(
        name=f"digits-{part}",
        role=PARTS[part],
        classes=() if part == "pool" else tuple(str(label) for label in range(10)),
        shards=writer.shards,
    )
    dataset.save(folder)
    return dataset
