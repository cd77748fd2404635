"""Whatever is in a file from outside: it is read, or refused with an error that names it. Never a stack trace, never silence."""

import importlib
import io
import json
import pkgutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from importlib.resources import files

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ns
from ns.config.loader import load_experiment
from ns.core.errors import ConfigError, DataError, NsError
from ns.data.dataset import Dataset
from ns.data.importing import sources
from ns.labeling import audit
from ns.modeling.factory import load_model
from ns.storage import LocalStore
from ns.storage.documents import JsonDocument
from ns.storage.ledger import Ledger

# Some thousand files, one after the other.
pytestmark = pytest.mark.integration

QUICKSTART = (files("ns.config.presets") / "quickstart.yaml").read_text()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda leaf: st.lists(leaf, max_size=3) | st.dictionaries(st.text(max_size=5), leaf, max_size=3),
    max_leaves=6,
)
FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def documents() -> list[type[JsonDocument]]:
    """Every kind of document that there is."""
    for module in pkgutil.walk_packages(ns.__path__, "ns."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, waiting = [], [JsonDocument]
    while waiting:
        kinds = waiting.pop().__subclasses__()
        found += [kind for kind in kinds if kind.__module__.startswith("ns.")]
        waiting += kinds
    return sorted(set(found), key=lambda kind: (kind.__module__, kind.__name__))


def refusal(read: Callable[[], object], kind: type[NsError] = NsError) -> str | None:
    """The message of an error of that kind; None if there was none. Any other error is a fault."""
    try:
        read()
    except kind as error:
        return str(error)
    return None


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """The bytes with some of them changed, put in, or missing."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["change", "insert", "remove", "cut"])):
            case "change" if data:
                data[at] = draw(st.integers(0, 255))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del data[at : at + draw(st.integers(1, 40))]
            case "cut":
                del data[at:]
    return bytes(data)


@pytest.mark.parametrize("kind", documents(), ids=lambda kind: kind.__qualname__)
def test_document_of_garbage_is_refused_by_name(kind):
    names = [*kind.model_fields, "digest", "more"]

    @settings(FEW, max_examples=15)
    @given(st.dictionaries(st.sampled_from(names), VALUES) | VALUES)
    def check(value):
        said = refusal(lambda: kind.parse(json.dumps(value).encode(), "store/some.json"), DataError)
        assert said is None or said.startswith("store/some.json: ")

    check()


@FEW
@given(st.binary(max_size=200))
def test_document_of_random_bytes_is_refused(data):
    with pytest.raises(DataError, match=r"^store/some\.json: "):
        Dataset.parse(data, "store/some.json")


@FEW
@given(damaged(QUICKSTART.encode()))
def test_damaged_experiment_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "experiment.yaml"
    path.write_bytes(data)
    said = refusal(lambda: load_experiment(str(path)))
    assert said is None or "experiment.yaml" in said


@FEW
@given(st.lists(st.tuples(st.sampled_from(["teacher", "students", "data", "selection", "gate", "labeling", "name"]), VALUES)))
def test_experiment_of_wrong_values_is_refused_by_field(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "wrong.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(QUICKSTART), **dict(changes)}))
    said = refusal(lambda: load_experiment(str(path)), ConfigError)
    assert said is None or "wrong.yaml" in said


def tar_of_samples() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in [("a.png", b"png"), ("a.cls", b"1"), ("ü/b.jpg", b"jpg"), ("ü/b.cls", b"0")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def zip_of_folders() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("cat/a.png", b"png")
        archive.writestr("dog/b.png", b"png")
    return sink.getvalue()


def parquet_table() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "label": ["cat", "dog"]}), sink)
    return sink.getvalue()


SOURCES = {
    "table.csv": b"path,label\na.png,cat\nb.png,dog\n",
    "table.tsv": b"path\tlabel\na.png\tcat\n",
    "table.parquet": parquet_table(),
    "archive.zip": zip_of_folders(),
    "archive.tar.gz": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    "shards/shard-000000.tar": tar_of_samples(),
}


@pytest.mark.parametrize("name", SOURCES)
def test_damaged_source_is_listed_or_refused_by_name(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    source = path.parent if name.startswith("shards/") else path
    times = iter(range(10**6))

    @FEW
    @given(damaged(SOURCES[name]) | st.binary(max_size=600))
    def check(data):
        path.write_bytes(data)
        scratch = tmp_path / f"scratch-{next(times)}"
        scratch.mkdir()
        said = refusal(
            lambda: list(sources.list_entries(str(source), "labeled", split=None, scratch_dir=scratch, passed_over=Counter()))
        )
        assert said is None or path.name.partition(".")[0] in said or str(source) in said

    check()


@FEW
@given(damaged(json.dumps({"label_set": "0", "images": []}).encode()))
def test_damaged_audit_is_refused(data):
    with pytest.raises(DataError, match=r"^audit\.json: "):
        audit.AuditSheet.parse(data, "audit.json")


@FEW
@given(st.binary(max_size=100) | st.dictionaries(st.text(max_size=5), VALUES).map(lambda value: json.dumps(value).encode()))
def test_damaged_ledger_entry_counts_as_absent(tmp_path_factory, data):
    store = LocalStore(tmp_path_factory.getbasetemp() / "ledger")
    ledger = Ledger(store)
    key = ledger.compute_digest("train", {})
    store.put(f"store/ledger/train/{key}.json", data)
    assert ledger.find_entry("train", {}) is None


@FEW
@given(st.binary(max_size=100))
def test_damaged_model_manifest_is_refused_by_name(tmp_path_factory, data):
    store = LocalStore(tmp_path_factory.getbasetemp() / "model")
    store.put("model.json", data)
    with pytest.raises(DataError, match=r"model\.json"):
        load_model(store)
