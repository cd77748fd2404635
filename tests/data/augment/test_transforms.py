"""RandAugment against the paper's table, and the geometry of crops."""

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageEnhance, ImageOps

from ns.config.schema import NoiseConfig
from ns.data.augment import transforms
from ns.data.augment.randaugment import GRAY, RandAugment, equalize_channels, stretch_contrast
from ns.data.augment.transforms import (
    EvalTransform,
    TrainTransform,
    compute_center_box,
    crop_image,
    draw_crop_box,
    pad_and_crop,
    resize_image,
)
from ns.data.loading.decode import EncodedJpeg, allocate_images, decode_image

resize_whole = transforms._resize_images

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
IMAGE = Image.fromarray(PIXELS)


def make_photograph(width: int, height: int, seed: int) -> np.ndarray:
    """Slopes, edges and grain, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    edges = (np.indices((height, width)).sum(0) // 9 % 2 * 60)[:, :, None]
    return (np.asarray(coarse) // 2 + edges + rng.normal(30, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)


class Signed:
    """A generator whose draws are all one value: below a half is the positive sign."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def apply(name: str, magnitude: float, draw: float = 0.0, size: int = 224) -> np.ndarray:
    augment = RandAugment(2, magnitude, size)
    return augment.operations[name](PIXELS, Signed(draw)).astype(int)


def test_randaugment_draws_sixteen_operations_evenly():
    augment = RandAugment(2, 5, 32)
    assert len(augment.operations) == 16
    drawn = Counter()
    augment._drawn = [lambda image, _, name=name: (drawn.update([name]), image)[1] for name in augment.operations]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        augment(PIXELS, rng)
    assert sum(drawn.values()) == 4000
    assert set(drawn) == set(augment.operations)
    assert max(drawn.values()) < 1.35 * min(drawn.values())


@pytest.mark.parametrize(
    ("magnitude", "arguments"),
    [
        # arXiv:1911.04252 §3.1; the last three of M = 27 are clamped from 10 bits, 691 and 297.
        (5, {"translate_px": 50, "cutout_half_px": 20, "posterize_bits": 2, "solarize_threshold": 128, "solarize_add": 55}),
        (27, {"translate_px": 270, "cutout_half_px": 108, "posterize_bits": 8, "solarize_threshold": 256, "solarize_add": 255}),
    ],
)
def test_randaugment_arguments_follow_paper(magnitude, arguments):
    augment = RandAugment(2, magnitude, 224)
    assert {name: getattr(augment, name) for name in arguments} == pytest.approx(arguments)
    assert augment.enhance_factor == pytest.approx({5: 1.0, 27: 4.96}[magnitude])


def test_randaugment_constants_of_small_images():
    augment = RandAugment(2, 5, 32)
    assert augment.translate_px == 2
    assert augment.cutout_half_px == 2


def test_randaugment_constants_can_be_set():
    augment = RandAugment(2, 5, 224, translate_px=60, cutout_px=20)
    assert (augment.translate_px, augment.cutout_half_px) == (30, 10)
    assert set(augment.operations) - set(RandAugment(2, 5, 224, cutout_px=0).operations) == {"cutout"}


def test_enhancements_change_nothing_at_magnitude_5():
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert np.abs(apply(name, 5) - PIXELS).max() <= 1


@pytest.mark.parametrize("magnitude", [5, 27])
def test_enhancements_blend_with_their_degenerate_image(magnitude):
    factor = 1.8 * magnitude / 10 + 0.1
    gray = np.asarray(IMAGE.convert("L")).astype(float)
    for name, degenerate in {
        "brightness": np.zeros((32, 32, 3)),
        "color": np.repeat(gray[:, :, None], 3, 2),
        "contrast": np.full((32, 32, 3), int(gray.mean() + 0.5)),
    }.items():
        expected = np.clip(degenerate + factor * (PIXELS - degenerate), 0, 255)
        assert np.abs(apply(name, magnitude) - expected).max() <= 1, name


def test_pointwise_operations_follow_their_definition():
    assert np.array_equal(apply("invert", 5), 255 - PIXELS.astype(int))
    assert np.array_equal(apply("posterize", 5), PIXELS & 0b11000000)
    assert np.array_equal(apply("posterize", 27), PIXELS)
    assert np.array_equal(apply("solarize", 5), np.where(PIXELS < 128, PIXELS, 255 - PIXELS.astype(int)))
    assert np.array_equal(apply("solarize", 27), PIXELS)
    added = np.minimum(255, PIXELS.astype(int) + 55)
    assert np.array_equal(apply("solarize_add", 5), np.where(PIXELS < 128, added, PIXELS))
    assert np.array_equal(apply("solarize_add", 27), np.where(PIXELS < 128, 255, PIXELS))


@pytest.mark.parametrize("size", [32, 64, 65, 200])
@pytest.mark.parametrize("magnitude", [0, 3, 5, 9, 27, 30])
def test_pointwise_operations_equal_pillows_at_all_sizes(size, magnitude):
    image = Image.fromarray(np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8))
    augment = RandAugment(2, magnitude, size)
    for name, reference in {
        "invert": ImageOps.invert(image),
        "posterize": ImageOps.posterize(image, augment.posterize_bits),
        "solarize": ImageOps.solarize(image, augment.solarize_threshold),
    }.items():
        assert np.array_equal(augment.operations[name](np.asarray(image), Signed(0)), np.asarray(reference)), name


@pytest.mark.parametrize("shape", [(224, 224), (32, 32), (41, 65), (3, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("magnitude", [1, 5, 9, 18, 27])
def test_operations_are_pillows(shape, magnitude):
    pixels = make_photograph(*shape, 0)
    image, augment = Image.fromarray(pixels), RandAugment(2, magnitude, shape[0])
    factor, level = augment.enhance_factor, magnitude / 10
    for draw, sign in ((0.0, 1), (0.9, -1)):
        shear, shift = sign * 0.3 * level, sign * augment.translate_px
        matrices = {"shear_x": (1, shear, 0, 0, 1, 0), "shear_y": (1, 0, 0, shear, 1, 0)}
        matrices |= {"translate_x": (1, 0, shift, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, shift)}
        expected = {
            name: image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GRAY)
            for name, matrix in matrices.items()
        }
        expected["rotate"] = image.rotate(sign * 30 * level, fillcolor=GRAY)
        for name in ("Color", "Contrast", "Brightness", "Sharpness"):
            expected[name.lower()] = getattr(ImageEnhance, name)(image).enhance(factor)
        for name, picture in expected.items():
            found = augment.operations[name](pixels, Signed(draw))
            if name in ("color", "sharpness"):
                difference = np.abs(found.astype(int) - np.asarray(picture))
                assert difference.max() <= 1, name
                assert difference.mean() < 1e-3, name
            else:
                assert np.array_equal(found, np.asarray(picture)), name
    assert np.array_equal(pixels, make_photograph(*shape, 0)), "operations must not change their input"


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS // 4 + 90, np.full_like(PIXELS, 7)])
def test_autocontrast_stretches_each_channel(pixels):
    got = RandAugment(2, 5, 32).operations["auto_contrast"](pixels, Signed(0))
    for channel in range(3):
        values = pixels[..., channel].astype(float)
        low, high = values.min(), values.max()
        expected = (values - low) * 255 / (high - low) if high > low else values
        assert np.abs(got[..., channel] - expected).max() <= 1


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS // 4 + 90, np.full_like(PIXELS, 7)])
def test_equalize_maps_each_value_to_its_rank(pixels):
    got = RandAugment(2, 5, 32).operations["equalize"](pixels, Signed(0))
    for channel in range(3):
        values = pixels[..., channel]
        counts = np.bincount(values.ravel(), minlength=256)
        # TensorFlow's and Pillow's: the highest value's count is left out, and half a step rounds.
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        below = np.concatenate([[0], np.cumsum(counts)[:-1]])
        expected = np.minimum(255, (below + step // 2) // step)[values] if step else values
        assert np.array_equal(got[..., channel], expected)


@pytest.mark.parametrize("magnitude", [5, 9, 27])
def test_sharpness_blends_with_the_smoothed_image(magnitude):
    factor = 1.8 * magnitude / 10 + 0.1
    values = PIXELS.astype(float)
    smooth = values.copy()
    windows = np.lib.stride_tricks.sliding_window_view(values, (3, 3), axis=(0, 1))
    # The border is left as it is.
    smooth[1:-1, 1:-1] = np.floor((windows * np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13).sum((-2, -1)) + 0.5)
    expected = np.clip(smooth + factor * (values - smooth), 0, 255)
    assert np.abs(apply("sharpness", magnitude) - expected).max() <= 1


@pytest.mark.parametrize("magnitude", [5, 27])
@pytest.mark.parametrize(("draw", "sign"), [(0.0, 1), (0.9, -1)])
def test_shearing_shifts_each_line_by_its_share(magnitude, draw, sign):
    shear = sign * 0.3 * magnitude / 10
    expected = np.full_like(PIXELS, 128)
    for row in range(32):
        # A pixel comes from its place plus shear times its row, both counted at pixel centers.
        source = np.floor(np.arange(32) + 0.5 + shear * (row + 0.5)).astype(int)
        inside = (source >= 0) & (source < 32)
        expected[row, inside] = PIXELS[row, source[inside]]
    across = apply("shear_x", magnitude, draw)
    assert (across != expected).any(2).mean() < 0.01  # ties of rounding
    turned = np.ascontiguousarray(PIXELS.transpose(1, 0, 2))
    down = RandAugment(2, magnitude, 32).operations["shear_y"](turned, Signed(draw))
    assert np.array_equal(down.transpose(1, 0, 2), across)


def test_autocontrast_and_equalize_stretch_to_the_full_range():
    narrow = PIXELS // 4 + 90
    augment = RandAugment(2, 5, 32)
    for name in ("auto_contrast", "equalize"):
        values = augment.operations[name](narrow, Signed(0))
        assert values.min() == 0
        assert values.max() >= 254


@pytest.mark.parametrize(("draw", "sign"), [(0.0, 1), (0.9, -1)])
def test_translation_moves_by_its_pixels_and_fills_with_gray(draw, sign):
    moved = apply("translate_x", 5, draw, size=32)
    kept = moved[:, :-2] if sign > 0 else moved[:, 2:]
    assert np.array_equal(kept, PIXELS[:, 2:] if sign > 0 else PIXELS[:, :-2])
    fill = moved[:, -2:] if sign > 0 else moved[:, :2]
    assert np.array_equal(fill, np.broadcast_to(GRAY, fill.shape))
    down = apply("translate_y", 5, draw, size=32)
    assert np.array_equal(down, moved.transpose(1, 0, 2)) == np.array_equal(PIXELS, PIXELS.transpose(1, 0, 2))


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y"])
def test_geometric_operations_take_sign_from_draw(name):
    left, right = apply(name, 5, 0.0), apply(name, 5, 0.9)
    assert not np.array_equal(left, right)
    assert (left == 128).all(2).sum() > 5  # corners uncovered
    turned = RandAugment(2, 27, 224).operations[name](np.full((32, 32, 3), 7, np.uint8), Signed(0))
    assert set(np.unique(turned)) <= {7, 128}


def test_rotation_is_thirty_degrees_at_level_one():
    expected = np.asarray(IMAGE.rotate(15, Image.Resampling.NEAREST, fillcolor=GRAY))
    assert np.array_equal(apply("rotate", 5), expected)


def test_cutout_is_a_gray_square_cut_off_at_the_border():
    out = apply("cutout", 5, 0.5, size=32)
    changed = np.argwhere((out != PIXELS).any(2))
    assert changed.min(0).tolist() == [14, 14]
    assert changed.max(0).tolist() == [17, 17]
    assert np.array_equal(apply("cutout", 5, 0.0, size=32)[:2, :2], np.full((2, 2, 3), 128))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_crop_boxes_lie_inside_and_follow_ranges(width, height, seed):
    areas, aspects = NoiseConfig().crop_area, NoiseConfig().crop_aspect
    left, upper, right, lower = draw_crop_box((width, height), np.random.default_rng(seed), areas, aspects)
    w, h = right - left, lower - upper
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    if min(w, h) > 40 and w != h:
        assert areas[0] * 0.95 <= w * h / (width * height) <= areas[1]
        assert aspects[0] * 0.95 <= w / h <= aspects[1] * 1.05


@pytest.mark.parametrize(("size", "expected"), [((256, 256), 224), ((500, 375), 328), ((64, 32), 28)])
def test_center_box_is_size_over_size_plus_margin(size, expected):
    left, upper, right, lower = compute_center_box(size, 224, 32)
    assert right - left == lower - upper == expected
    assert abs((left + right) - size[0]) <= 1
    assert abs((upper + lower) - size[1]) <= 1


@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 1000))
def test_pad_and_crop_equals_padding_then_cropping(height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pad = min(height, width) - 1
    rng = np.random.default_rng(seed)
    dy, dx = int(rng.random() * (2 * pad + 1)), int(rng.random() * (2 * pad + 1))
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), "reflect")
    assert np.array_equal(pad_and_crop(image, pad, np.random.default_rng(seed)), padded[dy : dy + height, dx : dx + width])


@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
def test_train_transform_follows_its_generator(crop):
    transform = TrainTransform(NoiseConfig(cutout_px=8), 24, crop)
    image = np.random.default_rng(1).integers(0, 256, (50, 40, 3), np.uint8)
    first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (24, 24, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_train_transform_crops_and_shifts_as_configured():
    image = np.arange(64, dtype=np.uint8)[:, None, None].repeat(64, 1).repeat(3, 2)
    plain = {"randaugment_layers": 0, "flip": False}
    whole = TrainTransform(NoiseConfig(crop_area=(1, 1), crop_aspect=(1, 1), **plain), 64, "resized")
    assert np.array_equal(whole(image, np.random.default_rng(0)), image)
    shifted = TrainTransform(NoiseConfig(pad_px=2, **plain), 64, "pad")
    assert {int(shifted(image, np.random.default_rng(seed))[32, 0, 0]) for seed in range(50)} == {30, 31, 32, 33, 34}
    still = TrainTransform(NoiseConfig(pad_px=0, **plain), 64, "pad")
    assert np.array_equal(still(image, np.random.default_rng(0)), image)


def test_eval_transform_keeps_small_images():
    assert np.array_equal(EvalTransform(32, "pad", 32)(PIXELS), PIXELS)
    assert EvalTransform(48, "pad", 32)(PIXELS).shape == (48, 48, 3)
    assert EvalTransform(32, "resized", 32)(PIXELS).shape == (32, 32, 3)


@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (31, 33)])
def test_transforms_bring_any_size_to_resolution(crop, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    transform = TrainTransform(NoiseConfig(cutout_px=16, randaugment_magnitude=27), 32, crop)
    for seed in range(10):
        noised = transform(image, np.random.default_rng(seed))
        assert noised.shape == (32, 32, 3)
        assert noised.dtype == np.uint8
        assert noised.flags.c_contiguous
    assert EvalTransform(32, crop, 32)(image).shape == (32, 32, 3)


def test_train_transform_keeps_its_input():
    image = PIXELS.copy()
    for crop in ("resized", "pad", "none"):
        transform = TrainTransform(NoiseConfig(cutout_px=16), 32, crop)
        for seed in range(30):
            transform(image, np.random.default_rng(seed))
    assert np.array_equal(image, PIXELS)


def test_train_transform_without_noise_keeps_image():
    noise = NoiseConfig(flip=False, randaugment_layers=0)
    assert np.array_equal(TrainTransform(noise, 32, "none")(PIXELS, np.random.default_rng(0)), PIXELS)


def test_train_transform_flips_half_of_images():
    noise = NoiseConfig(randaugment_layers=0)
    transform = TrainTransform(noise, 32, "none")
    rng = np.random.default_rng(0)
    mirrored = [np.array_equal(transform(PIXELS, rng), PIXELS[:, ::-1]) for _ in range(400)]
    assert 160 < sum(mirrored) < 240


def test_timm_randaugment_follows_its_generator():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    transform = TrainTransform(NoiseConfig(randaugment="timm", randaugment_magnitude=9, flip=False), 32, "none")
    results = [transform(image, np.random.default_rng(seed)) for seed in (*range(30), *range(30))]
    assert all(np.array_equal(a, b) for a, b in zip(results[:30], results[30:], strict=True))
    changed = sum(not np.array_equal(result, image) for result in results[:30])
    # Two operations, each applied half of the time: a quarter stays as it is.
    assert 15 <= changed < 30
    none = TrainTransform(NoiseConfig(randaugment="timm", randaugment_layers=0, flip=False), 32, "none")
    assert np.array_equal(none(image, np.random.default_rng(0)), image)


def edge_cases():
    rng = np.random.default_rng(0)
    for size in (7, 32, 64, 65, 100):
        yield rng.integers(0, 256, (size, size, 3), np.uint8)
        yield rng.integers(100, 140, (size, size, 3), np.uint8)
        yield np.full((size, size, 3), 77, np.uint8)
        yield (rng.random((size, size, 3)) < 0.01).astype(np.uint8) * 255
        yield np.stack(
            [rng.integers(0, 2, (size, size)), np.full((size, size), 9), rng.integers(0, 256, (size, size))], 2
        ).astype(np.uint8)


@pytest.mark.parametrize(
    ("ours", "pillows"), [(stretch_contrast, ImageOps.autocontrast), (equalize_channels, ImageOps.equalize)]
)
def test_autocontrast_and_equalize_equal_pillow_on_edge_cases(ours, pillows):
    for pixels in edge_cases():
        image = Image.fromarray(pixels)
        assert np.array_equal(ours(pixels), np.asarray(pillows(image)))


@settings(max_examples=100, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))))
def test_autocontrast_and_equalize_equal_pillow_on_any_image(pixels):
    image = Image.fromarray(pixels)
    assert np.array_equal(stretch_contrast(pixels), np.asarray(ImageOps.autocontrast(image)))
    assert np.array_equal(equalize_channels(pixels), np.asarray(ImageOps.equalize(image)))


def assert_near_pillow(found: np.ndarray, part: Image.Image, size: int) -> None:
    # Across first, as Pillow did before 13, which begins with the height of tall images: in noise, that alone changes values by 20.
    across = part.resize((size, part.height), Image.Resampling.BICUBIC)
    expected = np.asarray(across.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    difference = np.abs(found - expected)
    assert difference.mean() <= 1
    assert difference.max() <= 3


@pytest.mark.parametrize("size", [8, 32, 96, 224, 299])
@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (33, 31), (224, 224), (1, 300), (640, 7), (2, 2), (903, 611)])
def test_crops_are_pillows(shape, size):
    images = make_photograph(*shape, 0), np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    for pixels in images:
        picture, rng = Image.fromarray(pixels), np.random.default_rng(size)
        assert_near_pillow(resize_image(pixels, size), picture, size)
        for box in (
            compute_center_box(shape, size, 32),
            *(draw_crop_box(shape, rng, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3)),
        ):
            assert_near_pillow(crop_image(pixels, box, size), picture.crop(box), size)


@pytest.mark.parametrize("axis", [0, 1])
def test_of_elongated_images_only_the_middle_is_resized(monkeypatch, axis):
    """A line of 1 x 60,000 px would take gigabytes."""
    image = np.random.default_rng(0).integers(0, 256, (2, 80, 3), np.uint8)
    image = image if axis else image.transpose(1, 0, 2)
    whole = resize_whole(image[None], (36, 36 * 40) if axis else (36 * 40, 36), "bicubic")[0]
    begin = (36 * 40 - 32) // 2
    expected = whole[2:34, begin : begin + 32] if axis else whole[begin : begin + 32, 2:34]
    sizes = []
    monkeypatch.setattr(transforms, "_resize_images", lambda *given: sizes.append(given[1]) or resize_whole(*given))
    found = EvalTransform(32, "resized", 4, test_crop="center")(image)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert max(sizes[0]) == 36 * transforms.MAX_ELONGATION


@pytest.mark.parametrize("size", [24, 64, 150])
def test_crops_of_scaled_jpegs_are_pillows(size):
    """Of the pixels at that scale, whether the box falls on whole pixels or not."""
    whole = Image.fromarray(make_photograph(601, 450, 1))
    sink = io.BytesIO()
    whole.save(sink, "JPEG", quality=92)
    encoded, rng, broken = EncodedJpeg(sink.getvalue(), *whole.size), np.random.default_rng(0), 0
    for _ in range(20):
        box = draw_crop_box(whole.size, rng, (0.5, 1), (3 / 4, 4 / 3))
        pixels, inner = encoded.decode_box(box, size)
        broken += inner != tuple(map(int, inner))
        outer = np.array([np.floor(inner[:2]), np.ceil(inner[2:])]).ravel()
        part = Image.fromarray(pixels).crop(tuple(outer))
        expected = part.resize((size, size), Image.Resampling.BICUBIC, box=tuple(np.array(inner) - np.tile(outer[:2], 2)))
        difference = np.abs(crop_image(encoded, box, size).astype(int) - np.asarray(expected))
        assert difference.mean() <= 1
        assert difference.max() <= 3
    assert size == 150 or broken > 0


def test_crops_lie_where_scaled_jpegs_show_them():
    """A size that no scale divides: the last pixel of the scaled image lies half outside."""
    ramp = np.broadcast_to((np.arange(601) * 255 // 600).astype(np.uint8)[None, :, None], (450, 601, 3))
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ramp)).save(sink, "JPEG", quality=95)
    encoded, whole = EncodedJpeg(sink.getvalue(), 601, 450), decode_image(sink.getvalue())
    for size in (24, 40, 64, 90):
        for left in (0, 1, 2, 3, 201):
            box = (left, 7, left + 400, 407)
            difference = crop_image(encoded, box, size).astype(int) - crop_image(whole, box, size)
            assert np.abs(difference[:, 2:-2].mean()) < 0.2
            assert np.abs(difference[:, 2:-2]).max() <= 2


def test_batch_resize_equals_single_resize_and_nearly_pillow():
    rng = np.random.default_rng(3)
    sizes = [(32, 32), (48, 40), (32, 32), (24, 24), (300, 301), (48, 40)] + [(32, 32)] * 90
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    transform = EvalTransform(48, "pad", 32)
    out = allocate_images(len(images), 48)
    assert transform.transform_batch(images, out) == {}
    for image, found in zip(images, out, strict=True):
        assert np.array_equal(found, transform(image))
        expected = np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC)).astype(np.int64)
        assert np.abs(found - expected).max() <= 2
        assert (found != expected).mean() < 0.02


@pytest.mark.parametrize("pixels", [24, 48])
def test_batch_of_one_size_is_resized_as_each_image(pixels):
    images = np.random.default_rng(4).integers(0, 256, (300, pixels, pixels, 3), np.uint8)
    transform, out = EvalTransform(48, "none", 0), allocate_images(300, 48)
    assert transform.shows_all
    with ThreadPoolExecutor(2) as threads:
        transform.resize_batch(images, out, threads)
    assert np.array_equal(out, np.stack([transform(image) for image in images]))
