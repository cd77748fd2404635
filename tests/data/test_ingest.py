import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ns.data.dataset import Dataset
from ns.data.digits import write_digits
from ns.data.ingest import import_images
from ns.data.shards import read_index
from ns.errors import DataError
from ns.store import LocalStore


def picture(seed: int, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(sink, kind)
    return sink.getvalue()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "animals"
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(6):
            (folder / name / f"{index}.png").write_bytes(picture(10 * label + index))
    return folder


def run(source, folder, role="labelled", **options):
    fields = {"name": "animals", "max_rejected_share": 0.5, "shard_samples": 5, "shard_mib": 1, **options}
    return import_images(str(source), LocalStore(folder), role=role, **fields)


def keys_of(folder, dataset):
    return [sample for shard in dataset.shards for sample in read_index(LocalStore(folder).path(shard.name))]


def test_class_folders_become_labels(source, tmp_path):
    dataset = run(source, tmp_path / "out")
    assert dataset.classes == ("cat", "dog")
    assert [shard.samples for shard in dataset.shards] == [5, 5, 2]
    for sample in keys_of(tmp_path / "out", dataset):
        assert dataset.classes[sample.label] == sample.key.partition("/")[0]
    assert Dataset.load(LocalStore(tmp_path / "out")) == dataset


def test_the_same_images_give_the_same_digest_wherever_they_are(source, tmp_path):
    first = run(source, tmp_path / "a")
    moved = tmp_path / "elsewhere"
    source.rename(moved)
    assert run(moved, tmp_path / "b").digest == first.digest


def test_images_are_kept_byte_for_byte(source, tmp_path):
    run(source, tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    dataset = Dataset.load(store)
    for shard in dataset.shards:
        for sample in read_index(store.path(shard.name)):
            kept = store.get_range(shard.name, sample.offset, sample.size)
            assert kept == (tmp_path / "animals" / f"{sample.key}.png").read_bytes()


def test_what_cannot_be_read_is_counted_listed_and_left_out(source, tmp_path):
    (source / "cat" / "empty.jpg").write_bytes(b"")
    (source / "cat" / "cut.png").write_bytes(picture(1)[:50])
    (source / "dog" / "notes.txt").write_text("not a picture")
    dataset = run(source, tmp_path / "out")
    assert dataset.samples == 12
    assert dataset.rejected == 3
    listed = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pydict()
    reasons = dict(zip(listed["path"], listed["reason"], strict=True))
    assert reasons["cat/empty.jpg"] == "empty file"
    assert reasons["cat/cut.png"] == "truncated"
    assert "not an image" in reasons["dog/notes.txt"]


def test_too_many_unreadable_images_fail_with_a_summary(source, tmp_path):
    (source / "cat" / "cut.png").write_bytes(picture(1)[:50])
    with pytest.raises(DataError, match=r"1 of 13 files cannot be read \(1 truncated\).*first: cat/cut\.png: truncated"):
        run(source, tmp_path / "out", max_rejected_share=0.01)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_other_formats_become_png_without_loss(source, tmp_path):
    (source / "cat" / "bitmap.bmp").write_bytes(picture(99, "BMP"))
    dataset = run(source, tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    for shard in dataset.shards:
        for sample in read_index(store.path(shard.name)):
            if sample.key == "cat/bitmap":
                image = Image.open(io.BytesIO(store.get_range(shard.name, sample.offset, sample.size)))
                assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(picture(99)))))
                return
    pytest.fail("the bitmap is not in the dataset")


def test_loose_images_become_a_pool_without_labels(source, tmp_path):
    dataset = run(source, tmp_path / "out", role="unlabelled")
    assert dataset.classes == ()
    assert all(sample.label is None for sample in keys_of(tmp_path / "out", dataset))


def test_names_that_a_tar_could_not_hold_apart_are_told_apart(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for index, name in enumerate(("a.b.png", "a_b.png", "a_b-2.png", "ü ö.png", "x.jpg", "x.png", "noextension")):
        (folder / name).write_bytes(picture(index))
    dataset = run(folder, tmp_path / "out", role="unlabelled", shard_samples=100)
    keys = [sample.key for sample in keys_of(tmp_path / "out", dataset)]
    assert len(keys) == len(set(keys)) == 7


@pytest.mark.parametrize(
    ("spoil", "options", "reason"),
    [
        (lambda folder: (folder / "emu").mkdir(), {}, "class folder 'emu' has no images"),
        (lambda folder: (folder / "stray.png").write_bytes(picture(0)), {}, "stray.png lies outside any class folder"),
        (lambda folder: None, {"classes": ["cat", "emu"]}, "class folder 'dog' is none of the labelled classes"),
        (lambda folder: (folder / "dog").rename(folder / ".dog"), {}, "1 class folders; at least 2 are needed"),
    ],
)
def test_a_folder_that_cannot_be_meant_is_refused(source, tmp_path, spoil, options, reason):
    spoil(source)
    with pytest.raises(DataError, match=reason):
        run(source, tmp_path / "out", **options)


def test_an_evaluation_set_keeps_the_labelled_classes(source, tmp_path):
    dataset = run(source, tmp_path / "out", role="evaluation", classes=["ant", "cat", "dog"])
    assert dataset.classes == ("ant", "cat", "dog")
    assert {sample.label for sample in keys_of(tmp_path / "out", dataset)} == {1, 2}


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        run(tmp_path / "nowhere", tmp_path / "out")


def test_digits_are_split_without_overlap_and_evenly(tmp_path):
    parts = {part: write_digits(part, LocalStore(tmp_path / part)) for part in ("labelled", "pool", "heldout")}
    assert {part: dataset.samples for part, dataset in parts.items()} == {"labelled": 50, "pool": 1247, "heldout": 500}
    keys = [sample.key for part in parts for sample in keys_of(tmp_path / part, parts[part])]
    assert len(keys) == len(set(keys)) == 1797
    labels = [sample.label for sample in keys_of(tmp_path / "labelled", parts["labelled"])]
    assert [labels.count(label) for label in range(10)] == [5] * 10
    assert all(sample.label is None for sample in keys_of(tmp_path / "pool", parts["pool"]))


def test_linked_folders_are_followed_and_loops_are_not(source, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(source / name)
    (source / "cat" / "again").symlink_to(source / "cat")
    (source / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    dataset = run(linked, tmp_path / "out")
    assert dataset.classes == ("cat", "dog")
    assert dataset.rejected == 1
    keys = [sample.key for sample in keys_of(tmp_path / "out", dataset)]
    assert len(keys) == len(set(keys)) == 12
