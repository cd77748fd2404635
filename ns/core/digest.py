"""Identities: canonical JSON, hashed with SHA-256, and the digests of the code that results depend on."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


def canonical_json(value: Any) -> bytes:
    """The only spelling of a JSON value: sorted keys, no spaces, UTF-8.

    Raises ValueError for NaN and infinities, TypeError for values that JSON cannot express.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def shorten_digest(full_digest: str) -> str:
    """The first 16 hex digits, which suffice for folder names within one project."""
    return full_digest[:16]


def hash_text(text: str, *, size: int, key: bytes = b"") -> int:
    """A number of `size` bytes that follows from the text and the key alone (BLAKE2b): a seed, or a rank in random order."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size, key=key).digest())


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def digest_code(*parts: str) -> str:
    """Digest of the source files of parts of `ns` ("training", "modeling/factory.py"), so that a change of them repeats the work.

    `parts` holds only code that can change a stage's output: a new report must not cost a new training.
    """
    sources: dict[str, str] = {}
    for part in parts:
        path = PACKAGE / part
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            sources[file.relative_to(PACKAGE).as_posix()] = sha256_file(file)
    return digest_json(sources)


# The code that each kind of result depends on; tests/core/test_digest.py compares it with the imports.
READING_SOURCES = (
    "data/dataset.py",
    "data/shards.py",
    "data/index.py",
    "data/loading/shard_reader.py",
    "data/loading/decode.py",
    "data/augment/transforms.py",
    "modeling/factory.py",
)
TRAINING_SOURCES = (
    *READING_SOURCES,
    "training",
    "modeling/precision.py",
    "modeling/distributed.py",
    "data/loading/sampler.py",
    "data/loading/stream.py",
    "data/augment/randaugment.py",
    "labeling/label_set.py",
    "labeling/selection.py",
    "labeling/pseudo_label_dataset.py",
)
INFERENCE_SOURCES = (*READING_SOURCES, "modeling/predictor.py", "modeling/precision.py", "modeling/labeler.py")
EVALUATION_SOURCES = (
    *INFERENCE_SOURCES,
    "evaluation/accuracy.py",
    "evaluation/multi_label.py",
    "evaluation/result.py",
    "data/subsample.py",
)
TEMPERATURE_SOURCES = (*EVALUATION_SOURCES, "evaluation/temperature.py")
ROBUSTNESS_SOURCES = (*EVALUATION_SOURCES, "evaluation/robustness")
DISTORTION_SOURCES = (
    "data/loading/decode.py",
    "evaluation/robustness/corruptions.py",
    "evaluation/robustness/render.py",
    "data/subsample.py",
)
LABELING_SOURCES = (*INFERENCE_SOURCES, "labeling/predict.py", "labeling/label_set.py")
