"""Renders corrupted images and perturbed sequences from plain ones, as the published sets were made.

Photographs are resized to 256 px, cropped to 224, corrupted, and stored as JPEG of quality 85, as in ImageNet-C. Images of at most 64 px
are corrupted at their size and stored without loss, as in CIFAR-10-C. All randomness follows from seed, key, kind and severity, so every
model sees the same pixels, whatever the shards and processes. Does not import torch, so that helper processes stay small.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from ns.core.digest import hash_text
from ns.core.errors import DataError
from ns.data.loading.decode import EncodedJpeg, decode_image
from ns.evaluation.robustness.corruptions import corrupt_image
from ns.evaluation.robustness.perturbations import crop_center, render_sequence
from ns.storage.parquet import encode_table, parse_table

RESIZED_PX = 256
JPEG_QUALITY = 85

DistortedImage = EncodedJpeg | npt.NDArray[np.uint8]

IMAGE_SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
CURE = "delete it, and run the same command again"


class DistortionTask(NamedTuple):
    """Images to distort in one way."""

    images: list[npt.NDArray[np.uint8]]
    keys: list[str]
    kind: str
    severities: tuple[int, ...]
    """Severities of a corruption; empty for a perturbation."""
    frames: int
    """Frames per sequence of a perturbation."""
    seed: int
    keep_size: bool
    """Whether images are small, so that they are neither resized nor cropped."""


def render_base(image: EncodedJpeg | bytes, *, keep_size: bool) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3]: a photograph resized to a short side of 256 px, or the image as it is if `keep_size`. Raises DataError for an
    image that cannot be read."""
    pixels = image.decode_whole() if isinstance(image, EncodedJpeg) else decode_image(image)
    if keep_size:
        return pixels
    picture = Image.fromarray(pixels)
    width, height = (max(RESIZED_PX, int(RESIZED_PX * side / min(picture.size))) for side in picture.size)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def distort_images(task: DistortionTask) -> list[DistortedImage]:
    """All severities, or frames, of the first image, then those of the next."""
    images: list[DistortedImage] = []
    for image, key in zip(task.images, task.keys, strict=True):
        if task.severities:
            plain = image if task.keep_size else crop_center(image)
            for severity in task.severities:
                corrupted = corrupt_image(plain, task.kind, severity, _make_rng(task.seed, key, task.kind, severity))
                images.append(corrupted if task.keep_size else _encode_jpeg(corrupted))
        else:
            images += list(render_sequence(image, task.kind, task.frames, _make_rng(task.seed, key, task.kind, 0)))
    return images


def pack_images(images: Sequence[DistortedImage]) -> bytes:
    """The images as the bytes of a Parquet file."""
    rows = [
        (image.data, image.width, image.height)
        if isinstance(image, EncodedJpeg)
        else (image.tobytes(), image.shape[1], image.shape[0])
        for image in images
    ]
    return encode_table(pa.table(list(zip(*rows, strict=True)), schema=IMAGE_SCHEMA), use_dictionary=False)


def unpack_images(data: bytes, uri: str, *, keep_size: bool) -> list[DistortedImage]:
    """The images that `pack_images` encoded. Raises DataError naming the file if it is damaged."""
    table = parse_table(data, uri, IMAGE_SCHEMA, CURE)
    images: list[DistortedImage] = []
    for image, width, height in zip(*(table[name].to_pylist() for name in IMAGE_SCHEMA.names), strict=True):
        if not keep_size:
            images.append(EncodedJpeg(image, width, height))
        elif min(width, height) > 0 and len(image) == width * height * 3:
            images.append(np.frombuffer(image, np.uint8).reshape(height, width, 3))
        else:
            raise DataError(f"{uri}: has an image of {width} x {height} px with {len(image)} bytes; {CURE}")
    return images


def _encode_jpeg(image: npt.NDArray[np.uint8]) -> EncodedJpeg:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "JPEG", quality=JPEG_QUALITY)
    return EncodedJpeg(sink.getvalue(), image.shape[1], image.shape[0])


def _make_rng(seed: int, key: str, kind: str, severity: int) -> np.random.Generator:
    name = f"{seed}/{kind}/{severity}/{key}"
    return np.random.default_rng(hash_text(name, size=16))
