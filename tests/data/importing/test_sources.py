"""Every kind of source gives the same dataset as a folder of the same images, or an error with the reason."""

import bz2
import errno
import gzip
import io
import lzma
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ns.config.schema import ImportConfig
from ns.core.errors import DataError
from ns.data.importing import ingest, sources, tables
from ns.data.importing.ingest import import_images
from ns.data.shards import read_samples
from ns.storage import LocalStore


def run(source, folder, role="labeled", workers=1, classes=None, split=None, **options):
    config = ImportConfig(**{"max_rejected_share": 0, "shard_samples": 5, "shard_mib": 1, **options})
    store = LocalStore(folder)
    return import_images(str(source), store, name="n", role=role, config=config, workers=workers, classes=classes, split=split)


def content(folder: Path, dataset) -> dict[bytes, str | None]:
    """Image bytes → class."""
    found = {}
    for shard in dataset.shards:
        path = folder / shard.name
        for sample in read_samples(path):
            data = path.read_bytes()[sample.offset : sample.offset + sample.size]
            found[data] = None if sample.class_id is None else dataset.classes[sample.class_id]
    return found


@pytest.fixture
def images(picture):
    """Path in a source → bytes."""
    return {f"{label}/{n}.png": picture(10 * i + n) for i, label in enumerate(("cat", "dog")) for n in range(6)}


@pytest.fixture
def expected(images):
    return {data: path.partition("/")[0] for path, data in images.items()}


@pytest.fixture
def folder(tmp_path, images):
    for path, data in images.items():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_bytes(data)
    return tmp_path / "source"


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# Tables


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_import_of_table(tmp_path, folder, images, expected, kind):
    table = pa.table({"Filename": [f"source/{path}" for path in images], "class": [path[:3] for path in images]})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "t.parquet")
    else:
        pacsv.write_csv(table, tmp_path / f"t.{kind}", pacsv.WriteOptions(delimiter="\t" if kind == "tsv" else ","))
    dataset = run(tmp_path / f"t.{kind}", tmp_path / "out")
    assert content(tmp_path / "out", dataset) == expected
    assert read_samples(tmp_path / "out" / dataset.shards[0].name)[0].key.startswith("source/")


def test_import_of_table_split(tmp_path, folder, images):
    lines = ["path,label,split", *(f"source/{p},{p[:3]},{'test' if '0' in p else 'train'}" for p in images)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    assert run(tmp_path / "t.csv", tmp_path / "out", split="test").samples == 2
    with pytest.raises(DataError, match=r"has the splits test, train; import one of them, .* --role labeled --split test"):
        run(tmp_path / "t.csv", tmp_path / "out")


def test_table_class_names_stay_text(tmp_path, folder, images):
    lines = ["path,label", *(f"source/{path},{'007' if 'cat' in path else '7'}" for path in images)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    assert run(tmp_path / "t.csv", tmp_path / "out").classes == ("007", "7")


def test_import_rejects_table_rows_without_file_or_label(tmp_path, folder):
    (tmp_path / "t.csv").write_text("path,label\nsource/cat/0.png,cat\nsource/dog/0.png,dog\nno.png,cat\nsource/cat/1.png,\n")
    dataset = run(tmp_path / "t.csv", tmp_path / "out", max_rejected_share=0.5)
    listed = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pydict()
    assert dataset.samples == 2
    assert dict(zip(listed["path"], listed["reason"], strict=True)) == {
        "no.png": "no such file or directory",
        "source/cat/1.png": "no label",
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,label\na,b\n", r"has no column for the path of each image: its columns are name, label; name one path or"),
        ("path,color\na,b\n", r"has no column for its class"),
        ('path,label\n"a,b\nc', r"not a readable table|no files to import|has 0 classes"),
        ("path,label\n", r"has 0 classes|no files to import"),
        ("path;label\na;b\n", r"its columns are path;label; name one .*; save it as UTF-8, with columns separated by commas$"),
        (
            "path,label\né,b\n".encode("latin-1"),
            r"not a readable table: .*; save it as UTF-8, with columns separated by commas$",
        ),
        ("path,label\na,b\n".encode("utf-16"), r"save it as UTF-8, with columns separated by commas$"),
    ],
)
def test_import_refuses_invalid_table(tmp_path, text, reason):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=reason):
        run(tmp_path / "t.csv", tmp_path / "out")


def test_import_tells_conflicting_rows_of_a_table(tmp_path, folder):
    rows = ["cat/0.png,cat", "dog/0.png,dog", "cat/1.png,cat", "cat/2.png,cat", "./cat/2.png,cat", f"{folder}/cat/2.png,cat"]
    # In other shards than the first ones.
    rows += [*(f"dog/{n}.png,dog" for n in range(1, 6)), f"{folder}/cat/1.png,dog", "dog/../cat/0.png,Cat"]
    (folder / "t.csv").write_text("\n".join(["path,label", *rows]))
    dataset = run(folder / "t.csv", tmp_path / "out", max_rejected_share=0.5, shard_samples=2, classes=["cat", "dog"])
    listed = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pydict()
    assert dict(zip(listed["path"], listed["reason"], strict=True)) == {
        "cat/0.png": "is named 2 times with different classes: Cat, cat",
        "cat/1.png": "is named 2 times with different classes: cat, dog",
    }
    assert dataset.samples == 7


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("\ufeffPath , Label", " cat/é.png , Café "),
        ("path,label", unicodedata.normalize("NFD", "cat/é.png,Café")),
        ("path,label", "cat\\é.png,CAFÉ"),
        ("label,FILE", "Café,{folder}/cat/é.png"),
        ("label,path", "Café,{folder_uri}/cat/%C3%A9.png"),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_table_names_are_the_same_however_written(tmp_path, folder, images, header, row, form):
    (folder / "cat" / unicodedata.normalize(form, "é.png")).write_bytes(images["cat/0.png"])
    row = row.format(folder=folder, folder_uri=folder.as_uri())
    (folder / "t.csv").write_text(f"{header}\n{row}\n")
    dataset = run(folder / "t.csv", tmp_path / "out", "evaluation", classes=["Café", "Dog"])
    assert content(tmp_path / "out", dataset) == {images["cat/0.png"]: "Café"}


def test_parquet_table_with_gaps_keeps_numbers(tmp_path, folder):
    columns = {"path": ["cat/0.png", "dog/0.png", "dog/1.png", None], "label": pa.array([10.0, 9.0, None, 9.0])}
    pq.write_table(pa.table(columns), folder / "t.parquet")
    dataset = run(folder / "t.parquet", tmp_path / "out", max_rejected_share=0.5)
    assert dataset.classes == ("9", "10")
    listed = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pydict()
    assert dict(zip(listed["path"], listed["reason"], strict=True)) == {"dog/1.png": "no label", "row 4": "names no image"}


def test_import_refuses_split_that_is_not_there(tmp_path, folder):
    (folder / "t.csv").write_text("path,label,split\ncat/0.png,cat,train\n")
    with pytest.raises(DataError, match=r"--split tset: .* has no such split; it has train"):
        run(folder / "t.csv", tmp_path / "out", split="tset")


# Folders


def test_import_passes_over_what_programs_leave(tmp_path, folder, expected):
    left = [
        ".DS_Store",
        "Thumbs.db",
        "README.md",
        "labels.csv",
        "cat/desktop.ini",
        "cat/notes.txt",
        "@eaDir/a/x.jpg",
        "_SUCCESS",
    ]
    left += [
        "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "$RECYCLE.BIN/0.png",
        ".ipynb_checkpoints/0.png",
        "annotations/0.xml",
        "x.pth",
    ]
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")
    dataset = run(folder, tmp_path / "out")
    assert (dataset.classes, dataset.rejected) == (("cat", "dog"), 0)
    assert content(tmp_path / "out", dataset) == expected


def test_classes_are_the_same_however_folders_are_named(tmp_path, picture):
    for number, name in enumerate(("café", unicodedata.normalize("NFD", "café"), " dog", "dog", "10", "9")):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.png").write_bytes(picture(number))
    dataset = run(tmp_path / "in", tmp_path / "out")
    assert dataset.classes == ("9", "10", "café", "dog")
    classes = ["Dog", "CAFÉ", "10", "9"]
    assert content(tmp_path / "out", dataset) == {
        picture(n): c for n, c in enumerate(["café", "café", "dog", "dog", "10", "9"])
    }
    other = run(tmp_path / "in", tmp_path / "other", "evaluation", classes=classes)
    assert content(tmp_path / "other", other) == {
        picture(n): c for n, c in enumerate(["CAFÉ", "CAFÉ", "Dog", "Dog", "10", "9"])
    }


def test_import_refuses_splits_as_classes(tmp_path, folder):
    (folder / "cat").rename(folder / "Train")
    (folder / "dog").rename(folder / "val")
    with pytest.raises(DataError, match=r"its folders \(Train, val\) are splits, not classes"):
        run(folder, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    with pytest.raises(DataError, match=r"are splits, not classes; unpack it, and name one of them as the source"):
        run(tmp_path / "in.zip", tmp_path / "out")


# Tars in the WebDataset layout


def test_tars_of_one_name_in_several_folders(tmp_path, picture):
    for number in range(4):
        (tmp_path / "in" / str(number)).mkdir(parents=True)
        files = {"x.png": picture(number), "x.cls": str(number).encode()}
        write_tar(tmp_path / "in" / str(number) / "part.tar", files)
    expected = {picture(number): str(number) for number in range(4)}
    for source in (str(tmp_path / "in"), f"{tmp_path}/in/{{0..3}}/part.tar"):
        dataset = run(source, tmp_path / "out")
        assert content(tmp_path / "out", dataset) == expected
        keys = [sample.key for shard in dataset.shards for sample in read_samples(tmp_path / "out" / shard.name)]
        assert sorted(keys) == [f"{number}/part/x" for number in range(4)]


@pytest.fixture
def tars(tmp_path, images):
    (tmp_path / "tars").mkdir()
    for number, label in enumerate(("cat", "dog")):
        files = {}
        for path, data in images.items():
            if path.startswith(label):
                files[path] = data
                files[path.replace("png", "cls")] = str(number).encode()
                files[path.replace("png", "json")] = b"{}"
        write_tar(tmp_path / "tars" / f"part-{number:02d}.tar", files)
    return tmp_path / "tars"


def test_import_of_webdataset_tars(tmp_path, tars, expected):
    by_index = run(tars, tmp_path / "a")
    assert by_index.classes == ("0", "1")
    named = run(tars, tmp_path / "b", classes=["cat", "dog"])
    assert content(tmp_path / "b", named) == expected
    assert run(f"{tars}/part-{{00..01}}.tar", tmp_path / "c", classes=["cat", "dog"]).digest == named.digest
    assert run(tars / "part-00.tar", tmp_path / "d", "evaluation", classes=["cat", "dog"]).samples == 6


def test_import_keeps_images_beside_tars(tmp_path, tars, images):
    (tars / "alone.png").write_bytes(next(iter(images.values())))
    dataset = run(tars, tmp_path / "out", "unlabeled")
    assert (dataset.samples, dataset.rejected) == (13, 0)
    with pytest.raises(DataError, match=r"alone\.png lies outside any class folder"):
        run(tars, tmp_path / "labeled")


def test_import_refuses_class_index_out_of_range(tmp_path, tars):
    write_tar(tars / "part-02.tar", {"x.png": b"", "x.cls": b"2"})
    with pytest.raises(DataError, match=r"class index 2: there are 2 labeled classes \(cat, dog\)"):
        run(tars, tmp_path / "out", classes=["cat", "dog"])


def test_import_refuses_indices_beside_names(tmp_path, tars):
    write_tar(tars / "part-02.tar", {"x.png": b"", "x.cls": b"cat"})
    with pytest.raises(DataError, match=r"some labels are class indices \(0\) and some are names \('cat'\)"):
        run(tars, tmp_path / "out")


# Archives


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip"])
@pytest.mark.parametrize("prefix", ["", "data/train/"])
def test_import_of_archives(tmp_path, images, expected, suffix, prefix):
    path = tmp_path / f"a.{suffix}"
    files = {prefix + name: data for name, data in images.items()} | {f"{prefix}.DS_Store": b"x"}
    if suffix == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        write_tar(path, files, {"tar": "w", "tgz": "w:gz"}.get(suffix, f"w:{suffix.rpartition('.')[2]}"))
    dataset = run(path, tmp_path / "out")
    assert content(tmp_path / "out", dataset) == expected
    assert read_samples(tmp_path / "out" / dataset.shards[0].name)[0].key.partition("/")[0] in ("cat", "dog")
    assert run(path, tmp_path / "pool", role="unlabeled").samples == 12


def test_import_of_archive_with_tar_per_class(tmp_path, images, expected):
    inner = {}
    for label in ("cat", "dog"):
        own = {path.partition("/")[2]: data for path, data in images.items() if path.startswith(label)}
        inner[f"{label}.tar"] = write_tar(tmp_path / "inner.tar", own).read_bytes()
    dataset = run(write_tar(tmp_path / "outer.tar", inner), tmp_path / "out")
    assert content(tmp_path / "out", dataset) == expected


def test_import_of_archive_in_the_webdataset_layout(tmp_path, picture):
    expected = {picture(number): str(number % 2) for number in range(4)}
    flat = {f"{n}.png": picture(n) for n in range(4)} | {f"{n}.json": f'{{"label": {n % 2}}}'.encode() for n in range(4)}
    shards = {
        f"s{n}.tar": write_tar(tmp_path / "i.tar", {"a.png": picture(n), "a.cls": b"%d" % (n % 2)}).read_bytes()
        for n in range(4)
    }
    for number, files in enumerate((flat, {f"data/{name}": data for name, data in flat.items()}, shards)):
        dataset = run(write_tar(tmp_path / f"{number}.tar.gz", files, "w:gz"), tmp_path / "out")
        assert content(tmp_path / "out", dataset) == expected


def test_readme_beside_archive_folders_is_no_class(tmp_path, images, expected):
    files = {f"./set/{name}": data for name, data in images.items()} | {
        "./README.md": b"x",
        "./set/labels.csv": b"x",
        "./LICENSE": b"x",
    }
    assert content(tmp_path / "out", run(write_tar(tmp_path / "a.tar", files), tmp_path / "out")) == expected


def test_zip_of_windows(tmp_path, images, expected):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in images.items():
            info = zipfile.ZipInfo(name)
            info.create_system, info.filename = 0, name.replace("/", "\\")
            archive.writestr(info, data)
    assert content(tmp_path / "out", run(tmp_path / "a.zip", tmp_path / "out")) == expected


def bomb() -> bytes:
    """A PNG of a gigabyte of pixels in a megabyte of file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * 20_000)
    pixels = b"".join(packer.compress(row) for _ in range(18_000)) + packer.flush()
    header = struct.pack(">IIBBBBB", 20_000, 18_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_xz_is_read_stream_by_stream_and_within_a_limit_of_memory(tmp_path, monkeypatch):
    path = tmp_path / "a.tar.xz"
    parts = [bytes(3 << 20), b"abc" * 1000]
    path.write_bytes(lzma.compress(parts[0]) + bytes(8) + lzma.compress(parts[1]) + bytes(4))
    with sources.XzReader(path, "rb") as reader:
        assert b"".join(iter(lambda: reader.read(1 << 16), b"")) == b"".join(parts)
    path.write_bytes(lzma.compress(parts[1], filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]))
    monkeypatch.setattr(sources, "XZ_BYTES", 1 << 19)
    with sources.XzReader(path, "rb") as reader, pytest.raises(lzma.LZMAError, match="Memory usage limit"):
        reader.read(1 << 16)


@pytest.mark.integration
def test_import_rejects_decompression_bomb(tmp_path, images):
    path = write_tar(tmp_path / "a.tar", {**images, "cat/bomb.png": bomb()})
    dataset = run(path, tmp_path / "out", max_rejected_share=0.5, shard_samples=100, shard_mib=64)
    listed = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pydict()
    assert dataset.samples == 12
    assert listed["path"] == ["cat/bomb.png"]
    assert "decompression bomb: more than " in listed["reason"][0]


def tar_with(kind: bytes, name: str, target: str = ""):
    def write(path: Path) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        with tarfile.open(path, "w") as tar:
            tar.addfile(info)

    return write


def zip_with(name: str, mode: int = 0):
    def write(path: Path) -> None:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(info, "/etc/passwd")

    return write


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.tar", tar_with(tarfile.REGTYPE, "cat/../../x.png"), "a name that leads outside"),
        ("a.tar", tar_with(tarfile.REGTYPE, "/tmp/x.png"), "a name that leads outside"),
        ("a.tar", tar_with(tarfile.SYMTYPE, "cat/x.png", "/etc/passwd"), "a link or device"),
        ("a.tar", tar_with(tarfile.LNKTYPE, "cat/x.png", "../../x"), "a link or device"),
        ("a.tar", tar_with(tarfile.CHRTYPE, "cat/x.png"), "a link or device"),
        ("a.zip", zip_with("../../x.png"), "a name that leads outside"),
        ("a.zip", zip_with("cat/x.png", 0o120777), "cat/x.png: a link"),
        ("a.tar.gz", lambda path: path.write_bytes(gzip.compress(b"x" * 9000)[:-9]), "not a whole archive"),
        ("a.tar.gz", lambda path: path.write_bytes(b"no archive"), "not a whole archive"),
        ("a.tar.bz2", lambda path: path.write_bytes(bz2.compress(os.urandom(9000))[:99]), "not a whole archive"),
        ("a.tar.xz", lambda path: path.write_bytes(b"no archive"), "not a whole archive"),
        ("a.zip", lambda path: path.write_bytes(b"no archive"), "not a whole archive"),
    ],
)
def test_import_refuses_malicious_and_damaged_archives(tmp_path, monkeypatch, name, write, reason):
    for part in ("in", "scratch", "out"):
        (tmp_path / part).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    write(tmp_path / "in" / name)
    with pytest.raises(DataError, match=reason) as caught:
        run(tmp_path / "in" / name, tmp_path / "out", role="unlabeled")
    assert name in str(caught.value)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["in", f"in/{name}", "out", "scratch"]


# What an import promises


def test_import_limits_shard_size_when_images_grow(tmp_path, picture):
    (tmp_path / "pool").mkdir()
    for number in range(6):
        # 300 kB as an 8-bit palette image, about 900 kB as PNG of noise.
        (tmp_path / "pool" / f"{number}.bmp").write_bytes(picture(number, "BMP", 500))
    dataset = run(tmp_path / "pool", tmp_path / "out", role="unlabeled", shard_samples=100, shard_mib=2)
    assert dataset.samples == 6
    assert all(shard.bytes <= 2 << 20 for shard in dataset.shards)


def test_max_side_shrinks_large_images(tmp_path, picture):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "large.jpg").write_bytes(picture(0, "JPEG", 64))
    (tmp_path / "pool" / "small.jpg").write_bytes(picture(1, "JPEG", 16))
    dataset = run(tmp_path / "pool", tmp_path / "out", role="unlabeled", shard_samples=100, max_side=32)
    path = tmp_path / "out" / dataset.shards[0].name
    large, small = (path.read_bytes()[sample.offset :][: sample.size] for sample in read_samples(path))
    assert ingest.decode_image(large).shape == (32, 32, 3)
    assert small == picture(1, "JPEG", 16)
    assert run(tmp_path / "pool", tmp_path / "kept", role="unlabeled").digest != dataset.digest


@pytest.mark.integration
def test_import_does_not_depend_on_workers(tmp_path, folder):
    (folder / "cat" / "bad.png").write_bytes(b"no image")
    options = {"max_rejected_share": 0.5, "shard_samples": 3}
    expected = run(folder, tmp_path / "1", **options)
    found = run(folder, tmp_path / "3", **options, workers=3)
    assert found == expected
    assert (tmp_path / "3" / "rejected.parquet").read_bytes() == (tmp_path / "1" / "rejected.parquet").read_bytes()


def test_smaller_import_removes_old_shards(tmp_path, folder):
    run(folder, tmp_path / "out", shard_samples=2)
    dataset = run(folder, tmp_path / "out", shard_samples=100)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [shard.name for shard in dataset.shards]


IMPORT = """
import sys
from ns.config.schema import ImportConfig
from ns.data.importing.ingest import import_images
from ns.storage import open_store

if __name__ == "__main__":
    source, out = sys.argv[1:]
    config = ImportConfig(max_rejected_share=0.5, shard_samples=20, shard_mib=1)
    print(import_images(source, open_store(out), name="n", role="unlabeled", config=config, workers=2).digest)
"""


@pytest.fixture
def many(tmp_path, picture):
    (tmp_path / "many").mkdir()
    for number in range(1000):
        (tmp_path / "many" / f"{number:04d}.png").write_bytes(picture(number, size=64))
    return tmp_path / "many"


def start(tmp_path, many):
    (tmp_path / "main.py").write_text(IMPORT)
    return subprocess.Popen(
        [sys.executable, tmp_path / "main.py", many, tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.integration
def test_import_survives_killed_processes(tmp_path, many):
    expected = run(many, tmp_path / "calm", role="unlabeled", max_rejected_share=0.5, shard_samples=20).digest
    parts = tmp_path / "out" / "parts"
    # All of it is killed: no process is left behind, and the same command continues.
    process = start(tmp_path, many)
    wait_for(lambda: len(list(parts.glob("*.json"))) >= 5)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not (tmp_path / "out" / "dataset.json").exists()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    # One worker is killed: the import continues by itself.
    process = start(tmp_path, many)
    wait_for(lambda: len(list(parts.glob("*.json"))) >= len(done) + 3)
    workers = [one for one in psutil.Process(process.pid).children(recursive=True) if not one.children()]
    os.kill(workers[-1].pid, signal.SIGKILL)
    out, err = process.communicate(timeout=100)
    assert out.splitlines()[-1] == expected
    assert "a process of the import was killed" in out + err


def test_archive_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch):
    """Some kilobytes would fill the disk."""
    monkeypatch.setattr(sources, "MIN_UNPACKED_LIMIT", 1 << 16)
    zeros = bytes(4 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/a.png", zeros)
    plain = tmp_path / "plain.tar"
    with tarfile.open(plain, "w") as archive:
        info = tarfile.TarInfo("cat/a.png")
        info.size = len(zeros)
        archive.addfile(info, io.BytesIO(zeros))
    for suffix, module in ((".tar.gz", gzip), (".tar.bz2", bz2), (".tar.xz", lzma)):
        (tmp_path / f"bomb{suffix}").write_bytes(module.compress(plain.read_bytes()))
    for suffix in (".zip", ".tar.gz", ".tar.bz2", ".tar.xz"):
        with pytest.raises(DataError, match=rf"bomb{suffix}: decompression bomb: it unpacks to more than [\d,]+ bytes"):
            run(tmp_path / f"bomb{suffix}", tmp_path / "out", role="unlabeled")


def test_parquet_table_of_repeated_or_huge_cells_is_refused(tmp_path, monkeypatch):
    """Of values that are repeated, Parquet keeps one: a kilobyte stands for gigabytes."""
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"path": ["a" * 100_000] * 1000, "label": ["cat"] * 1000}), path)
    with pytest.raises(DataError, match=r"table\.parquet: path: has a text of 100,000 bytes"):
        run(path, tmp_path / "out", role="labeled")
    monkeypatch.setattr(tables, "MIN_ROW_LIMIT", 10)
    pq.write_table(pa.table({"path": ["a.png"] * 500_000, "label": ["cat"] * 500_000}), path)
    with pytest.raises(DataError, match=r"table\.parquet: has 500,000 rows in [\d,]+ bytes, so they say the same again"):
        run(path, tmp_path / "out", role="labeled")


def test_files_of_a_folder_that_may_not_be_entered_are_left_out_with_the_reason(tmp_path, monkeypatch):
    """Its names can be listed; asking for a file's size is refused."""
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "a.png").write_bytes(b"x")
    stat = Path.stat

    def refuse(path: Path, **options) -> os.stat_result:
        if path.parent.name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    (entry,) = sources.list_entries(str(tmp_path), "unlabeled", split=None, scratch_dir=tmp_path, passed_over=Counter())
    with pytest.raises(DataError, match="permission denied"):
        sources.SourceReader(str(tmp_path)).read_entry(entry)


def test_links_in_circles_are_counted_and_links_that_multiply_are_refused(tmp_path, picture):
    root = tmp_path / "pool"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / f"{name}.png").write_bytes(picture(0))
    (root / "a" / "to-b").symlink_to(root / "b")
    (root / "b" / "to-a").symlink_to(root / "a")
    (root / "b" / "up").symlink_to(root)
    passed_over = Counter()
    listed = sources.list_entries(str(root), "unlabeled", split=None, scratch_dir=tmp_path, passed_over=passed_over)
    assert {entry.path for entry in listed} == {"a/a.png", "a/to-b/b.png", "b/b.png", "b/to-a/a.png"}
    assert passed_over == {sources.LOOP: 4}
    folders = [tmp_path / "many" / str(number) for number in range(12)]
    for folder in folders:
        folder.mkdir(parents=True)
    for number, folder in enumerate(folders):
        for later in folders[number + 1 :]:
            (folder / later.name).symlink_to(later)
    with pytest.raises(DataError, match=r"many/.*: links lead to this folder in more than 100 ways; remove links"):
        run(tmp_path / "many", tmp_path / "out", role="unlabeled")


def test_image_of_too_many_pixels_is_left_out_with_its_size(tmp_path, picture):
    root = tmp_path / "pool"
    root.mkdir()
    (root / "small.png").write_bytes(picture(0))
    Image.new("L", (2000, 1000)).save(root / "large.png")
    dataset = run(root, tmp_path / "out", role="unlabeled", max_megapixels=1, max_rejected_share=0.5)
    assert dataset.rejected == 1
    assert pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist() == [
        {"path": "large.png", "reason": "2,000 × 1,000 px: more than 1 megapixels"}
    ]
    assert run(root, tmp_path / "out", role="unlabeled", max_megapixels=2).rejected == 0
