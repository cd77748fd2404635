"""The images of a step depend on the seed and the step only: not on processes, storage or earlier errors."""

import contextlib
import io
import mmap
import multiprocessing
import os
import shutil
import socket
import sys
import threading
import time
from multiprocessing import SimpleQueue, connection, resource_sharer
from multiprocessing.queues import Queue

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ns.config.schema import NoiseConfig
from ns.core.errors import DataError, StoreError, TrainingError
from ns.data.augment.transforms import EvalTransform, TrainTransform
from ns.data.dataset import Dataset, Shard
from ns.data.importing.writer import ShardWriter
from ns.data.index import ShardIndex, build_index_key
from ns.data.loading import shard_reader, stream
from ns.data.loading.decode import EncodedJpeg, decode_image, read_jpeg_size
from ns.data.loading.shard_reader import ImageSource, count_window_shards
from ns.data.loading.shared_memory import StepShape, StepSplit
from ns.data.loading.stream import LabeledImages, PseudoLabeledImages, TrainingBatches, iterate_batches
from ns.storage import LocalStore
from tests.storage.conftest import environment, moto, proxied, store_at, swift  # noqa: F401
from tests.storage.faults import Fault

CLASSES = ("a", "b", "c")
NOISE = NoiseConfig(randaugment_layers=1, randaugment_magnitude=5)


def write(folder, picture, count=50, label=True, kind="JPEG", size=16, shard_samples=7):
    with ShardWriter(folder, max_samples=shard_samples, max_bytes=1 << 24) as writer:
        for number in range(count):
            data = picture(number, kind, size)
            writer.add_image(f"{number:03d}", kind.lower().replace("jpeg", "jpg"), data, number % 3 if label else None)
    role = "labeled" if label else "unlabeled"
    dataset = Dataset(name="n", role=role, classes=CLASSES if label else (), shards=writer.shards)
    dataset.save(folder)
    return dataset


@pytest.fixture(scope="module")
def written(tmp_path_factory, picture):
    """Folder of labeled images and pool, and the two datasets. Each test has a copy."""
    root = tmp_path_factory.mktemp("written")
    pool = write(LocalStore(root / "pool"), picture, count=33, label=False, kind="PNG")
    return root, write(LocalStore(root / "labeled"), picture), pool


@pytest.fixture
def labeled(tmp_path, written):
    root, dataset, _ = written
    return LocalStore(shutil.copytree(root / "labeled", tmp_path / "labeled")), dataset


@pytest.fixture
def pool(tmp_path, written):
    root, _, dataset = written
    return LocalStore(shutil.copytree(root / "pool", tmp_path / "pool")), dataset


def make_batches(labeled, pool=None, *, batch_size=10, noise=NOISE, **ranks):
    folder, dataset = labeled
    pseudo = None
    if pool:
        rng = np.random.default_rng(0)
        targets = [rng.random((shard.samples, 3), np.float32) for shard in pool[1].shards]
        copies = [rng.integers(0, 3, shard.samples).astype(np.uint16) for shard in pool[1].shards]
        pseudo = PseudoLabeledImages(ImageSource(*pool), targets.__getitem__, copies)
    transform = TrainTransform(noise, 16, "pad")
    options = {"batch_size": batch_size, "pseudo_batch_size": 6, "num_classes": 3, "seed": 4, **ranks}
    return TrainingBatches(LabeledImages(folder, dataset), pseudo, transform, **options)


def arrays(batch):
    return [part.numpy().copy() for part in (*batch[:3], *(batch.mixed or ()))]


def read_steps(source, count):
    batches = make_batches(source)
    return [arrays(batches[step]) for step in range(count)]


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def first_steps(written):
    """Twelve steps, each made on its own."""
    root, labeled, pool = written
    folders = (LocalStore(root / "labeled"), labeled), (LocalStore(root / "pool"), pool)
    return [arrays(make_batches(*folders)[step]) for step in range(12)]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_batches_resume_at_any_step_with_any_workers(labeled, pool, first_steps, workers, start):
    expected = first_steps[start:]
    found = iterate_batches(make_batches(labeled, pool), start=start, stop=12, workers=workers, pin_memory=False)
    assert all(equal(a, arrays(b)) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_together_see_the_batch_of_one_process(labeled, pool, world):
    whole = make_batches(labeled, pool)
    parts = [make_batches(labeled, pool, rank=rank, world_size=world) for rank in range(world)]
    for step in (0, 3, 20):
        images, labels, targets = arrays(whole[step])
        shares = [arrays(part[step]) for part in parts]
        assert np.array_equal(np.concatenate([share[1] for share in shares]), labels)
        assert np.array_equal(np.concatenate([share[2] for share in shares]), targets)
        together = [share[0][: len(share[1])] for share in shares] + [share[0][len(share[1]) :] for share in shares]
        assert np.array_equal(np.concatenate(together), images)


MIXED = NOISE.model_copy(update={"mixup": 0.8, "cutmix": 1.0, "erasing": 0.5})


@pytest.mark.parametrize(("workers", "parts"), [(0, 1), (2, 1), (2, 3), (1, 10)])
def test_mixed_batches_resume_at_any_step_with_any_workers(labeled, pool, workers, parts):
    expected = [arrays(make_batches(labeled, pool, noise=MIXED)[step]) for step in range(3, 8)]
    batches, split = make_batches(labeled, pool, noise=MIXED), StepSplit(parts)
    found = iterate_batches(batches, start=3, stop=8, workers=workers, pin_memory=False, split=split)
    assert all(equal(a, arrays(b)) for a, b in zip(expected, found, strict=True))
    assert len(expected[0]) == 6


def test_shared_memory_of_mixed_parts_is_what_they_have(labeled, pool):
    batches = make_batches(labeled, pool, noise=MIXED)
    part = batches.make_part(2, 1, 3)
    page = mmap.PAGESIZE
    taken = sum(-(-tensor.nbytes // page) * page for tensor in (*part[:3], *part.mixed))
    assert taken <= StepShape(*batches.count_images(), 16, 3, True).count_part_bytes(3) <= taken + page


@pytest.mark.parametrize("batch_size", [10, 9])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_mixing_does_not_depend_on_ranks_or_sizes_of_batches(labeled, pool, world, batch_size):
    """Pairs are those of the stream, wherever steps and ranks divide it."""
    one = make_batches(labeled, pool, noise=MIXED, batch_size=1, pseudo_batch_size=1)
    parts = [
        make_batches(labeled, pool, noise=MIXED, batch_size=batch_size, pseudo_batch_size=6, rank=rank, world_size=world)
        for rank in range(world)
    ]
    for step in (0, 3):
        batches = [part[step] for part in parts]
        for kind, size in enumerate((batch_size, 6)):
            singles = [one[position] for position in range(step * size, (step + 1) * size)]
            got = [
                (image, share, label, partner)
                for batch in batches
                for image, share, label, partner in zip(
                    batch.images[len(batch.class_ids) :] if kind else batch.images,
                    batch.mixed.shares[len(batch.class_ids) :] if kind else batch.mixed.shares,
                    batch[1 + kind],
                    batch.mixed[kind],
                    strict=False,
                )
            ]
            assert len(got) == size
            for (image, share, label, partner), single in zip(got, singles, strict=True):
                assert np.array_equal(image, single.images[kind])
                assert share == single.mixed.shares[kind]
                assert np.array_equal(label, single[1 + kind][0])
                assert np.array_equal(partner, single.mixed[kind][0])


def test_images_are_mixed_with_their_neighbors(labeled, pool):
    quiet = NoiseConfig(randaugment_layers=0, flip=False, pad_px=0)
    plain = make_batches(labeled, pool, noise=quiet)[1]
    mixed = make_batches(labeled, pool, noise=quiet.model_copy(update={"mixup": 1.0}))[1]
    shares = mixed.mixed.shares.numpy()
    for count, offset in ((10, 0), (6, 10)):
        for index in range(offset, offset + count):
            neighbor = offset + ((index - offset) ^ 1)
            assert shares[index] == shares[neighbor]
            expected = shares[index] * plain.images[index].numpy() + (1 - shares[index]) * plain.images[neighbor].numpy()
            assert np.abs(mixed.images[index].numpy() - expected).max() <= 0.51
    assert np.array_equal(mixed.mixed.class_ids, plain.class_ids.reshape(5, 2).flip(1).ravel())
    assert np.array_equal(mixed.mixed.targets, plain.targets.reshape(3, 2, 3).flip(1).reshape(6, 3))
    assert np.array_equal(mixed.class_ids, plain.class_ids)
    assert plain.mixed is None


def test_streams_may_have_transforms_of_their_own(labeled, pool):
    still = TrainTransform(NoiseConfig(randaugment_layers=0, flip=False, pad_px=0), 16, "pad")
    both = make_batches(labeled, pool, noise=MIXED)[0]
    only_labeled = make_batches(labeled, pool, noise=MIXED, pseudo_transform=still)[0]
    plain = make_batches(labeled, pool, noise=NoiseConfig(randaugment_layers=0, flip=False, pad_px=0))[0]
    assert np.array_equal(only_labeled.images[:10], both.images[:10])
    assert np.array_equal(only_labeled.images[10:], plain.images[10:])
    assert only_labeled.mixed.shares[10:].tolist() == [1] * 6
    assert np.array_equal(only_labeled.mixed.targets, only_labeled.targets)


def test_ranks_together_see_each_image_once_per_epoch(labeled):
    parts = [make_batches(labeled, rank=rank, world_size=3) for rank in range(3)]
    seen = [place for step in range(5) for part in parts for place in part._streams[0].locate_images(step)]
    assert len(seen) == len(set(seen)) == 50


@pytest.mark.parametrize(
    ("shard_mib", "shards", "together"), [(20, 400, 128), (256, 400, 32), (256, 3, 32), (4096, 40, 8), (0, 1, 128)]
)
def test_window_shards_are_limited_in_number_and_bytes(shard_mib, shards, together):
    manifests = [Shard(name=f"{i}.tar", samples=1, bytes=shard_mib << 20, sha256="0" * 64) for i in range(shards)]
    assert count_window_shards(Dataset(name="n", role="unlabeled", classes=(), shards=manifests)) == together


def test_training_reads_within_the_open_shards(tmp_path, picture, monkeypatch):
    monkeypatch.setattr(shard_reader, "WINDOW_SHARDS", 4)
    monkeypatch.setattr(shard_reader, "MIN_WINDOW_SHARDS", 4)
    folder = LocalStore(tmp_path)
    batches = make_batches((folder, write(folder, picture, count=48, shard_samples=4)), batch_size=8)
    for step in range(6):
        batches[step]
    # Each of the twelve shards once: a window of four stays open until the next one begins.
    assert batches._streams[0].source._open_cached.cache_info().misses == 12


def test_scaled_decoding_looks_the_same():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    smooth.save(sink, "JPEG", quality=95)
    data = sink.getvalue()
    assert read_jpeg_size(data) == (640, 480)
    encoded, whole = EncodedJpeg(data, 640, 480), decode_image(data)
    assert encoded.decode_box((0, 0, 640, 480), 64)[0].shape == (120, 160, 3)
    assert encoded.decode_box((0, 0, 640, 480), 400)[0].shape == (480, 640, 3)
    # Scaled decoding smooths a little differently from bicubic resizing, by a few of 255 levels.
    evaluated = EvalTransform(64, "resized", 32)
    assert np.abs(evaluated(encoded).astype(int) - evaluated(whole)).mean() < 1.5
    plain = TrainTransform(NoiseConfig(randaugment_layers=0), 64, "resized")
    for seed in range(20):
        first, second = (plain(image, np.random.default_rng(seed)).astype(int) for image in (encoded, whole))
        assert np.abs(first - second).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("crop", ["resized", "pad"])
def test_batch_holds_all_image_formats(tmp_path, picture, kind, crop):
    folder = LocalStore(tmp_path / kind)
    labeled = folder, write(folder, picture, kind=kind, size=20)
    transform = TrainTransform(NoiseConfig(), 16, crop)
    labeled = TrainingBatches(
        LabeledImages(*labeled), None, transform, batch_size=8, pseudo_batch_size=0, num_classes=3, seed=0
    )
    assert labeled[3].images.shape == (8, 16, 16, 3)


# The index beside a shard


def test_index_file_equals_index_made_from_tar(labeled, pool):
    for folder, dataset in (labeled, pool):
        for shard in dataset.shards:
            kept = ShardIndex.load(folder, shard)
            folder.delete(build_index_key(shard))
            walked = ShardIndex.load(folder, shard)
            assert kept.table.equals(walked.table)
            assert len(kept) == shard.samples


@pytest.mark.parametrize("spoil", ["another", "garbage", "labels"])
def test_index_that_is_not_that_of_the_manifest_is_made_from_the_tar(labeled, spoil, capsys):
    folder, dataset = labeled
    first, second = dataset.shards[:2]
    expected = ShardIndex.load(folder, first)
    if spoil == "labels":
        wrong = expected.table.set_column(4, "class_id", pa.array(expected.class_ids[::-1]))
        ShardIndex._from_table(wrong).save(folder, first)
    else:
        folder.put(build_index_key(first), folder.get(build_index_key(second)) if spoil == "another" else b"garbage")
    assert ShardIndex.load(folder, first).table.equals(expected.table)
    logged = capsys.readouterr()
    assert "an index is not that of dataset.json" in logged.out + logged.err


def test_index_without_checksum_in_the_manifest_is_not_believed(labeled):
    folder, dataset = labeled
    shard = dataset.shards[0].model_copy(update={"index_sha256": None})
    expected = ShardIndex.load(folder, shard)
    folder.put(build_index_key(shard), folder.get(build_index_key(dataset.shards[1])))
    assert ShardIndex.load(folder, shard).table.equals(expected.table)


def test_index_is_not_made_from_a_damaged_tar(labeled):
    folder, dataset = labeled
    shard = dataset.shards[0]
    folder.delete(build_index_key(shard))
    data = bytearray(folder.get(shard.name))
    data[600] ^= 1
    folder.put(shard.name, bytes(data))
    with pytest.raises(DataError, match=r"its sha256 is not that of dataset\.json"):
        ShardIndex.load(folder, shard)


# Damage


def test_reader_refuses_changed_shard(labeled):
    folder, dataset = labeled
    data = bytearray(folder.get("shard-00002.tar"))
    data[700] ^= 1
    folder.put("shard-00002.tar", bytes(data))
    source = ImageSource(folder, dataset)
    with pytest.raises(DataError, match=r"shard-00002\.tar: its sha256 is not that of dataset\.json"):
        source.read_image(2, 0)
    folder.put("shard-00002.tar", bytes(data[:-512]))
    with pytest.raises(
        DataError, match=r"shard-00002\.tar: has 13824 bytes, dataset\.json says 14336|shard-00002\.tar: has \d+ bytes"
    ):
        source.read_image(2, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_shard_error_names_shard(labeled, workers):
    folder, _ = labeled
    batches = make_batches(labeled)
    folder.delete("shard-00003.tar")
    with pytest.raises((DataError, StoreError), match=r"shard-00003\.tar"):
        list(iterate_batches(batches, start=0, stop=20, workers=workers, pin_memory=False))


def test_batch_error_names_shard_and_key(tmp_path, picture):
    folder = LocalStore(tmp_path)
    with ShardWriter(folder, max_samples=10, max_bytes=1 << 20) as writer:
        writer.add_image("good", "jpg", picture(0, "JPEG"), 0)
        writer.add_image("bad", "jpg", picture(1, "JPEG")[:200], 1)
    dataset = Dataset(name="n", role="labeled", classes=CLASSES, shards=writer.shards)
    labeled = TrainingBatches(
        LabeledImages(folder, dataset),
        None,
        TrainTransform(NOISE, 16, "pad"),
        batch_size=2,
        pseudo_batch_size=0,
        num_classes=3,
        seed=0,
    )
    with pytest.raises(DataError, match=r"shard-00000\.tar: bad: truncated; import the data again"):
        labeled[0]


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_steps_made_in_parts_are_those_made_whole(labeled, pool, parts):
    """10 labeled and 6 pseudo-labeled images per step, on the second of two ranks."""
    ranks = {"rank": 1, "world_size": 2}
    expected = [arrays(make_batches(labeled, pool, **ranks)[step]) for step in range(3, 9)]
    found = iterate_batches(
        make_batches(labeled, pool, **ranks), start=3, stop=9, workers=2, pin_memory=False, split=StepSplit(parts, ahead=1)
    )
    assert all(equal(a, arrays(b)) for a, b in zip(expected, found, strict=True))


def test_loader_without_room_in_shared_memory_says_so(labeled, monkeypatch):
    def fail(_tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(
        TrainingError, match=r"^/dev/shm has no room for [\d,]+ bytes of images.*loader_workers \(0 needs none\)$"
    ):
        next(iterate_batches(make_batches(labeled), start=0, stop=9, workers=1, pin_memory=False))


@pytest.mark.timeout(60)
def test_loader_that_cannot_send_ends_the_training_with_its_reason(labeled, monkeypatch):
    """Python drops what a process cannot send, and goes on: the training would wait for it for good."""

    class Unsendable:
        def __reduce__(self):
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(stream._StepParts, "__getitem__", lambda _self, number: Unsendable() if number == 2 else number)
    # torch looks every 5 s whether its processes are alive.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    with pytest.raises(TrainingError, match=r"a data loader cannot hand over its images: OSError: .*Too many open files"):
        list(iterate_batches(make_batches(labeled), start=0, stop=9, workers=1, pin_memory=False))


# From S3


@pytest.fixture
def remote(moto, tmp_path, picture):  # noqa: F811
    store = store_at(moto, tmp_path / "cache")
    return store, write(store, picture)


@pytest.mark.integration
@pytest.mark.usefixtures("environment")
def test_batches_from_s3_equal_batches_from_folder(labeled, remote):
    assert all(equal(a, b) for a, b in zip(read_steps(labeled, 8), read_steps(remote, 8), strict=True))


@pytest.mark.integration
@pytest.mark.usefixtures("environment")
def test_workers_fetch_each_shard_once(proxied, picture):  # noqa: F811
    store, proxy = proxied
    labeled = store, write(store, picture)
    expected = read_steps(labeled, 10)
    proxy.requests.clear()
    store.service.cache.root.rename(store.service.cache.root.with_name("old"))
    found = [arrays(batch) for batch in iterate_batches(make_batches(labeled), start=0, stop=10, workers=2, pin_memory=False)]
    assert all(equal(a, b) for a, b in zip(expected, found, strict=True))
    assert proxy.count(r"GET .*\.tar") == len(labeled[1].shards)


@pytest.mark.integration
@pytest.mark.usefixtures("environment")
def test_batches_are_unchanged_by_s3_errors(proxied, picture):  # noqa: F811
    store, proxy = proxied
    labeled = store, write(store, picture)
    expected = read_steps(labeled, 10)
    store.service.cache.root.rename(store.service.cache.root.with_name("old"))
    proxy.faults = [
        Fault(r"GET .*shard-00001\.tar", 2, 503),
        Fault(r"GET .*shard-00002\.tar", 1, truncate=5000),
        Fault(r"GET .*shard-00003\.tar", 1, flip=True),
        Fault(r"GET .*shard-00004\.tar", 1, reset="before"),
    ]
    assert all(equal(a, b) for a, b in zip(expected, read_steps(labeled, 10), strict=True))
    assert not any(fault.times for fault in proxy.faults)


@pytest.mark.integration
@pytest.mark.usefixtures("environment")
def test_unreachable_shard_error_names_shard(proxied, picture):  # noqa: F811
    store, proxy = proxied
    stream = make_batches((store, write(store, picture)))
    proxy.faults = [Fault(r"GET .*shard-00001\.tar", 1000, 503)]
    with pytest.raises(StoreError, match=r"shard-00001\.tar: cannot read: .*SlowDown"):
        list(map(stream.__getitem__, range(10)))


@pytest.mark.integration
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("environment")
def test_batches_are_unchanged_by_server_restarts(swift, tmp_path, picture):  # noqa: F811
    from ns.storage.retry import RetryPolicy
    from ns.storage.s3 import S3Service, S3Store

    near = store_at(swift.url, tmp_path / "cache")
    labeled = near, write(near, picture, count=200, shard_samples=10)
    expected = [arrays(make_batches(labeled)[step]) for step in range(30)]
    near.service.cache.root.rename(tmp_path / "old")
    patience = RetryPolicy(seconds=60, first_contact_seconds=60, cap_seconds=0.5)
    patient = S3Store(near.uri, S3Service(near.service.endpoint, retry_policy=patience, cache=near.service.cache))

    def trouble():
        for _ in range(3):
            swift.kill()
            time.sleep(0.7)
            swift.start()
            time.sleep(0.2)

    thread = threading.Thread(target=trouble)
    thread.start()
    try:
        found = [arrays(make_batches((patient, labeled[1]))[step]) for step in range(30)]
    finally:
        thread.join()
    assert all(equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("run", [1, 2, 64])
def test_read_encoded_equals_reading_single_rows(labeled, monkeypatch, run):
    folder, dataset = labeled
    source = ImageSource(folder, dataset)
    alone = [source.read_image(1, row).data for row in range(7)]
    monkeypatch.setattr(shard_reader, "READ_ROWS", run)
    assert [image.data for image in source.read_encoded(1)] == alone
    assert [image.data for image in source.read_encoded(1, 2, 5)] == alone[2:5]


# From the loaders to a GPU


def test_parts_are_written_into_the_memory_that_loaders_hand_over(labeled, pool):
    batches = make_batches(labeled, pool)
    expected, taken = batches[3], []

    def allocate(shape):
        taken.append(stream._allocate_shared_pixels(shape))
        return taken[-1]

    batch = batches.make_part(3, 0, 1, allocate)
    assert batch.images is taken[0]
    assert batch.images.is_shared()
    assert torch.equal(batch.images, expected.images)


def test_copies_to_a_gpu_run_beside_the_network(monkeypatch):
    """On fakes: what is called on which stream, in which order."""
    calls, active = [], ["working"]

    class FakeStream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    class FakeTensor:
        def to(self, device, non_blocking=False):
            calls.append(f"{active[-1]} copies" + " at once" * non_blocking)
            return self

        def record_stream(self, used_by):
            calls.append(f"kept for {used_by.name}")

    @contextlib.contextmanager
    def use_stream(used):
        active.append(used.name)
        yield
        active.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(active[-1]))
    monkeypatch.setattr(torch.cuda, "stream", use_stream)
    batches = [stream.Batch(FakeTensor(), FakeTensor(), FakeTensor()) for _ in range(2)]
    copies = stream.copy_ahead(iter(batches), torch.device("cuda"))
    for number in range(2):
        next(copies)
        calls.append(f"network on {number}")
    copied = ["copying copies at once"] * 3 + ["working waits for copying"] + ["kept for working"] * 3
    assert calls == [*copied, "network on 0", *copied, "network on 1"]


@pytest.mark.parametrize(("has_init", "printed"), [(True, ""), (False, "ConnectionResetError")])
def test_loader_says_nothing_of_a_training_that_was_killed_while_it_took_a_batch(monkeypatch, capfd, has_init, printed):
    """The thread that hands over shared memory meets a connection that is reset; without our set-up it prints a stack trace."""
    monkeypatch.setattr(Queue, "_on_queue_feeder_error", Queue._on_queue_feeder_error)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    if has_init:
        stream._init_loader(SimpleQueue(), 0)
    sharer = resource_sharer._ResourceSharer()
    address, key = sharer.register(lambda connection, pid: connection.send("batch"), lambda: None)
    with socket.socket(socket.AF_UNIX) as training:
        training.connect(address)
        # What is left unread resets the connection.
        training.send(b"x")
        training.recv(4)
    # It serves the next one.
    with connection.Client(address, authkey=multiprocessing.current_process().authkey) as training:
        training.send((key, os.getpid()))
        assert training.recv() == "batch"
    sharer.stop(timeout=5)
    error = capfd.readouterr().err
    assert printed in error
    assert bool(printed) == bool(error)
