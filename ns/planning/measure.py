"""How fast this machine does the parts of a step: the network, the update of its weights, decoding and noise."""

import contextlib
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from ns.config.schema import Precision, RoleConfig
from ns.core.errors import TrainingError
from ns.data.augment.transforms import EvalTransform, TrainTransform
from ns.data.loading.decode import allocate_images
from ns.modeling.factory import build_model, get_best_device
from ns.modeling.precision import PrecisionMode, Task, choose_precision
from ns.planning.data_stats import SampleImage
from ns.training.ema import Ema
from ns.training.optim import make_optimizer
from ns.training.plan import TrainingPlan

DECODE_SECONDS = 1.0
"""Time for which the same images are decoded over and over, at most."""


class DeviceSpeed(NamedTuple):
    """Speed of one device."""

    mode: str
    """Precision of the network."""
    images_per_second: float
    """Of the network: the forward pass, and in training also the backward pass."""
    update_seconds: float
    """Time of the optimizer and the averaged weights, once per step, however many images it has."""


def describe_machine(device: torch.device) -> str:
    """The processor that does the work, and its number of threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads"


def measure_training_speed(training_plan: TrainingPlan, *, outputs: int, batch: int, seconds: float) -> DeviceSpeed:
    """Forward and backward passes, without torch.compile. `batch`: images that a device has in memory at a time.

    Raises TrainingError if two images do not fit into memory.
    """
    role, device = training_plan.role, get_best_device()
    network = build_model(role.model, role.noise, outputs).to(device).train()
    mode = _resolve_mode(role.train.precision, "train", device)

    def train_once(images: torch.Tensor) -> None:
        with mode.autocast(device):
            logits = network(images)
        network.zero_grad(set_to_none=True)
        logits.float().square().mean().backward()

    rate = measure_rate(train_once, device, batch=batch, resolution=role.model.resolution, seconds=seconds)
    return DeviceSpeed(str(mode), rate, _measure_update_seconds(network, role, device))


def measure_inference_speed(role: RoleConfig, *, outputs: int, batch: int, seconds: float) -> DeviceSpeed:
    """Forward passes as in labeling and evaluation. Raises TrainingError if two images do not fit into memory."""
    device, resolution = get_best_device(), role.model.inference_resolution
    network = build_model(role.model, role.noise, outputs).eval().to(device)
    mode = _resolve_mode(role.model.inference_precision, "infer", device)

    def predict_once(images: torch.Tensor) -> None:
        with torch.inference_mode(), mode.autocast(device):
            network(images)

    rate = measure_rate(predict_once, device, batch=batch, resolution=resolution, seconds=seconds)
    return DeviceSpeed(str(mode), rate, 0.0)


def measure_rate(
    run_pass: Callable[[torch.Tensor], object], device: torch.device, *, batch: int, resolution: int, seconds: float
) -> float:
    """Images per second, measured for about `seconds` with as many images per pass as fit into that time, at most `batch`.

    A network that takes longer for two images is measured with one or two passes over them. Raises TrainingError if they do not
    fit into memory.
    """
    # With one image, a batch norm whose map is one px wide cannot be trained.
    least = min(2, batch)
    out_of_memory = f"out of memory with {least} images of {resolution} px"
    images, fastest = _draw_images(least, resolution, device), float("inf")
    for _ in range(2):
        try:
            fastest = min(fastest, _time_pass(partial(run_pass, images), device))
        except torch.OutOfMemoryError as error:
            raise TrainingError(out_of_memory) from error
        if fastest > seconds / 4:
            break
    if fastest > seconds / 2:
        return least / fastest
    # Half of the time for the passes that count, of which there are at least two, after a first one that allocates.
    count = max(least, min(batch, int(least * seconds / 6 / fastest)))
    while True:
        try:
            images = _draw_images(count, resolution, device)
            _time_pass(partial(run_pass, images), device)
            times: list[float] = []
            while len(times) < 2 or sum(times) < seconds / 2:
                times.append(_time_pass(partial(run_pass, images), device))
            # The shortest time: a neighbor on the same cores slows down single passes by any factor.
            return count / min(times)
        except torch.OutOfMemoryError as error:
            if count == least:  # another process has taken the memory since
                raise TrainingError(out_of_memory) from error
            count = max(least, count // 2)


def measure_noise_seconds(transform: TrainTransform, sample_images: Sequence[SampleImage], seconds: float) -> float:
    """Seconds that one core takes to make an image of a training batch from what is in a shard, measured for `seconds`."""
    rng = np.random.default_rng(0)

    def make_image(image: SampleImage) -> None:
        pixels = transform(image, rng)
        if transform.mixer and rng.random() < 0.5:  # once per pair
            transform.mixer(pixels, pixels, rng)

    return _time_per_image(make_image, sample_images, seconds)


def measure_decode_seconds(
    transform: EvalTransform, resolution: int, sample_images: Sequence[SampleImage], seconds: float
) -> float:
    """Seconds that one core takes to make an image for labeling or evaluation, measured for `seconds`."""
    out = allocate_images(1, resolution)

    def decode_image(image: SampleImage) -> None:
        out[0] = transform(image)

    return _time_per_image(decode_image, sample_images, seconds)


def _resolve_mode(precision: Literal["auto"] | Precision, task: Task, device: torch.device) -> PrecisionMode:
    """Uncompiled: compiling takes longer than measuring."""
    return PrecisionMode(choose_precision(task, device)[0] if precision == "auto" else precision)


def _draw_images(count: int, resolution: int, device: torch.device) -> torch.Tensor:
    """float32 [count, 3, resolution, resolution]. A generator of its own leaves the draws of others as they are."""
    images = torch.randn(count, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    return images.to(device, memory_format=torch.channels_last)


def _measure_update_seconds(network: nn.Module, role: RoleConfig, device: torch.device) -> float:
    optimizer = make_optimizer(network, role.train.optimizer, role.train.optimizer.lr)
    ema = Ema(network, role.train.ema_decay)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def update_weights() -> None:
        optimizer.step()
        ema.update(0)

    # The first update allocates the optimizer's state.
    return min([_time_pass(update_weights, device) for _ in range(4)][1:])


def _time_pass(run_pass: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run_pass()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _time_per_image(
    process_image: Callable[[SampleImage], object], sample_images: Sequence[SampleImage], seconds: float
) -> float:
    process_image(sample_images[0])  # the first one imports modules and fills tables
    started, done = time.perf_counter(), 0
    while done < len(sample_images) or time.perf_counter() - started < seconds:
        process_image(sample_images[done % len(sample_images)])
        done += 1
    return (time.perf_counter() - started) / done
