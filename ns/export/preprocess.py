"""Reads image files as the model beside this file was trained to see them. Needs numpy and Pillow only.

    load_pixels(path)    uint8 [R, R, 3], what model.onnx and model.pt2 take
    load_input(path)     float32 [1, 3, R, R], normalized, what timm's network takes

R, the crop and the normalization are in export.json, beside this file.
"""

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

MAX_ELONGATION = 16
"""Long side in short sides, of what is resized before its center is cut."""


def load_pixels(path: str | Path) -> npt.NDArray[np.uint8]:
    """uint8 [R, R, 3]: upright (EXIF orientation applied), transparency laid over white, integers of 16 bits scaled to 8; cropped and
    resized as in the model's evaluation."""
    about = _read_export()
    size: int = about["resolution"]
    # From memory: of a file, Pillow forgets the orientation once the pixels are read.
    with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
        picture = _convert_picture(image)
    resampling, scaled = Image.Resampling[about["interpolation"].upper()], size + about["test_margin_px"]
    if about["crop"] == "resized" and about["test_crop"] != "paper":
        # As timm: resized, then cut.
        width = height = scaled
        if about["test_crop"] == "center":
            short = min(picture.size)
            # Only the center is seen: of 1 × 60,000 px, the whole would take gigabytes.
            longest = MAX_ELONGATION * short
            left, upper = (max(0, side - longest) // 2 for side in picture.size)
            picture = picture.crop((left, upper, min(picture.width, left + longest), min(picture.height, upper + longest)))
            width, height = int(scaled * picture.width / short), int(scaled * picture.height / short)
        left, upper = round((width - size) / 2), round((height - size) / 2)
        return np.array(_resize(picture, width, height, resampling).crop((left, upper, left + size, upper + size)))
    if about["crop"] == "resized":
        side = max(1, round(min(picture.size) * size / scaled))
        left, upper = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, upper, left + side, upper + side))
    return np.array(_resize(picture, size, size, resampling))


def _resize(picture: Image.Image, width: int, height: int, resampling: Image.Resampling) -> Image.Image:
    # Across first: by itself, Pillow 13 begins with the height of tall images, and Pillow 12 does not.
    return picture.resize((width, picture.height), resampling).resize((width, height), resampling)


def load_input(path: str | Path) -> npt.NDArray[np.float32]:
    """float32 [1, 3, R, R]: `load_pixels`, in 0–1, minus the mean, divided by the standard deviation, per channel."""
    about = _read_export()
    normalized = (load_pixels(path) / 255 - np.array(about["mean"])) / np.array(about["std"])
    return np.ascontiguousarray(normalized.transpose(2, 0, 1)[None], np.float32)


def _read_export() -> Any:
    return json.loads(Path(__file__).with_name("export.json").read_text(encoding="utf-8"))


def _convert_picture(image: Image.Image) -> Image.Image:
    """RGB, of any size."""
    image.load()
    stated_bits = 12 if getattr(image, "tag_v2", {}).get(258) == (12,) else 0
    with suppress(Exception):  # EXIF may be damaged
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow's own conversion clips at 255. The fewest bits that hold the largest value are taken.
        values = np.asarray(image).astype(np.int64)
        bits = next((bits for bits in (8, 12, 16) if values.max() >> bits == 0 and bits >= stated_bits), None)
        if bits is None or values.min() < 0:
            raise ValueError("integers of unknown range: convert the image to 8 or 16 bits")
        top = (1 << bits) - 1
        return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point image of unknown range: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")
