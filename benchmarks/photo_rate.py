"""How fast training's input of photographs is made by the `ns` that Python finds: this one, or an earlier commit's (benchmarks/photos.py).

    PYTHONPATH=FOLDER python -P benchmarks/photo_rate.py PHOTOGRAPHS.npz    prints images per second for each line that it reads

It imports nothing of this package, which an earlier `ns` may not suit.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import simplejpeg
import torch

from ns.config.schema import NoiseConfig
from ns.data.augment.transforms import TrainTransform
from ns.data.loading.decode import EncodedJpeg

PX = 224

Run = Callable[[], int]
T = TypeVar("T")


def measure_cpu_rate(run: Run) -> float:
    """Images per second of processor time."""
    started = time.process_time()
    count = run()
    return count / (time.process_time() - started)


def make_train_runner(photographs: list[bytes]) -> Run:
    noise = NoiseConfig(randaugment_layers=2, randaugment_magnitude=9)
    transform, rng = TrainTransform(noise, PX, "resized"), np.random.default_rng(0)
    return make_runner(add_sizes(photographs), lambda photograph: transform(photograph, rng))


def add_sizes(photographs: list[bytes]) -> list[EncodedJpeg]:
    """The JPEGs with their sizes, as a dataset's index has them."""
    headers = [simplejpeg.decode_jpeg_header(photograph) for photograph in photographs]
    return [
        EncodedJpeg(photograph, width, height) for photograph, (height, width, *_) in zip(photographs, headers, strict=True)
    ]


def make_runner(photographs: list[T], transform: Callable[[T], object]) -> Run:
    def run_once() -> int:
        for photograph in photographs:
            transform(photograph)
        return len(photographs)

    return run_once


def serve_rates(path: Path) -> None:
    with np.load(path) as arrays:
        run = make_train_runner([array.tobytes() for array in arrays.values()])
    for _ in sys.stdin:
        print(measure_cpu_rate(run), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve_rates(Path(sys.argv[1]))
