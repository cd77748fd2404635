"""RandAugment as in the reference code of arXiv:1911.04252 §3.1, with arguments clamped to the range of uint8.

Every drawn operation is applied, and the magnitude M is constant. The level is M / 10, so M = 27 is 2.7 times the nominal
maximum. `ns.data.augment.reference` follows the code to the bit; here, its overflows and its bugs are left out:
- Posterize keeps int(4 · level) bits, at least 1 (M < 2.5 would keep none) and at most 8 (which keeps the image).
- Solarize inverts values from int(256 · level) on; 256 at most, which inverts nothing.
- SolarizeAdd adds int(110 · level), 255 at most.
- Contrast blends with the mean gray; the reference code has the number of pixels / 256 instead, a bug.
- Arithmetic and pixel coordinates are Pillow's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

GRAY = (128, 128, 128)
SMALL_PX = 64
"""Largest side of images that use the constants for small images."""

VALUES = np.arange(256)
CHANNELS = np.array([0, 256, 512], np.uint16)
"""Offset of each channel's table."""

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
        brightened = blend_pixels(np.uint8(0), VALUES.astype(np.uint8), self.enhance_factor)
        angle, shear = 30 * self.level, 0.3 * self.level
        self.operations: dict[str, Operation] = {
            "auto_contrast": lambda image, _: stretch_contrast(image),
            "equalize": lambda image, _: equalize_channels(image),
            "invert": lambda image, _: ~image,
            "rotate": lambda image, rng: _run_pillow(image, Image.Image.rotate, draw_sign(rng) * angle, fillcolor=GRAY),
            "posterize": lambda image, _: image & np.uint8(256 - lowest_kept),
            "solarize": lambda image, _: solarize_pixels(image, self.solarize_threshold),
            "color": lambda image, _: _enhance_color(image, self.enhance_factor),
            "contrast": lambda image, _: _enhance_contrast(image, self.enhance_factor),
            "brightness": lambda image, _: map_values(image, brightened),
            "sharpness": lambda image, _: _enhance_sharpness(image, self.enhance_factor),
            "shear_x": lambda image, rng: _transform_affine(image, (1, draw_sign(rng) * shear, 0, 0, 1, 0)),
            "shear_y": lambda image, rng: _transform_affine(image, (1, 0, 0, draw_sign(rng) * shear, 1, 0)),
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
    return _map_channels(image, np.where(high > low, stretched, VALUES))


def equalize_channels(image: Pixels) -> Pixels:
    """Pillow's ImageOps.equalize: each channel's histogram is flattened."""
    counts = np.fromiter(_make_picture(image).histogram(), np.int64, 768).reshape(3, 256)
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


def blend_pixels(degenerate: Pixels | np.uint8, image: Pixels, factor: float) -> Pixels:
    """Pillow's Image.blend: degenerate + factor · (image - degenerate), cut off to 0…255 and to whole numbers."""
    base = np.float32(degenerate)
    blended = image - base
    blended *= np.float32(factor)
    blended += base
    if factor > 1:
        np.clip(blended, 0, 255, out=blended)
    return blended.astype(np.uint8)


def sum_neighbors(image: Pixels) -> npt.NDArray[np.uint16]:
    """Sums over 3 x 3 px with weight 5 in the middle, uint16 [H - 2, W - 2, 3]: 13 times a smoothed image."""
    rows = np.add(image[:-2], image[2:], dtype=np.uint16)
    rows += image[1:-1]
    total: npt.NDArray[np.uint16] = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    total += np.multiply(image[1:-1, 1:-1], np.uint16(4), dtype=np.uint16)
    return total


def map_values(image: Pixels, table: Pixels) -> Pixels:
    """Replaces each value by that of a table, [256]."""
    # bytes.translate takes a quarter of the time of indexing.
    mapped = np.frombuffer(image.tobytes().translate(table.tobytes()), np.uint8)
    return mapped.reshape(image.shape)


def draw_sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _enhance_contrast(image: Pixels, factor: float) -> Pixels:
    """Blends with the mean gray."""
    gray = np.frombuffer(_make_picture(image).convert("L").tobytes(), np.uint8)
    mean = int(gray.sum(dtype=np.uint64) / gray.size + 0.5)
    return map_values(image, blend_pixels(np.uint8(mean), VALUES.astype(np.uint8), factor))


def _enhance_sharpness(image: Pixels, factor: float) -> Pixels:
    """Blends with Pillow's ImageFilter.SMOOTH: a blur by 3 x 3 px with weight 5 in the middle, which leaves the border as it is."""
    if min(image.shape[:2]) < 3:
        return image
    smoothed = (sum_neighbors(image) + np.uint16(6)) // np.uint16(13)
    enhanced = image.copy()
    enhanced[1:-1, 1:-1] = blend_pixels(smoothed.astype(np.uint8), image[1:-1, 1:-1], factor)
    return enhanced


def _map_channels(image: Pixels, tables: npt.NDArray[np.integer]) -> Pixels:
    """Replaces each value by its channel's table, int [3, 256]."""
    height, width = image.shape[:2]
    index = image.reshape(height, -1) + np.tile(CHANNELS, width)
    return tables.astype(np.uint8).ravel().take(index, mode="clip").reshape(image.shape)


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


def _enhance_color(image: Pixels, factor: float) -> Pixels:
    """Blends with the gray image."""
    return _run_pillow(image, lambda picture: ImageEnhance.Color(picture).enhance(factor))


def _transform_affine(image: Pixels, matrix: tuple[float, ...]) -> Pixels:
    size = image.shape[1], image.shape[0]
    return _run_pillow(
        image, Image.Image.transform, size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GRAY
    )


def _run_pillow(image: Pixels, run: Callable[..., Image.Image], *args: Any, **kwargs: Any) -> Pixels:
    """An operation that is as fast in Pillow as it could be here."""
    return np.frombuffer(run(_make_picture(image), *args, **kwargs).tobytes(), np.uint8).reshape(image.shape)


def _make_picture(image: Pixels) -> Image.Image:
    # At 32 px, where this takes longer than a warp, Image.fromarray takes half as long again, and np.asarray of a picture too.
    return Image.frombytes("RGB", (image.shape[1], image.shape[0]), np.ascontiguousarray(image))
