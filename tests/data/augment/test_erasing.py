import random

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing

from ns.config.schema import NoiseConfig
from ns.data.augment.erasing import erase_rectangle
from ns.data.augment.transforms import TrainTransform

GRAY = np.full((40, 60, 3), 77, np.uint8)


def measure_box(changed):
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def test_erase_rectangle_fills_a_rectangle_with_random_values():
    for seed in range(50):
        erased = erase_rectangle(GRAY, np.random.default_rng(seed))
        height, width = measure_box((erased != 77).any(2))
        assert 0.015 < height * width / 2400 < 0.36
        assert (erased != 77).mean() > 0.95 * height * width / 2400
    assert (GRAY == 77).all()


def test_erased_areas_are_distributed_as_timms():
    ours = [measure_box((erase_rectangle(GRAY, np.random.default_rng(seed)) != 77).any(2)) for seed in range(600)]
    erase = RandomErasing(probability=1, mode="const", device="cpu")
    random.seed(0)
    theirs = [measure_box((erase(torch.ones(3, 40, 60)) == 0).any(0).numpy()) for _ in range(600)]
    for measure in (lambda box: box[0] * box[1], lambda box: np.log(box[0] / box[1])):
        a, b = (np.array([measure(box) for box in boxes]) for boxes in (ours, theirs))
        standard_error = np.hypot(a.std(), b.std()) / np.sqrt(600)
        assert abs(a.mean() - b.mean()) < 3 * standard_error
        assert 0.9 < a.std() / b.std() < 1.1


def test_tiny_images_stay():
    tiny = np.zeros((1, 1, 3), np.uint8)
    assert erase_rectangle(tiny, np.random.default_rng(0)) is tiny


def test_train_transform_erases_with_its_probability():
    quiet = {"randaugment_layers": 0, "flip": False}
    square = np.full((32, 32, 3), 77, np.uint8)
    for probability in (0.0, 0.25, 1.0):
        transform = TrainTransform(NoiseConfig(erasing=probability, **quiet), 32, "none")
        erased = np.mean([(transform(square, np.random.default_rng(seed)) != 77).any() for seed in range(400)])
        assert abs(erased - probability) < 0.07
