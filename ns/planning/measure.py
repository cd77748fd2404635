"""How fast this machine does the parts of a step: the network, the update of its weights, decoding and noise."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ns.config.schema import Precision, RoleConfig
from ns.data.augment.transforms import EvalTransform, TrainTransform
from ns.data.loading.decode import room
from ns.modeling import factory as models
from ns.modeling.precision import Mode, measured
from ns.modeling.predictor import inference_workload
from ns.planning.data_stats import Picture
from ns.training.ema import Ema
from ns.training.loop import training_workload
from ns.training.optim import make_optimizer
from ns.training.plan import Course

PICTURE_SECONDS = 1.0
"""Decoding is measured for so long, over and over the same images."""


class Speed(NamedTuple):
    """Of one device."""

    mode: str
    images_per_second: float
    """Of the network: forward, and in training backward."""
    update_seconds: float
    """Of the optimiser and the averaged weights, once a step, however many images it has."""


def training_speed(course: Course, *, outputs: int, batch: int, seconds: float) -> Speed:
    """`batch`: images a device has in memory at a time."""
    role = course.role
    network = models.build(role.model, role.noise, outputs).to(models.best_device())
    precisions: list[Precision] | None = None
    if role.train.precision != "auto":
        precisions = [Mode.parse(role.train.precision).precision]
    rate = measured(training_workload(network, role, batch), seconds=seconds, precisions=precisions)
    optimizer = make_optimizer(network, role.train.optimizer)
    ema = Ema(network, role.train.ema_decay)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def update() -> None:
        optimizer.step()
        ema.update(0)
        if parameter.device.type == "cuda":
            torch.cuda.synchronize()

    return Speed(str(rate.mode), rate.images_per_second, _shortest(update, rounds=3))


def inference_speed(role: RoleConfig, *, outputs: int, batch: int, seconds: float) -> Speed:
    """Of labelling and evaluation."""
    network = models.build(role.model, role.noise, outputs).eval().to(models.best_device())
    named = role.model.inference_precision
    rate = measured(
        inference_workload(network, role.model, batch), seconds=seconds, precisions=None if named == "auto" else [named]
    )
    return Speed(str(rate.mode), rate.images_per_second, 0.0)


def noise_seconds(transform: TrainTransform, pictures: Sequence[Picture]) -> float:
    """Seconds of one core to make an image of a training step from what is in a shard."""
    rng = np.random.default_rng(0)
    return _each(lambda picture: transform(picture, rng), pictures)


def decode_seconds(transform: EvalTransform, resolution: int, pictures: Sequence[Picture]) -> float:
    """Seconds of one core to make an image of labelling or evaluation."""
    out = room(1, resolution)

    def decode(picture: Picture) -> None:
        out[0] = transform(picture)

    return _each(decode, pictures)


def _each(work: Callable[[Picture], object], pictures: Sequence[Picture]) -> float:
    work(pictures[0])  # the first one makes tables and imports
    started, done = time.perf_counter(), 0
    while done < len(pictures) or time.perf_counter() - started < PICTURE_SECONDS:
        work(pictures[done % len(pictures)])
        done += 1
    return (time.perf_counter() - started) / done


def _shortest(work: Callable[[], None], *, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])
