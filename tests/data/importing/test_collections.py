"""Imports of generated collections hold what an independent reader finds: nothing is lost, nothing is mislabeled. With damage, each holds
images or is refused in one line."""

import os
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from ns.config.schema import ImportConfig
from ns.core.errors import DataError, NsError
from ns.data.importing.ingest import import_images
from ns.storage import LocalStore
from tests.data.importing.collections import Collection, Generator, Outcome, damage_bytes, read_collection, read_pixels
from tests.storage.conftest import environment, moto, store_at  # noqa: F401

# The reader lets Pillow warn of damage.
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = ImportConfig(max_rejected_share=1, shard_samples=4, shard_mib=1)


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch):
    """To flush a tiny file to disk takes longer than all else that an import does."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def run_import(collection: Collection, source: str, target: Path) -> Outcome:
    """What the import holds, read from its tars."""
    store = LocalStore(target)
    options = {"role": collection.role, "classes": collection.classes, "split": collection.split}
    try:
        dataset = import_images(source, store, name="n", config=CONFIG, workers=1, **options)
    except DataError:
        return Outcome(refused=True)
    images: Counter[tuple[bytes, str | None]] = Counter()
    keys: list[str] = []
    for shard in dataset.shards:
        with tarfile.open(target / shard.name) as tar:
            data = {member.name: tar.extractfile(member).read() for member in tar}
        for name in data:
            key, _, extension = name.rpartition(".")
            if extension != "cls":
                keys.append(key)
                label = data.get(f"{key}.cls")
                images[read_pixels(data[name]), None if label is None else dataset.classes[int(label)]] += 1
    assert len(keys) == len(set(keys)) == dataset.samples
    return Outcome(images, dataset.rejected)


def check_collection(seed: int, folder: Path, remote=None) -> bool:
    """Whether the collection was imported, rather than refused. `remote`: a store to put the source into first."""
    folder.mkdir()
    collection = Generator(seed, folder, remote.uri if remote else "").make_collection()
    expected = read_collection(collection)
    source = collection.source
    if remote is not None:
        for path in folder.rglob("*"):
            if path.is_file():
                remote.put(path.relative_to(folder).as_posix(), path.read_bytes())
        source = source.replace(str(folder), remote.uri)
    found = run_import(collection, source, folder / "out")
    context = f"seed {seed}: {collection}"
    assert found.refused == expected.refused, context
    if not found.refused:
        assert found.images == expected.images, context
        assert found.rejected == expected.rejected, context
    return not found.refused


@pytest.mark.parametrize("seed", range(0, 40, 10))
def test_imports_hold_what_an_independent_reader_finds(tmp_path, seed):
    for number in range(seed, seed + 10):
        check_collection(number, tmp_path / str(number))


def check_damaged(seed: int, folder: Path) -> None:
    """Imports tables, tars and archives with damage: each either holds images, or is refused in one line."""
    folder.mkdir()
    collection = Generator(seed, folder).make_collection()
    rng = random.Random(seed)
    source = Path(collection.source)
    files = [source] if source.is_file() else sorted(folder.rglob("*.tar"))
    for path in rng.sample(files, min(2, len(files))):
        good = path.read_bytes()
        path.write_bytes(damage_bytes(good, rng))
        options = {"role": collection.role, "classes": collection.classes, "split": collection.split}
        message = ""
        try:
            import_images(collection.source, LocalStore(folder / "out"), name="n", config=CONFIG, workers=1, **options)
        except NsError as error:
            message = str(error)
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", message), f"seed {seed}: {message!r}"
        path.write_bytes(good)


def test_damaged_collections_are_imported_or_refused_in_one_line(tmp_path):
    for seed in range(20):
        check_damaged(seed, tmp_path / str(seed))


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_many_damaged_collections_are_imported_or_refused_in_one_line(tmp_path):
    for seed in range(1000, 1600):
        check_damaged(seed, tmp_path / str(seed))


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_2000_imports_hold_what_an_independent_reader_finds(tmp_path):
    imported = sum(check_collection(1000 + number, tmp_path / str(number)) for number in range(1900))
    assert imported > 1300


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("environment")
def test_imports_from_s3_hold_what_an_independent_reader_finds(moto, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    store = store_at(moto, tmp_path / "cache")
    imported = sum(check_collection(5000 + number, tmp_path / str(number), store.at(str(number))) for number in range(100))
    assert imported > 60
