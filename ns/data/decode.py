"""Encoded image → uint8 RGB. libjpeg-turbo for JPEGs, Pillow for the rest."""

import io
import warnings

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from ns.errors import DataError

MAX_PIXELS = 178_956_970
"""Pillow's own limit: a larger image is a decompression bomb, or belongs cut up."""

JPEG = b"\xff\xd8\xff"
# Colour spaces that libjpeg-turbo turns into RGB by itself; CMYK needs Pillow's inverted-Adobe handling.
PLAIN = ("Gray", "YCbCr", "RGB")
ORIENTATION = 0x0112


def decode(data: bytes) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3], C-contiguous, upright (EXIF orientation applied).

    Greyscale is repeated over the channels, 16 bits are scaled to 8, transparency is laid over white, and of an animation
    the first frame is taken. Raises DataError with the reason: empty, not an image, truncated, decompression bomb.
    """
    if not data:
        raise DataError("empty file")
    if data.startswith(JPEG):
        image = _jpeg(data)
        if image is not None:
            return image
    return _pillow(data)


def _jpeg(data: bytes) -> npt.NDArray[np.uint8] | None:
    """The fast path; None for what it leaves to Pillow: rotated, CMYK, and damaged images."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        # Only an upright image may skip Pillow, and most JPEGs have no EXIF block at all.
        if colours not in PLAIN or b"Exif\0\0" in data[:65536]:
            return None
        if height * width > MAX_PIXELS:
            raise DataError(f"decompression bomb: {width} x {height} px")
        image: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
        return image
    except ValueError:
        return None


def _pillow(data: bytes) -> npt.NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its limit; a warning in a worker is lost.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            with Image.open(io.BytesIO(data)) as image:
                return np.ascontiguousarray(_rgb(image))
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError("not an image, or of an unknown format") from error
    except (OSError, SyntaxError) as error:
        reason = str(error)
        raise DataError("truncated" if "truncated" in reason else f"damaged: {reason}") from error
    except Exception as error:
        # Pillow's parsers raise whatever the garbage leads them to: struct.error, ValueError, zlib.error, …
        raise DataError(f"damaged: {type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow's own conversion clips at 255.
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        grey = (values * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise DataError("floating-point image: its range is not known; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))
