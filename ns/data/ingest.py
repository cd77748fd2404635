"""Ingest: a folder of images becomes a dataset. Each image is decoded once; what cannot be read is listed and left out."""

import hashlib
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ns import log
from ns.data.dataset import MANIFEST, Dataset, Role
from ns.data.decode import JPEG, decode
from ns.data.shards import IMAGES, ShardWriter
from ns.errors import DataError
from ns.store import Store

REJECTED = "rejected.parquet"
MAX_FILE_BYTES = 1 << 30
"""A larger file among images is a film or an archive: too much to read to find out."""
SHOWN_REJECTS = 10
"""So many are logged one by one; `rejected.parquet` has them all."""
EXTENSIONS = {*IMAGES, "bmp", "gif", "tif", "tiff", "ppm", "jp2", "avif"}
"""Left out of keys."""
HIDDEN = (".", "__MACOSX", "Thumbs.db", "desktop.ini")


def import_images(
    source: str,
    folder: Store,
    *,
    name: str,
    role: Role,
    max_rejected_share: float,
    shard_samples: int,
    shard_mib: int,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Imports a local folder: one subfolder for each class, or for an unlabelled pool images at any depth.

    The result depends on names and bytes alone: the same folder gives the same digest. `classes` fixes the class list, as an
    evaluation set must have that of the labelled data. A dataset that was in `folder` is replaced; an import that was stopped
    leaves no manifest, and starts over. Raises DataError for a folder without images, an empty or unknown class, or a larger
    share of unreadable images than `max_rejected_share`.
    """
    root = _local(source)
    files = _files(root)
    class_names: tuple[str, ...] = ()
    if role != "unlabelled":
        class_names = _classes(root, files, classes)
    if not files:
        raise DataError(f"{root}: has no files to import")
    order = sorted(files)
    if role != "unlabelled":
        # By hash, so that every shard mixes the classes.
        order.sort(key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
    index = {label: number for number, label in enumerate(class_names)}
    rejected: list[tuple[str, str]] = []
    used: Counter[str] = Counter()
    readable: Counter[str] = Counter()
    # Shards of one import under the manifest of another would be a damaged dataset.
    folder.delete(MANIFEST)
    progress = log.Progress(len(order), "images")
    with ShardWriter(folder, max_samples=shard_samples, max_bytes=shard_mib << 20) as writer:
        for path in order:
            try:
                data, extension = _read(root / path)
            except DataError as error:
                rejected.append((_text(path), str(error)))
            else:
                label = path.partition(os.sep)[0]
                readable[label] += 1
                writer.add(_key(path, used), extension, data, None if role == "unlabelled" else index[label])
            progress.advance()
    _check_rejects(root, rejected, len(order), max_rejected_share)
    _check_any(root, writer, rejected)
    if role == "labelled":
        _check_labels(root, [label for label in class_names if not readable[label]], rejected)
    _list_rejects(folder, rejected)
    dataset = Dataset(name=name, role=role, classes=class_names, shards=writer.shards, rejected=len(rejected))
    dataset.save(folder)
    return dataset


def _local(source: str) -> Path:
    path = Path(unquote(urlsplit(source).path) if source.startswith("file://") else source).expanduser()
    if not path.is_dir():
        raise DataError(f"{source}: no such folder")
    return path


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder at and below `root` with the sorted names of its folders and files, hidden ones left out.

    Links to folders are followed, as data sets are often linked into place, but not back into a folder that leads here.
    """
    for place, folders, names in os.walk(root, onerror=_unreadable, followlinks=True):
        parent = Path(place)
        leading = {folder.resolve() for folder in (parent, *parent.parents) if folder.is_relative_to(root)}
        folders[:] = sorted(
            name for name in folders if not name.startswith(HIDDEN) and (parent / name).resolve() not in leading
        )
        yield parent, list(folders), sorted(name for name in names if not name.startswith(HIDDEN))


def _files(root: Path) -> list[str]:
    """Relative paths of all files but hidden ones."""
    return [str((parent / name).relative_to(root)) for parent, _, names in walk(root) for name in names]


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _classes(root: Path, files: list[str], known: Sequence[str] | None) -> tuple[str, ...]:
    loose = next((path for path in files if os.sep not in path), None)
    if loose is not None:
        raise DataError(
            f"{root}: {_text(loose)} lies outside any class folder; labelled images belong into one subfolder for each class"
        )
    counts = Counter(path.partition(os.sep)[0] for path in files)
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(HIDDEN))
    if unnamed := [_text(folder) for folder in folders if _text(folder) != folder]:
        raise DataError(f"{root}: class folder '{unnamed[0]}': its name is not UTF-8; rename it")
    empty = [folder for folder in folders if not counts[folder]]
    if empty:
        raise DataError(f"{root}: class folder {empty[0]!r} has no images; add some, or remove the folder")
    if known is not None:
        if unknown := sorted(set(folders) - set(known)):
            raise DataError(
                f"{root}: class folder {unknown[0]!r} is none of the labelled classes "
                f"({', '.join(known[:10])}{', …' if len(known) > 10 else ''}); rename or remove it"
            )
        return tuple(known)
    if len(folders) < 2:
        raise DataError(f"{root}: has {len(folders)} class folders; at least 2 are needed to learn anything")
    return tuple(folders)


def _read(path: Path) -> tuple[bytes, str]:
    """The bytes that go into the shard, and their extension. Raises DataError with the reason for a reject."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for a writer for good.
            raise DataError("not a plain file")
        if status.st_size > MAX_FILE_BYTES:
            raise DataError("larger than 1 GiB")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(error.strerror or str(error)) from error
    pixels = decode(data)
    kept = _kept(data)
    if kept is not None:
        return data, kept
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return png.getvalue(), "png"


def _kept(data: bytes) -> str | None:
    """The extension of what goes into shards byte for byte, by its first bytes; other formats become PNG."""
    if data.startswith(JPEG):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return None


def _text(path: str) -> str:
    # Names that are no UTF-8 get escapes for their bytes instead of lone surrogates, which no file could hold.
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _key(path: str, used: Counter[str]) -> str:
    """`cat/IMG.1.jpg` → `cat/IMG_1`; a number is added where two files would share a key."""
    stem, dot, extension = path.rpartition(".")
    plain = stem if dot and extension.lower() in EXTENSIONS else path
    text = re.sub(r"[\x00-\x1f.\\]", "_", _text(plain))
    key = "/".join(part.strip() or "_" for part in text.split("/"))
    used[key] += 1
    while used[key] > 1:
        key = f"{key}-{used[key]}"
        used[key] += 1
    return key


def _check_rejects(root: Path, rejected: list[tuple[str, str]], total: int, limit: float) -> None:
    if len(rejected) <= limit * total:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(r for _, r in rejected).most_common(3))
    first = "; ".join(f"{path}: {reason}" for path, reason in rejected[:3])
    raise DataError(
        f"{root}: {len(rejected)} of {total} files cannot be read ({reasons}), more than "
        f"data.max_rejected_share = {limit:.1%}; first: {first}; mend or remove them, or raise the limit"
    )


def _check_any(root: Path, writer: ShardWriter, rejected: list[tuple[str, str]]) -> None:
    if not writer.shards:
        path, reason = rejected[0]
        raise DataError(f"{root}: no readable image among {len(rejected)} files; first: {path}: {reason}")


def _check_labels(root: Path, unread: list[str], rejected: list[tuple[str, str]]) -> None:
    for label in unread:
        path, reason = next(item for item in rejected if item[0].startswith(label + os.sep))
        raise DataError(
            f"{root}: class folder {label!r} has no readable image; first: {path}: {reason}; mend its images, or remove the folder"
        )


def _list_rejects(folder: Store, rejected: list[tuple[str, str]]) -> None:
    columns = {"path": [path for path, _ in rejected], "reason": [reason for _, reason in rejected]}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=pa.schema([("path", pa.string()), ("reason", pa.string())])), sink)
    folder.put(REJECTED, sink.getvalue())
    for path, reason in rejected[:SHOWN_REJECTS]:
        log.get().warning("image left out", path=path, reason=reason)
    if len(rejected) > SHOWN_REJECTS:
        log.get().warning("more images left out", images=len(rejected) - SHOWN_REJECTS, list=f"{folder.uri}/{REJECTED}")
