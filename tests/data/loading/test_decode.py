import contextlib
import io
import struct
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ns.core.errors import DataError
from ns.data.loading import decode as module
from ns.data.loading.decode import EncodedJpeg, decode_image, read_jpeg_size

# pytest puts aside the filter that decode sets.
pytestmark = pytest.mark.filterwarnings("ignore")

RNG = np.random.default_rng(0)
SMOOTH = np.stack([np.add.outer(np.arange(40), np.arange(60)) * k for k in (1, 2, 1)], 2).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def test_decode_keeps_lossless_formats_exactly():
    pixels = RNG.integers(0, 256, (9, 13, 3), np.uint8)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})):
        assert np.array_equal(decode_image(encoded(Image.fromarray(pixels), kind, **options)), pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decode_of_color_spaces_equals_pillow(mode):
    data = encoded(Image.fromarray(SMOOTH).convert(mode), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 2


def test_decode_repeats_gray_over_channels():
    gray = RNG.integers(0, 256, (5, 4), np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(gray), "PNG")), np.repeat(gray[:, :, None], 3, 2))


def test_decode_scales_sixteen_bits():
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    assert decode_image(encoded(Image.fromarray(values), "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_decode_scales_integers_by_the_bits_that_they_take(kind, bits, dtype):
    top = (1 << bits) - 1
    values = np.linspace(0, top, 256).round().astype(dtype).reshape(16, 16)
    if dtype == np.int32:
        kind = "TIFF"
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    decoded = decode_image(encoded(Image.fromarray(values), kind, **options))[:, :, 0]
    assert np.array_equal(decoded.ravel(), (values.astype(float) * 255 / top).round().ravel())


def test_decode_scales_twelve_bits_as_the_file_states():
    def pack(first, second):
        return bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])

    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 110), (277, 1), (278, 1)]
    header = (
        b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    )
    dark = (header + struct.pack("<I", 0)).ljust(110, b"\0") + pack(0, 160)
    assert decode_image(dark)[0, :, 0].tolist() == [0, 10]


@pytest.mark.parametrize("values", [[0, 1 << 16], [-1, 5]])
def test_decode_refuses_integers_of_unknown_range(values):
    with pytest.raises(
        DataError, match=rf"integers from {values[0]} to {values[1]}: their range is not known; convert it to 8 or 16"
    ):
        decode_image(encoded(Image.fromarray(np.array([values], np.int32)), "TIFF"))


def test_decode_reads_chroma_that_turbo_has_no_name_for():
    data = bytearray(simplejpeg.encode_jpeg(RNG.integers(0, 256, (32, 32, 3), np.uint8), colorsubsampling="411"))
    # As many blocks, but 1 × 4 instead of 4 × 1 of luminance for one of chroma.
    data[data.index(b"\xff\xc0") + 11] = 0x14
    with Image.open(io.BytesIO(data)) as image:
        assert image.layer[0][1:3] == (1, 4)
        assert np.array_equal(decode_image(bytes(data)), np.asarray(image.convert("RGB")))
    assert read_jpeg_size(bytes(data)) == (0, 0)


@pytest.mark.parametrize("fill", [1, 2, 300])
def test_decode_finds_orientation_behind_fill_bytes(fill):
    exif = Image.Exif()
    exif[module.ORIENTATION] = 6
    data = encoded(Image.fromarray(SMOOTH), "JPEG", exif=exif)
    at = data.index(b"\xff\xe1")
    filled = data[:at] + b"\xff" * fill + data[at:]
    assert read_jpeg_size(filled) == (0, 0)
    assert np.array_equal(decode_image(filled), decode_image(data))


def test_decode_lays_transparency_over_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    assert decode_image(encoded(image, "PNG"))[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_decode_applies_palettes():
    image = Image.new("P", (1, 1), 3)
    image.putpalette([0] * 9 + [10, 20, 30])
    assert decode_image(encoded(image, "PNG"))[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode_applies_exif_orientation(orientation, kind):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[module.ORIENTATION] = orientation
    data = encoded(Image.fromarray(SMOOTH), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    got = decode_image(data).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 2


def test_decode_takes_first_frame_of_animation():
    frames = [Image.new("RGB", (3, 3), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data)[0, 0].tolist() == [255, 0, 0]


PHOTO = encoded(Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8)), "JPEG")
PICTURE = encoded(Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8)), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello world", "not an image"),
        (PHOTO[: len(PHOTO) // 2], "truncated"),
        (PICTURE[: len(PICTURE) // 2], "truncated"),
        (PHOTO[:30], "damaged|truncated|not an image"),
    ],
)
def test_decode_error_gives_reason(data, reason):
    with pytest.raises(DataError, match=reason):
        decode_image(data)


def test_decode_refuses_a_jpeg_of_very_many_scans():
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(sink, "JPEG", progressive=True)
    jpeg = sink.getvalue()
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    assert decode_image(jpeg[:-2] + 50 * last + b"\xff\xd9").shape == (64, 64, 3)
    with pytest.raises(DataError, match=r"decompression bomb: \d+ scans, more than 100"):
        decode_image(jpeg[:-2] + 200 * last + b"\xff\xd9")


def test_decode_refuses_bombs_by_header(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 2000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for data in (PHOTO, PICTURE, encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG")):
        with pytest.raises(DataError, match="decompression bomb"):
            decode_image(data)


def test_decode_limit_is_the_same_for_all_formats(monkeypatch):
    assert module.MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    # Pillow starts to warn at half of what it refuses; 2,400 px lie between.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert decode_image(PICTURE).shape == (40, 60, 3)


@pytest.mark.parametrize("orientation", [None, 1, 0, 9])
def test_upright_jpegs_are_decoded_by_turbo(orientation, monkeypatch):
    monkeypatch.setattr(module, "_decode_pillow", lambda data: pytest.fail("took the slow path"))
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    if orientation is not None:
        exif[module.ORIENTATION] = orientation
    assert decode_image(encoded(Image.fromarray(SMOOTH), "JPEG", exif=exif)).shape == SMOOTH.shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decode_ignores_damaged_exif(kind):
    data = encoded(Image.fromarray(SMOOTH), kind, exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    assert decode_image(data).shape == SMOOTH.shape


def test_decode_refuses_eps():
    # Pillow would start Ghostscript.
    with pytest.raises(DataError, match="not an image, or of an unknown format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1"])
def test_upper_rows_are_those_of_the_whole_image(sampling):
    pixels = np.concatenate([SMOOTH, RNG.integers(0, 256, (33, 60, 3), np.uint8)])
    images = [memoryview(simplejpeg.encode_jpeg(pixels, 90, colorsubsampling=sampling.replace(":", "")))]
    if sampling in ("4:4:4", "4:2:2", "4:2:0"):
        options = {"quality": 90, "subsampling": sampling, "restart_marker_rows": 1}
        images += [encoded(Image.fromarray(pixels), "JPEG", progressive=kind, **options) for kind in (False, True)]
    for image in images:
        jpeg = EncodedJpeg(image, 60, 73)
        whole = jpeg.decode_whole()
        for lower in (*range(1, 73, 5), 62, 63, 64, 70, 71, 72, 73):
            found, box = jpeg.decode_box((3, 0, 40, lower), 60)
            assert box == (3, 0, 40, lower)
            assert len(found) == min(lower + 2, 73)
            assert np.array_equal(found[:lower], whole[:lower]), lower


def test_damage_in_upper_rows_is_found():
    data = bytearray(encoded(Image.fromarray(RNG.integers(0, 256, (400, 60, 3), np.uint8)), "JPEG"))
    scan = data.index(b"\xff\xda")
    with pytest.raises(DataError, match="truncated"):
        EncodedJpeg(bytes(data[: scan + 500]), 60, 400).decode_box((0, 0, 60, 100), 60)
    data[scan + 200 : scan + 220] = b"\xff\xd0" * 10
    whole = decode_image(bytes(data))
    assert np.array_equal(EncodedJpeg(bytes(data), 60, 400).decode_box((0, 0, 60, 100), 60)[0][:100], whole[:100])


def test_decode_in_threads_keeps_warning_filters():
    before = list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(decode_image, [PICTURE] * 300))
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


def test_decode_applies_orientation_to_sixteen_bits():
    exif = Image.Exif()
    exif[module.ORIENTATION] = 6
    values = np.array([[0, 65535]], np.uint16)
    assert decode_image(encoded(Image.fromarray(values), "PNG", exif=exif))[:, :, 0].tolist() == [[0], [255]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"])
def test_decode_result_has_one_form_for_all_modes(mode):
    image = Image.new(mode, (7, 5))
    decoded = decode_image(encoded(image, "TIFF"))
    assert decoded.shape == (5, 7, 3)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous


def test_decode_blends_half_transparency():
    gray = Image.new("LA", (1, 1), (0, 128))
    assert decode_image(encoded(gray, "PNG"))[0, 0].tolist() == [127, 127, 127]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([200, 0, 0])
    assert decode_image(encoded(palette, "PNG", transparency=0))[0, 0].tolist() == [255, 255, 255]


def test_decode_of_cut_image_is_data_error_or_image():
    exif = Image.Exif()
    exif[module.ORIENTATION] = 3
    for whole in (encoded(Image.fromarray(SMOOTH), "JPEG", exif=exif), PICTURE[:700]):
        for length in range(0, len(whole), 3):
            with contextlib.suppress(DataError):
                assert decode_image(whole[:length]).ndim == 3


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_decode_of_damaged_image_is_data_error_or_image(kind, data):
    spoilt = bytearray(encoded(Image.fromarray(SMOOTH), kind))
    for place in data.draw(st.lists(st.integers(0, len(spoilt) - 1), min_size=1, max_size=4)):
        spoilt[place] = data.draw(st.integers(0, 255))
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(DataError):
        # A spoilt size may ask for half a gigabyte of pixels.
        patch.setattr(module, "MAX_PIXELS", 200_000)
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
        image = decode_image(bytes(spoilt))
        assert image.dtype == np.uint8
        assert image.ndim == 3


@given(st.binary(max_size=300), st.sampled_from([b"", PHOTO[:100], PICTURE[:60], b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 "]))
def test_decode_of_garbage_is_data_error_or_image(data, start):
    try:
        image = decode_image(start + data)
    except DataError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "L", "I;16"])
def test_conversion_in_strips_changes_no_pixel(mode, monkeypatch):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 4000, (40, 30)).astype(np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (40, 30, 4), dtype=np.uint8), "RGBA").convert(mode)
    data = encoded(image, "PNG")
    whole = decode_image(data)
    monkeypatch.setattr(module, "STRIP_PIXELS", 100)
    np.testing.assert_array_equal(decode_image(data), whole)


def test_decode_refuses_more_pixels_than_asked_for_before_it_decodes(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr(module, "_decode_turbo", lambda data: pytest.fail("decoded"))
    for data in (PHOTO, PICTURE):
        with pytest.raises(DataError, match=r"^[\d,]+ × [\d,]+ px: more than 0.001 megapixels$"):
            decode_image(data, 1000)


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P"])
def test_largest_image_takes_little_more_memory_than_its_pixels(mode):
    """Less than a megabyte of file. Measured in a process of its own, beside what an image of one pixel takes."""
    code = (
        "import io, resource, sys; from PIL import Image; from ns.data.loading.decode import decode_image\n"
        "side = int(sys.argv[2]); sink = io.BytesIO(); image = Image.new(sys.argv[1], (side, side))\n"
        "image.save(sink, 'PNG', **({'transparency': 0} if sys.argv[1] == 'P' else {})); del image; decode_image(sink.getvalue())\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, mode, side], capture_output=True, text=True, check=True).stdout)
        for side in ("1", "6000")
    ]
    assert (peaks[1] - peaks[0]) * 1024 / 6000**2 < 12, "bytes per pixel"
