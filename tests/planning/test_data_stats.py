import numpy as np
import pytest
from PIL import Image

from ns.config.schema import ImportConfig
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.importing.ingest import import_images
from ns.data.loading.decode import EncodedJpeg
from ns.planning.data_stats import SAMPLE_IMAGES, KnownCounts
from ns.storage import LocalStore


@pytest.fixture
def folder(tmp_path):
    """Two classes, 30 JPEGs and 30 PNGs, and a damaged file."""
    rng = np.random.default_rng(0)
    for name, kind in (("cat", "jpg"), ("dog", "png")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.{kind}")
    (tmp_path / "photos" / "cat" / "damaged.jpg").write_bytes(b"no picture")
    return tmp_path / "photos"


def test_stats_of_a_source(folder):
    stats = KnownCounts().get_stats("labeled", str(folder))
    sizes = [file.stat().st_size for file in folder.rglob("*.*")]
    assert (stats.images, stats.classes) == (61, 2)
    assert stats.image_bytes == pytest.approx(sum(sizes) / 61)
    assert len(stats.sample_images) == 60 < SAMPLE_IMAGES
    assert {type(picture) for picture in stats.sample_images} == {EncodedJpeg, np.ndarray}


def test_stats_count_labeled_images_only(folder):
    rows = [f"cat/{number}.{kind},{'cat' if number < 20 else ''}" for number in range(30) for kind in ("jpg", "png")]
    rows += [f"dog/{number}.jpg,dog" for number in range(10)]
    (folder / "t.csv").write_text("\n".join(["path,label", *rows, ",cat"]))
    for part, images in (("labeled", 50), ("pool", 70)):
        assert KnownCounts().get_stats(part, str(folder / "t.csv")).images == images


def test_stats_of_a_dataset(folder, tmp_path):
    dataset = import_images(
        str(folder), LocalStore(tmp_path / "set"), name="photos", role="labeled", config=ImportConfig(), workers=1
    )
    stats = KnownCounts().get_stats("labeled", str(tmp_path / "set"))
    assert (stats.images, stats.classes, len(stats.sample_images)) == (60, 2, 60)
    assert stats.image_bytes == dataset.bytes / 60


def test_stats_of_digits():
    stats = KnownCounts().get_stats("heldout", "digits:heldout")
    assert (stats.images, stats.classes) == (500, 10)


def test_known_counts_read_nothing():
    stats = KnownCounts({"pool": 7}, image_bytes=5).get_stats("pool", "s3://nobody/nothing")
    assert (stats.images, stats.image_bytes, stats.sample_images) == (7, 5, ())


def test_stats_without_images_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    Dataset(name="x", role="unlabeled", classes=(), shards=()).save(LocalStore(tmp_path / "dataset"))
    for name in ("folder", "dataset"):
        with pytest.raises(DataError, match=rf"data\.pool: .*{name}: has no images; or give the number of images: --pool N"):
            KnownCounts().get_stats("pool", str(tmp_path / name))
