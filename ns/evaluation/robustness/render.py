"""Corrupted images and perturbed sequences, made of plain ones as the published sets were; needs no torch, so that processes that do
nothing else are small.

Photographs are resized to 256 px, cropped to 224, corrupted, and stored as JPEG of quality 85, as ImageNet-C. Images of 64 px and less
are corrupted as they are, and nothing is lost in storing them, as CIFAR-10-C. What chance there is follows from seed, key, kind and
severity: every model sees the same pixels, whatever the shards, and whoever makes them.
"""

import hashlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ns.data.loading.decode import Encoded, decode
from ns.evaluation.robustness.corruptions import corrupt
from ns.evaluation.robustness.perturbations import CROPPED_PX, sequence
from ns.storage.parquet import read_table

RESIZED_PX = 256
JPEG_QUALITY = 85

Picture = Encoded | npt.NDArray[np.uint8]

MADE = pa.schema([("image", pa.binary()), ("width", pa.int32()), ("height", pa.int32())])


class Task(NamedTuple):
    """Images to be distorted in one way."""

    images: list[npt.NDArray[np.uint8]]
    keys: list[str]
    kind: str
    severities: tuple[int, ...]
    """Of a corruption; none of a perturbation."""
    frames: int
    """Of a perturbation."""
    seed: int
    as_they_are: bool


def base(image: Encoded | bytes, *, as_they_are: bool) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3]: a small image as it is, a photograph with its short side at 256 px. Raises DataError for an image that cannot be
    read."""
    pixels = image.whole() if isinstance(image, Encoded) else decode(image)
    if as_they_are:
        return pixels
    picture = Image.fromarray(pixels)
    width, height = (max(RESIZED_PX, int(RESIZED_PX * side / min(picture.size))) for side in picture.size)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def cropped(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The centre of a photograph, 224 px a side."""
    top, left = (round((side - CROPPED_PX) / 2) for side in image.shape[:2])
    return image[top : top + CROPPED_PX, left : left + CROPPED_PX]


def distorted(task: Task) -> list[Picture]:
    """All severities, or frames, of the first image, then of the next."""
    found: list[Picture] = []
    for image, key in zip(task.images, task.keys, strict=True):
        if task.severities:
            plain = image if task.as_they_are else cropped(image)
            for severity in task.severities:
                made = corrupt(plain, task.kind, severity, _rng(task.seed, key, task.kind, severity))
                found.append(made if task.as_they_are else _jpeg(made))
        else:
            found += list(sequence(image, task.kind, task.frames, _rng(task.seed, key, task.kind, 0)))
    return found


def packed(pictures: Sequence[Picture]) -> bytes:
    """Pictures as a Parquet file."""
    rows = [
        (picture.data, picture.width, picture.height)
        if isinstance(picture, Encoded)
        else (picture.tobytes(), picture.shape[1], picture.shape[0])
        for picture in pictures
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table(list(zip(*rows, strict=True)), schema=MADE), sink, compression="zstd", use_dictionary=False)
    return sink.getvalue()


def unpacked(data: bytes, *, as_they_are: bool) -> list[Picture]:
    """What `packed` made a file of."""
    table = read_table(data, schema=MADE)
    found: list[Picture] = []
    for image, width, height in zip(*(table[name].to_pylist() for name in MADE.names), strict=True):
        if as_they_are:
            found.append(np.frombuffer(image, np.uint8).reshape(height, width, 3))
        else:
            found.append(Encoded(image, width, height))
    return found


def _jpeg(image: npt.NDArray[np.uint8]) -> Encoded:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "JPEG", quality=JPEG_QUALITY)
    return Encoded(sink.getvalue(), image.shape[1], image.shape[0])


def _rng(seed: int, key: str, kind: str, severity: int) -> np.random.Generator:
    name = f"{seed}/{kind}/{severity}/{key}"
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest()))
