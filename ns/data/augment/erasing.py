"""Random erasing (arXiv:1708.04896): a rectangle of an image is replaced by random pixels."""

import math

import numpy as np
import numpy.typing as npt

AREA = (0.02, 1 / 3)
"""Least and greatest share of the image's area, timm's."""
ASPECT = (0.3, 1 / 0.3)
"""Least and greatest height / width."""
TRIES = 10
"""Attempts to draw a rectangle that fits in the image."""


def erase_rectangle(image: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A copy of an image, uint8 [H, W, 3], with random values in a rectangle; the image itself if none of 10 rectangles fits."""
    height, width = image.shape[:2]
    for _ in range(TRIES):
        area = height * width * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            erased = image.copy()
            erased[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, 3), np.uint8)
            return erased
    return image
