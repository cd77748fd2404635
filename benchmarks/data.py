"""How fast images reach the model: our streams against the bare decoder and against other loaders, in one run.

    python -m benchmarks.data [--quick] [--json FILE] [--keep]

Needs the CIFAR-10 images in ../shared/data/cifar10 (without them generated ones of the same size, and says so), and for the
peers `pip install webdataset`. All rates are images per second of one reading process, on files in the page cache.
"""

import io
import itertools
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader

from benchmarks.measure import CIFAR10, measure_rates, paired_ratio, parse_arguments, write_benchmark
from ns.config.schema import Crop, ImportConfig, NoiseConfig
from ns.data.augment.randaugment import RandAugment
from ns.data.augment.transforms import EvalTransform, TrainTransform
from ns.data.dataset import Dataset, DatasetRole
from ns.data.importing.ingest import import_images
from ns.data.importing.writer import ShardWriter
from ns.data.loading import shard_reader
from ns.data.loading.decode import allocate_images
from ns.data.loading.sampler import ShardShuffle
from ns.data.loading.shard_reader import ImageSource
from ns.data.loading.stream import LabeledImages, TrainingBatches, iterate_batches
from ns.data.shards import read_samples
from ns.storage import LocalStore, Store

BATCH = 250
LARGE_PX = (500, 375)

Run = Callable[[], int]


def main() -> None:
    options = parse_arguments(__doc__ or "")
    rounds = 5 if options.quick else 15
    torch.set_num_threads(1)
    # Each round reads and decodes everything again.
    shard_reader.DECODED_BYTES = 0
    table = Table("what", "ours, images/s", "theirs, images/s", "ours ÷ theirs", "least … greatest")
    figures: dict[str, float] = {}

    def add_comparison(figure: str, what: str, ours: Run, theirs: Run, count: int = rounds) -> None:
        # Warms up page cache, imports and lazily made tables.
        ours(), theirs()
        # A quick run guards the others only against being broken (benchmarks/summary.py).
        turns = count if figure.startswith("decode_") or not options.quick else 1
        measured = measure_rates({"ours": ours, "theirs": theirs}, turns)
        median, least, greatest = paired_ratio(measured, "ours", "theirs")
        figures[figure] = round(median, 4)
        speed = [f"{statistics.median(measured[name]):,.0f}" for name in ("ours", "theirs")]
        table.add_row(f"{figure}\n[dim]{what}[/]", *speed, f"{median:.2f}", f"{least:.2f} … {greatest:.2f}")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folders, small = folder / "folders", LocalStore(folder / "small")
        data = import_small_images(folders, small, "labeled", 4_000 if options.quick else 10_000)
        large = LocalStore(folder / "large")
        photographs = make_large_images(large, 100 if options.quick else 400)

        pool = LocalStore(folder / "pool")
        unlabeled = import_small_images(folders, pool, "unlabeled", 0)
        limit = make_bare_decoder(small, data, allocate_images(BATCH, 32))
        what = "labeling's stream ÷ simplejpeg on bytes in memory"
        add_comparison("decode_ratio_32px", what, make_labeling_stream(pool, unlabeled), limit)
        add_comparison("decode_ratio_32px_shuffled", "training's stream ÷ the same", make_training_stream(small, data), limit)
        kilobytes = photographs.bytes / photographs.samples / 1000
        what = f"training's stream ÷ the same, {LARGE_PX[0]} x {LARGE_PX[1]} px of {kilobytes:.0f} kB"
        limit = make_bare_decoder(large, photographs, [None] * BATCH)
        add_comparison("decode_ratio_large", what, make_decoder(large, photographs), limit)
        what = "decoded no larger than needed, cropped and resized ÷ Pillow and torchvision"
        for size in (224, 96):
            resizers = make_resizer(large, photographs, size), make_pillow_resizer(large, photographs, size)
            add_comparison(f"resized_crop_{size}px_vs_pillow", what, *resizers)
        plain = NoiseConfig(randaugment_layers=0, flip=False)
        noisy = NoiseConfig(randaugment_layers=2, randaugment_magnitude=6)
        ours = make_training_loader(small, data, plain, "none")
        noisy_ours = make_training_loader(small, data, noisy, "pad")
        few = 3 if options.quick else 7
        for name, what, mine, theirs in (
            ("imagefolder", "shuffled batches ÷ torchvision's ImageFolder", ours, make_imagefolder_loader(folders)),
            ("timm", "with RandAugment and crop ÷ timm's loader", noisy_ours, make_timm_loader(folders)),
            ("webdataset", "shuffled batches ÷ webdataset on our tars", ours, make_webdataset_loader(small, data)),
        ):
            add_comparison(f"vs_{name}", what, mine, theirs, few)
        compare_s3(small, data, folder, plain, add_comparison, few)
        for size in (32, 224):
            compare_augment(size, add_comparison, rounds)
    write_benchmark("data", figures, options, table)


def import_small_images(folder: Path, store: LocalStore, role: DatasetRole, count: int, shard_samples: int = 2_000) -> Dataset:
    """Imports `count` small images into a store, by way of class folders in `folder`; the images there if `count` is 0."""
    if count:
        _make_small_folders(folder, count)
    config = ImportConfig(shard_samples=shard_samples)
    return import_images(str(folder), store, name="small", role=role, config=config, workers=2)


def _make_small_folders(folder: Path, count: int) -> None:
    """CIFAR-10's test images, or generated ones, as class folders."""
    if CIFAR10.exists():
        source = LocalStore(folder.with_name("imported"))
        data = import_images(str(CIFAR10), source, name="c", role="labeled", config=ImportConfig(shard_samples=1000), workers=2)
        for shard in data.shards[: count // 1000]:
            path = source.path(shard.name)
            for sample in read_samples(path):
                target = folder / f"{sample.key}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes()[sample.offset : sample.offset + sample.size])
        return
    sys.stderr.write(f"{CIFAR10}: does not exist; uses generated images\n")
    rng = np.random.default_rng(0)
    for number in range(count):
        target = folder / str(number % 10) / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        blurred = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        blurred.save(target, "JPEG", quality=90)


def make_large_images(store: Store, count: int) -> Dataset:
    """A dataset of `draw_photographs`, about 110 kB each."""
    with ShardWriter(store, max_samples=100, max_bytes=1 << 28) as writer:
        for number, photograph in enumerate(draw_photographs(count, quality=95)):
            writer.add_image(f"{number:05d}", "jpg", photograph, number % 2)
    dataset = Dataset(name="large", role="labeled", classes=("a", "b"), shards=writer.shards)
    dataset.save(store)
    return dataset


def draw_photographs(count: int, quality: int) -> list[bytes]:
    """JPEGs of LARGE_PX, which is ImageNet's usual size: cuts from scikit-learn's two photographs, with grain."""
    rng = np.random.default_rng(0)
    photographs = [
        Image.fromarray(image).resize((1280, 854), Image.Resampling.BICUBIC) for image in load_sample_images()["images"]
    ]
    encoded = []
    for number in range(count):
        left, upper = int(rng.integers(1280 - LARGE_PX[0])), int(rng.integers(854 - LARGE_PX[1]))
        cut = photographs[number % 2].crop((left, upper, left + LARGE_PX[0], upper + LARGE_PX[1]))
        grain = np.asarray(cut).astype(np.int16) + rng.normal(0, 6, (LARGE_PX[1], LARGE_PX[0], 1)).astype(np.int16)
        sink = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(sink, "JPEG", quality=quality)
        encoded.append(sink.getvalue())
    return encoded


def make_labeling_stream(store: Store, data: Dataset) -> Run:
    """An epoch into a batch, in the order of the tars, as labeling reads it."""
    source, transform, batch = ImageSource(store, data), EvalTransform(32, "none", 0), allocate_images(BATCH, 32)

    def run_epoch() -> int:
        for number, shard in enumerate(data.shards):
            for start in range(0, shard.samples, BATCH):
                stop = min(start + BATCH, shard.samples)
                transform.transform_batch(list(source.read_encoded(number, start, stop)), batch)
        return data.samples

    return run_epoch


def make_shuffled_run(store: Store, data: Dataset, use_batch: Callable[[ImageSource, Any], Any]) -> Run:
    """An epoch in the order of training; `use_batch` takes the positions of a batch."""
    source = ImageSource(store, data)
    order = ShardShuffle([np.ones(shard.samples, np.uint8) for shard in data.shards], (0, 0))

    def run_epoch() -> int:
        for start in range(0, data.samples, BATCH):
            source.fetch_ahead(order.prefetch(start))
            use_batch(source, order.positions(start, min(BATCH, data.samples - start)))
        return data.samples

    return run_epoch


def make_training_stream(store: Store, data: Dataset) -> Run:
    """An epoch into a batch, in the order of training."""
    transform, batch = EvalTransform(32, "none", 0), allocate_images(BATCH, 32)
    return make_shuffled_run(
        store, data, lambda source, positions: transform.transform_batch([source.read_image(*at) for at in positions], batch)
    )


def make_decoder(store: Store, data: Dataset) -> Run:
    """An epoch in the order of training, decoded whole: what resizes images begins here."""

    def decode_batch(source: ImageSource, positions: Any) -> None:
        for position in positions:
            source.read_pixels(*position)

    return make_shuffled_run(store, data, decode_batch)


def make_image_run(store: Store, data: Dataset, use_image: Callable[[Any], Any]) -> Run:
    """An epoch in the order of the tars, image by image."""
    source = ImageSource(store, data)

    def run_epoch() -> int:
        for number, shard in enumerate(data.shards):
            for row in range(shard.samples):
                use_image(source.read_image(number, row))
        return data.samples

    return run_epoch


def make_resizer(store: Store, data: Dataset, size: int) -> Run:
    """A random crop of each image, resized to `size` px."""
    transform, rng = TrainTransform(NoiseConfig(randaugment_layers=0), size, "resized"), np.random.default_rng(0)
    return make_image_run(store, data, lambda image: transform(image, rng))


def make_pillow_resizer(store: Store, data: Dataset, size: int) -> Run:
    """The same as torchvision users do it."""
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    crop = RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC)
    return make_image_run(store, data, lambda image: crop(Image.open(io.BytesIO(image.data)).convert("RGB")))


def make_bare_decoder(store: Store, data: Dataset, batch: Any) -> Run:
    """The same bytes, in memory already, through the same decoder with the same settings, into a batch if there is one."""
    blobs = []
    for shard in data.shards:
        tar = store.get(shard.name)
        blobs += [tar[sample.offset : sample.offset + sample.size] for sample in read_samples(store.path(shard.name))]

    def run_epoch() -> int:
        for start in range(0, len(blobs), BATCH):
            for blob, out in zip(blobs[start : start + BATCH], batch, strict=False):
                simplejpeg.decode_jpeg(blob, "RGB", False, False, 0, 0, 1, out)
        return len(blobs)

    return run_epoch


def drain_batches(batches: Iterator[Any]) -> int:
    return sum(len(batch[0]) for batch in batches)


def make_training_loader(store: Store, data: Dataset, noise: NoiseConfig, crop: Crop) -> Run:
    labeled_set = LabeledImages(store, data)

    def run_epoch() -> int:
        transform = TrainTransform(noise, 32, crop)
        batches = TrainingBatches(
            labeled_set, None, transform, batch_size=BATCH, pseudo_batch_size=0, num_classes=len(data.classes), seed=0
        )
        return drain_batches(iterate_batches(batches, start=0, stop=data.samples // BATCH, workers=1, pin_memory=False))

    return run_epoch


def make_imagefolder_loader(folder: Path) -> Run:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    dataset = ImageFolder(str(folder), PILToTensor())
    return lambda: drain_batches(iter(DataLoader(dataset, BATCH, shuffle=True, num_workers=1, drop_last=True)))


def make_timm_loader(folder: Path) -> Run:
    from timm.data import create_loader
    from timm.data.dataset import ImageDataset

    batches = create_loader(
        ImageDataset(str(folder)),
        input_size=(3, 32, 32),
        batch_size=BATCH,
        is_training=True,
        use_prefetcher=False,
        auto_augment="rand-m6-n2",
        scale=(1.0, 1.0),
        color_jitter=None,
        num_workers=1,
        persistent_workers=False,
    )
    return lambda: drain_batches(iter(batches))


def make_webdataset_loader(store: LocalStore, data: Dataset) -> Run:
    import webdataset as wds

    tars = [str(store.path(shard.name)) for shard in data.shards]
    samples = (
        wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False)
        .shuffle(1000)
        .decode("rgb8")
        .to_tuple("jpg", "cls")
        .batched(BATCH)
    )
    return lambda: drain_batches(iter(DataLoader(samples, batch_size=None, num_workers=1)))


def compare_s3(
    local_store: Store, data: Dataset, scratch_folder: Path, noise: NoiseConfig, compare: Callable[..., None], rounds: int
) -> None:
    """Our loader from a server on this machine, its cache empty and filled, against the same from a folder."""
    from minio import Minio
    from moto.server import ThreadedMotoServer

    from ns.storage.s3 import S3Store

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "NS_CACHE_DIR": str(scratch_folder / "cache"),
    }
    client = Minio(endpoint=f"{host}:{port}", access_key="key", secret_key="secret", secure=False, region="us-east-1")
    client.make_bucket(bucket_name="bench")
    store = S3Store("s3://bench/small")
    for key in local_store.list():
        store.put(key, local_store.get(key))
    numbers = itertools.count()

    def run_cold() -> int:
        os.environ["NS_CACHE_DIR"] = str(scratch_folder / f"cache-{next(numbers)}")
        return make_training_loader(store, data, noise, "none")()

    warm = make_training_loader(store, data, noise, "none")
    local = make_training_loader(local_store, data, noise, "none")
    compare("s3_cold_vs_folder", "from S3 with an empty cache ÷ from a folder", run_cold, local, rounds)
    compare("s3_warm_vs_folder", "from S3 with a full cache ÷ from a folder", warm, local, rounds)
    server.stop()


def compare_augment(size: int, compare: Callable[..., None], rounds: int) -> None:
    """RandAugment alone, two operations at magnitude 9, on decoded images."""
    from timm.data.auto_augment import rand_augment_transform
    from torchvision.transforms import v2

    rng = np.random.default_rng(0)
    count = 2_000 if size == 32 else 100
    arrays = [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(count)]
    pictures = [Image.fromarray(array) for array in arrays]
    tensors = [torch.from_numpy(array).permute(2, 0, 1).contiguous() for array in arrays]
    ours = RandAugment(2, 9, size)

    def make_item_run(items: list[Any], work: Callable[[Any], Any]) -> Run:
        def run_items() -> int:
            for item in items:
                work(item)
            return count

        return run_items

    mine = make_item_run(arrays, lambda pixels: ours(pixels, rng))
    for name, what, theirs in (
        ("pillow", "timm's, on Pillow", make_item_run(pictures, rand_augment_transform("rand-m9-n2", {}))),
        ("torchvision", "torchvision v2's, on tensors", make_item_run(tensors, v2.RandAugment(2, 9))),
    ):
        compare(f"randaugment_vs_{name}_{size}px", f"RandAugment alone ÷ {what}", mine, theirs, rounds)


if __name__ == "__main__":
    main()
