"""Collections of images as people and programs leave them, made from a seed, and a plain reader that says what an import of them must hold.

The reader shares no code with the import: it uses the standard library and Pillow, and keeps all in memory.
"""

import csv
import io
import json
import posixpath
import random
import re
import tarfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LEFT_BY_PROGRAMS = (
    *(".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r", "_SUCCESS", "Picasa.ini"),
    *("@eaDir/1.jpg", "__MACOSX/._1.jpg", "$RECYCLE.BIN/1.png", ".ipynb_checkpoints/1.png", "lost+found/1.png"),
)
DOCUMENTS = ("README.md", "LICENSE", "notes.txt", "labels.csv", "data.xml", "info.json")
OTHERS = ("film.mp4", "photo.heic", "drawing.svg", "nothing")
FORMATS = {"png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
FORMATS |= dict.fromkeys(("jpg", "JPG", "jpeg", "jfif"), "JPEG")
CLASS_NAMES = (
    ("cat", "dog", "emu"),
    ("0", "1", "2", "10"),
    ("7", "12", "100"),
    ("007", "n01440764", "Ox, bull"),
    ("Café", "Ñandú", "日本", "🦊"),
    (" cat", "dog "),
    ("a", "A", "b"),
)
FOLDERS = ("", "", "sub", "more/deep", "2024.06", "é")
STEMS = ("{n}", "IMG_{n:04d}", "2024.06.{n:02d}_cam", "a b {n}", "é{n}", "x{n}.left", "#{n}", "{n}%20", "Ünï-{n}")

LABEL_EXTENSIONS = ("cls", "json", "txt")

Files = dict[str, bytes]


@dataclass
class Collection:
    """A source on disk, and what an import is told of it."""

    source: str
    role: str
    kind: str
    """`folder`, `table`, `tars` or `archive`."""
    classes: list[str] | None = None
    split: str | None = None
    class_depth: int = 0
    """Number of folders above the class folders."""


@dataclass
class Outcome:
    """What an import holds."""

    images: Counter[tuple[bytes, str | None]] = field(default_factory=Counter)
    """Pixels and class name → number."""
    rejected: int = 0
    refused: bool = False


def read_pixels(data: bytes) -> bytes | None:
    """RGB bytes; None for what is no whole image."""
    try:
        with Image.open(io.BytesIO(data), formats=list(set(FORMATS.values()))) as image:
            return image.convert("RGB").tobytes()
    except Exception:
        return None


# The generator


class Generator:
    def __init__(self, seed: int, root: Path, uri: str = "") -> None:
        """`uri`: where the files below `root` will be, if not there."""
        self._random = random.Random(seed)
        self._root, self._uri = root, uri or str(root)
        self._number = 0

    def make_collection(self) -> Collection:
        rng = self._random
        kind = rng.choice(("folder", "folder", "table", "tars", "tars", "archive", "archive"))
        role = rng.choice(("labeled", "labeled", "evaluation", "unlabeled"))
        names = list(rng.choice(CLASS_NAMES))
        collection = getattr(self, f"_make_{kind}")(role, names)
        if role == "evaluation" and collection.classes is None:
            change_case = rng.choice((str, str.upper)) if len({name.upper() for name in names}) == len(names) else str
            collection.classes = [change_case(self._respell(name)) for name in rng.sample(names, len(names))]
        return collection

    def _respell(self, name: str) -> str:
        return unicodedata.normalize(self._random.choice(("NFC", "NFD")), name)

    def _make_image(self) -> tuple[str, bytes]:
        """Extension and bytes; now and then damaged or of another kind."""
        rng = self._random
        extension = rng.choice(list(FORMATS))
        sink = io.BytesIO()
        size = (rng.randint(4, 9), rng.randint(4, 9))
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(sink, FORMATS[extension])
        data = sink.getvalue()
        damage = rng.random()
        if damage < 0.03:
            data = data[: rng.randrange(20)]
        elif damage < 0.05:
            data = rng.randbytes(50)
        elif damage < 0.08:
            extension = rng.choice(("", "png", "heic", "bin"))
        return extension, data

    def _make_name(self) -> str:
        self._number += self._random.choice((0, 1, 1, 1, 1))
        return unicodedata.normalize(self._random.choice(("NFC", "NFD")), self._random.choice(STEMS).format(n=self._number))

    def _make_tree(self, prefixes: list[str]) -> Files:
        """Images at some depth below each of the prefixes, with what lies around them."""
        rng = self._random
        files: Files = {}
        for prefix in prefixes:
            for _ in range(rng.randint(1, 4)):
                extension, data = self._make_image()
                name = self._make_name() + (f".{extension}" if extension else "")
                files[posixpath.join(prefix, rng.choice(FOLDERS), name)] = data
            if rng.random() < 0.3:
                files[posixpath.join(prefix, rng.choice(OTHERS))] = b"no image"
        for around in ([""], prefixes):
            for name in rng.sample(LEFT_BY_PROGRAMS + DOCUMENTS, rng.choice((0, 0, 1, 3))):
                files[posixpath.join(rng.choice(around), name)] = rng.choice((b"", b"left", *list(files.values())[:1]))
        return files

    def _write_files(self, files: Files, folder: str = "source") -> Path:
        for name, data in files.items():
            path = self._root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return self._root / folder

    def _make_folder(self, role: str, names: list[str]) -> Collection:
        prefixes = [self._respell(name) for name in names]
        if role == "unlabeled" and self._random.random() < 0.5:
            prefixes = [""]
        return Collection(str(self._write_files(self._make_tree(prefixes))), role, "folder")

    def _make_table(self, role: str, names: list[str]) -> Collection:
        rng = self._random
        files = self._make_tree(["images"])
        files = {name: data for name, data in files.items() if not name.endswith((".csv", "\r"))}
        folder = self._write_files(files)
        splits = rng.choice((None, None, ["train", "test"]))
        rows: list[dict[str, str | None]] = []
        for name in files:
            spellings = [name, name, f"./{name}", f"images/../{name}", f"{self._uri}/source/{name}"]
            if self._uri == str(self._root):
                spellings.append(unicodedata.normalize("NFC", name))
            spelling = rng.choice(spellings)
            rows.append({"path": spelling, "label": self._respell(rng.choice(names))})
        for _ in range(rng.choice((0, 0, 1, 2))):
            # A row again, perhaps with another class; a file that is not there; a row without label or path.
            again = dict(rng.choice(rows))
            change = rng.choice(("nothing", "label", "path", "unlabeled", "empty"))
            if change == "label":
                again["label"] = rng.choice(names)
            elif change == "path":
                again["path"] = f"images/none-{len(rows)}.png"
            elif change == "unlabeled":
                again |= {"path": f"images/none-{len(rows)}.png", "label": None}
            elif change == "empty":
                again["path"] = None
            rows.insert(rng.randrange(len(rows) + 1), again)
        if splits:
            for row in rows:
                row["split"] = rng.choice(splits)
            rows[0]["split"] = "test"
        columns = {key: rng.choice((key, key.upper(), f" {key.title()}")) for key in rows[0]}
        suffix = rng.choice((".csv", ".tsv", ".parquet"))
        table = folder / f"table{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([{columns[key]: row[key] for key in columns} for row in rows]), table)
        else:
            text = io.StringIO()
            writer = csv.writer(text, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerow(columns.values())
            writer.writerows([["" if row[key] is None else row[key] for key in columns] for row in rows])
            table.write_text(rng.choice(("", "\ufeff")) + text.getvalue())
        return Collection(str(table), role, "table", split="test" if splits else None)

    def _make_samples(self, count: int, labels: list[str], kind: str) -> list[tuple[str, bytes]]:
        """The members of one tar: images, labels in some order, and other things."""
        rng = self._random
        samples: list[list[tuple[str, bytes]]] = []
        for _ in range(count):
            extension, data = self._make_image()
            stem = posixpath.join(rng.choice(FOLDERS), self._make_name())
            label = rng.choice(labels)
            sample = [(f"{stem}.{extension or 'png'}", data)]
            if rng.random() < 0.1:
                sample.append((f"{stem}.right.png", self._make_image()[1]))
            document = {"width": 3, "label": int(label) if label.isdecimal() else label}
            text = {"cls": label, "json": json.dumps(document), "txt": f"{label}\n"}
            if rng.random() > 0.05:
                sample.append((f"{stem}.{rng.choice((kind, kind.upper()))}", self._respell(text[kind]).encode()))
            if kind == "cls" and rng.random() < 0.3:
                sample.append((f"{stem}.json", b'{"width": 3}'))
                sample.append((f"{stem}.txt", b"a caption\nof two lines"))
            if rng.random() < 0.05:
                sample = sample[1:]
            samples.append(sample)
            if rng.random() < 0.05:
                # A writer that counts from one again.
                other = json.dumps({"label": rng.choice(labels)}) if kind == "json" else rng.choice(labels)
                images = [(name, self._make_image()[1]) for name, _ in sample if not name.lower().endswith(LABEL_EXTENSIONS)]
                samples.append([*images, *((name, other.encode()) for name, _ in sample if name.lower().endswith(kind))])
        order = rng.choice(("together", "labels last", "labels first", "shuffled"))
        members = [member for sample in samples for member in sample]
        if order == "shuffled":
            rng.shuffle(members)
        elif order != "together":
            members.sort(key=lambda member: member[0].lower().endswith(LABEL_EXTENSIONS) == (order == "labels last"))
        if members and rng.random() < 0.1:
            members.append(rng.choice(members))
        others = rng.sample(LEFT_BY_PROGRAMS + DOCUMENTS + OTHERS, rng.choice((0, 0, 2)))
        return members + [(name, b"left") for name in others]

    def _pack_tar(self, members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
        rng = self._random
        sink = io.BytesIO()
        dotted = rng.choice(("", "", "./"))
        with tarfile.open(fileobj=sink, mode=mode, format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
            for name, data in members:
                info = tarfile.TarInfo(dotted + name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return sink.getvalue()

    def _make_tars(self, role: str, names: list[str]) -> Collection:
        rng = self._random
        by_index = rng.random() < 0.5
        labels = [name for name in names if not name.isdecimal()] or ["x", "y"]
        if by_index:
            labels = [str(number) for number in range(len(names))]
        kind = rng.choice(("cls", "cls", "json", "txt"))
        patterns = rng.choice((["part-{}.tar"], ["{}/part.tar"], ["a/b/part-{}.tar", "part-{}.tar"]))
        digits, count = rng.choice((1, 3)), rng.randint(1, 3)
        numbers = [f"{number:0{digits}d}" for number in range(count)]
        shards = {
            pattern.format(number): self._pack_tar(self._make_samples(rng.randint(2, 5), labels, kind))
            for number in numbers
            for pattern in patterns
        }
        source = str(self._write_files(shards))
        if len(patterns) == 1 and rng.random() < 0.5:
            source = f"{source}/{patterns[0].format(f'{{{numbers[0]}..{numbers[-1]}}}')}"
        classes = None
        if role == "evaluation" or (role == "labeled" and by_index and rng.random() < 0.5):
            classes = [f"class {label}" for label in labels] if by_index else rng.sample(labels, len(labels))
        return Collection(source, role, "tars", classes)

    def _make_archive(self, role: str, names: list[str]) -> Collection:
        rng = self._random
        prefix = rng.choice(("", "data", "set/train"))
        files = self._make_tree([posixpath.join(prefix, self._respell(name)) for name in names])
        if rng.random() < 0.2:
            # A tar for each class, as in ImageNet.
            trees = {posixpath.join(prefix, self._respell(name)): self._make_tree([""]) for name in names}
            files = {f"{folder}.tar": self._pack_tar(list(tree.items())) for folder, tree in trees.items()}
        suffix = rng.choice((".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip"))
        path = self._root / f"archive{suffix}"
        if suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
        else:
            path.write_bytes(self._pack_tar(list(files.items()), {".tar": "w", ".tar.xz": "w:xz"}.get(suffix, "w:gz")))
        return Collection(str(path), role, "archive", class_depth=len([part for part in prefix.split("/") if part]))


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them changed, left out, or put in."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at, length = rng.randrange(len(damaged) + 1), rng.randrange(1, 600)
        kind = rng.choice(("change", "change", "cut", "insert", "text"))
        if kind == "change":
            damaged[at : at + 1] = rng.randbytes(1)
        elif kind == "cut":
            del damaged[at : at + length]
        elif kind == "insert":
            damaged[at:at] = rng.randbytes(length)
        else:
            damaged[at:at] = rng.choice((b"\0", b",,\n", b'"', b"\r", b"../", b"\xff\xfe", b"\x1b[31m"))
    return bytes(damaged)


# The reader


def read_collection(collection: Collection) -> Outcome:
    """What an import of the collection must hold."""
    files = {"folder": read_folder, "table": read_table, "tars": read_tars, "archive": read_archive}[collection.kind](
        collection
    )
    outcome = Outcome()
    labels: set[str] = set()
    readable: set[str | None] = set()
    count = 0
    for data, label, good in files:
        count += 1
        label = None if collection.role == "unlabeled" or label is None else find_class(label, collection.classes)
        if label == "":
            outcome.refused = True
        if label is not None:
            labels.add(label)
        pixels = read_pixels(data) if good and data is not None else None
        if pixels is None or (label is None and collection.role != "unlabeled"):
            outcome.rejected += 1
        else:
            outcome.images[pixels, label] += 1
            readable.add(label)
    if not count or not outcome.images:
        outcome.refused = True
    if collection.role == "labeled":
        classes = set(collection.classes or labels)
        if all(name.isdecimal() for name in labels) and collection.kind == "tars" and not collection.classes and labels:
            classes = {str(number) for number in range(max(map(int, labels)) + 1)}
        outcome.refused |= len(classes) < 2 or not classes <= readable
    return outcome


def find_class(label: str, classes: list[str] | None) -> str:
    """The class that a label means, as an import names it; empty for none."""
    name = unicodedata.normalize("NFC", label).strip()
    if classes is None:
        return name
    if name.isdecimal() and classes[0].startswith("class "):
        return classes[int(name)] if int(name) < len(classes) else ""
    spellings = {unicodedata.normalize("NFC", one).strip(): one for one in classes}
    return spellings.get(name) or spellings.get(name.upper(), "")


def is_left_or_document(path: str) -> bool:
    parts = path.split("/")
    left = {name.split("/")[0] for name in LEFT_BY_PROGRAMS}
    return bool(left.intersection(parts)) or any(part.startswith(".") for part in parts) or parts[-1] in DOCUMENTS


def read_folder(collection: Collection) -> Iterator[tuple[bytes, str | None, bool]]:
    root = Path(collection.source)
    for path in root.rglob("*"):
        inner = path.relative_to(root).as_posix()
        if path.is_file() and not is_left_or_document(inner):
            yield path.read_bytes(), inner.split("/")[0], True


def read_archive(collection: Collection) -> Iterator[tuple[bytes, str | None, bool]]:
    if collection.source.endswith(".zip"):
        with zipfile.ZipFile(collection.source) as archive:
            files = [(name, archive.read(name)) for name in archive.namelist()]
    else:
        files = unpack_tar(collection.source)
    for name, data in files:
        if is_left_or_document(name):
            continue
        class_name = name.split("/")[collection.class_depth]
        if class_name.endswith(".tar"):
            inner = unpack_tar(io.BytesIO(data))
            yield from ((bytes_, class_name[:-4], True) for inner_name, bytes_ in inner if not is_left_or_document(inner_name))
        else:
            yield data, class_name, True


def unpack_tar(source: str | Path | io.BytesIO) -> list[tuple[str, bytes]]:
    options = {"fileobj": source} if isinstance(source, io.BytesIO) else {"name": source}
    with tarfile.open(**options) as tar:
        return [(posixpath.normpath(member.name), tar.extractfile(member).read()) for member in tar if member.isfile()]


def read_table(collection: Collection) -> Iterator[tuple[bytes | None, str | None, bool]]:
    path = Path(collection.source)
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    else:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    rows = [{key.strip().lower(): value or None for key, value in row.items()} for row in rows]
    rows = [row for row in rows if collection.split is None or row["split"] == collection.split]
    on_disk = {unicodedata.normalize("NFC", str(file)): file for file in path.parent.rglob("*")}
    labels_by_file: dict[str, set[str]] = {}
    for row in rows:
        if row["path"] is None:
            yield None, None, False
            continue
        inner = re.sub(r"^s3://.*?/source/", "", row["path"].strip())
        name = unicodedata.normalize("NFC", posixpath.normpath(path.parent / inner))
        labels_by_file.setdefault(name, set()).update([row["label"]] if row["label"] else [])
    for name, labels in labels_by_file.items():
        if collection.role == "unlabeled":
            labels = set()
        labels = {unicodedata.normalize("NFC", label).strip() for label in labels}
        data = on_disk[name].read_bytes() if name in on_disk and on_disk[name].is_file() else None
        yield data, min(labels) if len(labels) == 1 else None, len(labels) < 2


def read_tars(collection: Collection) -> Iterator[tuple[bytes, str | None, bool]]:
    root = Path(collection.source.split("{")[0]).parent if "{" in collection.source else Path(collection.source)
    for tar in sorted(root.rglob("*.tar")):
        yield from read_samples(unpack_tar(tar), collection.role)


def read_samples(members: list[tuple[str, bytes]], role: str) -> Iterator[tuple[bytes, str | None, bool]]:
    members = [(name, data) for name, data in members if name.split("/")[-1] not in DOCUMENTS and not is_left_or_document(name)]
    images = [(name, data) for name, data in members if not name.lower().endswith(LABEL_EXTENSIONS)]
    if role == "unlabeled":
        yield from ((data, None, True) for _, data in images)
        return
    labels: dict[str, dict[str, list[str]]] = {}
    for name, data in members:
        stem, _, kind = unicodedata.normalize("NFC", name).rpartition(".")
        if kind.lower() in LABEL_EXTENSIONS:
            value = json.loads(data).get("label") if kind.lower() == "json" else data.decode()
            if value is not None and "caption" not in str(value):
                labels.setdefault(stem, {}).setdefault(kind.lower(), []).append(
                    unicodedata.normalize("NFC", str(value)).strip()
                )
    used: set[str] = set()
    names = [name for name, _ in images]
    for name, data in images:
        folder, slash, base = unicodedata.normalize("NFC", name).rpartition("/")
        stems = [folder + slash + base.rpartition(".")[0], folder + slash + base.partition(".")[0]]
        used.update(stems)
        found = next((labels[stem] for stem in stems if stem in labels), {})
        values = next((found[kind] for kind in LABEL_EXTENSIONS if kind in found), [])
        good = len(set(values)) <= 1 and (names.count(name) == 1 or not values or len(values) == names.count(name))
        yield data, values[0] if values and good else None, good
    for stem, kinds in labels.items():
        if stem not in used:
            yield from ((b"", None, False) for _ in kinds.get("cls", []))
