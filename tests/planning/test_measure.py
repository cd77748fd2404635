import numpy as np
import pytest
import torch

from ns.config.loader import parse_experiment
from ns.core.errors import TrainingError
from ns.data.augment.transforms import EvalTransform, TrainTransform
from ns.planning.measure import (
    _draw_images,
    measure_decode_seconds,
    measure_inference_speed,
    measure_noise_seconds,
    measure_rate,
    measure_training_speed,
)
from ns.training.plan import plan_training


@pytest.fixture
def role():
    data = {part: f"digits:{part}" for part in ("labeled", "pool", "heldout")}
    teacher = {"model": {"arch": "test_efficientnet", "resolution": 32}, "train": {"precision": "bfloat16"}}
    return parse_experiment({"name": "x", "data": data, "teacher": teacher}, "test").teacher


def test_training_speed_uses_the_configured_precision(role):
    speed = measure_training_speed(plan_training(role, 50), outputs=10, batch=8, seconds=0.2)
    assert speed.mode == "bfloat16"
    assert speed.images_per_second > 0
    assert speed.update_seconds > 0


@pytest.mark.integration
def test_inference_speed_exceeds_training_speed(role):
    train = measure_training_speed(plan_training(role, 50), outputs=10, batch=64, seconds=0.4)
    infer = measure_inference_speed(role, outputs=10, batch=64, seconds=0.4)
    assert infer.images_per_second > train.images_per_second
    assert infer.mode in ("float32", "bfloat16")


def test_measuring_draws_nothing_from_the_global_generator(role):
    state = torch.get_rng_state()
    _draw_images(2, 32, torch.device("cpu"))
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def stopwatch(monkeypatch):
    """Instead of measuring: half a second per image. Returns the sizes of the passes, and the most images that fit into memory."""
    sizes, limit = [], [1000]

    def time_pass(run_pass, _device):
        count = run_pass()
        sizes.append(count)
        if count > limit[0]:
            raise torch.OutOfMemoryError
        return count / 2

    monkeypatch.setattr("ns.planning.measure._time_pass", time_pass)
    return sizes, limit


def rate_of(batch, seconds):
    return measure_rate(len, torch.device("cpu"), batch=batch, resolution=32, seconds=seconds)


def test_rate_of_a_slow_network_is_measured_with_one_pass(stopwatch):
    sizes, _ = stopwatch
    assert rate_of(16, seconds=1) == 2
    assert sizes == [2]


@pytest.mark.parametrize(("seconds", "largest"), [(24, 8), (1000, 16)])
def test_rate_is_measured_with_as_many_images_as_time_allows(stopwatch, seconds, largest):
    sizes, _ = stopwatch
    assert rate_of(16, seconds=seconds) == 2
    assert max(sizes) == largest
    assert sum(sizes) / 2 <= seconds


def test_rate_halves_a_batch_that_does_not_fit(stopwatch):
    sizes, limit = stopwatch
    limit[0] = 5
    assert rate_of(16, seconds=1000) == 2
    assert list(dict.fromkeys(sizes)) == [2, 16, 8, 4]


def test_rate_without_memory_for_two_images_is_an_error(stopwatch):
    _, limit = stopwatch
    limit[0] = 1
    with pytest.raises(TrainingError, match="out of memory with 2 images of 32 px"):
        rate_of(16, seconds=24)


def test_noise_takes_longer_than_decoding(role):
    pictures = [np.zeros((40, 60, 3), np.uint8), np.full((50, 30, 3), 9, np.uint8)]
    plain = measure_decode_seconds(EvalTransform(32, "resized", 32), 32, pictures, 0.05)
    noisy = measure_noise_seconds(TrainTransform(role.noise, 32, role.model.crop), pictures, 0.05)
    assert 0 < plain < noisy
