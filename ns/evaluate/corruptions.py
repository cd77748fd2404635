"""Common corruptions, by the published definitions of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich, arXiv:1903.12261)."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image
from scipy.ndimage import gaussian_filter

from ns.errors import ConfigError

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

SMALL_PX = 64
"""Images up to here get CIFAR-10-C's parameters."""


def corrupt(image: Pixels, kind: str, severity: int, rng: np.random.Generator) -> Pixels:
    """uint8 [H, W, 3] → uint8 [H, W, 3], at a severity of 1 to 5. All chance comes from `rng`.

    Raises ConfigError for a kind that cannot be made here.
    """
    if kind not in KINDS:
        raise ConfigError(f"evaluation.corruptions: {kind} cannot be made here; there are {', '.join(KINDS)}")
    small = max(image.shape[:2]) <= SMALL_PX
    made, photographs, small_images = KINDS[kind]
    found = made(image.astype(np.float64) / 255, (small_images if small else photographs)[severity - 1], rng)
    return np.clip(found * 255, 0, 255).astype(np.uint8)


def _gaussian_noise(image: Floats, scale: float, rng: np.random.Generator) -> Floats:
    return image + rng.normal(size=image.shape, scale=scale)


def _shot_noise(image: Floats, photons: float, rng: np.random.Generator) -> Floats:
    return rng.poisson(image * photons) / photons


def _impulse_noise(image: Floats, share: float, rng: np.random.Generator) -> Floats:
    draw = rng.random(image.shape)
    return np.where(draw < share / 2, 0.0, np.where(draw < share, 1.0, image))


def _speckle_noise(image: Floats, scale: float, rng: np.random.Generator) -> Floats:
    return image + image * rng.normal(size=image.shape, scale=scale)


def _gaussian_blur(image: Floats, sigma: float, _: np.random.Generator) -> Floats:
    blurred: Floats = gaussian_filter(image, (sigma, sigma, 0), truncate=4.0)
    return blurred


def _brightness(image: Floats, shift: float, _: np.random.Generator) -> Floats:
    # Of HSV's value, with hue and saturation kept.
    value = image.max(2, keepdims=True)
    lighter = np.clip(value + shift, 0, 1)
    lit: Floats = np.where(value > 0, image * (lighter / np.maximum(value, 1e-12)), lighter)
    return lit


def _contrast(image: Floats, factor: float, _: np.random.Generator) -> Floats:
    mean = image.mean((0, 1), keepdims=True)
    found: Floats = (image - mean) * factor + mean
    return found


def _pixelate(image: Floats, factor: float, _: np.random.Generator) -> Floats:
    picture = Image.fromarray((image * 255).round().astype(np.uint8))
    less = picture.resize((max(1, int(picture.width * factor)), max(1, int(picture.height * factor))), Image.Resampling.BOX)
    return np.asarray(less.resize(picture.size, Image.Resampling.BOX)) / 255


def _jpeg(image: Floats, quality: float, _: np.random.Generator) -> Floats:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray((image * 255).round().astype(np.uint8)), int(quality), "RGB", "420")
    decoded: Pixels = simplejpeg.decode_jpeg(data)
    return decoded / 255


Distort = Callable[[Floats, float, np.random.Generator], Floats]

# What it is made with, its parameter by severity for photographs, and for small images.
KINDS: dict[str, tuple[Distort, tuple[float, ...], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_jpeg, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)),
}
