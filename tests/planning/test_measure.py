import numpy as np
import pytest
import torch

from ns.config.schema import parse_experiment
from ns.data.augment.transforms import EvalTransform, TrainTransform
from ns.planning.measure import measure_decode_seconds, measure_inference_speed, measure_noise_seconds, measure_training_speed
from ns.training.plan import plan_training


@pytest.fixture
def role():
    data = {part: f"digits:{part}" for part in ("labeled", "pool", "heldout")}
    teacher = {"model": {"arch": "test_efficientnet", "resolution": 32}, "train": {"precision": "bfloat16+compile"}}
    return parse_experiment({"name": "x", "data": data, "teacher": teacher}, "test").teacher


def test_training_is_measured_in_the_precision_asked_for(role):
    speed = measure_training_speed(plan_training(role, 50), outputs=10, batch=8, seconds=0.2)
    assert speed.mode == "bfloat16"
    assert speed.images_per_second > 0
    assert speed.update_seconds > 0


def test_inference_is_faster_than_training(role):
    train = measure_training_speed(plan_training(role, 50), outputs=10, batch=64, seconds=1)
    infer = measure_inference_speed(role, outputs=10, batch=64, seconds=1)
    assert infer.images_per_second > train.images_per_second
    assert infer.mode in ("float32", "bfloat16")


def test_measuring_draws_nothing_from_the_generator_that_training_uses(role):
    torch.manual_seed(0)
    from ns.modeling import factory as models
    from ns.modeling.precision import measure_speed
    from ns.modeling.predictor import make_inference_workload

    network = models.build_model(role.model, role.noise, 10)
    state = torch.get_rng_state()
    rate = measure_speed(make_inference_workload(network, role.model, 5), seconds=0.1)
    assert torch.equal(state, torch.get_rng_state())
    assert 1 <= rate.batch <= 5


def test_pictures_take_time(role, monkeypatch):
    monkeypatch.setattr("ns.planning.measure.PICTURE_SECONDS", 0.05)
    pictures = [np.zeros((40, 60, 3), np.uint8), np.full((50, 30, 3), 9, np.uint8)]
    plain = measure_decode_seconds(EvalTransform(32, "resized", 32), 32, pictures)
    noisy = measure_noise_seconds(TrainTransform(role.noise, 32), pictures)
    assert 0 < plain < noisy
