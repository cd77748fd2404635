"""How fast labeling is: against the bare forward pass on images in memory, and against timm's inference.py.

    python -m benchmarks.label [--quick] [--json FILE] [--keep]

CIFAR-10's test images (without ../shared/data/cifar10 generated ones, and says so) at 64 px, in one shard of the usual size, labeled by
networks with random weights. TIMM_INFERENCE names timm's inference.py, which its wheel lacks:
github.com/huggingface/pytorch-image-models. Both of our sides run in the precision that `auto` means here, with torch.compile
(not with --quick); timm's script with its defaults.

    forward_ratio        labeling, from tars to Parquet ÷ the same network on a batch in memory; least favorable case
    vs_timm_inference    images per second of the whole command without its start ÷ inference.py's; least favorable case
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.data import import_small_images
from benchmarks.measure import measure_rates, parse_arguments, record_ratio, stream_script, write_benchmark
from ns.config.schema import LabelingConfig, ModelConfig, NoiseConfig
from ns.data.dataset import Dataset
from ns.labeling.predict import label_pool_shards
from ns.modeling import factory as models
from ns.modeling.manifest import Lineage
from ns.modeling.precision import PrecisionMode, choose_precision
from ns.modeling.predictor import Predictor
from ns.storage import LocalStore

ARCHITECTURES = ("efficientnet_b0", "resnet18")
PX = 64
BATCH = 256
CLASSES = tuple("0123456789")
LARGE = 100_000_000
"""Images of a pool for which a model is compiled."""
MEASURED = 12
"""Batches of inference.py that are counted, after two that are not."""


def main() -> None:
    options = parse_arguments(__doc__ or "")
    rounds = 3 if options.quick else 9
    console = Console(width=120)
    table = Table("network", "ratio", "ours, images/s", "theirs, images/s", "ours ÷ theirs", "least … greatest")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        store = LocalStore(folder / "pool")
        images, shard_samples = (2_000, 1_000) if options.quick else (10_000, 10_000)
        data = import_small_images(folder / "images" / "validation", store, "unlabeled", images, shard_samples)
        for arch in ARCHITECTURES[:1] if options.quick else ARCHITECTURES:
            model_store = make_random_model(arch, LocalStore(folder / arch), compiled=not options.quick)
            predictor = Predictor(model_store, batch=BATCH, images=LARGE)
            contestants: dict[str, Callable[[], int]] = {
                "ours": make_labeler(predictor, store, data, folder / "labels"),
                "bare": make_bare_forward(model_store, predictor.mode, 2_000 if options.quick else 5_000),
            }
            for run in contestants.values():
                run()  # compiles, allocates
            measured = measure_rates(contestants, rounds)
            pairs = [("forward_ratio", "bare")]
            if not options.quick and (script := os.environ.get("TIMM_INFERENCE")):
                measured["timm"] = [
                    run_timm_inference(script, folder / "images", arch, folder / arch / predictor.manifest.weights_key)
                ] * rounds
                pairs.append(("vs_timm_inference", "timm"))
            for figure, other in pairs:
                record_ratio(figures, table, figure, measured, ("ours", other), (arch,))
            console.print(f"{arch}: {predictor.mode}")
    if "vs_timm_inference" not in figures and not options.quick:
        console.print("vs_timm_inference skipped: TIMM_INFERENCE does not name timm's inference.py", style="yellow")
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


def make_bare_forward(store: LocalStore, mode: PrecisionMode, images: int) -> Callable[[], int]:
    """The same network, prepared in the same way, on one batch that is normalized and on the device."""
    device = models.get_best_device()
    network = mode.prepare_network(models.load_model(store)[0].to(device).requires_grad_(False))
    batch = torch.randn(BATCH, 3, PX, PX, device=device).to(memory_format=torch.channels_last)
    steps = images // BATCH

    @torch.inference_mode()
    def run_once() -> int:
        total = torch.zeros((), device=device)
        for _ in range(steps):
            with mode.autocast(device):
                logits = network(batch)
            total += logits.float().sum()
        total.item()
        return steps * BATCH

    return run_once


def run_timm_inference(script: str, images: Path, arch: str, weights: Path) -> float:
    """Images per second of timm's script with its defaults, except network, size and device."""
    ends: list[float] = []
    arguments = ["--data-dir", str(images), "--model", arch, "--num-classes", str(len(CLASSES)), "--img-size", str(PX)]
    arguments += ["--device", models.get_best_device().type, "--log-freq", "1", "--checkpoint", str(weights)]
    arguments += ["--results-dir", str(images.parent / "results"), "--no-console-results"]
    with closing(stream_script(script, *arguments)) as lines:
        for line in lines:
            if re.search(r"Predict: \[\d+/\d+\]", line):
                ends.append(time.perf_counter())
            if len(ends) == MEASURED + 2:
                break
    return MEASURED * BATCH / (ends[-1] - ends[1])


if __name__ == "__main__":
    main()
