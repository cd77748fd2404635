"""RandAugment as in the reference code of arXiv:1911.04252 §3.1, with arguments clamped to the range of uint8.

Every drawn operation is applied, and the magnitude M is constant. The level is M / 10, so M = 27 is 2.7 times the nominal
maximum. `ns.data.augment.reference` follows the code to the bit; here, its overflows and its bugs are left out:
- Posterize keeps int(4 · level) bits, at least 1 (M < 2.5 would keep none) and at most 8 (which keeps the image).
- Solarize inverts values from int(256 · level) on; 256 at most, which inverts nothing.
- SolarizeAdd adds int(110 · level), 255 at most.
- Contrast blends with the mean gray; the reference code has the number of pixels / 256 instead, a bug.
- Arithmetic and pixel coordinates are Pillow's.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageEnhance

GRAY = (128, 128, 128)
SMALL_PX = 64
"""Largest side of images that use the constants for small images."""

VALUES = np.arange(256)
CHANNELS = np.array([0, 256, 512], np.uint16)
"""Offset of each channel's table."""

Operation = Callable[[Image.Image, np.random.Generator], Image.Image]


class SizeConstants(NamedTuple):
    """What operations do at magnitude 10 that depends on the size of images."""

    translate_px: float
    """Shift, px."""
    cutout_px: float
    """Half the side of Cutout's square, px."""


def choose_constants(size: int, translate_px: float | None, cutout_px: float | None) -> SizeConstants:
    """The constants that are given, or those of the paper: 100 and 40 px at ImageNet sizes, an eighth of the size for small images."""
    default = SizeConstants(size / 8, size / 8) if size <= SMALL_PX else SizeConstants(100.0, 40.0)
    return SizeConstants(
        default.translate_px if translate_px is None else translate_px,
        default.cutout_px if cutout_px is None else cutout_px,
    )


class RandAugment:
    """`layers` operations, drawn with replacement, on images of about `size` px.

    `translate_px`, `cutout_px`: see `choose_constants`. `cutout_px=0` removes Cutout.
    """

    def __init__(
        self, layers: int, magnitude: float, size: int, *, translate_px: float | None = None, cutout_px: float | None = None
    ) -> None:
        self.layers = layers
        self.level = magnitude / 10
        constants = choose_constants(size, translate_px, cutout_px)
        self.translate_px = constants.translate_px * self.level
        self.cutout_half_px = int(constants.cutout_px * self.level)
        self.posterize_bits = min(8, max(1, int(4 * self.level)))
        self.solarize_threshold = min(256, int(256 * self.level))
        self.solarize_add = min(255, int(110 * self.level))
        self.enhance_factor = 1.8 * self.level + 0.1
        lowest_kept = 1 << (8 - self.posterize_bits)
        posterized = bytes(v // lowest_kept * lowest_kept for v in range(256))
        solarized = bytes(v if v < self.solarize_threshold else 255 - v for v in range(256))
        added = bytes(min(255, v + self.solarize_add) if v < 128 else v for v in range(256))
        self.operations: dict[str, Operation] = {
            "auto_contrast": lambda image, _: stretch_contrast(image),
            "equalize": lambda image, _: equalize_channels(image),
            "invert": lambda image, _: ImageChops.invert(image),
            "rotate": lambda image, rng: image.rotate(draw_sign(rng) * 30 * self.level, fillcolor=GRAY),
            "posterize": lambda image, _: _map_values(image, posterized),
            "solarize": lambda image, _: _map_values(image, solarized),
            "color": lambda image, _: ImageEnhance.Color(image).enhance(self.enhance_factor),
            "contrast": lambda image, _: ImageEnhance.Contrast(image).enhance(self.enhance_factor),
            "brightness": lambda image, _: ImageEnhance.Brightness(image).enhance(self.enhance_factor),
            "sharpness": lambda image, _: ImageEnhance.Sharpness(image).enhance(self.enhance_factor),
            "shear_x": lambda image, rng: _transform_affine(image, (1, draw_sign(rng) * 0.3 * self.level, 0, 0, 1, 0)),
            "shear_y": lambda image, rng: _transform_affine(image, (1, 0, 0, draw_sign(rng) * 0.3 * self.level, 1, 0)),
            "translate_x": lambda image, rng: _transform_affine(image, (1, 0, draw_sign(rng) * self.translate_px, 0, 1, 0)),
            "translate_y": lambda image, rng: _transform_affine(image, (1, 0, 0, 0, 1, draw_sign(rng) * self.translate_px)),
            "solarize_add": lambda image, _: _map_values(image, added),
            "cutout": lambda image, rng: apply_cutout(image, self.cutout_half_px, rng),
        }
        if cutout_px == 0:
            del self.operations["cutout"]
        self._drawn = list(self.operations.values())

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for _ in range(self.layers):
            image = self._drawn[int(rng.random() * len(self._drawn))](image, rng)
        return image


def apply_cutout(image: Image.Image, half_px: int, rng: np.random.Generator) -> Image.Image:
    """A gray square of side 2 · half_px around a random pixel, cut off at the border."""
    width, height = image.size
    x, y = int(rng.random() * width), int(rng.random() * height)
    box = (max(0, x - half_px), max(0, y - half_px), min(width, x + half_px), min(height, y + half_px))
    image = image.copy()
    image.paste(GRAY, box)
    return image


def stretch_contrast(image: Image.Image) -> Image.Image:
    """ImageOps.autocontrast of an RGB image, with vectorized tables: each channel is stretched to 0–255."""
    low, high = np.array(image.getextrema()).T[:, :, None]
    span = np.maximum(high - low, 1)
    # The order of operations is Pillow's, since it decides the last bit.
    stretched = (VALUES * (255.0 / span) + -low * (255.0 / span)).astype(np.int64).clip(0, 255)
    return _map_channels(image, np.where(high > low, stretched, VALUES))


def equalize_channels(image: Image.Image) -> Image.Image:
    """ImageOps.equalize of an RGB image, with vectorized tables: each channel's histogram is flattened."""
    counts = np.array(image.histogram()).reshape(3, 256)
    before = np.cumsum(counts, axis=1) - counts
    last = counts[np.arange(3), 255 - (counts[:, ::-1] > 0).argmax(1)]
    step = ((counts.sum(1) - last) // 255)[:, None]
    spread = ((before + step // 2) // np.maximum(step, 1)).clip(0, 255)
    return _map_channels(image, np.where(step > 0, spread, VALUES))


def _map_channels(image: Image.Image, tables: npt.NDArray[np.integer]) -> Image.Image:
    """Replaces each value by its channel's table, int [3, 256]."""
    if image.width * image.height > SMALL_PX**2:
        return image.point(tables.ravel().tolist())
    pixels = np.asarray(image)
    return Image.fromarray(tables.astype(np.uint8).ravel()[pixels + CHANNELS])


def _map_values(image: Image.Image, table: bytes) -> Image.Image:
    """Replaces each value by a table of 256 bytes, as ImageOps does with a new table for each image."""
    if image.width * image.height > SMALL_PX**2:
        return image.point([*table] * len(image.getbands()))
    # point() spends 30 µs on the table before it reads a pixel.
    return Image.frombytes(image.mode, image.size, image.tobytes().translate(table))


def _transform_affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GRAY)


def draw_sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1
