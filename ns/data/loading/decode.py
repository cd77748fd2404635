"""Decodes images to uint8 RGB: JPEGs by libjpeg-turbo, all other formats by Pillow."""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ns.core.errors import DataError

MAX_PIXELS = 178_956_970
"""Pillow's limit. A larger image is a decompression bomb, or should be cut into tiles."""

MAX_SCANS = 100
"""Scans of a JPEG. Progressive ones of usual programs have about ten; each scan costs as much time as a whole image, however few its
bytes."""

STRIP_PIXELS = 1 << 20
"""Pixels that are converted at a time: a conversion takes up to 24 bytes per pixel, beside the 8 of the image and the result."""

PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that Pillow may decode. It knows more, such as EPS, for which it runs a foreign program in Ghostscript."""

HEIC_BEGINNINGS = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"))
"""Bytes 4 to 12 of what phones take photographs in."""

JPEG_MAGIC = b"\xff\xd8\xff"
# Color spaces that libjpeg-turbo converts to RGB; CMYK needs Pillow's handling of inverted Adobe files.
PLAIN_COLORSPACES = ("Gray", "YCbCr", "RGB")
ORIENTATION = 0x0112
TIFF_BITS_PER_SAMPLE = 258
SCALED_FROM = 2
"""An image is decoded at a smaller scale if it is shrunk by at least this factor afterwards; below, it would lose quality and gain
no time."""

Box = tuple[float, float, float, float]
"""left, upper, right, lower, px."""

# EXIF orientation → transposition that brings the image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
APP1, START_OF_SCAN = b"\xe1", b"\xda"
START_OF_FRAME = b"\xc0", b"\xc1", b"\xc2"
"""Baseline, extended, progressive."""
UNREAD_DATA = "extraneous bytes before marker"
"""What libjpeg-turbo says of data that belong to rows beyond the stated height."""
EXIF_MAGIC = b"Exif\0\0"

# Pillow warns of odd metadata, and of bombs from half the limit on. The filter is permanent, because images are decoded in threads
# and warnings.catch_warnings, which would set it per image, is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


@cache
def _list_formats() -> list[str]:
    """PILLOW_FORMATS that this Pillow can read. Not at import: this loads all plugins of Pillow, which most stages never need."""
    Image.init()
    return [name for name in PILLOW_FORMATS if name in Image.OPEN]


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3], C-contiguous, upright (EXIF orientation applied).

    Gray is repeated over the channels, integers of more than 8 bits are scaled to 8, transparency is laid over white, and of an
    animation only the first frame is decoded. Thread-safe; libjpeg-turbo and Pillow release the interpreter lock. Raises DataError with the
    reason: empty file, not an image, truncated, damaged, decompression bomb, more than `max_pixels`; of these, before it decodes any.
    """
    if not data:
        raise DataError("empty file")
    # Inside a scan no other byte than 0 or a restart follows ff.
    if data.startswith(JPEG_MAGIC) and (scans := data.count(b"\xff" + START_OF_SCAN)) > MAX_SCANS:
        raise DataError(f"decompression bomb: {scans:,} scans, more than {MAX_SCANS}")
    size = read_jpeg_size(data)
    if not any(size):
        return _decode_pillow(data, max_pixels)
    _check_size(size, max_pixels)
    return _decode_turbo(data)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DataError(f"{width:,} × {height:,} px: more than {max_pixels / 1e6:g} megapixels")


class EncodedJpeg(NamedTuple):
    """A JPEG whose size `read_jpeg_size` has read. It is decoded later, when the required size is known."""

    data: bytes | memoryview
    width: int
    height: int

    def decode_whole(self) -> npt.NDArray[np.uint8]:
        """The same as `decode_image`."""
        return _decode_turbo(self.data)

    def decode_box(self, box: Box, size: int) -> tuple[npt.NDArray[np.uint8], Box]:
        """Pixels, uint8 [H, W, 3], and the position of `box` in them, for a result with sides of `size` px.

        If the box is at least twice as large, the JPEG is decoded at 1/2, 3/8, 1/4 or 1/8: libjpeg-turbo then skips most of the work.
        Between 1/2 and 1 it would take longer than for the whole (500 x 375 px: 1.5 times as long at 7/8, 1.1 at 5/8); then, rows below
        the box are left out.
        """
        shrink = min((box[2] - box[0]) / size, (box[3] - box[1]) / size)
        if shrink < SCALED_FROM:
            return _decode_upper_rows(self, math.ceil(box[3])), box
        pixels = _decode_turbo(self.data, math.ceil(self.width / shrink), math.ceil(self.height / shrink))
        # The last pixel may lie half outside, so the scale is not the ratio of the sizes.
        scale = round(8 * max(pixels.shape[:2]) / max(self.width, self.height)) / 8
        return pixels, (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)


def decode_into(data: bytes | memoryview, out: npt.NDArray[np.uint8]) -> None:
    """Decodes a JPEG whose size `read_jpeg_size` has read into `out`, C-contiguous uint8 [height, width, 3].

    For small images, allocating an array costs as much as decoding.
    """
    try:
        simplejpeg.decode_jpeg(data, "RGB", False, False, 0, 0, 1, out)
    except ValueError:
        out[:] = _decode_pillow(bytes(data))


def allocate_images(
    count: int, size: int, allocate: Callable[[int], npt.NDArray[np.uint8]] | None = None
) -> npt.NDArray[np.uint8]:
    """uint8 [count, size, size, 3], of any content, to decode images into. `allocate`: number of bytes → other memory.

    It does not start at a multiple of 32 bytes: libjpeg-turbo writes rows that start there past the cache. For small images,
    which are read again at once, that takes longer than decoding (32 px: 12.8 instead of 7.9 µs).
    """
    length = count * size * size * 3
    memory = allocate(length + 32) if allocate else np.empty(length + 32, np.uint8)
    start = (16 - memory.ctypes.data) % 32
    return memory[start : start + length].reshape(count, size, size, 3)


def read_jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height, px, of a JPEG that libjpeg-turbo alone decodes; (0, 0) for all other and for damaged images."""
    if data.startswith(JPEG_MAGIC):
        # KeyError: simplejpeg knows no name for chroma of 4:4:1.
        with suppress(ValueError, KeyError):
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            if height * width <= MAX_PIXELS and colors in PLAIN_COLORSPACES and _is_upright(data):
                return width, height
    return 0, 0


def _decode_turbo(data: bytes | memoryview, width: int = 0, height: int = 0) -> npt.NDArray[np.uint8]:
    """With a width and height, decodes at the smallest of the scales of `decode_box` that is at least as large."""
    try:
        image: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", False, False, height, width, SCALED_FROM)
        return image
    except ValueError:
        # Pillow may still decode it, or give a better reason.
        return _decode_pillow(bytes(data))


def _decode_upper_rows(jpeg: EncodedJpeg, rows: int) -> npt.NDArray[np.uint8]:
    """uint8 [at least `rows`, W, 3], the upper rows of the whole image to the bit.

    A copy of the file that states a smaller height is decoded: what follows is skipped, which takes a twentieth of the time. libjpeg-turbo
    could also leave out rows above, but simplejpeg does not let it.
    """
    # Chroma of the last row would be that of the row below.
    height = rows + 2
    at = next((at for marker, at in _iterate_segments(jpeg.data) if marker in START_OF_FRAME), None)
    if at is None or height >= jpeg.height:
        return jpeg.decode_whole()
    shortened = bytearray(jpeg.data)
    shortened[at + 5 : at + 7] = height.to_bytes(2)
    pixels = np.empty((height, jpeg.width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(shortened, "RGB", False, False, 0, 0, 1, pixels)
    except ValueError as error:
        # libjpeg-turbo names the first fault only, so there is no other.
        if UNREAD_DATA not in str(error):
            return jpeg.decode_whole()
    return pixels


def _is_upright(jpeg: bytes) -> bool:
    block = _find_exif(jpeg)
    return block is None or _read_turn(partial(_parse_exif, block)) is None


def _find_exif(jpeg: bytes) -> bytes | None:
    """Follows the segments: parsing them with Pillow would double the time."""
    for marker, at in _iterate_segments(jpeg):
        if marker == APP1 and jpeg[at + 4 : at + 10] == EXIF_MAGIC:
            return jpeg[at + 4 : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])]
    return None


def _iterate_segments(jpeg: bytes | memoryview) -> Iterator[tuple[bytes, int]]:
    """Marker and start of each segment before the pixels."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and (marker := bytes(jpeg[at + 1 : at + 2])) != START_OF_SCAN:
        if marker == b"\xff":
            # Any number of fill bytes may stand before a marker.
            at += 1
            continue
        yield marker, at
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])


def _parse_exif(block: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(block)
    return exif


def _read_turn(read_exif: Callable[[], Image.Exif]) -> Image.Transpose | None:
    """The transposition that brings the image upright; None if EXIF is damaged, as the pixels may still be intact."""
    try:
        return TURNS.get(read_exif().get(ORIENTATION, 1))
    except Exception:
        return None


def _decode_pillow(data: bytes, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=_list_formats()) as image:
            _check_size(image.size, max_pixels)
            return _convert_rgb(image)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"decompression bomb: more than {MAX_PIXELS:,} px") from error
    except UnidentifiedImageError as error:
        if data[4:12] in HEIC_BEGINNINGS:
            raise DataError("HEIC, which is not read: convert it to JPEG") from error
        raise DataError("not an image, or of an unknown format") from error
    except (OSError, SyntaxError) as error:
        reason = str(error)
        raise DataError("truncated" if "truncated" in reason.lower() else f"damaged: {reason}") from error
    except Exception as error:
        # Garbage makes Pillow's parsers raise struct.error, ValueError, zlib.error and more.
        raise DataError(f"damaged: {type(error).__name__}: {error}") from error


def _convert_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    image.load()
    stated_bits = _read_stated_bits(image)
    turn = _read_turn(image.getexif)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise DataError("floating-point image: its range is not known; convert it to 8 or 16 bits")
    convert = _convert_strip
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow's own conversion clips at 255.
        bounds = [(strip.min(), strip.max()) for _, part in _cut_strips(image) for strip in (np.asarray(part),)]
        smallest, largest = min(int(low) for low, _ in bounds), max(int(high) for _, high in bounds)
        convert = partial(_scale_integers, top=_find_top(smallest, largest, stated_bits))
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _cut_strips(image):
        pixels[top : top + strip.height] = convert(strip)
    return pixels


def _cut_strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The first row of each strip, and the strip."""
    rows = max(1, STRIP_PIXELS // max(1, image.width))
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _convert_strip(strip: Image.Image) -> npt.NDArray[np.uint8]:
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        strip = Image.alpha_composite(white, strip)
    return np.asarray(strip.convert("RGB"))


def _find_top(smallest: int, largest: int, stated_bits: int) -> int:
    """The value of white, of integers of 8, 12 or 16 bits: the fewest that hold the largest value, and at least as many as the file
    states.

    Cameras and instruments keep 12 bits in files of 16, and programs keep 8 in 32: scaled as 16 bits, they would be nearly black.
    """
    bits = next((bits for bits in (8, 12, 16) if largest >> bits == 0 and bits >= stated_bits), None)
    if bits is None or smallest < 0:
        raise DataError(f"integers from {smallest} to {largest}: their range is not known; convert it to 8 or 16 bits")
    return (1 << bits) - 1


def _scale_integers(strip: Image.Image, *, top: int) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 1], from integers of which `top` is white."""
    values = np.asarray(strip).astype(np.int64)
    return ((values * 255 + top // 2) // top).astype(np.uint8)[:, :, None]


def _read_stated_bits(image: Image.Image) -> int:
    """Bits per sample of a TIFF of 12 bits, which Pillow unpacks to 16; 0 for all other images, whose files have room for more."""
    bits = getattr(image, "tag_v2", {}).get(TIFF_BITS_PER_SAMPLE, (0,))
    return 12 if bits == (12,) else 0
