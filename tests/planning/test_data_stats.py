import numpy as np
import pytest
from PIL import Image

from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.importing.ingest import ImportLimits, import_images
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


def test_a_source_is_counted_and_sampled(folder):
    found = KnownCounts().get_stats("labeled", str(folder))
    sizes = [file.make_stat().st_size for file in folder.rglob("*.*")]
    assert (found.images, found.classes) == (61, 2)
    assert found.image_bytes == pytest.approx(sum(sizes) / 61)
    assert len(found.sample_images) == 60 < SAMPLE_IMAGES
    assert {type(picture) for picture in found.sample_images} == {EncodedJpeg, np.ndarray}


def test_a_dataset_is_read_from_its_manifest(folder, tmp_path):
    made = import_images(
        str(folder), LocalStore(tmp_path / "set"), name="photos", role="labeled", limits=ImportLimits(), workers=1
    )
    found = KnownCounts().get_stats("labeled", str(tmp_path / "set"))
    assert (found.images, found.classes, len(found.sample_images)) == (60, 2, 60)
    assert found.image_bytes == made.bytes / 60


def test_digits_are_looked_at_without_a_dataset():
    found = KnownCounts().get_stats("heldout", "digits:heldout")
    assert (found.images, found.classes) == (500, 10)


def test_what_is_known_is_not_looked_at():
    found = KnownCounts({"pool": 7}, image_bytes=5).get_stats("pool", "s3://nobody/nothing")
    assert (found.images, found.image_bytes, found.sample_images) == (7, 5, ())


def test_what_has_no_images_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    Dataset(name="x", role="unlabeled", classes=(), shards=()).save(LocalStore(tmp_path / "dataset"))
    for place in ("folder", "dataset"):
        with pytest.raises(
            DataError, match=rf"data\.pool: .*{place}: has no images; import some, or say how many there will be: --pool N"
        ):
            KnownCounts().get_stats("pool", str(tmp_path / place))
