"""The reference RandAugment against the published code, run by TensorFlow, and against its definitions."""

import json
from pathlib import Path

import numpy as np
import pytest

from ns.data.augment.randaugment import RandAugment
from ns.data.augment.reference import ReferenceRandAugment, transform_nearest
from tests.data.augment.reference_values import MAGNITUDES, SIGNED, SIZES, digest_pixels, make_picture

PUBLISHED = json.loads(Path(__file__).with_name("reference_values.json").read_text())
"""Made by reference_values.py."""
NAMES = {
    "AutoContrast": "auto_contrast", "Equalize": "equalize", "Invert": "invert", "Rotate": "rotate", "Posterize": "posterize",
    "Solarize": "solarize", "SolarizeAdd": "solarize_add", "Color": "color", "Contrast": "contrast", "Brightness": "brightness",
    "Sharpness": "sharpness", "ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x", "TranslateY": "translate_y",
}  # fmt: skip


class Signed:
    """A generator whose draws are all one value: below a half is the positive sign."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_operations_equal_the_published_code_bit_by_bit(name, size):
    picture = make_picture(size)
    for sign in "+-" if name in SIGNED else "+":
        got = [
            digest_pixels(
                ReferenceRandAugment(2, magnitude, size).operations[NAMES[name]](picture, Signed(0.0 if sign == "+" else 0.9))
            )
            for magnitude in MAGNITUDES
        ]
        assert dict(zip(MAGNITUDES, got, strict=True)) == dict(
            zip(MAGNITUDES, PUBLISHED[str(size)][f"{name}{sign}"], strict=True)
        )


@pytest.mark.parametrize(
    ("magnitude", "threshold"), [(0, 0), (5, 128), (6, 153), (10, 0), (12, 51), (15, 128), (18, 204), (24, 102), (27, 179)]
)
def test_solarize_threshold_wraps_modulo_256(magnitude, threshold):
    augment = ReferenceRandAugment(2, magnitude, 224)
    assert augment.solarize_threshold == threshold
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    expected = [value if value < threshold else 255 - value for value in range(256)]
    assert augment.operations["solarize"](values, Signed(0))[..., 0].ravel().tolist() == expected


@pytest.mark.parametrize(
    ("magnitude", "bits"), [(0, 1), (2, 1), (2.5, 1), (5, 2), (10, 4), (18, 7), (20, 8), (22, 8), (22.5, 1), (24, 1), (27, 1)]
)
def test_posterize_wraps_and_keeps_one_bit_at_least(magnitude, bits):
    augment = ReferenceRandAugment(2, magnitude, 224)
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert len(np.unique(augment.operations["posterize"](values, Signed(0)))) == 2**bits


@pytest.mark.parametrize(("size", "base"), [(32, 4), (64, 16), (224, 196), (256, 255), (600, 255)])
def test_contrast_blends_with_the_number_of_pixels(size, base):
    image = np.full((size, size, 3), 100, np.uint8)
    expected = int(min(max(base + 4.96 * (100 - base), 0), 255))
    assert np.unique(ReferenceRandAugment(2, 27, size).operations["contrast"](image, Signed(0))).tolist() == [expected]


def test_every_operation_but_fivefold_enhancement_does_something_at_magnitude_27():
    picture = make_picture(65)

    def find_idle(kind):
        operations = kind(2, 27, 65).operations
        return {
            name
            for name, operation in operations.items()
            if np.array_equal(operation(picture, np.random.default_rng(0)), picture)
        }

    assert find_idle(ReferenceRandAugment) == set()
    assert find_idle(RandAugment) == {"posterize", "solarize"}


def test_transform_nearest_rounds_halves_away_from_zero():
    row = np.arange(5, dtype=np.uint8)[None, :, None].repeat(3, 2)
    # Column x shows the nearest to x - 0.5: -0.5 is outside, 0.5 is the second.
    assert transform_nearest(row, (1, 0, -0.5, 0, 1, 0))[0, :, 0].tolist() == [128, 1, 2, 3, 4]
    assert transform_nearest(row, (1, 0, 0.5, 0, 1, 0))[0, :, 0].tolist() == [1, 2, 3, 4, 128]


def test_reference_draws_sixteen_operations_and_follows_its_generator():
    augment = ReferenceRandAugment(2, 27, 32)
    assert len(augment.operations) == 16
    assert set(augment.operations) == set(RandAugment(2, 27, 32).operations)
    assert "cutout" not in ReferenceRandAugment(2, 27, 32, cutout_px=0).operations
    results = [(augment(make_picture(32), np.random.default_rng(seed))) for seed in (*range(20), *range(20))]
    assert all(np.array_equal(a, b) for a, b in zip(results[:20], results[20:], strict=True))
    assert len({result.tobytes() for result in results}) == 20
