"""Transforms an image for the network: with noise for training, without for evaluation (arXiv:1911.04252 §3.1)."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from ns.config.schema import Crop, Interpolation, ModelConfig, NoiseConfig, TestCrop
from ns.core.errors import DataError
from ns.data.augment.erasing import erase_rectangle
from ns.data.augment.mixing import PairMixer
from ns.data.augment.policies import AugmentPolicy
from ns.data.augment.randaugment import Operation, RandAugment, apply_cutout
from ns.data.augment.reference import ReferenceRandAugment
from ns.data.loading.decode import Box, EncodedJpeg, decode_image, decode_into

CROP_TRIES = 10
"""Attempts of the paper's random-resized-crop."""

MAX_ELONGATION = 16
"""Long side in short sides, of what is resized before its center is cut: of an image of 1 × 60,000 px, the whole would take gigabytes."""

RESIZED_BYTES = 1 << 18
"""Bytes of images of the same size that are resized together: as much as fits in a core's cache."""


def make_augmentation(noise: NoiseConfig, resolution: int) -> Operation:
    """The policy of the noise, or its kind of RandAugment, for images of `resolution` px."""
    layers, magnitude = noise.randaugment_layers, noise.randaugment_magnitude
    if noise.policy is not None:
        return AugmentPolicy(noise.policy, resolution)
    if noise.randaugment == "timm" and layers:
        return AugmentPolicy(f"rand-m{magnitude:g}-n{layers}", resolution)
    kind = ReferenceRandAugment if noise.randaugment == "reference" else RandAugment
    translate_px, cutout_px = noise.randaugment_translate_px, noise.randaugment_cutout_px
    return kind(layers, magnitude, resolution, translate_px=translate_px, cutout_px=cutout_px)


class TrainTransform:
    """Input noise. Photographs: crop, flip, RandAugment, cutout. Small images: RandAugment, cutout, flip, pad and crop. Then random
    erasing. `mixer` mixes finished images, if the noise says so."""

    def __init__(self, noise: NoiseConfig, resolution: int, crop: Crop, interpolation: Interpolation = "bicubic") -> None:
        self.resolution = resolution
        """Sides of the result, px."""
        self._noise = noise
        self._crop = crop
        self._interpolation: Interpolation = interpolation
        self._pad = max(1, resolution // 8) if noise.pad_px is None else noise.pad_px
        self._augment = make_augmentation(noise, resolution)
        self.mixer = PairMixer(noise.mixup, noise.cutmix) if noise.mixes_images else None

    @property
    def allows_scaled_decode(self) -> bool:
        """Whether a JPEG may be decoded at a smaller scale."""
        return self._crop == "resized"

    def __call__(self, image: EncodedJpeg | npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        """A JPEG or uint8 [H, W, 3] → uint8 [resolution, resolution, 3]. All randomness comes from `rng`."""
        noise, size = self._noise, self.resolution
        if self._crop == "resized":
            box = draw_crop_box(_measure_size(image), rng, noise.crop_area, noise.crop_aspect)
            pixels = self._flip_image(crop_image(image, box, size, self._interpolation), rng)
        else:
            pixels = resize_image(image, size, self._interpolation)
        pixels = self._augment(pixels, rng)
        if noise.cutout_px:
            pixels = apply_cutout(pixels, noise.cutout_px // 2, rng)
        if self._crop != "resized":
            pixels = self._flip_image(pixels, rng)
        if self._crop == "pad":
            pixels = pad_and_crop(pixels, self._pad, rng)
        if noise.erasing and rng.random() < noise.erasing:
            pixels = erase_rectangle(pixels, rng)
        return np.ascontiguousarray(pixels)

    def _flip_image(self, image: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        if self._noise.flip and rng.random() < 0.5:
            # np.ascontiguousarray would take ten times as long. torch warns of arrays that cannot be written to.
            flipped: npt.NDArray[np.uint8] = torch.from_numpy(np.require(image, requirements="W")).flip(1).numpy()
            return flipped
        return image


class EvalTransform:
    """The deterministic transform of evaluation and labeling.

    For `crop` "resized", it is a centered square, resolution / (resolution + margin_px) of the short side (224 of 256), cut as `test_crop`
    says; otherwise the whole image. With `whole`, the result has the same scale and shows the margin too, so it is larger by `margin_px`.
    """

    def __init__(
        self,
        resolution: int,
        crop: Crop,
        margin_px: int,
        *,
        whole: bool = False,
        test_crop: TestCrop = "paper",
        interpolation: Interpolation = "bicubic",
    ) -> None:
        self._resolution = resolution + margin_px * whole
        self._crop = crop
        self._margin_px = 0 if whole else margin_px
        self._test_crop = test_crop
        self._interpolation: Interpolation = interpolation
        self.shows_all = crop != "resized" or (test_crop == "squash" and self._margin_px == 0)
        """Whether it only resizes."""

    @classmethod
    def for_model(
        cls, model: ModelConfig, *, resolution: int | None = None, margin_px: int | None = None, whole: bool = False
    ) -> Self:
        """The transform of a model: at its test resolution and with its margin, if no others are given."""
        return cls(
            resolution or model.inference_resolution,
            model.crop,
            model.test_margin_px if margin_px is None else margin_px,
            whole=whole,
            test_crop=model.test_crop,
            interpolation=model.interpolation,
        )

    def __call__(self, image: EncodedJpeg | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A JPEG or uint8 [H, W, 3] → uint8 [resolution, resolution, 3]."""
        size = self._resolution
        if self.shows_all:
            return resize_image(image, size, self._interpolation)
        if self._test_crop == "paper":
            box = compute_center_box(_measure_size(image), size, self._margin_px)
            return crop_image(image, box, size, self._interpolation)
        # Decoded whole: at a smaller scale, values would differ from timm's by a few of 255.
        pixels = image.decode_whole() if isinstance(image, EncodedJpeg) else image
        return self._cut_resized(pixels)

    def _cut_resized(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resizes, then cuts, with the rounding of torchvision's Resize and CenterCrop, which timm uses."""
        scaled = self._resolution + self._margin_px
        rows = columns = scaled
        if self._test_crop == "center":
            pixels = _cut_elongated_image(pixels)
            height, width = pixels.shape[:2]
            short = min(height, width)
            rows, columns = int(scaled * height / short), int(scaled * width / short)
        resized = _resize_images(np.stack([pixels]), (rows, columns), self._interpolation)[0]
        top, left = round((rows - self._resolution) / 2), round((columns - self._resolution) / 2)
        return np.ascontiguousarray(resized[top : top + self._resolution, left : left + self._resolution])

    def transform_batch(
        self, images: Sequence[EncodedJpeg | bytes | npt.NDArray[np.uint8]], out: npt.NDArray[np.uint8]
    ) -> dict[int, str]:
        """Decodes and transforms images into `out`, uint8 [≥ N, resolution, resolution, 3] from `allocate_images`.

        Returns row → reason for unreadable images; they become black.
        """
        errors: dict[int, str] = {}
        whole = self.shows_all
        waiting: dict[tuple[int, ...], _Resizer] = {}
        # All but decoding may take about a microsecond per image, so calls are avoided here.
        for row, (image, row_pixels) in enumerate(zip(images, out, strict=False)):
            try:
                # A whole JPEG is decoded to where it is wanted: for small images, allocating and copying take a third of the time.
                jpeg = image if whole and isinstance(image, EncodedJpeg) else None
                pixels = row_pixels if jpeg else self._read_pixels(image)
                shape = (jpeg[2], jpeg[1], 3) if jpeg else pixels.shape
                resizer = None
                target = row_pixels
                if shape != row_pixels.shape:
                    resizer = waiting.get(shape) or waiting.setdefault(shape, _Resizer(shape, out, self._interpolation))
                    target = resizer.pixels[len(resizer.rows)]
                if jpeg:
                    decode_into(jpeg[0], target)
                else:
                    target[:] = pixels
            except DataError as error:
                row_pixels[:] = 0
                errors[row] = str(error)
                continue
            if resizer:
                resizer.rows.append(row)
                if len(resizer.rows) == len(resizer.pixels):
                    del waiting[shape]
                    resizer.write_rows()
        for resizer in waiting.values():
            resizer.write_rows()
        return errors

    def resize_batch(self, images: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8], threads: ThreadPoolExecutor) -> None:
        """Transforms images of one size, uint8 [N, H, W, 3], into `out`, if this transform shows whole images."""
        step = max(1, RESIZED_BYTES // images[0].nbytes)

        def resize_part(start: int) -> None:
            part = images[start : start + step]
            is_resized = part.shape[1:] != out.shape[1:]
            out[start : start + step] = _resize_images(part, out.shape[1:3], self._interpolation) if is_resized else part

        for _ in threads.map(resize_part, range(0, len(images), step)):
            pass

    def _read_pixels(self, image: EncodedJpeg | bytes | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The image, uint8 [H, W, 3]: whole, or transformed."""
        if isinstance(image, EncodedJpeg):
            return self(image)
        pixels = decode_image(image) if isinstance(image, bytes) else image
        return pixels if self.shows_all else self(pixels)


class _Resizer:
    """Resizes images of the same size together. They wait in `pixels`, uint8 [most, H, W, 3], and their rows in `out` in `rows`."""

    def __init__(self, shape: tuple[int, ...], out: npt.NDArray[np.uint8], interpolation: Interpolation) -> None:
        self.pixels = np.empty((max(1, RESIZED_BYTES // math.prod(shape)), *shape), np.uint8)
        self.rows: list[int] = []
        self._out = out
        self._interpolation: Interpolation = interpolation

    def write_rows(self) -> None:
        """Resizes the images that wait, if any, into their rows."""
        if self.rows:
            size = (self._out.shape[1], self._out.shape[1])
            self._out[self.rows] = _resize_images(self.pixels[: len(self.rows)], size, self._interpolation)


def _resize_images(images: npt.NDArray[np.uint8], size: tuple[int, int], interpolation: Interpolation) -> npt.NDArray[np.uint8]:
    """Resizes whole images, uint8 [N, H, W, 3], to uint8 [N, *size, 3]. Images do not influence each other.

    torch's filters are Pillow's, in a fifth of its time: half a percent of the values differ, by 1 or 2.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    resized: npt.NDArray[np.uint8] = (
        F.interpolate(pixels, size=size, mode=interpolation, antialias=True).permute(0, 2, 3, 1).numpy()
    )
    return resized


def resize_image(
    image: EncodedJpeg | npt.NDArray[np.uint8], size: int, interpolation: Interpolation = "bicubic"
) -> npt.NDArray[np.uint8]:
    """The whole image, resized to uint8 [size, size, 3]; an array of that size is returned itself."""
    pixels = image.decode_whole() if isinstance(image, EncodedJpeg) else image
    return pixels if pixels.shape[:2] == (size, size) else _resize_images(np.stack([pixels]), (size, size), interpolation)[0]


def crop_image(
    image: EncodedJpeg | npt.NDArray[np.uint8], box: Box, size: int, interpolation: Interpolation = "bicubic"
) -> npt.NDArray[np.uint8]:
    """A part of the image, resized to uint8 [size, size, 3]. Pixels outside of it have no influence, as in Pillow's crop and resize."""
    pixels, (left, upper, right, lower) = image.decode_box(box, size) if isinstance(image, EncodedJpeg) else (image, box)
    x, y = math.floor(left), math.floor(upper)
    part = pixels[y : math.ceil(lower), x : math.ceil(right)]
    if part.shape[:2] == (lower - upper, right - left):
        return resize_image(part, size, interpolation)
    # In a JPEG that was decoded at a smaller scale, a box may begin within a pixel: torch cannot do that.
    inner = (left - x, upper - y, right - x, lower - y)
    picture = Image.fromarray(part).resize((size, size), Image.Resampling[interpolation.upper()], box=inner)
    return np.asarray(picture)


def _cut_elongated_image(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The middle of an image, uint8 [H, W, 3], of at most MAX_ELONGATION short sides."""
    longest = MAX_ELONGATION * min(pixels.shape[:2])
    top, left = (max(0, side - longest) // 2 for side in pixels.shape[:2])
    return pixels[top : top + longest, left : left + longest]


def _measure_size(image: EncodedJpeg | npt.NDArray[np.uint8]) -> tuple[int, int]:
    return (image.width, image.height) if isinstance(image, EncodedJpeg) else (image.shape[1], image.shape[0])


def draw_crop_box(
    size: tuple[int, int], rng: np.random.Generator, areas: tuple[float, float], aspects: tuple[float, float]
) -> Box:
    """A random part of the image as (left, upper, right, lower), px.

    Its share of the image's area is uniform in `areas`, its aspect ratio log-uniform in `aspects`. After 10 draws that do not fit
    in the image, it is the largest centered square.
    """
    width, height = size
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*areas)
        aspect = math.exp(rng.uniform(math.log(aspects[0]), math.log(aspects[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    return compute_center_box(size, 1, 0)


def compute_center_box(size: tuple[int, int], resolution: int, margin_px: int) -> Box:
    """The centered square of side resolution / (resolution + margin_px) × short side, px."""
    width, height = size
    side = max(1, round(min(width, height) * resolution / (resolution + margin_px)))
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def pad_and_crop(image: npt.NDArray[np.uint8], pad: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Pads by `pad` reflected px and cuts a random window of the original size: a shift by up to `pad` px in each direction."""
    height, width = image.shape[:2]
    dy, dx = int(rng.random() * (2 * pad + 1)) - pad, int(rng.random() * (2 * pad + 1)) - pad
    # Indexing with reflected coordinates cuts the window without allocating the padded image.
    rows = _reflect_index(np.arange(dy, dy + height), height)
    columns = _reflect_index(np.arange(dx, dx + width), width)
    return image[rows[:, None], columns[None, :]]


def _reflect_index(index: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """…2 1 0 1 2 … n-2 n-1 n-2 …: the border itself is not repeated."""
    index = np.abs(index)
    return np.where(index >= size, 2 * (size - 1) - index, index)
