"""How fast one core makes a network's input of photographs: ours against timm's transforms, the bare decoder, and ourselves before.

    python -m benchmarks.photos [--quick] [--json FILE] [--keep]

JPEGs of 500 x 375 px and about 60 kB, cut from scikit-learn's two photographs with grain, in memory; results of 224 px. Neither side
normalizes: both leave that to the device (timm's create_transform with use_prefetcher). Both filters are bicubic. Seconds are those of the
processor, which other programs disturb less.

    photo_train_vs_timm            random crop, flip and RandAugment of magnitude 9 ÷ timm's with rand-m9-mstd0.5
    photo_label_vs_timm            labeling's center crop ÷ timm's transform of evaluation
    photo_label_share_of_decode    labeling's center crop ÷ libjpeg-turbo decoding the whole image, and nothing else
    photo_train_vs_today           training's input ÷ that of commit 904b801, which resized and augmented with Pillow
"""

import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import photo_rate
from benchmarks.data import LARGE_PX, draw_photographs
from benchmarks.measure import measure_turns, paired_ratio, parse_arguments, write_benchmark
from benchmarks.photo_rate import PX, Run, add_sizes, make_runner, make_train_runner, measure_cpu_rate
from ns.data.augment.transforms import EvalTransform

QUALITY = 89
BEFORE = "904b801"
"""The commit before photographs were resized by torch and augmented as arrays."""
REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    options = parse_arguments(__doc__ or "")
    rounds, count = (5, 40) if options.quick else (15, 150)
    torch.set_num_threads(1)
    console = Console(width=120)
    figures: dict[str, float] = {}
    table = Table("figure", "ours, images/s", "theirs, images/s", "ours ÷ theirs", "least … greatest")
    photographs = draw_photographs(count, QUALITY)
    with serve_rates_before(photographs) as measure_before:
        runs = {
            "train": make_train_runner(photographs),
            "timm's train": make_timm_runner(photographs, is_training=True),
            "label": make_label_runner(photographs),
            "timm's label": make_timm_runner(photographs, is_training=False),
            "decode": make_decode_runner(photographs),
        }
        contestants: dict[str, Callable[[], float]] = {name: partial(measure_cpu_rate, run) for name, run in runs.items()}
        pairs = {
            "photo_train_vs_timm": ("train", "timm's train"),
            "photo_label_vs_timm": ("label", "timm's label"),
            "photo_label_share_of_decode": ("label", "decode"),
        }
        if measure_before is None:
            console.print(f"photo_train_vs_today skipped: git has no commit {BEFORE} here", style="yellow")
        else:
            contestants["train before"] = measure_before
            pairs["photo_train_vs_today"] = ("train", "train before")
        measure_turns(contestants, 1)  # imports, lazily made tables
        measured = measure_turns(contestants, rounds)
    for figure, (ours, theirs) in pairs.items():
        median, least, greatest = paired_ratio(measured, ours, theirs)
        figures[figure] = round(median, 4)
        speeds = [f"{statistics.median(measured[side]):,.0f}" for side in (ours, theirs)]
        table.add_row(figure, *speeds, f"{median:.2f}", f"{least:.2f} … {greatest:.2f}")
    kilobytes = sum(map(len, photographs)) / count / 1000
    console.print(f"{count} photographs of {LARGE_PX[0]} x {LARGE_PX[1]} px, {kilobytes:.0f} kB each")
    write_benchmark("photos", figures, options, table)


def make_label_runner(photographs: list[bytes]) -> Run:
    transform = EvalTransform(PX, "resized", 32)
    return make_runner(add_sizes(photographs), transform)


def make_timm_runner(photographs: list[bytes], *, is_training: bool) -> Run:
    from timm.data import create_transform

    kind = {"auto_augment": "rand-m9-mstd0.5"} if is_training else {"crop_pct": PX / (PX + 32)}
    transform = create_transform(PX, is_training=is_training, interpolation="bicubic", use_prefetcher=True, **kind)
    return make_runner(photographs, lambda photograph: transform(Image.open(io.BytesIO(photograph)).convert("RGB")))


def make_decode_runner(photographs: list[bytes]) -> Run:
    return make_runner(photographs, lambda photograph: simplejpeg.decode_jpeg(photograph, "RGB"))


@contextmanager
def serve_rates_before(photographs: list[bytes]) -> Iterator[Callable[[], float] | None]:
    """What measures our training's rate with the code of BEFORE, in a process of its own; None if git does not have it."""
    archive = subprocess.run(["git", "archive", BEFORE, "ns"], cwd=REPOSITORY, capture_output=True)
    if archive.returncode:
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        np.savez(folder / "photographs.npz", *(np.frombuffer(photograph, np.uint8) for photograph in photographs))
        # -P: or modules of this package, as `select`, would be taken for Python's own.
        command = [sys.executable, "-P", photo_rate.__file__, str(folder / "photographs.npz")]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            requests, answers = process.stdin, process.stdout
            assert requests
            assert answers

            def measure_before() -> float:
                requests.write("\n")
                requests.flush()
                return float(answers.readline())

            yield measure_before
            requests.close()


if __name__ == "__main__":
    main()
