"""How fast this machine does the parts of a step: the network, the update of its weights, decoding and noise."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ns.config.schema import Precision, RoleConfig
from ns.data.augment.transforms import EvalTransform, TrainTransform
from ns.data.loading.decode import allocate_images
from ns.modeling import factory as models
from ns.modeling.precision import PrecisionMode, measure_speed
from ns.modeling.predictor import make_inference_workload
from ns.planning.data_stats import SampleImage
from ns.training.ema import Ema
from ns.training.loop import make_training_workload
from ns.training.optim import make_optimizer
from ns.training.plan import TrainingPlan

DECODE_SECONDS = 1.0
"""Decoding is measured for so long, over and over the same images."""


class DeviceSpeed(NamedTuple):
    """Of one device."""

    mode: str
    images_per_second: float
    """Of the network: forward, and in training backward."""
    update_seconds: float
    """Of the optimizer and the averaged weights, once a step, however many images it has."""


def measure_training_speed(training_plan: TrainingPlan, *, outputs: int, batch: int, seconds: float) -> DeviceSpeed:
    """`batch`: images a device has in memory at a time."""
    role = training_plan.role
    network = models.build_model(role.model, role.noise, outputs).to(models.get_best_device())
    precisions: list[Precision] | None = None
    if role.train.precision != "auto":
        precisions = [PrecisionMode.parse(role.train.precision).precision]
    rate = measure_speed(make_training_workload(network, role, batch), seconds=seconds, precisions=precisions)
    optimizer = make_optimizer(network, role.train.optimizer)
    ema = Ema(network, role.train.ema_decay)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def update_weights() -> None:
        optimizer.step()
        ema.update(0)
        if parameter.device.type == "cuda":
            torch.cuda.synchronize()

    return DeviceSpeed(str(rate.mode), rate.images_per_second, _time_shortest(update_weights, rounds=3))


def measure_inference_speed(role: RoleConfig, *, outputs: int, batch: int, seconds: float) -> DeviceSpeed:
    """Of labeling and evaluation."""
    network = models.build_model(role.model, role.noise, outputs).eval().to(models.get_best_device())
    precision = role.model.inference_precision
    rate = measure_speed(
        make_inference_workload(network, role.model, batch),
        seconds=seconds,
        precisions=None if precision == "auto" else [precision],
    )
    return DeviceSpeed(str(rate.mode), rate.images_per_second, 0.0)


def measure_noise_seconds(transform: TrainTransform, sample_images: Sequence[SampleImage]) -> float:
    """Seconds of one core to make an image of a training step from what is in a shard."""
    rng = np.random.default_rng(0)
    return _time_per_image(lambda picture: transform(picture, rng), sample_images)


def measure_decode_seconds(transform: EvalTransform, resolution: int, sample_images: Sequence[SampleImage]) -> float:
    """Seconds of one core to make an image of labeling or evaluation."""
    out = allocate_images(1, resolution)

    def decode_image(picture: SampleImage) -> None:
        out[0] = transform(picture)

    return _time_per_image(decode_image, sample_images)


def _time_per_image(work: Callable[[SampleImage], object], sample_images: Sequence[SampleImage]) -> float:
    work(sample_images[0])  # the first one makes tables and imports
    started, done = time.perf_counter(), 0
    while done < len(sample_images) or time.perf_counter() - started < DECODE_SECONDS:
        work(sample_images[done % len(sample_images)])
        done += 1
    return (time.perf_counter() - started) / done


def _time_shortest(work: Callable[[], None], *, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])
