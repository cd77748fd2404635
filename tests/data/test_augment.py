"""RandAugment against the paper's table, and the geometry of crops."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ns.config import NoiseConfig
from ns.data.augment import AREA, ASPECT, EvalTransform, TrainTransform, centre_box, pad_and_crop, random_box
from ns.data.randaugment import GREY, RandAugment

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
IMAGE = Image.fromarray(PIXELS)


class Signed:
    """A generator whose draws are all one value: below a half is the positive sign."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def apply(name: str, magnitude: float, draw: float = 0.0, size: int = 224) -> np.ndarray:
    augment = RandAugment(2, magnitude, size)
    return np.asarray(augment.operations[name](IMAGE, Signed(draw))).astype(int)


def test_there_are_sixteen_operations_drawn_evenly():
    augment = RandAugment(2, 5, 32)
    assert len(augment.operations) == 16
    drawn = Counter()
    augment._drawn = [lambda image, _, name=name: (drawn.update([name]), image)[1] for name in augment.operations]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        augment(IMAGE, rng)
    assert sum(drawn.values()) == 4000
    assert set(drawn) == set(augment.operations)
    assert max(drawn.values()) < 1.35 * min(drawn.values())


@pytest.mark.parametrize(
    ("magnitude", "arguments"),
    [
        # noisy_student.md §3.1; the last three of M = 27 are clamped from 10 bits, 691 and 297.
        (5, {"translate_px": 50, "cutout_half_px": 20, "posterize_bits": 2, "solarize_threshold": 128, "solarize_add": 55}),
        (27, {"translate_px": 270, "cutout_half_px": 108, "posterize_bits": 8, "solarize_threshold": 256, "solarize_add": 255}),
    ],
)
def test_arguments_follow_the_papers_formulas(magnitude, arguments):
    augment = RandAugment(2, magnitude, 224)
    assert {name: getattr(augment, name) for name in arguments} == pytest.approx(arguments)
    assert augment.enhance_factor == pytest.approx({5: 1.0, 27: 4.96}[magnitude])


def test_small_images_take_the_small_constants():
    augment = RandAugment(2, 5, 32)
    assert augment.translate_px == 2
    assert augment.cutout_half_px == 2


def test_at_magnitude_5_the_four_enhancements_change_nothing():
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert np.abs(apply(name, 5) - PIXELS).max() <= 1


@pytest.mark.parametrize("magnitude", [5, 27])
def test_enhancements_blend_with_their_degenerate_image(magnitude):
    factor = 1.8 * magnitude / 10 + 0.1
    grey = np.asarray(IMAGE.convert("L")).astype(float)
    for name, degenerate in {
        "brightness": np.zeros((32, 32, 3)),
        "color": np.repeat(grey[:, :, None], 3, 2),
        "contrast": np.full((32, 32, 3), int(grey.mean() + 0.5)),
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


def test_autocontrast_and_equalize_stretch_to_the_full_range():
    narrow = Image.fromarray(PIXELS // 4 + 90)
    augment = RandAugment(2, 5, 32)
    for name in ("auto_contrast", "equalize"):
        values = np.asarray(augment.operations[name](narrow, Signed(0)))
        assert values.min() == 0
        assert values.max() >= 254


@pytest.mark.parametrize(("draw", "sign"), [(0.0, 1), (0.9, -1)])
def test_translation_moves_by_its_pixels_and_fills_with_grey(draw, sign):
    moved = apply("translate_x", 5, draw, size=32)
    kept = moved[:, :-2] if sign > 0 else moved[:, 2:]
    assert np.array_equal(kept, PIXELS[:, 2:] if sign > 0 else PIXELS[:, :-2])
    fill = moved[:, -2:] if sign > 0 else moved[:, :2]
    assert np.array_equal(fill, np.broadcast_to(GREY, fill.shape))
    down = apply("translate_y", 5, draw, size=32)
    assert np.array_equal(down, moved.transpose(1, 0, 2)) == np.array_equal(PIXELS, PIXELS.transpose(1, 0, 2))


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y"])
def test_geometry_keeps_the_middle_and_takes_its_sign_from_the_draw(name):
    left, right = apply(name, 5, 0.0), apply(name, 5, 0.9)
    assert not np.array_equal(left, right)
    assert (left == 128).all(2).sum() > 5  # corners uncovered
    flat = Image.new("RGB", (32, 32), (7, 7, 7))
    turned = np.asarray(RandAugment(2, 27, 224).operations[name](flat, Signed(0)))
    assert set(np.unique(turned)) <= {7, 128}


def test_rotation_is_thirty_degrees_at_level_one():
    expected = np.asarray(IMAGE.rotate(15, Image.Resampling.NEAREST, fillcolor=GREY))
    assert np.array_equal(apply("rotate", 5), expected)


def test_cutout_is_a_grey_square_cut_off_at_the_border():
    out = apply("cutout", 5, 0.5, size=32)
    changed = np.argwhere((out != PIXELS).any(2))
    assert changed.min(0).tolist() == [14, 14]
    assert changed.max(0).tolist() == [17, 17]
    assert np.array_equal(apply("cutout", 5, 0.0, size=32)[:2, :2], np.full((2, 2, 3), 128))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_random_boxes_lie_inside_and_follow_the_papers_ranges(width, height, seed):
    left, upper, right, lower = random_box((width, height), np.random.default_rng(seed))
    w, h = right - left, lower - upper
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    if min(w, h) > 40 and w != h:
        assert AREA[0] * 0.95 <= w * h / (width * height) <= AREA[1]
        assert ASPECT[0] * 0.95 <= w / h <= ASPECT[1] * 1.05


@pytest.mark.parametrize(("size", "expected"), [((256, 256), 224), ((500, 375), 328), ((64, 32), 28)])
def test_the_evaluation_crop_is_size_over_size_plus_32_of_the_short_side(size, expected):
    left, upper, right, lower = centre_box(size, 224)
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
def test_training_noise_has_the_right_shape_and_follows_its_generator(crop):
    transform = TrainTransform(NoiseConfig(crop=crop, cutout_px=8), 24)
    image = np.random.default_rng(1).integers(0, 256, (50, 40, 3), np.uint8)
    first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (24, 24, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_evaluation_takes_small_images_as_they_are():
    assert np.array_equal(EvalTransform(32, "pad")(PIXELS), PIXELS)
    assert EvalTransform(48, "pad")(PIXELS).shape == (48, 48, 3)
    assert EvalTransform(32, "resized")(PIXELS).shape == (32, 32, 3)
