import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ns.cli import app as cli
from ns.config.schema import ImportConfig
from ns.core.errors import DataError
from ns.data import fingerprint
from ns.data.dataset import Dataset
from ns.data.importing.ingest import import_images
from ns.data.importing.writer import ShardWriter
from ns.data.leakage import DUPLICATES, LEFT_OUT, LeakageReport, NamedDataset, check_datasets, load_left_out_rows
from ns.data.loading.shard_reader import ImageSource
from ns.storage import LocalStore


def scene(seed: int, size: int = 64) -> Image.Image:
    """A recognizable picture: a few soft blobs."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "JPEG", **options) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def make_dataset(folder, role, images, shard_samples=7):
    """A dataset of images (bytes) with alternating classes."""
    store = LocalStore(folder)
    with ShardWriter(store, max_samples=shard_samples, max_bytes=1 << 24) as writer:
        for number, data in enumerate(images):
            extension = "jpg" if data.startswith(b"\xff\xd8") else "png"
            writer.add_image(f"{number:03d}", extension, data, None if role == "unlabeled" else number % 2)
    classes = () if role == "unlabeled" else ("a", "b")
    data = Dataset(name=folder.name, role=role, classes=classes, shards=writer.shards)
    data.save(store)
    return NamedDataset(folder.name, store, data)


@pytest.fixture
def sets(tmp_path):
    """A pool with copies of held-out images: unchanged (3), encoded again (5) and smaller (8); and one of its own images twice."""
    heldout = [encoded(scene(seed)) for seed in range(20)]
    pool = [encoded(scene(seed)) for seed in range(100, 130)]
    pool[4] = heldout[3]
    pool[11] = encoded(scene(5), quality=60)
    pool[12] = pool[11]
    pool[25] = encoded(scene(8).resize((48, 48)), "PNG")
    pool[29] = pool[28]
    labeled = [encoded(scene(seed)) for seed in range(200, 210)]
    return {
        "pool": make_dataset(tmp_path / "pool", "unlabeled", pool),
        "labeled": make_dataset(tmp_path / "labeled", "labeled", labeled),
        "heldout": make_dataset(tmp_path / "heldout", "evaluation", heldout),
    }


def run(sets, tmp_path, **options):
    out = LocalStore(tmp_path / "out")
    return check_datasets(list(sets.values()), out, LocalStore(tmp_path / "kept"), **options), out


def test_check_finds_changed_heldout_images_in_pool(sets, tmp_path):
    report, out = run(sets, tmp_path)
    leak = report.get_overlap("pool", "heldout")
    assert (leak.same, leak.near, report.left_out) == (1, 3, 4)
    assert report.get_overlap("pool", "pool").same == 2
    assert (report.get_overlap("labeled", "heldout").same, report.get_overlap("labeled", "heldout").near) == (0, 0)
    assert report.classes == {"heldout": {"a": 10, "b": 10}, "labeled": {"a": 5, "b": 5}}
    rows = pq.read_table(io.BytesIO(out.get(LEFT_OUT))).to_pylist()
    assert [(row["key"], row["like_key"], row["same_bytes"]) for row in rows] == [
        ("004", "003", True),
        ("011", "005", False),
        ("012", "005", False),
        ("025", "008", False),
    ]
    assert LeakageReport.load_file(out, "check.json") == report


def test_left_out_rows_name_shard_and_row(sets, tmp_path):
    _, out = run(sets, tmp_path)
    shards = sets["pool"].dataset.shards
    assert load_left_out_rows(out) == {
        shards[0].sha256: {4: "also in heldout: 003"},
        shards[1].sha256: {4: "also in heldout: 005", 5: "also in heldout: 005"},
        shards[3].sha256: {4: "also in heldout: 008"},
    }


def test_fingerprints_are_computed_once(sets, tmp_path, monkeypatch):
    expected, _ = run(sets, tmp_path)
    kept = LocalStore(tmp_path / "kept")
    lost = next(kept.list())
    kept.delete(lost)
    computed = []
    fingerprint_images = fingerprint._fingerprint_images
    monkeypatch.setattr(
        fingerprint, "_fingerprint_images", lambda images: computed.append(len(images)) or fingerprint_images(images)
    )
    assert run(sets, tmp_path)[0] == expected
    assert 0 < sum(computed) <= 7


def test_check_does_not_match_flat_and_tiny_images(tmp_path):
    flat = [encoded(Image.new("RGB", (64, 64), (level, level, level)), "PNG") for level in range(0, 200, 10)]
    tiny = [encoded(scene(seed, 8), "PNG") for seed in range(20)]
    sets = {
        "pool": make_dataset(tmp_path / "pool", "unlabeled", flat[:10] + tiny[:10]),
        "heldout": make_dataset(tmp_path / "heldout", "evaluation", flat[10:] + tiny[10:]),
    }
    report, _ = run(sets, tmp_path)
    assert report.left_out == 0
    assert all(overlap.near == 0 for overlap in report.overlaps)


def test_check_compares_unreadable_images_by_bytes(tmp_path):
    bad = encoded(scene(0))[:200]
    sets = {
        "pool": make_dataset(tmp_path / "pool", "unlabeled", [bad, b"\xff\xd8\xff"]),
        "heldout": make_dataset(tmp_path / "h", "evaluation", [bad]),
    }
    report, _ = run(sets, tmp_path)
    assert (report.get_overlap("pool", "h").same, report.left_out) == (1, 1)


def test_features_confirm_or_reject_near_images(sets, tmp_path):
    report, _ = run(sets, tmp_path, features=lambda images: np.ones((len(images), 4), np.float32))
    assert report.get_overlap("pool", "heldout").near == 3
    signs = iter((1, -1))
    report, _ = run(sets, tmp_path, features=lambda images: np.full((len(images), 4), next(signs), np.float32))
    assert (report.get_overlap("pool", "heldout").near, report.left_out) == (0, 1)


def test_data_check_prints_counts_and_refuses_trained_evaluation_images(sets, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run_command_line(["data", "check", "pool", "labeled", "heldout", "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "4 images of pools are also in an evaluation set: they are left out" in " ".join(out.split())
    both = make_dataset(tmp_path / "both", "labeled", [encoded(scene(seed)) for seed in (3, 300)])
    assert both.dataset.samples == 2
    assert cli.run_command_line(["data", "check", "both", "heldout", "--out", "out"]) == DataError.exit_code
    assert "both: 1 of its images are also in the evaluation set heldout" in capsys.readouterr().err
    assert cli.run_command_line(["data", "check", "both", "heldout", "--out", "out", "--allow-overlap", "--json"]) == 0
    assert '"left_out": 0' in capsys.readouterr().out


@pytest.mark.data
@pytest.mark.timeout(300)
def test_check_finds_changed_copies_in_cifar10(cifar10, tmp_path):
    """500 of CIFAR-10's test images, changed, among 5,000 of its training images."""
    store = LocalStore(tmp_path / "all")
    data = import_images(str(cifar10 / "test.tar.gz"), store, name="all", role="unlabeled", config=ImportConfig())
    source = ImageSource(store, data)
    order = np.random.default_rng(0).permutation(data.samples)
    held, other = order[:1000], order[1000:6000]
    pictures = {int(row): Image.fromarray(source.read_pixels(0, int(row))) for row in order[:6000]}
    heldout = [encoded(pictures[int(row)], "PNG") for row in held]
    changed = []
    for number, row in enumerate(held[:500]):
        picture = pictures[int(row)]
        if number % 2:
            changed.append(encoded(picture, quality=60))
        else:
            changed.append(encoded(picture.resize((48, 48), Image.Resampling.BICUBIC)))
    sets = {
        "pool": make_dataset(
            tmp_path / "pool", "unlabeled", changed + [encoded(pictures[int(row)], "PNG") for row in other], 1000
        ),
        "heldout": make_dataset(tmp_path / "heldout", "evaluation", heldout, 1000),
    }
    report, out = run(sets, tmp_path)
    rows = pq.read_table(io.BytesIO(out.get(LEFT_OUT))).to_pylist()
    planted = {f"{number:03d}" for number in range(500)}
    found = {row["key"] for row in rows}
    assert len(found & planted) >= 495
    # CIFAR-10 has some images nearly twice.
    assert len(found - planted) <= 15
    assert len(pq.read_table(io.BytesIO(out.get(DUPLICATES)))) >= len(rows)
    assert report.skipped == 0
