"""Perturbed sequences, after the published definitions of ImageNet-P and CIFAR-10-P (Hendrycks & Dietterich, arXiv:1903.12261).

Frames are counted from the middle one, so a shorter sequence is the middle of a longer one. The published sequences have 31 frames; for
most kinds the middle one is the image itself, for noise and blurs the first one. Frames are not compressed; ImageNet-P's are H.264.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from ns.evaluation.robustness.corruptions import (
    PixelArray,
    Rng,
    blur_motion,
    draw_snowflakes,
    is_small_image,
    overlay_snow,
    scale_to_unit,
    shift_brightness,
)

CROPPED_PX = 224
FRAMES_BEFORE = 15
"""Frames before the middle one in a published sequence."""

TransformMatrix = npt.NDArray[np.float64]


def render_sequence(image: PixelArray, kind: str, frames: int, rng: Rng) -> PixelArray:
    """uint8 [H, W, 3] → uint8 [frames, h, w, 3]. A photograph has a short side of 256 px and is cropped to 224 px after it was moved;
    a small image keeps its size. All randomness comes from `rng`."""
    offsets = range(-((frames - 1) // 2), frames - (frames - 1) // 2)
    return np.stack(list(PERTURBATION_KINDS[kind](image, offsets, rng)))


def _gaussian_noise(image: PixelArray, offsets: range, rng: Rng) -> Iterator[PixelArray]:
    plain = crop_center(image)
    yield plain
    for _ in offsets[1:]:
        yield _to_uint8(
            scale_to_unit(plain) + (0.02 if is_small_image(image) else 0.03) * rng.standard_normal(plain.shape, np.float32)
        )


def _shot_noise(image: PixelArray, offsets: range, rng: Rng) -> Iterator[PixelArray]:
    plain, photons = crop_center(image), 700 if is_small_image(image) else 300
    yield plain
    for _ in offsets[1:]:
        yield _to_uint8(rng.poisson(scale_to_unit(plain) * photons) / photons)


def _motion_blur(image: PixelArray, offsets: range, _: Rng) -> Iterator[PixelArray]:
    plain = scale_to_unit(crop_center(image))
    for offset in offsets:
        if is_small_image(image):
            yield _to_uint8(blur_motion(plain, 6, 1.8, (offset - 10) * 9))
        else:
            yield _to_uint8(blur_motion(plain, 10, 3, (offset - FRAMES_BEFORE) * 4))


def _zoom_blur(image: PixelArray, offsets: range, _: Rng) -> Iterator[PixelArray]:
    total = scale_to_unit(crop_center(image)).astype(np.float64)
    yield crop_center(image)
    for number in range(1, len(offsets)):
        total += scale_to_unit(_move_image(image, scale=1 + 0.004 * number))
        yield _to_uint8(total / (number + 1))


def _snow_frames(image: PixelArray, offsets: range, rng: Rng) -> Iterator[PixelArray]:
    plain, small = scale_to_unit(crop_center(image)), is_small_image(image)
    flakes = draw_snowflakes(plain.shape, 0.05, 0.3, 2 if small else 3, 0.5, rng)
    for offset in offsets:
        falling = blur_motion(flakes, 10 if small else 14, 2 if small else 4, (offset + FRAMES_BEFORE) * 4 - 150)
        yield _to_uint8(overlay_snow(plain, falling, 0.85))


def _brightness_frames(image: PixelArray, offsets: range, _: Rng) -> Iterator[PixelArray]:
    plain = scale_to_unit(crop_center(image))
    for offset in offsets:
        yield _to_uint8(shift_brightness(plain, offset * (0.015 if is_small_image(image) else 0.02)))


def _translate_frames(image: PixelArray, offsets: range, _: Rng) -> Iterator[PixelArray]:
    for offset in offsets:
        yield _move_image(image, right=offset)


def _rotate_frames(image: PixelArray, offsets: range, _: Rng) -> Iterator[PixelArray]:
    for offset in offsets:
        yield _move_image(image, degrees=offset)


def _scale_frames(image: PixelArray, offsets: range, _: Rng) -> Iterator[PixelArray]:
    for offset in offsets:
        yield _move_image(image, scale=(1.0 + 0.02 * offset) if is_small_image(image) else 0.775 + 0.025 * offset)


def _tilt_frames(image: PixelArray, offsets: range, _: Rng) -> Iterator[PixelArray]:
    height, width = image.shape[:2]
    far = float(np.hypot(width, height))
    flat = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1], [0, 0, 1]])
    away = np.eye(4) + far * np.outer([0, 0, 1, 0], [0, 0, 0, 1])
    seen = np.array([[far, 0, width / 2, 0], [0, far, height / 2, 0], [0, 0, 1, 0]])
    for offset in offsets:
        angle = np.radians(offset * (0.75 if is_small_image(image) else 1))
        cosine, sine = np.cos(angle), np.sin(angle)
        about_x, about_y = np.eye(4), np.eye(4)
        about_x[1:3, 1:3] = [[cosine, -sine], [sine, cosine]]
        about_y[0, 0], about_y[0, 2], about_y[2, 0], about_y[2, 2] = cosine, -sine, sine, cosine
        yield _warp_image(image, np.linalg.inv(seen @ away @ about_x @ about_y @ flat), centers=False)


PERTURBATION_KINDS: dict[str, Callable[[PixelArray, range, Rng], Iterator[PixelArray]]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow_frames,
    "brightness": _brightness_frames,
    "translate": _translate_frames,
    "rotate": _rotate_frames,
    "tilt": _tilt_frames,
    "scale": _scale_frames,
}


def _move_image(image: PixelArray, *, degrees: float = 0, scale: float = 1, right: float = 0) -> PixelArray:
    """The image turned clockwise about its center, scaled and moved; the area beyond its edges is black."""
    height, width = image.shape[:2]
    cosine, sine = np.cos(np.radians(degrees)) / scale, np.sin(np.radians(degrees)) / scale
    to_center = np.array([[1, 0, -width / 2 - right], [0, 1, -height / 2], [0, 0, 1]])
    back = np.array([[cosine, sine, width / 2], [-sine, cosine, height / 2], [0, 0, 1]])
    return _warp_image(image, back @ to_center, centers=True)


def _warp_image(image: PixelArray, source: TransformMatrix, *, centers: bool) -> PixelArray:
    """The image, cropped, whose point (x, y, 1) shows the point `source` @ (x, y, 1) of the original. Pixel centers have integer
    coordinates, or, if `centers`, half-integer ones."""
    left, top, size = _find_window(image)
    if not centers:
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        source = half @ source @ np.linalg.inv(half)
    source = source @ np.array([[1, 0, left], [0, 1, top], [0, 0, 1]])
    coefficients = (source / source[2, 2]).reshape(-1)[:8].tolist()
    picture = Image.fromarray(image)
    return np.asarray(picture.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR))


def crop_center(image: PixelArray) -> PixelArray:
    """The central 224 px square of a photograph; a small image as it is."""
    left, top, (width, height) = _find_window(image)
    return image[top : top + height, left : left + width]


def _find_window(image: PixelArray) -> tuple[int, int, tuple[int, int]]:
    """Left, top, and (width, height) of the part that is kept."""
    height, width = image.shape[:2]
    if is_small_image(image):
        return 0, 0, (width, height)
    return round((width - CROPPED_PX) / 2), round((height - CROPPED_PX) / 2), (CROPPED_PX, CROPPED_PX)


def _to_uint8(image: npt.NDArray[np.floating]) -> PixelArray:
    pixels: PixelArray = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    return pixels
