import io
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ns.config.schema import ImportConfig
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.importing import ingest, sources
from ns.data.importing.ingest import import_images
from ns.data.index import build_index_key
from ns.data.shards import read_samples
from ns.storage import LocalStore


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


def run(source, folder, role="labeled", **options):
    own = {name: options.pop(name) for name in ("classes", "split", "workers") if name in options}
    config = ImportConfig(**{"max_rejected_share": 0.5, "shard_samples": 5, "shard_mib": 1, **options})
    return import_images(str(source), LocalStore(folder), name="animals", role=role, config=config, **{"workers": 1, **own})


def keys_of(folder, dataset):
    return [sample for shard in dataset.shards for sample in read_samples(LocalStore(folder).path(shard.name))]


def test_import_takes_classes_from_folders(source, tmp_path):
    dataset = run(source, tmp_path / "out")
    assert dataset.classes == ("cat", "dog")
    assert [shard.samples for shard in dataset.shards] == [5, 5, 2]
    for sample in keys_of(tmp_path / "out", dataset):
        assert dataset.classes[sample.class_id] == sample.key.partition("/")[0]
    assert Dataset.load(LocalStore(tmp_path / "out")) == dataset


def test_digest_does_not_depend_on_location(source, tmp_path):
    first = run(source, tmp_path / "a")
    moved = tmp_path / "elsewhere"
    source.rename(moved)
    assert run(moved, tmp_path / "b").digest == first.digest


def test_import_keeps_images_byte_for_byte(source, tmp_path):
    run(source, tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    dataset = Dataset.load(store)
    for shard in dataset.shards:
        for sample in read_samples(store.path(shard.name)):
            kept = store.get_range(shard.name, sample.offset, sample.size)
            assert kept == (tmp_path / "animals" / f"{sample.key}.png").read_bytes()


def test_import_lists_rejects(source, tmp_path):
    (source / "cat" / "empty.jpg").write_bytes(b"")
    (source / "cat" / "cut.png").write_bytes(picture(1)[:50])
    (source / "dog" / "notes.mov").write_text("not a picture")
    dataset = run(source, tmp_path / "out")
    assert dataset.samples == 12
    assert dataset.rejected == 3
    listed = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pydict()
    reasons = dict(zip(listed["path"], listed["reason"], strict=True))
    assert reasons["cat/empty.jpg"] == "empty file"
    assert reasons["cat/cut.png"] == "truncated"
    assert "not an image" in reasons["dog/notes.mov"]


def test_too_many_rejects_fail_with_summary(source, tmp_path):
    (source / "cat" / "cut.png").write_bytes(picture(1)[:50])
    with pytest.raises(DataError, match=r"1 of 13 files cannot be read \(1 truncated\).*first: cat/cut\.png: truncated"):
        run(source, tmp_path / "out", max_rejected_share=0.01)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_import_converts_other_formats_to_png(source, tmp_path):
    (source / "cat" / "bitmap.bmp").write_bytes(picture(99, "BMP"))
    dataset = run(source, tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    for shard in dataset.shards:
        for sample in read_samples(store.path(shard.name)):
            if sample.key == "cat/bitmap":
                image = Image.open(io.BytesIO(store.get_range(shard.name, sample.offset, sample.size)))
                assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(picture(99)))))
                return
    pytest.fail("the bitmap is not in the dataset")


def test_import_of_loose_images_has_no_labels(source, tmp_path):
    dataset = run(source, tmp_path / "out", role="unlabeled")
    assert dataset.classes == ()
    assert all(sample.class_id is None for sample in keys_of(tmp_path / "out", dataset))


def test_keys_of_similar_names_are_unique(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for index, name in enumerate(("a.b.png", "a_b.png", "a_b-2.png", "ü ö.png", "x.jpg", "x.png", "noextension")):
        (folder / name).write_bytes(picture(index))
    dataset = run(folder, tmp_path / "out", role="unlabeled", shard_samples=100)
    keys = [sample.key for sample in keys_of(tmp_path / "out", dataset)]
    assert len(keys) == len(set(keys)) == 7


@pytest.mark.parametrize(
    ("spoil", "options", "reason"),
    [
        (lambda folder: (folder / "emu").mkdir(), {}, "class folder 'emu' has no images"),
        (lambda folder: (folder / "stray.png").write_bytes(picture(0)), {}, "stray.png lies outside any class folder"),
        (lambda folder: None, {"classes": ["cat", "emu"]}, "class 'dog' is none of the labeled classes"),
        (lambda folder: (folder / "dog").rename(folder / ".dog"), {}, "has 1 class, and at least 2 are needed"),
    ],
)
def test_import_refuses_invalid_folders(source, tmp_path, spoil, options, reason):
    spoil(source)
    with pytest.raises(DataError, match=reason):
        run(source, tmp_path / "out", **options)


@pytest.mark.parametrize("inside", ["", "out"])
def test_import_refuses_dataset_in_its_own_source(source, inside):
    before = {path: path.read_bytes() for path in source.rglob("*.png")}
    with pytest.raises(DataError, match=r"would lie in its own source; name a folder outside it"):
        run(source, source / inside)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("key", ["shard-00007.tar", "parts/cat.png"])
def test_import_deletes_nothing_that_it_did_not_write(source, tmp_path, key):
    (tmp_path / "out" / key).parent.mkdir(parents=True)
    (tmp_path / "out" / key).write_bytes(b"mine")
    with pytest.raises(DataError, match=rf"has {key}, which no import wrote; name an empty folder for the dataset"):
        run(source, tmp_path / "out")
    assert [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()] == [b"mine"]


def test_import_replaces_a_larger_dataset(source, tmp_path):
    run(source, tmp_path / "out", shard_samples=2)
    dataset = run(source, tmp_path / "out", shard_samples=12)
    written = {shard.name for shard in dataset.shards} | {build_index_key(shard) for shard in dataset.shards}
    assert set(LocalStore(tmp_path / "out").list()) == {*written, "dataset.json", "rejected.parquet"}


def test_evaluation_set_keeps_labeled_classes(source, tmp_path):
    dataset = run(source, tmp_path / "out", role="evaluation", classes=["ant", "cat", "dog"])
    assert dataset.classes == ("ant", "cat", "dog")
    assert {sample.class_id for sample in keys_of(tmp_path / "out", dataset)} == {1, 2}


def test_import_names_missing_folder(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        run(tmp_path / "nowhere", tmp_path / "out")


def test_import_follows_linked_folders_without_loops(source, tmp_path):
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


def test_stopped_import_continues_with_current_shard(source, tmp_path, monkeypatch):
    expected = run(source, tmp_path / "whole").digest
    run(source, tmp_path / "out", shard_samples=3)
    checked, calls = ingest._check_image, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return checked(*arguments)

    monkeypatch.setattr(ingest, "_check_image", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    # Half of the shards belong to another import, so there must be no manifest.
    assert not LocalStore(tmp_path / "out").exists(Dataset.filename)
    assert run(source, tmp_path / "out").digest == expected
    # The first shard's five images were not read again.
    assert len(calls) == 8 + 7
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file()) == [
        "dataset.json",
        "rejected.parquet",
        *(f"shard-0000{number}.{kind}" for number in range(3) for kind in ("index.parquet", "tar")),
    ]


def test_import_refuses_class_without_readable_image(source, tmp_path):
    (source / "emu").mkdir()
    (source / "emu" / "x.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"class 'emu' has no readable image; first: emu/x\.jpg: not an image"):
        run(source, tmp_path / "out")
    # Held-out images may lack a class.
    run(source, tmp_path / "out", role="evaluation", classes=["cat", "dog", "emu"])


def test_import_escapes_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(0))
    (folder / os.fsdecode(b"th\xe9.png")).write_bytes(b"no image")
    dataset = run(folder, tmp_path / "out", role="unlabeled")
    (sample,) = keys_of(tmp_path / "out", dataset)
    assert sample.key == "caf_xe9"
    assert pq.read_table(tmp_path / "out" / "rejected.parquet").to_pydict()["path"] == ["th\\xe9.png"]


def test_import_refuses_class_names_that_are_not_utf8(source, tmp_path):
    (source / "cat").rename(source / os.fsdecode(b"caf\xe9"))
    with pytest.raises(
        DataError, match=r"class folder 'caf\\xe9': its name is not UTF-8, or has control characters; rename it"
    ):
        run(source, tmp_path / "out")


def test_import_keeps_multi_picture_jpegs(tmp_path):
    folder = tmp_path / "phone"
    folder.mkdir()
    sink = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(sink, "MPO", save_all=True, append_images=frames[1:])
    (folder / "a.jpg").write_bytes(sink.getvalue())
    dataset = run(folder, tmp_path / "out", role="unlabeled")
    (sample,) = keys_of(tmp_path / "out", dataset)
    assert sample.extension == "jpg"
    assert LocalStore(tmp_path / "out").get_range("shard-00000.tar", sample.offset, sample.size) == sink.getvalue()


def test_extension_depends_on_content(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture(0, "PNG"))
    (folder / "b.png").write_bytes(picture(1, "JPEG"))
    (folder / "c.png").write_bytes(picture(2, "WEBP"))
    (folder / "d.jpg").write_bytes(picture(3, "GIF"))
    dataset = run(folder, tmp_path / "out", role="unlabeled")
    assert [sample.extension for sample in keys_of(tmp_path / "out", dataset)] == ["png", "jpg", "webp", "png"]


def test_import_rejects_pipes_and_large_files_unread(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 10_000)
    os.mkfifo(source / "cat" / "pipe.png")
    (source / "dog" / "film.avi").write_bytes(bytes(10_001))
    run(source, tmp_path / "out")
    listed = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pydict()
    assert dict(zip(listed["path"], listed["reason"], strict=True)) == {
        "cat/pipe.png": "not a plain file",
        "dog/film.avi": "larger than 1 GiB",
    }


def test_empty_reject_list_has_columns(source, tmp_path):
    run(source, tmp_path / "out")
    schema = pq.read_table(tmp_path / "out" / "rejected.parquet").schema
    assert [(field.name, str(field.type)) for field in schema] == [("path", "string"), ("reason", "string")]


def test_log_shows_only_first_rejects(source, tmp_path, capsys):
    for index in range(ingest.SHOWN_REJECTS + 5):
        (source / "cat" / f"bad{index}.jpg").write_bytes(b"")
    run(source, tmp_path / "out", max_rejected_share=1)
    logged = capsys.readouterr()
    lines = [line for line in (logged.out + logged.err).splitlines() if "left out" in line]
    assert len(lines) == ingest.SHOWN_REJECTS + 1
    assert pq.read_table(tmp_path / "out" / "rejected.parquet").num_rows == ingest.SHOWN_REJECTS + 5


def test_labeled_shards_mix_classes(tmp_path):
    folder = tmp_path / "many"
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for index in range(50):
            (folder / label / f"{index}.png").write_bytes(picture(index))
    dataset = run(folder, tmp_path / "out", shard_samples=25)
    for shard in dataset.shards:
        labels = [sample.class_id for sample in read_samples(LocalStore(tmp_path / "out").path(shard.name))]
        assert 5 <= sum(labels) <= 20


def test_import_takes_file_uri(source, tmp_path):
    spaced = tmp_path / "my animals %41"
    source.rename(spaced)
    assert run(spaced.as_uri(), tmp_path / "out").samples == 12


@pytest.mark.parametrize("role", ["labeled", "evaluation", "unlabeled"])
def test_import_refuses_empty_folder(tmp_path, role):
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"has no files to import|has 0 classes"):
        run(tmp_path / "none", tmp_path / "out", role=role)


def test_import_refuses_folder_without_images(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    with pytest.raises(DataError, match=r"has no files to import, only 1 \.txt, which are no images"):
        run(tmp_path / "texts", tmp_path / "out", role="unlabeled")
    (tmp_path / "texts" / "a.mov").write_text("no image")
    with pytest.raises(DataError, match=r"no readable image among 1 files; first: a\.mov: not an image"):
        run(tmp_path / "texts", tmp_path / "out", role="unlabeled", max_rejected_share=1)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({1 << 40: 1}, "class index 1,099,511,627,776; at most 65,536 classes are possible"),
        ({1 << 16: 1}, "class index 65,536; at most 65,536 classes"),
        ({str(number): 1 for number in range((1 << 16) + 1)}, "65,537 classes; at most 65,536 classes"),
    ],
)
def test_import_refuses_more_classes_than_indices_hold(labels, reason):
    with pytest.raises(DataError, match=reason):
        ingest.resolve_classes("images", labels, None, 2)
    assert len(ingest.resolve_classes("images", {(1 << 16) - 1: 1}, None, 2)[0]) == 1 << 16


def test_import_refuses_a_class_folder_with_a_blank_name():
    with pytest.raises(DataError, match="images: has a class folder whose name is blank; rename it"):
        ingest.resolve_classes("images", {"": 1, "cat": 2}, None, 3)


@pytest.mark.parametrize(("name", "kept"), [("2025-06-03", 4), ("2025-06-01b", 2)])
def test_grown_pool_keeps_shards_before_the_first_new_image(tmp_path, name, kept):
    def fill(folder, count):
        (tmp_path / "pool" / folder).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "pool" / folder / f"{number}.png").write_bytes(
                picture(number + 100 * len(list((tmp_path / "pool").iterdir())))
            )

    fill("2025-06-01", 10)
    fill("2025-06-02", 12)
    before = [shard.sha256 for shard in run(tmp_path / "pool", tmp_path / "out", role="unlabeled").shards]
    fill(name, 3)
    after = [shard.sha256 for shard in run(tmp_path / "pool", tmp_path / "out", role="unlabeled").shards]
    assert len(set(before) & set(after)) == kept
    assert before[:kept] == after[:kept]
