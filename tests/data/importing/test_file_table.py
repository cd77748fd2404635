"""The table in docs/data.md of what becomes of each kind of file: it is made here, of real files, by imports."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from ns.config.schema import ImportConfig
from ns.core.errors import DataError
from ns.data.importing.ingest import import_images
from ns.data.shards import read_samples
from ns.storage import LocalStore

DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"
CONFIG = ImportConfig(max_rejected_share=1)
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
RGB = Image.fromarray(PIXELS)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def rotate(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(RGB, kind, exif=exif)


def make_441() -> bytes:
    data = bytearray(simplejpeg.encode_jpeg(np.ascontiguousarray(np.resize(PIXELS, (32, 32, 3))), colorsubsampling="411"))
    data[data.index(b"\xff\xc0") + 11] = 0x14
    return bytes(data)


def make_bomb() -> bytes:
    """A PNG of 20,000 × 18,000 px."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 18_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def make_tar(*members: tuple[str, bytes], link: str = "") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    return sink.getvalue()


def make_zip(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, PNG)
    return sink.getvalue()


PNG = encode(RGB, "PNG")
OTHER_PNG = encode(Image.fromarray(255 - PIXELS), "PNG")
THIRD_PNG = encode(Image.fromarray(PIXELS // 2), "PNG")
LABELED_PAIR = (("0.png", PNG), ("0.cls", b"0"), ("1.png", OTHER_PNG), ("1.cls", b"1"))
SIXTEEN = np.arange(384, dtype=np.uint16).reshape(16, 24)
MIB = 1 << 20

Write = Callable[[Path], object]


def write(name: str, data: bytes) -> Write:
    """Function that writes a file into a source."""

    def write_file(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return write_file


def write_all(*files: tuple[str, bytes]) -> Write:
    return lambda folder: [write(*file)(folder) for file in files]


def write_large(folder: Path) -> None:
    with (folder / "film.avi").open("wb") as file:
        file.truncate((1 << 30) + 1)


def write_table(*rows: str) -> Write:
    return write("table.csv", "\n".join(rows).encode())


POOL: list[tuple[str, Write]] = [
    ("JPEG: RGB, gray, CMYK, progressive", write_all(*(
        (f"{n}.jpg", encode(RGB.convert(mode), "JPEG", **options))
        for n, (mode, options) in enumerate((("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})))
    ))),
    ("JPEG turned by EXIF; with chroma of 4:4:1; several pictures in one (MPO)", write_all(
        ("1.jpg", rotate("JPEG")), ("2.jpg", make_441()), ("3.jpg", encode(RGB, "MPO", save_all=True, append_images=[RGB]))
    )),
    ("PNG: palette, transparent, 16 bits, animated", write_all(
        ("1.png", encode(RGB.convert("P"), "PNG")), ("2.png", encode(RGB.convert("RGBA"), "PNG")),
        ("3.png", encode(Image.fromarray(SIXTEEN), "PNG")), ("4.png", encode(RGB, "PNG", save_all=True, append_images=[RGB])),
    )),
    ("WebP", write("1.webp", encode(RGB, "WEBP"))),
    ("GIF, BMP, PPM, JPEG 2000, AVIF", write_all(*(
        (f"1.{name.lower()}", encode(RGB, name)) for name in ("GIF", "BMP", "PPM", "JPEG2000", "AVIF")
    ))),
    ("TIFF: RGB, 1 bit, 16 bits, integers of 32 bits that hold at most 16", write_all(*(
        (f"{n}.tif", encode(image, "TIFF"))
        for n, image in enumerate((RGB, RGB.convert("1"), Image.fromarray(SIXTEEN), Image.fromarray(SIXTEEN.astype(np.int32))))
    ))),
    ("an image whose name has another ending, or none", write_all(
        ("1.jfif", encode(RGB, "JPEG")), ("2.jpg", PNG), ("3", PNG), ("4.bin", PNG)
    )),
    ("images in a tar, at any depth; its labels, texts and JSON", write(
        "sub/a.tar", make_tar(("1.png", PNG), ("1.cls", b"3"), ("1.json", b"{}"))
    )),
    ("`.DS_Store`, `._a.jpg`, `.git/`, all hidden files", write_all((".DS_Store", b"x"), ("._a.jpg", PNG), (".git/a.png", PNG))),
    ("`Thumbs.db`, `desktop.ini`, `$RECYCLE.BIN/`, `__MACOSX/`, `lost+found/`, `@eaDir/`, `#recycle/`, `a.jpg~`", write_all(
        *((name, PNG) for name in (
            "Thumbs.db", "desktop.ini", "$RECYCLE.BIN/a.png", "__MACOSX/a.png", "lost+found/a.png", "@eaDir/a.png/b.jpg",
            "#recycle/a.png", "a.jpg~",
        ))
    )),
    ("`_SUCCESS`, `_temporary/`, `cat_$folder$`", write_all(*((name, PNG) for name in ("_SUCCESS", "_temporary/a.png", "cat_$folder$")))),
    ("documents by their endings: `.txt`, `.json`, `.xml`, `.csv`, `.pdf`, `.py`, `.npy`, …; `README`, `LICENSE`", write_all(
        *((f"a.{kind}", b"x") for kind in ("txt", "json", "xml", "csv", "pdf", "py", "npy")), ("README", b"x"), ("LICENSE", b"x")
    )),
    ("an empty file", write("a.jpg", b"")),
    ("a JPEG or PNG that is cut off", write_all(("a.jpg", encode(RGB, "JPEG")[:300]), ("a.png", PNG[:300]))),
    ("HEIC, in which phones take photographs", write("1.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")),
    ("SVG, EPS, a film, text with the name of an image", write_all(
        ("2.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("3.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("4.mp4", b"\0\0\0\x18ftypisom\0\0\0\0"),
        ("5.jpg", b"<html>not found</html>"),
    )),
    ("a TIFF of floating-point numbers", write("a.tif", encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))),
    ("integers of more than 16 bits", write("a.tif", encode(Image.fromarray(np.array([[0, 70_000]], np.int32)), "TIFF"))),
    ("an image of more than `data.max_megapixels` (100)", write("a.png", encode(Image.new("1", (15_000, 10_000)), "PNG"))),
    ("an image of more than 179 million px", write("a.png", make_bomb())),
    ("a file of more than 1 GiB", write_large),
    ("a link to nothing", lambda folder: (folder / "a.png").symlink_to("nowhere")),
    ("a link to a folder that holds it", lambda folder: (folder / "again").symlink_to(folder)),
    ("a pipe", lambda folder: os.mkfifo(folder / "a.png")),
    ("a zip or compressed tar in a folder", write("a.zip", make_zip("a.png"))),
]  # fmt: skip
"""What stands in a pool beside an image."""

LABELED: list[tuple[str, Write]] = [
    ("a class folder spelled in two ways (NFC and NFD)", write_all(("caf\u00e9/1.png", PNG), ("cafe\u0301/2.png", PNG))),
    ("a file that is no image, outside any class folder", write("film.mp4", b"x")),
    ("an image outside any class folder", write("a.png", PNG)),
    ("a class folder without a file", lambda folder: (folder / "emu").mkdir()),
    ("a class folder without a readable image", write("emu/a.png", b"x")),
    ("a tar with indices beside class folders", write("a.tar", make_tar(("1.png", PNG), ("1.cls", b"0")))),
]
"""What stands in labeled data beside two class folders."""

SOURCES: list[tuple[str, Write]] = [
    ("tar: labels before, after or far from their images; as `.cls`, `.json`, `.txt`", write("a.tar", make_tar(
        ("2.cls", b"1"), ("1.png", PNG), ("2.png", OTHER_PNG), ("3.png", THIRD_PNG), ("1.json", b'{"label": 0}'), ("3.txt", b"1"),
    ))),
    ("tar: several images of one key", write("a.tar", make_tar(
        ("1.left.png", PNG), ("1.right.png", OTHER_PNG), ("1.cls", b"0"), ("2.png", THIRD_PNG), ("2.cls", b"1")
    ))),
    ("tar: one name twice with one label twice", write("a.tar", make_tar(
        ("1.png", PNG), ("1.cls", b"0"), ("1.png", OTHER_PNG), ("1.cls", b"0"), ("2.png", THIRD_PNG), ("2.cls", b"1"),
    ))),
    ("tar: one key twice with different labels", write("a.tar", make_tar(
        *LABELED_PAIR, ("2.png", PNG), ("2.cls", b"0"), ("2.png", THIRD_PNG), ("2.cls", b"1"),
    ))),
    ("tar: `.cls` and `.json` that contradict each other", write("a.tar", make_tar(
        *LABELED_PAIR, ("2.png", PNG), ("2.cls", b"0"),
        ("2.json", b'{"label": 1}'),
    ))),
    ("tar: an image without a label", write("a.tar", make_tar(*LABELED_PAIR, ("2.png", PNG)))),
    ("tar: a `.cls` without an image", write("a.tar", make_tar(*LABELED_PAIR, ("2.cls", b"1")))),
    ("tar: a `.cls` that is neither an index nor a name", write("a.tar", make_tar(
        *LABELED_PAIR, ("2.png", PNG), ("2.cls", b"-1")
    ))),
    ("tar: indices and names", write("a.tar", make_tar(("0.png", PNG), ("0.cls", b"0"), ("1.png", OTHER_PNG), ("1.cls", b"cat")))),
    ("tar: a link, a device", write("a.tar", make_tar(("cat/1.png", PNG), link="dog/1.png"))),
    ("tar or zip: a name that leads outside", write("a.tar", make_tar(("../1.png", PNG)))),
    ("tar: cut off", write("a.tar", make_tar(("cat/1.png", PNG), ("dog/1.png", PNG))[:1000])),
    ("zip: cut off", write("a.zip", make_zip("cat/1.png")[:100])),
    ("archive: a README beside the class folders", write("a.tar", make_tar(
        ("cat/1.png", PNG), ("dog/1.png", OTHER_PNG), ("README", b"x")
    ))),
    ("table: rows that name one image again", write_table("path,label", "1.png,cat", "./1.png,cat", "2.png,dog")),
    ("table: rows that name one image with two classes", write_table("path,label", "1.png,cat", "./1.png,dog", "2.png,dog", "3.png,cat")),
    ("table: a row whose image is not there", write_table("path,label", "1.png,cat", "2.png,dog", "none.png,cat")),
    ("table: a row without a label", write_table("path,label", "1.png,cat", "2.png,dog", "3.png,")),
    ("table: a row without a path", write_table("path,label", "1.png,cat", "2.png,dog", ",cat")),
    ("table: several splits, and none is named", write_table("path,label,split", "1.png,cat,train", "2.png,dog,test")),
    ("folders that are all named as splits", write_all(("train/cat/1.png", PNG), ("test/cat/1.png", PNG))),
]  # fmt: skip
"""A labeled source of its own."""


def describe_import(source: Path, folder: Path, role: str, around: int, count: int | None) -> str:
    """What an import does with all files of a source but `around` images that it imports anyway. `count`: their number, if known."""
    out = folder / "out"
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.stat().st_size <= MIB]
    try:
        dataset = import_images(str(source), LocalStore(out), name="n", role=role, config=CONFIG, workers=1)
    except DataError as error:
        return f"refused | {str(error).removeprefix(f'{source}: ').replace(str(source), source.name)}"
    if dataset.rejected:
        assert dataset.samples == around
        assert count in (None, dataset.rejected)
        return f"counted | {', '.join(dict.fromkeys(pq.read_table(out / 'rejected.parquet')['reason'].to_pylist()))}"
    if dataset.samples == around:
        return "passed over |"
    assert count in (None, dataset.samples - around)
    # A tar holds images as they are, too.
    content = b"".join(files)
    kept = 0
    for path in (out / shard.name for shard in dataset.shards):
        data = path.read_bytes()
        kept += sum(data[sample.offset :][: sample.size] in content for sample in read_samples(path))
    assert kept in (around, dataset.samples)
    return "read | kept byte for byte" if kept == dataset.samples else "read | becomes PNG"


def make_rows(root: Path) -> list[str]:
    pictures = (("1.png", PNG), ("2.png", OTHER_PNG), ("3.png", THIRD_PNG))
    rows = []
    for number, (description, write_case) in enumerate((*POOL, *LABELED, *SOURCES)):
        folder = source = root / f"{number}" / "source"
        folder.mkdir(parents=True)
        write_case(folder)
        role, around, count = "labeled", 2, None
        if number < len(POOL):
            role, around = "unlabeled", 1
            count = sum(not path.is_dir() for path in folder.rglob("*"))
            write("good.png", OTHER_PNG)(folder)
        elif number < len(POOL) + len(LABELED):
            write_all(("cat/1.png", PNG), ("dog/1.png", OTHER_PNG))(folder)
        elif files := [path for path in folder.iterdir() if path.is_file()]:
            source = files[0]
            if source.suffix == ".csv":
                write_all(*pictures)(folder)
        rows.append(f"| {description} | {describe_import(source, folder.parent, role, around, count)} |")
    return rows


def test_table_of_files_says_what_imports_do(tmp_path):
    text = DOCUMENT.read_text()
    head = "| file | what becomes of it | how |\n|---|---|---|\n"
    rows = make_rows(tmp_path)
    shown = text.partition(head)[2].partition("\n\n")[0].splitlines()
    assert shown == rows, "the table of docs/data.md must be:\n" + head + "\n".join(rows)
