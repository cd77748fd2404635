"""Common corruptions, after the published definitions of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich, arXiv:1903.12261).

Reimplemented after their code with numpy, scipy and Pillow only. Two things differ: `frost` overlays generated textures with the colors
and contrasts of the published photographs, which may not be redistributed, and the random numbers are not those of the published files.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import (
    affine_transform,
    convolve1d,
    correlate,
    distance_transform_edt,
    gaussian_filter,
    label,
    map_coordinates,
    sobel,
    uniform_filter,
)
from scipy.signal import fftconvolve

PixelArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.floating[Any]]
Rng = np.random.Generator

TINY_PX = 32
"""Images of at most this size get CIFAR-10-C's parameters."""
SMALL_PX = 64
"""Larger images than tiny ones, of at most this size, get Tiny ImageNet-C's parameters; still larger ones ImageNet-C's, for 224 px."""

GREY = np.array([0.299, 0.587, 0.114], np.float32)
WATER = np.array([175, 238, 238], np.float32) / 255
MUD = np.array([63, 42, 20], np.float32) / 255
FROSTS = np.array(
    [
        (0.304, 0.584, 0.650, 0.070),
        (0.787, 0.805, 0.841, 0.086),
        (0.787, 0.805, 0.841, 0.086),
        (0.540, 0.599, 0.648, 0.113),
        (0.441, 0.484, 0.528, 0.169),
    ],
    np.float32,
)
"""Mean red, green, blue, and standard deviation of the gray of each photograph of frost that the published code draws from; the second
and third are one picture."""


def corrupt_image(image: PixelArray, kind: str, severity: int, rng: Rng) -> PixelArray:
    """uint8 [H, W, 3] → uint8 [H, W, 3], at a severity of 1 to 5. All randomness comes from `rng`."""
    corruption, *parameters_by_size = CORRUPTION_KINDS[kind]
    side = max(image.shape[:2])
    corrupted = corruption(image, parameters_by_size[(side <= SMALL_PX) + (side <= TINY_PX)][severity - 1], rng)
    # Truncated, not rounded, as published.
    return corrupted if corrupted.dtype == np.uint8 else np.clip(corrupted * 255, 0, 255).astype(np.uint8)


def is_small_image(image: PixelArray) -> bool:
    return bool(max(image.shape[:2]) <= SMALL_PX)


def scale_to_unit(image: PixelArray) -> FloatArray:
    """uint8 in 0–255 → float32 in 0–1."""
    return image.astype(np.float32) / 255


# Noise


def _gaussian_noise(image: PixelArray, scale: float, rng: Rng) -> FloatArray:
    return scale_to_unit(image) + scale * rng.standard_normal(image.shape, np.float32)


def _shot_noise(image: PixelArray, photons: float, rng: Rng) -> FloatArray:
    return (rng.poisson(scale_to_unit(image) * photons) / photons).astype(np.float32)


def _impulse_noise(image: PixelArray, share: float, rng: Rng) -> PixelArray:
    draw = rng.random(image.shape, np.float32)
    return np.where(draw < share / 2, 0, np.where(draw < share, 255, image)).astype(np.uint8)


def _speckle_noise(image: PixelArray, scale: float, rng: Rng) -> FloatArray:
    return scale_to_unit(image) * (1 + scale * rng.standard_normal(image.shape, np.float32))


# Blur


def _gaussian_blur(image: PixelArray, sigma: float, _: Rng) -> FloatArray:
    return _blur_gaussian(scale_to_unit(image), sigma)


def _defocus_blur(image: PixelArray, parameters: tuple[float, float], _: Rng) -> FloatArray:
    radius, softness = parameters
    reach, size = (8, 3) if radius <= 8 else (int(radius), 5)
    along = np.arange(-reach, reach + 1)
    disk = (along[:, None] ** 2 + along[None] ** 2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    soft = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * softness**2))
    for axis in (0, 1):
        disk = convolve1d(disk, soft / soft.sum(), axis, mode="mirror")
    disk = disk[_find_support(disk)]
    edge = len(disk) // 2
    padded = np.pad(scale_to_unit(image), ((edge, edge), (edge, edge), (0, 0)), "reflect")
    blurred: FloatArray = fftconvolve(padded, disk[:, :, None].astype(np.float32), "valid", axes=(0, 1))
    return blurred


def _find_support(disk: npt.NDArray[np.float64]) -> tuple[slice, slice]:
    """The central square outside of which a kernel is zero."""
    center = len(disk) // 2
    reach = int(np.abs(np.argwhere(disk > 0) - center).max())
    return slice(center - reach, center + reach + 1), slice(center - reach, center + reach + 1)


def _glass_blur(image: PixelArray, parameters: tuple[float, int, int], rng: Rng) -> FloatArray:
    sigma, reach, rounds = parameters
    height, width = image.shape[:2]
    soft = (_blur_gaussian(scale_to_unit(image), sigma) * 255).astype(np.uint8).reshape(-1, 3)
    # From the last pixel to the first, each takes the present value of a neighbor. (The published code intends to swap the two, but
    # assigns views of one array.)
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    rows, columns = rows[rows < height], columns[columns < width]
    pixels = (rows[:, None] * width + columns).reshape(-1)
    origin = list(range(height * width))
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, len(pixels)))
        for pixel, neighbor in zip(pixels.tolist(), (pixels + down * width + right).tolist(), strict=True):
            origin[pixel] = origin[neighbor]
    return _blur_gaussian(scale_to_unit(soft[origin].reshape(image.shape)), sigma)


def _motion_blur(image: PixelArray, parameters: tuple[float, float], rng: Rng) -> FloatArray:
    return blur_motion(scale_to_unit(image), *parameters, rng.uniform(-45, 45))


def blur_motion(image: FloatArray, radius: float, sigma: float, degrees: float) -> FloatArray:
    """ImageMagick's motion blur: half of a Gaussian along a line of pixels; edge pixels are repeated beyond the edge."""
    steps = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    down = np.ceil(steps * np.sin(np.radians(degrees)) - 0.5).astype(int)
    right = np.ceil(steps * np.cos(np.radians(degrees)) - 0.5).astype(int)
    height, width = image.shape[:2]
    blurred = np.zeros_like(image)
    for weight, dy, dx in zip(weights / weights.sum(), down, right, strict=True):
        if weight > 1e-4:
            rows, columns = (np.clip(np.arange(size) + shift, 0, size - 1) for size, shift in ((height, dy), (width, dx)))
            blurred += np.float32(weight) * image[rows][:, columns]
    return blurred


def _zoom_blur(image: PixelArray, factors: npt.NDArray[np.float64], _: Rng) -> FloatArray:
    plain = scale_to_unit(image)
    total = plain.copy()
    for factor in factors:
        total += zoom_center(plain, factor)
    return total / (len(factors) + 1)


def zoom_center(image: FloatArray, factor: float) -> FloatArray:
    """The center, enlarged to the size of the image by linear interpolation. [H, W] or [H, W, C]."""
    for axis in (0, 1):
        # Equals scipy.ndimage.zoom of the center, cropped, but computes only the kept pixels, in less than half of its time.
        size = image.shape[axis]
        kept = int(np.ceil(size / factor))
        larger = round(kept * factor)
        positions = ((larger - size) // 2 + np.arange(size)) * ((kept - 1) / max(larger - 1, 1))
        below = positions.astype(int)
        weight = (positions - below).astype(np.float32).reshape(-1, *(1,) * (image.ndim - 1 - axis))
        first = (size - kept) // 2
        lower, upper = (image.take(first + np.minimum(index, kept - 1), axis) for index in (below, below + 1))
        image = lower + weight * (upper - lower)
    return image


# Weather


def _add_fog(image: PixelArray, parameters: tuple[float, float], rng: Rng) -> FloatArray:
    thickness, roughness = parameters
    plain = scale_to_unit(image)
    brightest = plain.max()
    hazy: FloatArray = plain + thickness * generate_plasma(image.shape, roughness, rng)[:, :, None]
    foggy: FloatArray = hazy * brightest / (brightest + thickness)
    return foggy


def generate_plasma(shape: tuple[int, ...], decay: float, rng: Rng) -> FloatArray:
    """float32 [H, W] in 0–1: clouds by the diamond-square algorithm on a torus; each octave is weaker by the factor `decay`."""
    size = 1 << (max(shape[:2]) - 1).bit_length()
    field = np.zeros((size, size))
    step, wobble = size, 100.0

    def jitter_mean(total: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        field[half::step, half::step] = jitter_mean(pairs + np.roll(pairs, -1, 1))
        middles = field[half::step, half::step]
        field[::step, half::step] = jitter_mean(middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1))
        field[half::step, ::step] = jitter_mean(middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0))
        step, wobble = half, wobble / decay
    field -= field.min()
    clouds: FloatArray = (field / field.max())[: shape[0], : shape[1]].astype(np.float32)
    return clouds


def _add_frost(image: PixelArray, parameters: tuple[float, float], rng: Rng) -> FloatArray:
    kept, laid = parameters
    *color, contrast = FROSTS[rng.integers(len(FROSTS))]
    # Ridges of two plasma fields look like ice needles; a third field controls their density.
    needles = np.maximum(*(1 - np.abs(2 * generate_plasma(image.shape, decay, rng) - 1) for decay in (1.4, 1.8)))
    relief = needles**3 * (0.45 + 0.55 * generate_plasma(image.shape, 2.5, rng))
    relief = (relief - relief.mean()) / max(float(relief.std()), 1e-6)
    ice = np.clip(np.array(color) + contrast * relief[:, :, None], 0, 1)
    frosted: FloatArray = kept * scale_to_unit(image) + laid * ice
    return frosted


def _add_snow(image: PixelArray, parameters: tuple[float, ...], rng: Rng) -> FloatArray:
    mean, spread, size, least, radius, sigma, kept = parameters
    flakes = draw_snowflakes(image.shape, mean, spread, size, least, rng)
    return overlay_snow(scale_to_unit(image), blur_motion(flakes, radius, sigma, rng.uniform(-135, -45)), kept)


def draw_snowflakes(shape: tuple[int, ...], mean: float, spread: float, size: float, least: float, rng: Rng) -> FloatArray:
    """Snowflakes, float32 [H, W] in 0–1."""
    flakes = zoom_center((mean + spread * rng.standard_normal(shape[:2])).astype(np.float32), size)
    return np.clip(np.where(flakes < least, 0, flakes), 0, 1).astype(np.float32)


def overlay_snow(image: FloatArray, flakes: FloatArray, kept: float) -> FloatArray:
    """A paler image under the flakes and a copy of them turned by 180°."""
    pale = np.maximum(image, (image @ GREY)[:, :, None] * 1.5 + 0.5)
    falling = flakes + flakes[::-1, ::-1]
    return kept * image + (1 - kept) * pale + falling[:, :, None]


def _add_spatter(image: PixelArray, parameters: tuple[float, ...], rng: Rng) -> FloatArray:
    mean, spread, sigma, least, strength, mud = parameters
    liquid = _blur_gaussian((mean + spread * rng.standard_normal(image.shape[:2])).astype(np.float32), sigma)
    liquid[liquid < least] = 0
    plain = scale_to_unit(image)
    if mud:
        cover = _blur_gaussian((liquid > least).astype(np.float32), strength)
        cover[cover < 0.8] = 0
        return plain * (1 - cover[:, :, None]) + cover[:, :, None] * MUD
    depth = (np.clip(liquid, 0, 1) * 255).astype(np.uint8)
    near = np.minimum(distance_transform_edt(~_find_edges(depth)), 20)
    near = _equalize_histogram(uniform_filter(near, 3, mode="mirror").astype(np.uint8))
    lit = np.clip(correlate(near.astype(np.float32), np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), mode="mirror"), 0, 255)
    drops = depth * uniform_filter(lit, 3, mode="mirror")
    wet: FloatArray = plain + (strength * drops / max(float(drops.max()), 1e-6)).astype(np.float32)[:, :, None] * WATER
    return wet


def _find_edges(image: PixelArray) -> npt.NDArray[np.bool_]:
    """bool [H, W]: Canny's edges of a uint8 [H, W], with thresholds of 50 and 150 and |dx| + |dy| for the slope."""
    down, right = (sobel(image.astype(np.int32), axis, mode="nearest") for axis in (0, 1))
    slope = np.pad(np.abs(down) + np.abs(right), 1)

    def shift_slope(rows: int, columns: int) -> npt.NDArray[np.int32]:
        height, width = image.shape
        return slope[1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    center_slope = shift_slope(0, 0)
    steepness = np.abs(down) / np.maximum(np.abs(right), 1e-9)
    # A pixel must have the steepest slope among its neighbors across the edge, in one of four directions; 0.414 is tan 22.5°.
    across = np.select(
        [steepness < 0.41421356, steepness > 2.41421356, (down < 0) == (right < 0)],
        [
            (center_slope > shift_slope(0, -1)) & (center_slope >= shift_slope(0, 1)),
            (center_slope > shift_slope(-1, 0)) & (center_slope >= shift_slope(1, 0)),
            (center_slope > shift_slope(-1, -1)) & (center_slope > shift_slope(1, 1)),
        ],
        (center_slope > shift_slope(-1, 1)) & (center_slope > shift_slope(1, -1)),
    )
    lines, _ = label(across & (center_slope > 50), np.ones((3, 3)))
    strong = np.unique(lines[across & (center_slope > 150)])
    edges: npt.NDArray[np.bool_] = np.isin(lines, strong[strong > 0])
    return edges


def _equalize_histogram(image: PixelArray) -> PixelArray:
    """uint8 [H, W] with an equalized histogram."""
    counts = np.bincount(image.reshape(-1), minlength=256)
    first = int(np.flatnonzero(counts)[0])
    rest = image.size - counts[first]
    if rest == 0:
        return image
    table = np.round((np.cumsum(counts) - counts[first]) * 255 / rest)
    equalized: PixelArray = np.clip(table, 0, 255).astype(np.uint8)[image]
    return equalized


# Light and storage


def _raise_brightness(image: PixelArray, shift: float, _: Rng) -> FloatArray:
    return shift_brightness(scale_to_unit(image), shift)


def shift_brightness(image: FloatArray, shift: float) -> FloatArray:
    """Shifts HSV's value by `shift`; hue and saturation stay."""
    value = image.max(2, keepdims=True)
    new = np.clip(value + shift, 0, 1)
    lit: FloatArray = np.where(value > 0, image * (new / np.maximum(value, 1e-9)), new).astype(np.float32)
    return lit


def _change_saturation(image: PixelArray, parameters: tuple[float, float], _: Rng) -> FloatArray:
    factor, shift = parameters
    plain = scale_to_unit(image)
    value = plain.max(2, keepdims=True)
    saturation = (value - plain.min(2, keepdims=True)) / np.maximum(value, 1e-9)
    new = np.clip(saturation * factor + shift, 0, 1)
    colored = value - (value - plain) * (new / np.maximum(saturation, 1e-9))
    # Gray pixels have the hue of red.
    red = value * np.concatenate([np.ones_like(new), 1 - new, 1 - new], axis=2)
    saturated: FloatArray = np.where(saturation > 0, colored, red).astype(np.float32)
    return saturated


def _reduce_contrast(image: PixelArray, factor: float, _: Rng) -> FloatArray:
    plain = scale_to_unit(image)
    mean = plain.mean((0, 1), keepdims=True)
    flat: FloatArray = (plain - mean) * np.float32(factor) + mean
    return flat


def _compress_jpeg(image: PixelArray, quality: int, _: Rng) -> PixelArray:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "JPEG", quality=quality)
    with Image.open(sink) as stored:
        return np.asarray(stored)


def _pixelate_image(image: PixelArray, factor: float, _: Rng) -> PixelArray:
    picture = Image.fromarray(image)
    less = picture.resize((max(1, int(picture.width * factor)), max(1, int(picture.height * factor))), Image.Resampling.BOX)
    return np.asarray(less.resize(picture.size, Image.Resampling.BOX))


# Shape


def _elastic_transform(image: PixelArray, parameters: tuple[float, float, float], rng: Rng) -> FloatArray:
    # Lengths are in units of 244 px for photographs of any size, as published, and of the side for small images.
    side = min(image.shape[:2])
    strength, sigma, corner = (share * (side if is_small_image(image) else 244) for share in parameters)
    plain = scale_to_unit(image)
    middle, reach = np.array(image.shape[1::-1]) // 2, side // 3
    before = np.array([middle + reach, [middle[0] + reach, middle[1] - reach], middle - reach], np.float64)
    after = before + rng.uniform(-corner, corner, before.shape)
    # The affine map from the moved points back to the original ones; x comes before y.
    back, _, _, _ = np.linalg.lstsq(np.c_[after, np.ones(3)], before, rcond=None)
    matrix, offset = back[:2].T[::-1, ::-1], back[2][::-1]
    bent = np.stack([affine_transform(plain[:, :, c], matrix, offset, order=1, mode="mirror") for c in range(3)], axis=2)
    if not strength:
        return bent
    dx, dy = (
        gaussian_filter(rng.uniform(-1, 1, image.shape[:2]), sigma, mode="reflect", truncate=3) * strength for _ in range(2)
    )
    rows, columns = np.indices(image.shape[:2])
    coordinates = [rows + dy, columns + dx]
    return np.stack([map_coordinates(bent[:, :, c], coordinates, order=1, mode="reflect") for c in range(3)], axis=2)


def _blur_gaussian(image: FloatArray, sigma: float) -> FloatArray:
    blurred: FloatArray = gaussian_filter(image, (sigma, sigma, 0)[: image.ndim], mode="nearest", truncate=4.0)
    return blurred


CorruptionFunction = Callable[[PixelArray, Any, Rng], npt.NDArray[Any]]

# Kind → the function, and its parameters by severity for photographs, for small and for tiny images.
CORRUPTION_KINDS: dict[str, tuple[CorruptionFunction, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]] = {
    "gaussian_noise": (
        _gaussian_noise,
        (0.08, 0.12, 0.18, 0.26, 0.38),
        (0.04, 0.08, 0.12, 0.15, 0.18),
        (0.04, 0.06, 0.08, 0.09, 0.10),
    ),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3), (250, 100, 50, 30, 15), (500, 250, 100, 75, 50)),
    "impulse_noise": (
        _impulse_noise,
        (0.03, 0.06, 0.09, 0.17, 0.27),
        (0.01, 0.02, 0.05, 0.08, 0.14),
        (0.01, 0.02, 0.03, 0.05, 0.07),
    ),
    "defocus_blur": (
        _defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": (
        _glass_blur,
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": (
        _motion_blur,
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom_blur": (
        _zoom_blur,
        tuple(
            np.arange(1, stop, step) for stop, step in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
        ),
        tuple(np.arange(1, stop, 0.01) for stop in (1.06, 1.11, 1.16, 1.21, 1.26)),
        tuple(np.arange(1, stop, 0.01) for stop in (1.06, 1.11, 1.16, 1.21, 1.26)),
    ),
    "snow": (
        _add_snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (
        _add_frost,
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    "fog": (
        _add_fog,
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": (_raise_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_reduce_contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        _elastic_transform,
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
        ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (_pixelate_image, (0.6, 0.5, 0.4, 0.3, 0.25), (0.9, 0.8, 0.7, 0.6, 0.5), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_compress_jpeg, (25, 18, 15, 10, 7), (65, 58, 50, 40, 25), (80, 65, 58, 50, 40)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6), (0.15, 0.2, 0.25, 0.3, 0.35), (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6), (0.5, 0.75, 1, 1.25, 1.5), (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": (
        _add_spatter,
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.6, 0),
            (0.65, 0.1, 0.8, 0.7, 0.6, 0),
            (0.65, 0.3, 1, 0.69, 0.6, 0),
            (0.65, 0.1, 0.7, 0.68, 0.6, 1),
            (0.65, 0.1, 0.5, 0.67, 0.6, 1),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    ),
    "saturate": (
        _change_saturation,
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    ),
}
