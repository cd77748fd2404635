"""How fast the training loop is: against the bare step of the same network on images in memory, and against timm's train.py.

    python -m benchmarks.train [--quick] [--json FILE] [--keep]

Needs the CIFAR-10 images in ../shared/data/cifar10 (without them generated ones of the same size, and says so). For the peer,
TIMM_TRAIN names timm's train.py, which its wheel lacks: github.com/huggingface/pytorch-image-models. Rates are images per second;
both of our sides run in the precision that `auto` means here, timm's script with its defaults.

    step_ratio_plain        our loop, RandAugment off ÷ forward, backward and optimizer on a batch in memory; least favorable case
    step_ratio_randaugment  the same with the paper's RandAugment
    vs_timm_train           our loop with RandAugment ÷ train.py, which augments less; least favorable case
"""

import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.data import import_small_images
from benchmarks.measure import measure_turns, parse_arguments, record_ratio, stream_script, write_benchmark
from ns.config.schema import ModelConfig, NoiseConfig, RoleConfig, TrainConfig
from ns.core import log
from ns.core.malloc import keep_freed_memory
from ns.data.dataset import Dataset
from ns.data.loading.stream import LabeledImages
from ns.modeling import factory as models
from ns.modeling.precision import PrecisionMode, choose_precision
from ns.storage import LocalStore
from ns.training import loop
from ns.training.optim import make_optimizer
from ns.training.plan import plan_training

ARCHITECTURES = ("efficientnet_b0", "resnet18")
BATCH = 64
CLASSES = 10
WARM_UP = 6
"""Steps that are not counted: their batches were made while the network was built."""
NOISES = {
    "plain": NoiseConfig(randaugment_layers=0),
    "randaugment": NoiseConfig(randaugment_magnitude=5),
}

Run = Callable[[], float]
"""Runs its steps, and returns images per second."""


def main() -> None:
    options = parse_arguments(__doc__ or "")
    rounds, measured = (3, 6) if options.quick else (5, 8)
    console = Console(width=120)
    table = Table("network", "px", "ratio", "ours, images/s", "theirs, images/s", "ours ÷ theirs", "least … greatest")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        store = LocalStore(folder / "small")
        folders = folder / "images" / "train"
        data = import_small_images(folders, store, "labeled", 4_000 if options.quick else 10_000)
        (folder / "images" / "validation").symlink_to(folders)
        for arch, px in product(*((ARCHITECTURES[:1], (32,)) if options.quick else (ARCHITECTURES, (32, 64)))):
            role = make_role(arch, px, NOISES["plain"])
            console.print(f"{arch}, {px} px: {role.train.precision}")
            theirs = make_bare_steps(role, measured)
            ours = {
                name: make_loop_run(
                    LocalStore(folder / "none"), store, data, role.model_copy(update={"noise": noise}), measured
                )
                for name, noise in NOISES.items()
            }
            rates = measure_turns({"bare": theirs, **ours}, rounds)
            pairs = [("step_ratio_plain", "plain", "bare"), ("step_ratio_randaugment", "randaugment", "bare")]
            if not options.quick and (script := os.environ.get("TIMM_TRAIN")):
                rates["timm"] = [run_timm_train(script, folder / "images", arch, px, measured)] * rounds
                pairs.append(("vs_timm_train", "randaugment", "timm"))
            for figure, *pair in pairs:
                record_ratio(figures, table, figure, rates, (pair[0], pair[1]), (arch, f"{px}px"))
    if "vs_timm_train" not in figures and not options.quick:
        console.print("vs_timm_train skipped: TIMM_TRAIN does not name timm's train.py", style="yellow")
    write_benchmark("train", figures, options, table)


def make_role(arch: str, px: int, noise: NoiseConfig) -> RoleConfig:
    precision, _ = choose_precision("train", models.get_best_device())
    train = TrainConfig(labeled_batch=BATCH, loader_workers=1, checkpoint_seconds=1e9, epochs=1e-9, precision=precision)
    return RoleConfig(model=ModelConfig(arch=arch, resolution=px, crop="pad"), noise=noise, train=train)


def make_bare_steps(role: RoleConfig, measured_steps: int) -> Run:
    """Forward, backward and optimizer on one normalized batch in memory; keeps freed memory, as training does."""
    device = models.get_best_device()
    if device.type == "cpu":
        keep_freed_memory()
    mode = PrecisionMode.parse(role.train.precision)
    network = models.build_model(role.model, role.noise, CLASSES).to(device)
    forward = mode.prepare_network(network)
    optimizer = make_optimizer(network, role.train.optimizer, role.train.optimizer.lr)
    images = torch.randn(BATCH, 3, role.model.resolution, role.model.resolution, device=device)
    images = images.to(memory_format=torch.channels_last)
    class_ids = torch.randint(0, CLASSES, (BATCH,), device=device)

    def train_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with mode.autocast(device):
            logits = forward(images)
        F.cross_entropy(logits.float(), class_ids, label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def run_steps() -> float:
        train_step()
        synchronize_device()
        started = time.perf_counter()
        for _ in range(measured_steps):
            train_step()
        synchronize_device()
        return measured_steps * BATCH / (time.perf_counter() - started)

    return run_steps


class StepTimer(log.Progress):
    """Records when each step ended."""

    ends: list[float]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        StepTimer.ends = []

    def update(self, count: int = 1, **metrics: Any) -> None:  # noqa: ARG002
        synchronize_device()
        self.ends.append(time.perf_counter())


def make_loop_run(checkpoints: LocalStore, store: LocalStore, data: Dataset, role: RoleConfig, measured_steps: int) -> Run:
    """Our whole loop: read, decode, noise, step, average, record."""
    labeled_set, batch = LabeledImages(store, data), role.train.labeled_batch
    epochs = (WARM_UP + measured_steps) * batch / labeled_set.samples
    role = role.model_copy(update={"train": role.train.model_copy(update={"epochs": epochs})})

    def run_loop() -> float:
        network = models.build_model(role.model, role.noise, CLASSES)
        training_plan = plan_training(role, labeled_set.samples)
        original_progress, log.Progress = log.Progress, StepTimer  # type: ignore[misc]
        try:
            loop.train_model(network, training_plan, labeled_set, None, classes=CLASSES, seed=0, checkpoints=checkpoints)
        finally:
            log.Progress = original_progress  # type: ignore[misc]
        counted = StepTimer.ends[WARM_UP - 1 :]
        return (len(counted) - 1) * batch / (counted[-1] - counted[0])

    return run_loop


def run_timm_train(script: str, images: Path, arch: str, px: int, measured_steps: int) -> float:
    """Median rate of timm's train.py with its defaults, except network, size, batch and device."""
    rates: list[float] = []
    arguments = ["--data-dir", str(images), "--model", arch, "--num-classes", str(CLASSES), "--img-size", str(px)]
    arguments += ["--batch-size", str(BATCH), "--device", models.get_best_device().type]
    arguments += ["--epochs", "1", "--log-interval", "1", "--output", str(images / "output")]
    with closing(stream_script(script, *arguments)) as lines:
        for line in lines:
            if match := re.search(r"Time: [\d.]+s, +([\d.]+)/s", line):
                rates.append(float(match[1]))
            if len(rates) == WARM_UP + measured_steps:
                break
    return statistics.median(rates[WARM_UP:])


def synchronize_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
