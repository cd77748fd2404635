"""How fast labeling is: against the bare forward pass on images in memory, and against timm's inference.py.

    python -m benchmarks.label [--quick] [--json FILE] [--keep]

CIFAR-10's test images (without ../shared/data/cifar10 made-up ones, and says so) at 64 px, in one shard of the usual size, labeled by
networks with random weights. TIMM_INFERENCE names timm's inference.py, which its wheel lacks:
github.com/huggingface/pytorch-image-models. Both of our sides run in the mode that is the fastest here for a large pool, with
torch.compile if that pays (not with --quick); timm's script with its defaults.

    forward_ratio        labeling, from tars to Parquet ÷ the same network on a batch in memory; the least case
    vs_timm_inference    images a second of the whole command, start included on neither side ÷ inference.py's; the least case
"""

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.data import make_small_folders
from benchmarks.measure import CIFAR10, measure_rates, paired_ratio, parse_arguments, write_benchmark
from ns.config.schema import ImportConfig, LabelingConfig, ModelConfig, NoiseConfig
from ns.data.dataset import Dataset
from ns.data.importing.ingest import import_images
from ns.labeling.predict import label_pool_shards
from ns.modeling import factory as models
from ns.modeling.manifest import WEIGHTS, Lineage
from ns.modeling.precision import choose_precision
from ns.modeling.predictor import Predictor
from ns.storage import LocalStore

ARCHITECTURES = ("efficientnet_b0", "resnet18")
PX = 64
BATCH = 256
CLASSES = tuple("0123456789")
LARGE = 100_000_000
"""Images of the pool for which compiling is judged."""
MEASURED = 12
"""Batches of inference.py that are counted, after two that are not."""


def main() -> None:
    options = parse_arguments(__doc__ or "")
    rounds = 3 if options.quick else 5
    console = Console(width=120)
    table = Table("network", "mode", "ratio", "ours, images/s", "theirs, images/s", "ours ÷ theirs", "least … greatest")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not CIFAR10.exists():
            console.print(f"{CIFAR10} is not there: made-up images stand in for it", style="yellow")
        folders = make_small_folders(folder / "images" / "validation", 2_000 if options.quick else 10_000)
        store = LocalStore(folder / "pool")
        config = ImportConfig(shard_samples=1_000 if options.quick else 10_000)
        data = import_images(str(folders), store, name="pool", role="unlabeled", config=config, workers=2)
        for arch in ARCHITECTURES[:1] if options.quick else ARCHITECTURES:
            model_store = make_random_model(arch, LocalStore(folder / arch), compiled=not options.quick)
            predictor = Predictor(model_store, batch=BATCH, images=LARGE)
            contestants: dict[str, Callable[[], int]] = {
                "ours": make_labeler(predictor, store, data, folder / "labels"),
                "bare": make_bare_forward(predictor, 2_000 if options.quick else 5_000),
            }
            for run in contestants.values():
                run()  # compiles, allocates
            measured = measure_rates(contestants, rounds)
            pairs = [("forward_ratio", "bare")]
            if not options.quick and (script := os.environ.get("TIMM_INFERENCE")):
                measured["timm"] = [run_timm_inference(Path(script), folder / "images", arch, folder / arch / WEIGHTS)] * rounds
                pairs.append(("vs_timm_inference", "timm"))
            for figure, other in pairs:
                middle, least, most = paired_ratio(measured, "ours", other)
                figures[f"{figure}.{arch}"] = round(middle, 4)
                figures[figure] = round(min(middle, figures.get(figure, middle)), 4)
                speeds = [f"{statistics.median(measured[side]):,.0f}" for side in ("ours", other)]
                table.add_row(arch, str(predictor.mode), figure, *speeds, f"{middle:.3f}", f"{least:.3f} … {most:.3f}")
    console.print(table)
    if "vs_timm_inference" not in figures and not options.quick:
        console.print("vs_timm_inference left out: TIMM_INFERENCE does not name timm's inference.py", style="yellow")
    write_benchmark("label", figures, options, table)


def make_random_model(arch: str, store: LocalStore, *, compiled: bool) -> LocalStore:
    """A model with random weights in the precision that `auto` means here."""
    torch.manual_seed(0)
    config = ModelConfig(arch=arch, resolution=PX, crop="pad")
    noise = NoiseConfig()
    network = models.build_model(config, noise, len(CLASSES))
    precision, _ = choose_precision("infer", models.get_best_device())
    fields = {
        "generation": 0,
        "model": config.model_copy(update={"inference_precision": precision, "inference_compile": compiled}),
        "noise": noise,
        "classes": CLASSES,
        "parameters": models.count_parameters(network),
        "steps": 0,
        "lineage": Lineage(config="0", labeled="0", teacher=None, label_set=None, selection=None),
    }
    models.save_model(store, network.cpu().state_dict(), fields, [])
    return store


def make_labeler(predictor: Predictor, store: LocalStore, data: Dataset, path: Path) -> Callable[[], int]:
    """All of labeling: tars, decoding, network, Parquet."""

    def run_once() -> int:
        shutil.rmtree(path, ignore_errors=True)
        return label_pool_shards([predictor], store, data, LocalStore(path), range(len(data.shards)), LabelingConfig())

    return run_once


def make_bare_forward(predictor: Predictor, images: int) -> Callable[[], int]:
    """The same network, as it was prepared, on one batch that is normalized and on the device."""
    device = models.get_best_device()
    batch = torch.randn(BATCH, 3, PX, PX, device=device).to(memory_format=torch.channels_last)
    steps = images // BATCH

    @torch.inference_mode()
    def run_once() -> int:
        for _ in range(steps):
            with predictor.mode.autocast(device):
                logits = predictor.forward_pass(batch)
        logits.float().sum().item()
        return steps * BATCH

    return run_once


def run_timm_inference(script: Path, images: Path, arch: str, weights: Path) -> float:
    """Images a second of timm's script with its defaults, but for the network, its size and the device."""
    command = [sys.executable, str(script), "--data-dir", str(images), "--model", arch, "--num-classes", str(len(CLASSES))]
    command += ["--img-size", str(PX), "--device", models.get_best_device().type, "--log-freq", "1"]
    command += ["--checkpoint", str(weights)]
    command += ["--results-dir", str(images.parent / "results"), "--no-console-results"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    output_lines, ends = [], []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            output_lines.append(line)
            if re.search(r"Predict: \[\d+/\d+\]", line):
                ends.append(time.perf_counter())
            if len(ends) == MEASURED + 2:
                return MEASURED * BATCH / (ends[-1] - ends[1])
    finally:
        # Its loaders too.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    raise SystemExit("".join(output_lines[-20:]) + f"{script} ended early")


if __name__ == "__main__":
    main()
