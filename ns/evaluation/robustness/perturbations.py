"""Perturbed sequences, after the published definitions of ImageNet-P and CIFAR-10-P (Hendrycks & Dietterich, arXiv:1903.12261).

Frames are counted from the middle one, so that a shorter sequence is the middle of a longer one; published are 31, of which the middle
one is the image itself for most kinds. Noise, and the blurs, begin with the image. Frames are not compressed; ImageNet-P's are H.264.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from ns.evaluation.robustness.corruptions import Pixels, Rng, brighter, is_small, moved, snowed, snowflakes, unit

CROPPED_PX = 224
HALF = 15
"""Frames before the middle one in a published sequence."""

Matrix = npt.NDArray[np.float64]


def sequence(image: Pixels, kind: str, frames: int, rng: Rng) -> Pixels:
    """uint8 [H, W, 3] → uint8 [frames, h, w, 3]. A photograph comes with its short side at 256 px, and is cropped to 224 px when it has
    been moved; a small image stays as it is. All chance comes from `rng`."""
    steps = range(-((frames - 1) // 2), frames - (frames - 1) // 2)
    return np.stack(list(KINDS[kind](image, steps, rng)))


def _gaussian_noise(image: Pixels, steps: range, rng: Rng) -> Iterator[Pixels]:
    plain = _cropped(image)
    yield plain
    for _ in steps[1:]:
        yield _bytes(unit(plain) + (0.02 if is_small(image) else 0.03) * rng.standard_normal(plain.shape, np.float32))


def _shot_noise(image: Pixels, steps: range, rng: Rng) -> Iterator[Pixels]:
    plain, photons = _cropped(image), 700 if is_small(image) else 300
    yield plain
    for _ in steps[1:]:
        yield _bytes(rng.poisson(unit(plain) * photons) / photons)


def _motion_blur(image: Pixels, steps: range, _: Rng) -> Iterator[Pixels]:
    plain = unit(_cropped(image))
    for step in steps:
        if is_small(image):
            yield _bytes(moved(plain, 6, 1.8, (step - 10) * 9))
        else:
            yield _bytes(moved(plain, 10, 3, (step - HALF) * 4))


def _zoom_blur(image: Pixels, steps: range, _: Rng) -> Iterator[Pixels]:
    total = unit(_cropped(image)).astype(np.float64)
    yield _cropped(image)
    for number in range(1, len(steps)):
        total += unit(_moved(image, scale=1 + 0.004 * number))
        yield _bytes(total / (number + 1))


def _snow(image: Pixels, steps: range, rng: Rng) -> Iterator[Pixels]:
    plain, small = unit(_cropped(image)), is_small(image)
    flakes = snowflakes(plain.shape, 0.05, 0.3, 2 if small else 3, 0.5, rng)
    for step in steps:
        falling = moved(flakes, 10 if small else 14, 2 if small else 4, (step + HALF) * 4 - 150)
        yield _bytes(snowed(plain, falling, 0.85))


def _brightness(image: Pixels, steps: range, _: Rng) -> Iterator[Pixels]:
    plain = unit(_cropped(image))
    for step in steps:
        yield _bytes(brighter(plain, step * (0.015 if is_small(image) else 0.02)))


def _translate(image: Pixels, steps: range, _: Rng) -> Iterator[Pixels]:
    for step in steps:
        yield _moved(image, right=step)


def _rotate(image: Pixels, steps: range, _: Rng) -> Iterator[Pixels]:
    for step in steps:
        yield _moved(image, degrees=step)


def _scale(image: Pixels, steps: range, _: Rng) -> Iterator[Pixels]:
    for step in steps:
        yield _moved(image, scale=(1.0 + 0.02 * step) if is_small(image) else 0.775 + 0.025 * step)


def _tilt(image: Pixels, steps: range, _: Rng) -> Iterator[Pixels]:
    height, width = image.shape[:2]
    far = float(np.hypot(width, height))
    flat = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1], [0, 0, 1]])
    away = np.eye(4) + far * np.outer([0, 0, 1, 0], [0, 0, 0, 1])
    seen = np.array([[far, 0, width / 2, 0], [0, far, height / 2, 0], [0, 0, 1, 0]])
    for step in steps:
        angle = np.radians(step * (0.75 if is_small(image) else 1))
        cosine, sine = np.cos(angle), np.sin(angle)
        about_x, about_y = np.eye(4), np.eye(4)
        about_x[1:3, 1:3] = [[cosine, -sine], [sine, cosine]]
        about_y[0, 0], about_y[0, 2], about_y[2, 0], about_y[2, 2] = cosine, -sine, sine, cosine
        yield _mapped(image, np.linalg.inv(seen @ away @ about_x @ about_y @ flat), centres=False)


KINDS: dict[str, Callable[[Pixels, range, Rng], Iterator[Pixels]]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "brightness": _brightness,
    "translate": _translate,
    "rotate": _rotate,
    "tilt": _tilt,
    "scale": _scale,
}


def _moved(image: Pixels, *, degrees: float = 0, scale: float = 1, right: float = 0) -> Pixels:
    """Turned clockwise about the centre, scaled, and moved; what comes in is black."""
    height, width = image.shape[:2]
    cosine, sine = np.cos(np.radians(degrees)) / scale, np.sin(np.radians(degrees)) / scale
    to_centre = np.array([[1, 0, -width / 2 - right], [0, 1, -height / 2], [0, 0, 1]])
    back = np.array([[cosine, sine, width / 2], [-sine, cosine, height / 2], [0, 0, 1]])
    return _mapped(image, back @ to_centre, centres=True)


def _mapped(image: Pixels, source: Matrix, *, centres: bool) -> Pixels:
    """The image for which `source` says where each of its places, (x, y, 1), comes from; then cropped. Pixels lie at whole numbers, or, if
    `centres`, halfway between."""
    left, top, size = _window(image)
    if not centres:
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        source = half @ source @ np.linalg.inv(half)
    source = source @ np.array([[1, 0, left], [0, 1, top], [0, 0, 1]])
    coefficients = (source / source[2, 2]).reshape(-1)[:8].tolist()
    picture = Image.fromarray(image)
    return np.asarray(picture.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR))


def _cropped(image: Pixels) -> Pixels:
    left, top, (width, height) = _window(image)
    return image[top : top + height, left : left + width]


def _window(image: Pixels) -> tuple[int, int, tuple[int, int]]:
    """Left, top, and (width, height) of what is kept."""
    height, width = image.shape[:2]
    if is_small(image):
        return 0, 0, (width, height)
    return round((width - CROPPED_PX) / 2), round((height - CROPPED_PX) / 2), (CROPPED_PX, CROPPED_PX)


def _bytes(image: npt.NDArray[np.floating]) -> Pixels:
    found: Pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    return found
