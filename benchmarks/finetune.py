"""How fast a pretrained network is fine-tuned on photographs: our loop against timm's train.py, loaders included.

    python -m benchmarks.finetune [--quick] [--json FILE] [--keep]

Both train the same network from the same file of weights, at 224 px, with AdamW, RandAugment of magnitude 9, the same batch and as many
loader processes, each at the precision that it chooses by itself. The photographs are JPEGs of 500 x 375 px, as ImageNet's, cut from
scikit-learn's two with grain. TIMM_TRAIN names timm's train.py, which its wheel lacks: github.com/huggingface/pytorch-image-models. The
sides take turns; rates are images per second.

    vs_timm_finetune    our loop ÷ timm's train.py; least favorable network
"""

import os
import re
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from benchmarks.data import draw_photographs
from benchmarks.measure import measure_turns, parse_arguments, record_ratio, stream_script, write_benchmark
from benchmarks.train import WARM_UP, Run, make_loop_run
from ns.config.schema import ImportConfig, ModelConfig, NoiseConfig, OptimizerConfig, RoleConfig, TrainConfig
from ns.data.dataset import Dataset
from ns.data.importing.ingest import import_images
from ns.modeling import factory as models
from ns.storage import LocalStore
from ns.training.warm_start import copy_weights, read_weights

ARCHITECTURES = ("mobilenetv3_small_100", "mobilenetv4_conv_small")
PX = 224
BATCH = 32
WORKERS = 2
CLASSES = 2
QUALITY = 85
"""Of the JPEGs, which have 60 kB each then."""


def main() -> None:
    options = parse_arguments(__doc__ or "")
    rounds, measured = (1, 6) if options.quick else (5, 16)
    script = os.environ.get("TIMM_TRAIN", "")
    console = Console(width=120)
    table = Table("network", "px", "ratio", "ours, images/s", "theirs, images/s", "ours ÷ theirs", "least … greatest")
    figures: dict[str, float] = {}
    if not script:
        console.print("vs_timm_finetune skipped: TIMM_TRAIN does not name timm's train.py", style="yellow")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_photographs(folder / "images" / "train", (WARM_UP + measured + 8) * BATCH)
        (folder / "images" / "validation").symlink_to(folder / "images" / "train")
        store = LocalStore(folder / "store")
        config = ImportConfig()
        data = import_images(
            str(folder / "images" / "train"), store, name="photographs", role="labeled", config=config, workers=2
        )
        for arch in ARCHITECTURES[:1] if options.quick else ARCHITECTURES:
            weights = folder / f"{arch}.safetensors"
            tensors = models.build_model(ModelConfig(arch=arch), NoiseConfig(), CLASSES).state_dict()
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
            with keep_weights(weights):
                runs: dict[str, Run] = {"ours": make_run(folder, store, data, arch, measured)}
                if script:
                    runs["timm"] = make_timm_run(script, folder / "images", arch, weights, measured)
                rates = measure_turns(runs, rounds)
            console.print(arch, {name: round(statistics.median(values), 1) for name, values in rates.items()})
            if script:
                record_ratio(figures, table, "vs_timm_finetune", rates, ("ours", "timm"), (arch, f"{PX}px"))
    write_benchmark("finetune", figures, options, table)


def write_photographs(folder: Path, count: int) -> None:
    """Writes photographs as class folders."""
    for number, photograph in enumerate(draw_photographs(count, QUALITY)):
        path = folder / str(number % CLASSES) / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph)


@contextmanager
def keep_weights(path: Path) -> Iterator[None]:
    """Inside, networks that our loop is given start from a file of weights, as those of a stage do."""
    build, weights = models.build_model, read_weights(str(path))

    def build_from_weights(config: ModelConfig, noise: NoiseConfig, outputs: int) -> nn.Module:
        network = build(config, noise, outputs)
        copy_weights(network, weights, ("0", "1"))
        return network

    models.build_model = build_from_weights
    try:
        yield
    finally:
        models.build_model = build


def make_run(folder: Path, store: LocalStore, data: Dataset, arch: str, measured: int) -> Run:
    train = TrainConfig(
        labeled_batch=BATCH,
        loader_workers=WORKERS,
        checkpoint_seconds=1e9,
        epochs=1e-9,
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, schedule="cosine", warmup_epochs=0),
    )
    noise = NoiseConfig(randaugment_magnitude=9, dropout=0, stochastic_depth=0)
    role = RoleConfig(model=ModelConfig(arch=arch, resolution=PX), noise=noise, train=train)
    return make_loop_run(LocalStore(folder / "none"), store, data, role, measured)


def make_timm_run(script: str, images: Path, arch: str, weights: Path, measured: int) -> Run:
    """timm's train.py; each run is a process of its own, whose first steps are not counted either."""
    arguments = ["--data-dir", str(images), "--model", arch, "--num-classes", str(CLASSES), "--img-size", str(PX)]
    arguments += ["--initial-checkpoint", str(weights), "--opt", "adamw", "--lr", "1e-4", "--sched", "cosine"]
    arguments += ["--warmup-epochs", "0", "--aa", "rand-m9-inc1", "--smoothing", "0.1", "--workers", str(WORKERS)]
    arguments += ["--batch-size", str(BATCH), "--device", models.get_best_device().type]
    arguments += ["--epochs", "1", "--log-interval", "1", "--output", str(images.parent / "output")]

    def run_script() -> float:
        with closing(stream_script(script, *arguments)) as lines:
            seen = (match[1] for line in lines if (match := re.search(r"Time: [\d.]+s, +([\d.]+)/s", line)))
            rates = [float(rate) for rate in islice(seen, WARM_UP + measured)]
        # Its own mean of a step is the rate of the batch before it; the harmonic mean is that of all of them together.
        return statistics.harmonic_mean(rates[WARM_UP:])

    return run_script


if __name__ == "__main__":
    main()
