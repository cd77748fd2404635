"""RandAugment as the paper's authors ran it: their published code's arithmetic, with its overflows and its oddities.

The code is `randaugment.py` of google-research/noisystudent, whose operations are those of `autoaugment.py` in tensorflow/tpu. It never
bounds an argument, so those of high magnitudes wrap or are cut off where TensorFlow makes a uint8 of them (level = M / 10):
- Solarize compares with int(256 · level) modulo 256: 179 at M = 27, and 0, which inverts everything, at M = 10.
- Posterize shifts by 8 - int(4 · level) bits modulo 256, and TensorFlow shifts by at most 7: below M = 2.5 and from M = 22.5 on, one bit
  is kept; between M = 20 and 22.5 all eight are.
- Contrast blends with the number of pixels / 256, at most 255, and not with the mean gray.
- Enhancements cut off digits, where Pillow rounds. At factor 1 (M = 5) they do nothing.
- Shears are about the center of the first pixel, where Pillow's are about its corner.

All results are bit by bit those of the published code under TensorFlow 2.15 (tests/data/augment/reference_values.py).
"""

import math

import numpy as np
import numpy.typing as npt

from ns.data.augment.opencv import cv2
from ns.data.augment.randaugment import (
    GRAY,
    VALUES,
    Operation,
    Pixels,
    add_below_half,
    apply_cutout,
    choose_constants,
    draw_sign,
    equalize_channels,
    solarize_pixels,
)

LUMA = np.array([0.2989, 0.5870, 0.1140], np.float32)
"""Weights of red, green and blue in TensorFlow's gray."""


class ReferenceRandAugment:
    """`layers` operations, drawn with replacement, on images of about `size` px. Constants are those of `RandAugment`."""

    def __init__(
        self, layers: int, magnitude: float, size: int, *, translate_px: float | None = None, cutout_px: float | None = None
    ) -> None:
        self.layers = layers
        level = magnitude / 10
        constants = choose_constants(size, translate_px, cutout_px)
        shift_px, half_px = constants.translate_px * level, int(constants.cutout_px * level)
        self.posterize_shift = min(7, (8 - int(level * 4)) % 256)
        self.solarize_threshold = int(level * 256) % 256
        factor = level * 1.8 + 0.1
        lowest_kept = 1 << self.posterize_shift
        added = min(255, int(level * 110))
        self.operations: dict[str, Operation] = {
            "auto_contrast": lambda image, _: stretch_channels(image),
            "equalize": lambda image, _: equalize_channels(image),
            "invert": lambda image, _: ~image,
            "rotate": lambda image, rng: rotate_nearest(image, draw_sign(rng) * level * 30),
            "posterize": lambda image, _: image & np.uint8(256 - lowest_kept),
            "solarize": lambda image, _: solarize_pixels(image, self.solarize_threshold),
            "color": lambda image, _: blend_images(compute_gray(image)[:, :, None], image, factor),
            "contrast": lambda image, _: cv2.LUT(image, blend_images(compute_contrast_base(image), VALUES, factor)),
            "brightness": lambda image, _: cv2.LUT(image, blend_images(np.uint8(0), VALUES, factor)),
            "sharpness": lambda image, _: blend_images(smooth_inside(image), image, factor),
            "shear_x": lambda image, rng: transform_nearest(image, (1, draw_sign(rng) * level * 0.3, 0, 0, 1, 0)),
            "shear_y": lambda image, rng: transform_nearest(image, (1, 0, 0, draw_sign(rng) * level * 0.3, 1, 0)),
            "translate_x": lambda image, rng: transform_nearest(image, (1, 0, draw_sign(rng) * shift_px, 0, 1, 0)),
            "translate_y": lambda image, rng: transform_nearest(image, (1, 0, 0, 0, 1, draw_sign(rng) * shift_px)),
            "solarize_add": lambda image, _: add_below_half(image, added),
            "cutout": lambda image, rng: apply_cutout(image, half_px, rng),
        }
        if cutout_px == 0:
            del self.operations["cutout"]
        self._drawn = list(self.operations.values())

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        for _ in range(self.layers):
            image = self._drawn[int(rng.random() * len(self._drawn))](image, rng)
        return image


def blend_images(degenerate: npt.NDArray[np.uint8] | np.uint8, image: npt.NDArray[np.integer], factor: float) -> Pixels:
    """degenerate + factor · (image - degenerate) in float32, cut off to 0…255 and to whole numbers."""
    if factor == 1:  # as in TensorFlow: no arithmetic, no rounding
        return np.broadcast_to(image, np.broadcast_shapes(np.shape(degenerate), image.shape)).astype(np.uint8)
    base = np.float32(degenerate)
    blended: Pixels = (base + np.float32(factor) * (image.astype(np.float32) - base)).clip(0, 255).astype(np.uint8)
    return blended


def compute_gray(image: Pixels) -> npt.NDArray[np.uint8]:
    """TensorFlow's rgb_to_grayscale, uint8 [H, W]."""
    unit = image * np.float32(1 / 255)
    weighted: npt.NDArray[np.float32] = unit[..., 0] * LUMA[0] + unit[..., 1] * LUMA[1] + unit[..., 2] * LUMA[2]
    return (weighted * np.float32(255.5)).astype(np.uint8)


def compute_contrast_base(image: Pixels) -> np.uint8:
    """The sum of the histogram of gray values / 256, which is no mean gray."""
    return np.uint8(min(255.0, image.shape[0] * image.shape[1] / 256))


def sum_neighbors(image: Pixels) -> npt.NDArray[np.uint16]:
    """Sums over 3 x 3 px with weight 5 in the middle, uint16 [H - 2, W - 2, 3]: 13 times a smoothed image."""
    rows = np.add(image[:-2], image[2:], dtype=np.uint16)
    rows += image[1:-1]
    total: npt.NDArray[np.uint16] = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    total += np.multiply(image[1:-1, 1:-1], np.uint16(4), dtype=np.uint16)
    return total


def smooth_inside(image: Pixels) -> Pixels:
    """A blur by 3 × 3 px with weight 5 in the middle; the border stays as it is."""
    height, width = image.shape[:2]
    if min(height, width) < 3:
        return image
    total = sum_neighbors(image)
    smoothed = image.copy()
    smoothed[1:-1, 1:-1] = total // np.uint16(13)
    # TensorFlow's sums of fractions lie on either side of a whole number, so its arithmetic decides there.
    rows, columns, channels = np.nonzero(total % np.uint16(13) == 0)
    value = np.zeros(len(rows), np.float32)
    for dy, dx in np.ndindex(3, 3):
        weight = np.float32(5 if dy == dx == 1 else 1) / np.float32(13)
        # A product and a sum with one rounding, as processors do it that have such an instruction.
        value = (image[rows + dy, columns + dx, channels] * np.float64(weight) + value).astype(np.float32)
    smoothed[rows + 1, columns + 1, channels] = value.clip(0, 255)
    return smoothed


def stretch_channels(image: Pixels) -> Pixels:
    """Stretches each channel to 0–255 in float32, cut off to whole numbers. A channel of one value stays."""
    stretched = np.empty_like(image)
    for channel in range(3):
        low, high = (np.float32(bound) for bound in (image[..., channel].min(), image[..., channel].max()))
        table = VALUES.astype(np.float32)
        if high > low:
            scale = np.float32(255) / (high - low)
            table = (table * scale + -low * scale).clip(0, 255)
        stretched[..., channel] = table.astype(np.uint8)[image[..., channel]]
    return stretched


def rotate_nearest(image: Pixels, degrees: float) -> Pixels:
    """Turns around the image's center, whose coordinates are those of centers of pixels: (side - 1) / 2."""
    height, width = np.float32(image.shape[0] - 1), np.float32(image.shape[1] - 1)
    radians = np.float32(degrees * (np.pi / 180))
    cos, sin = np.float32(math.cos(radians)), np.float32(math.sin(radians))
    x_offset = (width - (cos * width - sin * height)) / np.float32(2)
    y_offset = (height - (sin * width + cos * height)) / np.float32(2)
    return transform_nearest(image, (cos, -sin, x_offset, sin, cos, y_offset))


def transform_nearest(image: Pixels, matrix: tuple[float | np.float32, ...]) -> Pixels:
    """The pixel at (x, y) is that nearest to (a x + b y + c, d x + e y + f), and gray outside. Halves round away from 0.

    (0, 0) is the center of the first pixel; Pillow counts from its corner.
    """
    height, width = image.shape[:2]
    a, b, c, d, e, f = np.array(matrix, np.float32)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    columns, rows = a * x + b * y + c, d * x + e * y + f
    inside = (columns > -0.5) & (columns < width - 0.5) & (rows > -0.5) & (rows < height - 0.5)
    index = _round_positive(rows) * width + _round_positive(columns)
    # Whole pixels are taken, and a gray one beyond the last: indexing three bytes at a time takes four times as long.
    pixels = np.concatenate([image.reshape(-1, 3), np.array([GRAY], np.uint8)]).view("V3").ravel()
    moved: Pixels = pixels[np.where(inside, index, height * width)].view(np.uint8).reshape(image.shape)
    return moved


def _round_positive(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    # In float64: 0.49999997 + 0.5 is 1 in float32.
    return (values + np.float64(0.5)).astype(np.int64)
