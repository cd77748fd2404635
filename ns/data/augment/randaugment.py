"""RandAugment as in the reference code of arXiv:1911.04252 §3.1, with arguments clamped to the range of uint8.

Every drawn operation is applied, and the magnitude M is constant. The level is M / 10, so M = 27 is 2.7 times the nominal
maximum. `ns.data.augment.reference` follows the code to the bit; here, its overflows and its bugs are left out:
- Posterize keeps int(4 · level) bits, at least 1 (M < 2.5 would keep none) and at most 8 (which keeps the image).
- Solarize inverts values from int(256 · level) on; 256 at most, which inverts nothing.
- SolarizeAdd adds int(110 · level), 255 at most.
- Contrast blends with the mean gray; the reference code has the number of pixels / 256 instead, a bug.
- Arithmetic and pixel coordinates are Pillow's; values of Color and Sharpness that float32 decides may differ by 1.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ns.data.augment.opencv import cv2

# Each loader works on one core, and OpenCV's threads would not outlive the fork that starts it.
cv2.setNumThreads(0)

GRAY = (128, 128, 128)
SMALL_PX = 64
"""Largest side of images that use the constants for small images."""

VALUES = np.arange(256)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
"""Pillow's ImageFilter.SMOOTH."""
LUMA = np.array([[19595, 38470, 7471]], np.float32) / 65536
"""Weights of red, green and blue in Pillow's gray; OpenCV's own differs. Their sums are exact in float32, since they take 24 bits."""

Pixels = npt.NDArray[np.uint8]
"""An image, [H, W, 3]."""
Operation = Callable[[Pixels, np.random.Generator], Pixels]
"""Returns another image, or its input; never changes it."""


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
        brightened = _blend_values(0, self.enhance_factor)
        angle, shear = 30 * self.level, 0.3 * self.level
        self.operations: dict[str, Operation] = {
            "auto_contrast": lambda image, _: stretch_contrast(image),
            "equalize": lambda image, _: equalize_channels(image),
            "invert": lambda image, _: ~image,
            "rotate": lambda image, rng: _move_pixels(image, _locate_rotated(image.shape[:2], draw_sign(rng) * angle)),
            "posterize": lambda image, _: image & np.uint8(256 - lowest_kept),
            "solarize": lambda image, _: solarize_pixels(image, self.solarize_threshold),
            "color": lambda image, _: _enhance_color(image, self.enhance_factor),
            "contrast": lambda image, _: _enhance_contrast(image, self.enhance_factor),
            "brightness": lambda image, _: cv2.LUT(image, brightened),
            "sharpness": lambda image, _: _enhance_sharpness(image, self.enhance_factor),
            "shear_x": lambda image, rng: _move_pixels(image, _locate_sheared(image.shape[:2], draw_sign(rng) * shear, 0)),
            "shear_y": lambda image, rng: _move_pixels(image, _locate_sheared(image.shape[:2], 0, draw_sign(rng) * shear)),
            "translate_x": lambda image, rng: _translate(image, draw_sign(rng) * self.translate_px, axis=1),
            "translate_y": lambda image, rng: _translate(image, draw_sign(rng) * self.translate_px, axis=0),
            "solarize_add": lambda image, _: add_below_half(image, self.solarize_add),
            "cutout": lambda image, rng: apply_cutout(image, self.cutout_half_px, rng),
        }
        if cutout_px == 0:
            del self.operations["cutout"]
        self._drawn = list(self.operations.values())

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        for _ in range(self.layers):
            image = self._drawn[int(rng.random() * len(self._drawn))](image, rng)
        return image


def apply_cutout(image: Pixels, half_px: int, rng: np.random.Generator) -> Pixels:
    """A gray square of side 2 · half_px around a random pixel, cut off at the border."""
    height, width = image.shape[:2]
    x, y = int(rng.random() * width), int(rng.random() * height)
    image = image.copy()
    image[max(0, y - half_px) : y + half_px, max(0, x - half_px) : x + half_px] = GRAY[0]
    return image


def stretch_contrast(image: Pixels) -> Pixels:
    """Pillow's ImageOps.autocontrast: each channel is stretched to 0–255."""
    rows = image.reshape(len(image), -1)
    # First over the rows: over both axes at once, it takes ten times as long.
    low, high = (extreme.reshape(-1, 3).astype(np.int64) for extreme in (rows.min(0), rows.max(0)))
    low, high = low.min(0)[:, None], high.max(0)[:, None]
    span = np.maximum(high - low, 1)
    # The order of operations is Pillow's, since it decides the last bit.
    stretched = (VALUES * (255.0 / span) + -low * (255.0 / span)).astype(np.int64).clip(0, 255)
    return image if (span == 255).all() else _map_channels(image, np.where(high > low, stretched, VALUES))


def equalize_channels(image: Pixels) -> Pixels:
    """Pillow's ImageOps.equalize: each channel's histogram is flattened."""
    counts = np.stack([cv2.calcHist([image], [channel], None, [256], [0, 256]) for channel in range(3)]).astype(np.int64)
    before = np.cumsum(counts, axis=1) - counts
    last = counts[np.arange(3), 255 - (counts[:, ::-1] > 0).argmax(1)]
    step = ((counts.sum(1) - last) // 255)[:, None]
    spread = ((before + step // 2) // np.maximum(step, 1)).clip(0, 255)
    return _map_channels(image, np.where(step > 0, spread, VALUES))


def solarize_pixels(image: Pixels, threshold: int) -> Pixels:
    """Inverts values from `threshold` on; 256 inverts none."""
    if threshold > 255:
        return image
    # All bits of a value are turned over, or none: np.where takes ten times as long.
    return image ^ np.negative((image >= np.uint8(threshold)).view(np.uint8))


def add_below_half(image: Pixels, addend: int) -> Pixels:
    """Adds `addend` to values below 128, up to 255."""
    # NumPy compares two arrays twelve times as fast as an array and a number.
    added = np.minimum(~image, np.full_like(image, addend))
    return image + (added & np.negative((image < np.uint8(128)).view(np.uint8)))


def draw_sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _blend_pixels(degenerate: Pixels, image: Pixels, factor: float) -> Pixels:
    """Pillow's Image.blend: degenerate + factor · (image - degenerate), cut off to 0…255 and to whole numbers."""
    # OpenCV rounds; the thousandth is for whole numbers that float32 may fall short of.
    blended: Pixels = cv2.addWeighted(image, factor, degenerate, 1 - factor, 0.001 - 0.5)
    return blended


def _blend_values(degenerate: int, factor: float) -> Pixels:
    """The table, [256], of blending with one value."""
    blended = (VALUES - degenerate).astype(np.float32) * np.float32(factor) + np.float32(degenerate)
    return blended.clip(0, 255).astype(np.uint8)


def _enhance_color(image: Pixels, factor: float) -> Pixels:
    """Blends with the gray image."""
    return _blend_pixels(cv2.cvtColor(cv2.transform(image, LUMA), cv2.COLOR_GRAY2RGB), image, factor)


def _enhance_contrast(image: Pixels, factor: float) -> Pixels:
    """Blends with the mean gray."""
    mean = int(cv2.mean(cv2.transform(image, LUMA))[0] + 0.5)
    mapped: Pixels = cv2.LUT(image, _blend_values(mean, factor))
    return mapped


def _enhance_sharpness(image: Pixels, factor: float) -> Pixels:
    """Blends with a blur by 3 x 3 px with weight 5 in the middle, which leaves the border as it is."""
    enhanced = image.copy()
    enhanced[1:-1, 1:-1] = _blend_pixels(cv2.filter2D(image, -1, SMOOTH), image, factor)[1:-1, 1:-1]
    return enhanced


def _map_channels(image: Pixels, tables: npt.NDArray[np.integer]) -> Pixels:
    """Replaces each value by its channel's table, int [3, 256]."""
    mapped: Pixels = cv2.LUT(image, np.ascontiguousarray(tables.T, np.uint8)[None])
    return mapped


def _translate(image: Pixels, shift_px: float, axis: int) -> Pixels:
    """Shows at each place the pixel that lies `shift_px` further on, rounded as Pillow does it; gray beyond the border."""
    shift = math.floor(shift_px + 0.5)
    kept = max(0, image.shape[axis] - abs(shift))
    first, target = max(0, shift), max(0, -shift)
    moved = np.full_like(image, GRAY[0])
    if axis == 0:
        moved[target : target + kept] = image[first : first + kept]
    else:
        moved[:, target : target + kept] = image[:, first : first + kept]
    return moved


def _move_pixels(image: Pixels, sources: npt.NDArray[np.int16]) -> Pixels:
    """Each pixel is that at its place in `sources`, [H, W, (x, y)], or gray if that is outside."""
    moved: Pixels = cv2.remap(image, sources, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=GRAY)
    return moved


# Pillow decides which pixel goes where, once for all images of a size: a training uses the two signs of one angle and of one shear.
@lru_cache(maxsize=2)
def _locate_rotated(shape: tuple[int, int], degrees: float) -> npt.NDArray[np.int16]:
    return _locate_sources(shape, lambda numbers, outside: numbers.rotate(degrees, fillcolor=outside))


@lru_cache(maxsize=4)
def _locate_sheared(shape: tuple[int, int], x_shear: float, y_shear: float) -> npt.NDArray[np.int16]:
    matrix = (1, x_shear, 0, y_shear, 1, 0)

    def shear_numbers(numbers: Image.Image, outside: int) -> Image.Image:
        return numbers.transform(numbers.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=outside)

    return _locate_sources(shape, shear_numbers)


def _locate_sources(shape: tuple[int, int], move: Callable[[Image.Image, int], Image.Image]) -> npt.NDArray[np.int16]:
    """(x, y) of the pixels that `move` takes, int16 [H, W, 2]; (-1, -1) for those from outside."""
    height, width = shape
    numbers = np.arange(height * width, dtype=np.int32).reshape(shape)
    moved = np.asarray(move(Image.fromarray(numbers), -1))
    return np.where(moved[:, :, None] < 0, -1, np.stack([moved % width, moved // width], axis=2)).astype(np.int16)
