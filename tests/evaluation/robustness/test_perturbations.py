"""Sequences against torchvision, which the published ones were made with, and against what they must do.

Against the published code itself, with OpenCV 5.0: tilt within 1 of 255, where nothing black comes in.
"""

import numpy as np
import pytest
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

from ns.config.schema import PERTURBATIONS
from ns.evaluation.robustness.perturbations import PERTURBATION_KINDS, render_sequence


def natural(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=[(32, 32), (256, 341)])
def image(request):
    return natural(*request.param)


def size(image):
    return 32 if len(image) == 32 else 224


def test_perturbation_kinds_are_published_ones():
    assert tuple(PERTURBATION_KINDS) == PERTURBATIONS


@pytest.mark.parametrize("kind", list(PERTURBATION_KINDS))
def test_render_sequence_is_reproducible_and_frames_differ_little(image, kind):
    first, again = (render_sequence(image, kind, 5, np.random.default_rng(3)) for _ in range(2))
    assert (first.shape, first.dtype) == ((5, size(image), size(image), 3), np.uint8)
    assert np.array_equal(first, again)
    steps = np.abs(first[1:].astype(int) - first[:-1]).mean((1, 2, 3))
    assert (steps > 0).all()
    assert steps.max() < 40


@pytest.mark.parametrize("kind", ["brightness", "translate", "rotate", "tilt", "scale", "motion_blur"])
def test_render_sequence_shorter_is_middle_of_longer(image, kind):
    longer, shorter = (render_sequence(image, kind, frames, np.random.default_rng(0)) for frames in (7, 3))
    assert np.array_equal(shorter, longer[2:5])


@pytest.mark.parametrize("kind", ["brightness", "translate", "rotate"])
def test_render_sequence_middle_frame_is_image(image, kind):
    middle = render_sequence(image, kind, 31, np.random.default_rng(0))[15]
    plain = np.asarray(F.center_crop(Image.fromarray(image), size(image)))
    assert np.abs(middle.astype(int) - plain).max() <= 1


@pytest.mark.parametrize("kind", ["gaussian_noise", "shot_noise", "zoom_blur"])
def test_render_sequence_noise_and_zoom_begin_with_image(image, kind):
    first = render_sequence(image, kind, 3, np.random.default_rng(0))[0]
    assert np.array_equal(first, np.asarray(F.center_crop(Image.fromarray(image), size(image))))


@pytest.mark.parametrize("step", [-15, -4, 0, 7, 15])
def test_render_sequence_moves_match_torchvision(image, step):
    small = len(image) == 32
    picture = Image.fromarray(image)
    wanted = {
        "rotate": {"angle": step, "scale": 1.0, "translate": (0, 0)},
        "translate": {"angle": 0, "scale": 1.0, "translate": (step, 0)},
        "scale": {"angle": 0, "scale": (1 + 0.02 * step) if small else 0.775 + 0.025 * step, "translate": (0, 0)},
    }
    for kind, options in wanted.items():
        moved = F.affine(picture, shear=0, interpolation=InterpolationMode.BILINEAR, **options)
        expected = np.asarray(F.center_crop(moved, size(image))).astype(int)
        result = render_sequence(image, kind, 31, np.random.default_rng(0))[step + 15]
        assert np.abs(result - expected).max() <= 1, kind


def test_render_sequence_noise_has_published_strength():
    gray = np.full((256, 256, 3), 128, np.uint8)
    frames = render_sequence(gray, "gaussian_noise", 3, np.random.default_rng(0))
    assert frames[1].std() / 255 == pytest.approx(0.03, rel=0.05)
    small = render_sequence(np.full((64, 64, 3), 128, np.uint8), "gaussian_noise", 3, np.random.default_rng(0))
    assert small[2].std() / 255 == pytest.approx(0.02, rel=0.05)
    shot = render_sequence(gray, "shot_noise", 2, np.random.default_rng(0))[1]
    assert shot.std() / 255 == pytest.approx(np.sqrt(128 / 255 / 300), rel=0.05)


def test_render_sequence_snow_keeps_flakes():
    frames = render_sequence(np.zeros((32, 32, 3), np.uint8), "snow", 4, np.random.default_rng(0)).astype(float)
    near = np.corrcoef(frames[0].reshape(-1), frames[1].reshape(-1))[0, 1]
    other = render_sequence(np.zeros((32, 32, 3), np.uint8), "snow", 1, np.random.default_rng(1))[0]
    assert near > 0.8 > np.corrcoef(frames[0].reshape(-1), other.reshape(-1).astype(float))[0, 1]
