"""Copies of a picture match; pictures of a camera that does not move, with something else in front of it, do not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_sample_images

from ns.data import duplicates
from ns.data.duplicates import find_duplicates
from ns.data.fingerprint import Fingerprints, compute_phashes
from ns.data.picture_match import match_pictures, shrink_picture

CHANGES = {
    "JPEG 40": lambda picture: compress(picture, 40),
    "smaller": lambda picture: picture.resize((picture.width // 3, picture.height // 3), Image.Resampling.BICUBIC),
    "larger": lambda picture: picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.8),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
    "more contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(1.2),
    "cropped": lambda picture: picture.crop((4, 4, picture.width - 4, picture.height - 4)),
    "shifted": lambda picture: picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, 3, 0, 1, 2)),
    "noisy": lambda picture: add_noise(picture, np.random.default_rng(0)),
}


def compress(picture: Image.Image, quality: int) -> Image.Image:
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=quality)
    return Image.open(io.BytesIO(sink.getvalue()))


def add_noise(picture: Image.Image, rng: np.random.Generator, brightness: int = 0) -> Image.Image:
    pixels = np.asarray(picture) + rng.normal(brightness, 8, np.asarray(picture).shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shrink(pictures) -> np.ndarray:
    return np.stack([shrink_picture(np.asarray(picture)) for picture in pictures])


def hash_pictures(pictures) -> np.ndarray:
    small = [picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS) for picture in pictures]
    return compute_phashes(np.stack([np.asarray(picture) for picture in small]))


@pytest.fixture(scope="module")
def photos():
    """60 parts of two photographs."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(whole).crop((x, y, x + 300, y + 225))
        for whole in load_sample_images().images
        for x, y in rng.integers(0, 190, (30, 2)).tolist()
    ]


def shoot(photo: Image.Image, count: int, seed: int, size: int) -> list[Image.Image]:
    """Pictures of a camera that does not move: an object of `size` px somewhere, noise, and changing light."""
    rng = np.random.default_rng(seed)
    shots = []
    for _ in range(count):
        shot = photo.copy()
        x, y = (int(value) for value in rng.integers(10, 190, 2))
        ImageDraw.Draw(shot).ellipse((x, y, x + size, y + size), fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
        shots.append(compress(add_noise(shot, rng, int(rng.integers(-20, 20))), 90))
    return shots


@pytest.mark.parametrize("change", CHANGES)
def test_copies_match(photos, change):
    assert match_pictures(shrink(photos), shrink(map(CHANGES[change], photos))).mean() >= 0.98


@pytest.mark.parametrize("size", [24, 40])
def test_objects_before_a_fixed_camera_do_not_match(photos, size):
    shots = shoot(photos[3], 40, 1, size)
    hashes, small = hash_pictures(shots), shrink(shots)
    first, second = np.triu_indices(40, 1)
    near = np.bitwise_count(hashes[first] ^ hashes[second]) <= 4
    assert near.sum() > 100, "the hash alone would call these the same"
    assert match_pictures(small[first[near]], small[second[near]]).mean() <= 0.05
    assert match_pictures(small, small[::-1])[:5].sum() == 0


def test_pictures_match_in_either_order(photos):
    small, changed = shrink(photos[:10]), shrink(map(CHANGES["darker"], photos[:10]))
    assert match_pictures(small, changed).all()
    assert match_pictures(changed, small).all()
    flat = np.full((1, 64, 64), 128, np.uint8)
    assert not match_pictures(flat, small[:1]).any()


def make_fingerprints(hashes) -> Fingerprints:
    count = len(hashes)
    return Fingerprints(np.arange(count).astype("S32"), np.array(hashes, np.uint64), np.ones(count, np.bool_))


def test_equal_hashes_are_paired_by_picture(tmp_path):
    """Twenty pictures of one hash, each there a hundred times: pairs are copies, and their number is linear."""
    picture_of = np.arange(2000) % 20
    compared = []

    def match(first, second):
        compared.append(len(first))
        return picture_of[first] == picture_of[second]

    found = find_duplicates([make_fingerprints([7] * 2000)], tmp_path, 4, match)
    pairs = np.concatenate([np.stack(group[:2], 1) for group in (found.alike, found.near)])
    assert (picture_of[pairs[:, 0]] == picture_of[pairs[:, 1]]).all()
    assert set(pairs[:, 0]) == set(range(20, 2000))
    assert sum(compared) < 2000 * (duplicates.MATCH_ROUNDS + duplicates.MAX_MATCHES)


def test_comparisons_of_a_fixed_camera_are_bounded_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_MATCHES", 10)
    compared = []

    def match(first, second):
        compared.extend(zip(first.tolist(), second.tolist(), strict=True))
        return np.zeros(len(first), np.bool_)

    found = find_duplicates([make_fingerprints([n << 60 for n in range(16)] * 50)], tmp_path, 4, match)
    assert len(found.near.later) == len(found.alike.later) == 0
    assert len(compared) <= 800 * (duplicates.MATCH_ROUNDS + 5 * 10)
    assert found.skipped > 0
