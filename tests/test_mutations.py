"""Files from outside with one thing wrong in them: each is read, or refused in one line that names the file, and never a stack trace.

Each kind of file has a good one, what changes it, and what reads it. Changes are seeded. NS_MUTATIONS: changes of each kind; the default
takes some seconds, a thousand some minutes.
"""

import gzip
import io
import json
import os
import random
import tarfile
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ns.config.loader import load_experiment, parse_experiment
from ns.config.schema import EvaluationConfig, ImportConfig, ModelConfig, NoiseConfig, SelectionConfig
from ns.core.digest import sha256_bytes
from ns.core.errors import ConfigError, Interrupted, NsError
from ns.data.dataset import Dataset
from ns.data.fingerprint import read_contents
from ns.data.importing.ingest import import_images
from ns.data.index import build_index_key
from ns.data.key_list import read_keys
from ns.data.leakage import LEFT_OUT, NamedDataset, check_datasets, load_left_out_rows
from ns.data.loading.shard_reader import ImageSource
from ns.data.verify import find_damage
from ns.evaluation.result import (
    PREDICTIONS_SCHEMA,
    AttackResult,
    Evaluation,
    ImageMistakes,
    PerturbationResult,
    Robustness,
    read_mistakes,
    read_predictions,
)
from ns.evaluation.robustness.scores import score_robustness
from ns.evaluation.robustness.suite import RobustnessSuite
from ns.labeling.audit import AuditSheet, LabelAudit, check_audit, check_audit_sheet, draw_audit_sample, estimate_precision
from ns.labeling.imported import import_labels
from ns.labeling.label_set import LabelSet, verify_label_set
from ns.labeling.selection import make_selection
from ns.modeling import pretrained
from ns.modeling.factory import build_model, load_model, save_model
from ns.modeling.manifest import Lineage, ModelManifest, read_history
from ns.modeling.predictor import Predictor
from ns.modeling.pretrained import complete_models
from ns.modeling.tensor_shapes import read_tensor_shapes
from ns.modeling.weight_names import check_weights_fit
from ns.runs.lookup import list_runs
from ns.runs.records import RunRecord, StageNote, list_stage_notes
from ns.storage import LocalStore, lease
from ns.storage.documents import name_by_content
from ns.storage.ledger import Ledger
from pipelines import PACKAGE
from pipelines.kfp_client import KfpClient, check_inputs, parse_inputs

pytestmark = pytest.mark.integration

MUTATIONS = int(os.environ.get("NS_MUTATIONS", "12"))
VALUES: list[Any] = [
    None, True, 0, -1, 2**40, 2**70, 0.5, 1e308, float("nan"), "", "\0", "x" * 300, "../up", "/etc/passwd", "\x1b[2J", "cat\nerror: no",
    "\ud800", [], [None], {}, {"a": 1}, "nan", "1e5", "2026-99-99",
]  # fmt: skip
CLASSES = ("cat", "dog", "ox")
Change = Callable[[random.Random, bytes], bytes]


def png(seed: int, size: int = 8) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def jpeg(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(sink, "JPEG")
    return sink.getvalue()


# Changes


def change_bytes(rng: random.Random, whole: bytes) -> bytes:
    """Some bytes changed, put in, taken out, doubled or cut off."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.choice(["change", "insert", "remove", "double", "zero", "cut"]):
            case "change" if at < len(data):
                data[at] = rng.randrange(256)
            case "insert":
                data[at:at] = rng.choice([b"\0", b"\n", b'"', b"\xff", b"\r\n", b",", b"-", rng.randbytes(8)])
            case "remove":
                del data[at : at + rng.randint(1, 40)]
            case "double":
                data[at:at] = data[at : at + rng.randint(1, 600)]
            case "zero":
                data[at : at + 16] = bytes(16)
            case "cut" if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def change_value(rng: random.Random, value: Any) -> Any:
    """One value somewhere in a document replaced, removed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.1:
            del changed[name]
        else:
            changed[name] = change_value(rng, value[name])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return [*value[:at], *rng.choice([[], [value[at]] * 2]), *value[at + 1 :]]
        return [*value[:at], change_value(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


def change_json(rng: random.Random, whole: bytes) -> bytes:
    if rng.random() < 0.2:
        return change_bytes(rng, whole)
    return json.dumps(change_value(rng, json.loads(whole))).encode()


def change_yaml(rng: random.Random, whole: bytes) -> bytes:
    if rng.random() < 0.3:
        return change_bytes(rng, whole)
    return yaml.safe_dump(change_value(rng, yaml.safe_load(whole))).encode(errors="replace")


def change_table(rng: random.Random, whole: bytes) -> bytes:
    """A column of a Parquet file without some values, of another type, missing, or named otherwise."""
    if rng.random() < 0.3:
        return change_bytes(rng, whole)
    table = pq.read_table(io.BytesIO(whole))
    at = rng.randrange(table.num_columns)
    name, column = table.column_names[at], table.column(at)
    match rng.choice(["drop", "rename", "nulls", "type", "values", "rows", "nested"]):
        case "drop":
            table = table.remove_column(at)
        case "rename":
            table = table.rename_columns(
                [rng.choice(["", "x", "\0"]) if other == name else other for other in table.column_names]
            )
        case "nulls":
            table = table.set_column(at, name, pa.nulls(len(table), column.type))
        case "type":
            values = [str(value) for value in column.to_pylist()]
            kind = rng.choice(
                [pa.string(), pa.binary(), pa.int64(), pa.float64(), pa.bool_(), pa.dictionary(pa.int8(), pa.string())]
            )
            texts = pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_dictionary(kind)
            table = table.set_column(at, name, pa.array(values if texts else [1] * len(values)).cast(kind))
        case "values":
            extremes = [
                value
                for value in (0, -1, 1, 2**15, 2**31 - 1, 2**62, -(2**62), 0.5, float("nan"), "", "../x", "a\0b")
                if fits(value, column.type)
            ]
            if extremes:
                table = table.set_column(at, name, pa.array([rng.choice(extremes)] * len(table), column.type))
        case "rows":
            table = table.slice(0, rng.randrange(len(table) + 1))
        case "nested":
            table = table.set_column(at, name, pa.array([[value] for value in column.to_pylist()], pa.list_(column.type)))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowException, TypeError, OverflowError):
        return False
    return True


def change_tensors(rng: random.Random, whole: bytes) -> bytes:
    if rng.random() < 0.3:
        return change_bytes(rng, whole)
    tensors = load_tensors(whole)
    name = rng.choice(list(tensors))
    match rng.choice(["drop", "rename", "shape", "type", "more", "none"]):
        case "drop":
            del tensors[name]
        case "rename":
            tensors["module." + name] = tensors.pop(name)
        case "shape":
            tensors[name] = np.zeros((2, 2), np.float32)
        case "type":
            tensors[name] = tensors[name].astype(rng.choice([np.int8, np.float64, np.bool_]))
        case "more":
            tensors["more"] = np.zeros(1, np.float32)
        case "none":
            tensors = {}
    return save_tensors(tensors)


def change_zip(rng: random.Random, whole: bytes) -> bytes:
    if rng.random() < 0.5:
        return change_bytes(rng, whole)
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("cat/a.png", png(0))
        name = rng.choice(
            [
                "",
                "/",
                "..",
                "../a.png",
                "/a.png",
                "cat\\b.png",
                "dog/" + "x" * 300,
                "dog/\x1b[2J.png",
                "cat/a.png",
                "C:a.png",
                "dog/😀.png",
            ]
        )
        archive.writestr(zipfile.ZipInfo(name), rng.choice([b"", png(1), b"x" * 100]))
    return sink.getvalue()


def change_tar(rng: random.Random, whole: bytes) -> bytes:
    if rng.random() < 0.4:
        return change_bytes(rng, whole)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as archive:
        for name, data in (
            ("cat/a.png", png(0)),
            (rng.choice(["", ".", "..", "../a.png", "/a.png", "dog/" + "x" * 300, "dog/b.png", "dog/\x1b[2J.png"]), png(1)),
            (
                rng.choice(["dog/b.cls", "dog/b.json", "dog/b.txt"]),
                rng.choice([b"", b"\xff", b"-1", b"9" * 30, b'{"label": []}', b"[" * 5000, b'{"label": 1e400}']),
            ),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), rng.choice([tarfile.REGTYPE] * 8 + [tarfile.SYMTYPE, tarfile.CHRTYPE])
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def change_csv(rng: random.Random, whole: bytes) -> bytes:
    if rng.random() < 0.5:
        return change_bytes(rng, whole)
    cell = rng.choice(
        [
            '"',
            "\0",
            "",
            "../x.png",
            "\x1b[2J",
            "a" * 70_000,
            "s3://nowhere",
            "file://%00",
            "http://[",
            "=1+1",
            "\ufeff",
            "-1",
            "1.0",
            "cat\ndog",
        ]
    )
    lines = whole.decode().splitlines()
    at = rng.randrange(len(lines))
    cells = lines[at].split(",")
    cells[rng.randrange(len(cells))] = cell
    lines[at] = ",".join(cells)
    return "\n".join(lines).encode()


# Good files and their readers


def make_experiment(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    path = folder / "experiment.yaml"
    path.write_text(Path("ns/config/presets/quickstart.yaml").read_text())
    return path, change_yaml, lambda: load_experiment(str(path))


def make_source(name: str, data: bytes, change: Change) -> Callable[[Path], tuple[Path, Change, Callable[[], object]]]:
    def make(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
        for number in range(3):
            (folder / f"{number}.png").write_bytes(png(number))
        path = folder / name
        path.write_bytes(data)
        config = ImportConfig(max_rejected_share=1)
        store = LocalStore(folder / "out")
        return path, change, lambda: import_images(str(path), store, name="n", role="labeled", config=config, workers=1)

    return make


def pack_zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, name in enumerate(("cat/a.png", "cat/b.png", "dog/c.png")):
            archive.writestr(name, png(number))
    return sink.getvalue()


def pack_tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number, name in enumerate(("cat/a.png", "cat/b.jpg", "dog/c.png")):
            data = jpeg(number) if name.endswith("jpg") else png(number)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def pack_table() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"path": ["0.png", "1.png", "2.png"], "label": ["cat", "dog", "cat"], "split": ["a"] * 3}), sink)
    return sink.getvalue()


def write_dataset(folder: Path) -> tuple[LocalStore, Dataset]:
    (folder / "images.tar").write_bytes(pack_tar())
    store = LocalStore(folder / "dataset")
    config = ImportConfig(max_rejected_share=1)
    return store, import_images(str(folder / "images.tar"), store, name="n", role="labeled", config=config, workers=1)


def read_dataset(store: LocalStore) -> None:
    dataset = Dataset.load(store)
    for problem in find_damage(store, dataset):
        assert "\n" not in problem
    source = ImageSource(store, dataset)
    for shard in range(len(dataset.shards)):
        source.read_class_ids(shard, len(dataset.classes))
        for row in range(len(source.read_index(shard))):
            source.read_pixels(shard, row)
        list(source.read_encoded(shard))


def make_dataset(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    store, _ = write_dataset(folder)
    return folder / "dataset" / Dataset.filename, sealed(change_json, Dataset), lambda: read_dataset(store)


def make_index(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    """The manifest has the checksum of the index, whatever it says: both may be from strangers."""
    store, dataset = write_dataset(folder)
    (shard,) = dataset.shards
    key = build_index_key(shard)

    def read() -> None:
        changed = shard.model_copy(update={"index_sha256": sha256_bytes(store.get(key))})
        dataset.model_copy(update={"shards": (changed,)}).save(store)
        read_dataset(store)

    return folder / "dataset" / key, change_table, read


def make_shard(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    store, dataset = write_dataset(folder)
    (shard,) = dataset.shards

    def read() -> None:
        data = store.get(shard.name)
        changed = shard.model_copy(update={"sha256": sha256_bytes(data), "bytes": len(data)})
        dataset.model_copy(update={"shards": (changed,)}).save(store)
        read_dataset(store)

    return folder / "dataset" / shard.name, change_tar, read


def sealed(change: Change, kind: type) -> Change:
    """The change, with the digest that belongs to it: those who write a file know how."""

    def change_and_seal(rng: random.Random, whole: bytes) -> bytes:
        changed = change(rng, whole)
        try:
            fields = json.loads(changed)
            fields.pop("digest", None)
            fields["digest"] = kind.model_validate(fields).digest
        except (ValueError, AttributeError, TypeError, RecursionError):
            return changed
        return json.dumps(fields).encode()

    return change_and_seal


NETWORK = ModelConfig(arch="test_resnet", resolution=32)


def write_model(folder: Path) -> tuple[LocalStore, ModelManifest]:
    store = LocalStore(folder / "model")
    network = build_model(NETWORK, NoiseConfig(), len(CLASSES))
    fields = {
        "generation": 0,
        "model": NETWORK,
        "noise": NoiseConfig(),
        "classes": CLASSES,
        "parameters": 1,
        "steps": 1,
        "lineage": Lineage(config="0", labeled="0"),
    }
    return store, save_model(store, dict(network.state_dict()), fields, [])


def make_model(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    store, _ = write_model(folder)
    return folder / "model" / "model.json", sealed(change_json, ModelManifest), lambda: load_model(store)


def make_weights(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    store, manifest = write_model(folder)

    def read() -> None:
        data = store.get(manifest.weights_key)
        changed = manifest.model_copy(update={"weights_sha256": sha256_bytes(data)})
        store.put(changed.weights_key, data)
        changed.save(store)
        check_weights_fit(build_model(NETWORK, NoiseConfig(), len(CLASSES)), store.uri, read_tensor_shapes(store.uri))
        load_model(store)

    return folder / "model" / manifest.weights_key, change_tensors, read


def write_labels(folder: Path, make_label_set: Any) -> tuple[LocalStore, LabelSet]:
    rng = random.Random(0)
    rows = [
        (f"k{number}", rng.randrange(3), None if number % 9 == 5 else float(np.float32(rng.random()))) for number in range(30)
    ]
    return make_label_set(folder / "labels", [rows], CLASSES)


def read_labels(store: LocalStore) -> None:
    label_set = LabelSet.load(store)
    make_selection(store, label_set, SelectionConfig(per_class=4, min_confidence=0.2), seed=0, label_set_key="labels")
    draw_audit_sample(store, label_set, sample_size=9, seed=0)
    verify_label_set(store, label_set)


def make_label_rows(folder: Path, make_label_set: Any) -> tuple[Path, Change, Callable[[], object]]:
    store, label_set = write_labels(folder, make_label_set)
    (shard,) = label_set.shards

    def read() -> None:
        data = store.get(shard.name)
        changed = shard.model_copy(update={"sha256": sha256_bytes(data), "bytes": len(data)})
        label_set.model_copy(update={"shards": (changed,)}).save(store)
        read_labels(store)

    return folder / "labels" / shard.name, change_table, read


def make_labels(folder: Path, make_label_set: Any) -> tuple[Path, Change, Callable[[], object]]:
    store, _ = write_labels(folder, make_label_set)
    return folder / "labels" / LabelSet.filename, sealed(change_json, LabelSet), lambda: read_labels(store)


def make_histogram(folder: Path, make_label_set: Any) -> tuple[Path, Change, Callable[[], object]]:
    store, _ = write_labels(folder, make_label_set)
    return folder / "labels" / "histogram.parquet", change_table, lambda: read_labels(store)


def write_sheet(folder: Path, make_label_set: Any) -> tuple[LocalStore, LabelSet, AuditSheet]:
    store, label_set = write_labels(folder, make_label_set)
    sheet = draw_audit_sample(store, label_set, sample_size=9, seed=0)
    images = tuple(
        image.model_copy(update={"reviewed": True, "wrong": number == 1}) for number, image in enumerate(sheet.images)
    )
    return store, label_set, sheet.model_copy(update={"images": images})


def make_audit_sheet(folder: Path, make_label_set: Any) -> tuple[Path, Change, Callable[[], object]]:
    store, label_set, sheet = write_sheet(folder, make_label_set)
    path = folder / "audit.json"
    path.write_text(sheet.model_dump_json())

    def read() -> None:
        filled = AuditSheet.parse(path.read_bytes(), str(path))
        check_audit_sheet(filled, str(path), store, label_set, None, sample_size=9, seed=0)
        estimate_precision(filled, str(path))

    return path, change_json, read


def make_audit(folder: Path, make_label_set: Any) -> tuple[Path, Change, Callable[[], object]]:
    store, label_set, sheet = write_sheet(folder, make_label_set)
    path = folder / "labels" / "audit-0.json"
    estimate_precision(sheet, "x").save_file(store, path.name)
    return (
        path,
        sealed(change_json, LabelAudit),
        lambda: check_audit(LabelAudit.load_file(store, path.name), store, label_set, None),
    )


def make_key_list(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    path = folder / "keys.txt"
    path.write_text("cat/a\ndog/b.png\n./ox/c\n")
    return path, change_bytes, lambda: read_keys(str(path))


def make_record(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    store = LocalStore(folder)
    record = RunRecord(run="one", config_digest="0", state="succeeded", started_at="2026", version="0")
    record.save_file(store, "store/runs/one.json")
    return folder / "store/runs/one.json", change_json, lambda: list_runs(store)


def make_note(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    store = LocalStore(folder)
    note = StageNote(
        generation=0, stage="train", outputs={"model": "a/model.json"}, seconds=1, reused=False, finished_at="2026"
    )
    note.save_file(store, "one/stages/0-train.json")
    return folder / "one/stages/0-train.json", change_json, lambda: list_stage_notes(store, "one")


def make_ledger_entry(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    store = LocalStore(folder)
    ledger = Ledger(store)
    store.put("store/models/a/model.json", b"{}")
    entry = ledger.record_entry("train", {"a": 1}, {"model": "store/models/a/model.json"}, 1.0)
    path = folder / f"store/ledger/train/{entry.digest}.json"

    def read() -> None:
        ledger.find_entry("train", {"a": 1})
        ledger.list_entries("train")

    return path, change_json, read


def write_checked_table(folder: Path, name: str, table: pa.Table) -> Path:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    path = folder / name_by_content(name, sha256_bytes(sink.getvalue()))
    path.write_bytes(sink.getvalue())
    return path


def make_predictions(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    """The manifest has the checksum of the file, whatever it says."""
    columns = [["a", "b", "c"], [0, 1, 2], [0, 1, 1], [0.5, 0.7, 0.9], [0, 0, 1]]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, PREDICTIONS_SCHEMA, strict=True)]
    table = pa.table(arrays, schema=PREDICTIONS_SCHEMA)
    path, store = write_checked_table(folder, "predictions.parquet", table), LocalStore(folder)

    def read() -> None:
        data = path.read_bytes()
        evaluation = Evaluation.model_construct(predictions_sha256=sha256_bytes(data))
        store.put(evaluation.predictions_key, data)
        read_predictions(store, evaluation)

    return path, change_table, read


def make_mistakes(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    counts = {"fog": np.array([0, 1, 2], np.uint8)}
    table = pq.read_table(io.BytesIO(ImageMistakes(["a", "b", "c"], counts, counts, {}).encode()))
    path, store = write_checked_table(folder, "mistakes.parquet", table), LocalStore(folder)

    def read() -> None:
        data = path.read_bytes()
        measured = {"corruptions": {"fog": (0.5,)}, "perturbations": {"fog": None}, "attacks": ()}
        robustness = Robustness.model_construct(mistakes_sha256=sha256_bytes(data), **measured)
        store.put(robustness.mistakes_key, data)
        read_mistakes(store, robustness).take_images({"a", "c"})

    return path, change_table, read


def make_robustness(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    """Of another person: ours is scored by it. It is shown too."""
    ours = Robustness(
        model="0", dataset="0", name="n", num_classes=3, imagenet=False, images=9, unreadable=0, subsample=None, seed=0, mode="float32",
        top1=0.5, severities=(1, 2), corruptions={"fog": (0.5, 0.75)}, frames=3,
        perturbations={"tilt": PerturbationResult(flip_probability=0.1, top5_distance=0.2)},
        attacks=(AttackResult(name="fgsm", epsilon=4, steps=1, step_size=4, top1=0.1),), predictions_sha256="0", seconds=1,
    )  # fmt: skip
    ours.save(LocalStore(folder))
    path = folder / Robustness.filename

    def read() -> None:
        other = Robustness.parse(path.read_bytes(), str(path))
        for pair in ((ours, other), (other, ours)):
            score_robustness(*pair).model_dump_json()
        [str(attack) for attack in other.attacks]

    return path, sealed(change_json, Robustness), read


def make_suite_file(kind: str) -> Callable[[Path], tuple[Path, Change, Callable[[], object]]]:
    """What an evaluation that was interrupted has left: its units, or the images that it distorted."""

    def make(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
        store, dataset = write_dataset(folder)
        predictor = Predictor(write_model(folder)[0], batch=4)
        out, images = LocalStore(folder / "out"), LocalStore(folder / "images")
        config = EvaluationConfig(
            suites=("corruptions", "perturbations"),
            corruptions=("contrast",),
            severities=(1, 5),
            perturbations=("brightness",),
            perturbation_frames=3,
        )

        def read() -> None:
            if kind == "images":
                out.delete_prefix("units/")
            RobustnessSuite(predictor, store, dataset, config, out.at("units"), images).run_suite(out)

        read()
        top = folder / "images" if kind == "images" else folder / "out/units"
        return (
            next(path for path in top.rglob("*.parquet") if path.name.startswith(kind) or kind == "images"),
            change_table,
            read,
        )

    return make


STUDIO_TASKS = [
    {
        "id": number,
        "data": {"image": f"/data/local-files/?d={number}.png", "key": str(number)},
        "annotations": [
            {
                "updated_at": "2026-11-30T00:00:00Z",
                "was_cancelled": False,
                "result": [{"value": {"choices": [("cat", "dog")[number % 2]]}}],
            }
        ],
        "predictions": [{"score": 0.9, "result": [{"value": {"choices": ["dog"]}}]}],
    }
    for number in range(3)
]


def make_imported_labels(name: str, data: bytes, change: Change) -> Callable[[Path], tuple[Path, Change, Callable[[], object]]]:
    def make(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
        for number in range(3):
            (folder / "pool").mkdir(exist_ok=True)
            (folder / "pool" / f"{number}.png").write_bytes(png(number))
        pool = LocalStore(folder / "dataset")
        import_images(str(folder / "pool"), pool, name="n", role="unlabeled", config=ImportConfig(), workers=1)
        path, out = folder / name, LocalStore(folder / "out")
        path.write_bytes(data)

        def read() -> None:
            out.delete_prefix("")
            import_labels(str(path), pool.uri, out.uri, CLASSES)

        return path, change, read

    return make


def make_curves(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    store, manifest = write_model(folder)
    path = folder / "model" / manifest.history_key
    path.write_text(json.dumps([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]))
    return path, change_json, lambda: read_history(store, manifest)


def make_hub_file(name: str, change: Change) -> Callable[[Path], tuple[Path, Change, Callable[[], object]]]:
    """A file in a repository of the hub, whose weights are fetched into a root that has none."""

    def make(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
        repository, root = folder / "c0ffee", LocalStore(folder / "root")
        repository.mkdir()
        weights = {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}}
        (repository / "config.json").write_text(
            json.dumps({"architecture": "test_resnet", "label_names": ["a", "b"], "model_args": {"num_features": 8}} | weights)
        )
        (repository / "README.md").write_text("---\nlicense: [mit, apache-2.0]\ntags: [a, b]\n---\n# A network\n")
        (repository / "model.safetensors").write_bytes(save_tensors({"fc.weight": np.zeros((2, 2), np.float32)}))

        def read() -> None:
            root.delete_prefix("")
            with patch.object(
                pretrained, "_download", lambda _name, _repository, _revision, file: (repository / file, "c0ffee")
            ):
                pretrained.fetch_weights("hf-hub:me/net", root)
                fields = {"name": "x", "data": {"labeled": "a", "pool": "b", "heldout": "c"}}
                role = {"model": {"pretrained": "hf-hub:me/net"}}
                complete_models(parse_experiment({**fields, "teacher": role, "students": [role]}, "x.yaml"), root)

        return repository / name, change, read

    return make


def make_pretrained(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    """Fetched weights are described from what is in the root, and fetched again if that cannot be read."""
    _, _, read_hub = make_hub_file("config.json", change_json)(folder)
    read_hub()
    root = LocalStore(folder / "root")
    key = next(key for key in root.list("store/pretrained/") if key.endswith(pretrained.PretrainedManifest.filename))

    def read() -> None:
        if pretrained.find_fetched("hf-hub:me/net", root):
            pretrained.describe_weights("hf-hub:me/net", root)
            pretrained.read_fetched("hf-hub:me/net", root)

    return folder / "root" / key, sealed(change_json, pretrained.PretrainedManifest), read


KFP_ANSWER = {
    "pipelines": [{"pipeline_id": "1", "display_name": "small"}],
    "pipeline_versions": [{"pipeline_version_id": "2", "display_name": "small-0", "created_at": "2026-11-29T00:00:00Z"}],
    "experiments": [{"experiment_id": "3", "display_name": "digits"}],
    "runs": [{"run_id": "4", "display_name": "run", "state": "SUCCEEDED"}],
    "run_id": "4",
    "display_name": "run",
    "state": "FAILED",
    "state_history": [{"state": "CANCELING", "update_time": "2026-11-29T00:00:00Z"}, {"state": "FAILED"}],
    "run_details": {"task_details": [{"display_name": "train", "state": "FAILED"}]},
}
"""All that is asked for in one: each call takes its part."""


def make_kfp_answer(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    path = folder / "answer.json"
    path.write_text(json.dumps(KFP_ANSWER))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = KfpClient(f"http://127.0.0.1:{server.server_port}")

    def read() -> None:
        list(client.list_versions("small"))
        client.find_run("run", "digits")
        client.list_failed_tasks("4", {"train"})
        # Whose state is none of the last is asked for again.
        with suppress(Interrupted):
            client.wait_for_run("4", Mock(side_effect=KeyboardInterrupt))

    return path, change_kfp_answer, read


def change_kfp_answer(rng: random.Random, whole: bytes) -> bytes:
    if rng.random() < 0.1:
        return json.dumps({**json.loads(whole), "next_page_token": "more"}).encode()
    return change_json(rng, whole)


def make_fingerprints(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    store, dataset = write_dataset(folder)
    kept = LocalStore(folder / "fingerprints")
    read_contents(store, dataset, kept)
    return next((folder / "fingerprints").glob("*.parquet")), change_table, lambda: read_contents(store, dataset, kept)


def make_leaks(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    store, dataset = write_dataset(folder)
    leaks = LocalStore(folder / "leaks")
    sets = [NamedDataset("pool", store, dataset, "unlabeled"), NamedDataset("heldout", store, dataset, "evaluation")]
    check_datasets(sets, leaks, leaks.at("fingerprints"))
    assert load_left_out_rows(leaks)
    return folder / "leaks" / LEFT_OUT, change_table, lambda: load_left_out_rows(leaks)


def make_lease(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    """Of a process of this machine that is gone: it is followed, at once or when it has been silent."""
    store = LocalStore(folder)
    path = folder / f"{lease.LEASES}/work-0001.json"
    holder = lease.LeaseHolder.make_own()
    gone = holder.model_copy(update={"process": holder.process._replace(identity=f"{os.getpid()}:1")})

    def read() -> None:
        data = path.read_bytes()
        lease.sweep_leases(store, 0)
        path.write_bytes(data)
        with patch.object(lease, "STALE_SECONDS", 0), lease.hold_lease(store, "work", "work"):
            pass
        path.write_bytes(data)

    gone.save_file(store, f"{lease.LEASES}/work-0001.json")
    return path, change_json, read


def make_inputs(folder: Path) -> tuple[Path, Change, Callable[[], object]]:
    path = folder / "inputs.json"
    path.write_text(json.dumps({"gpus_train": "1", "generations": 2, "config": "s3://a/b.yaml", "run": "c", "overrides": []}))
    package = PACKAGE.read_text()
    return path, change_json, lambda: check_inputs(package, parse_inputs(package, [f"@{path}"]))


KINDS: dict[str, Callable[..., tuple[Path, Change, Callable[[], object]]]] = {
    "experiment": make_experiment,
    "csv": make_source("table.csv", b"path,label,split\n0.png,cat,a\n1.png,dog,a\n2.png,cat,a\n", change_csv),
    "tsv": make_source("table.tsv", b"path\tlabel\n0.png\tcat\n1.png\tdog\n", change_bytes),
    "parquet": make_source("table.parquet", pack_table(), change_table),
    "studio": make_source("tasks.json", json.dumps(STUDIO_TASKS).encode(), change_json),
    "labels_csv": make_imported_labels("labels.csv", b"key,class,confidence\n0,cat,0.9\n1,dog,0.8\n2,cat,1\n", change_csv),
    "labels_parquet": make_imported_labels("labels.parquet", pack_table(), change_table),
    "labels_studio": make_imported_labels("tasks.json", json.dumps(STUDIO_TASKS).encode(), change_json),
    "zip": make_source("archive.zip", pack_zip(), change_zip),
    "tar": make_source("archive.tar", pack_tar(), change_tar),
    "tar.gz": make_source("archive.tar.gz", gzip.compress(pack_tar()), change_bytes),
    "dataset": make_dataset,
    "index": make_index,
    "shard": make_shard,
    "model": make_model,
    "weights": make_weights,
    "curves": make_curves,
    "hub_config": make_hub_file("config.json", change_json),
    "hub_card": make_hub_file("README.md", change_bytes),
    "hub_weights": make_hub_file("model.safetensors", change_bytes),
    "pretrained": make_pretrained,
    "label_rows": make_label_rows,
    "label_set": make_labels,
    "histogram": make_histogram,
    "audit_sheet": make_audit_sheet,
    "audit": make_audit,
    "keys": make_key_list,
    "record": make_record,
    "note": make_note,
    "ledger_entry": make_ledger_entry,
    "lease": make_lease,
    "inputs": make_inputs,
    "predictions": make_predictions,
    "mistakes": make_mistakes,
    "fingerprints": make_fingerprints,
    "leaks": make_leaks,
    "robustness": make_robustness,
    "clean_unit": make_suite_file("clean"),
    "corruption_unit": make_suite_file("contrast"),
    "perturbation_unit": make_suite_file("brightness"),
    "distorted_images": make_suite_file("images"),
    "kfp_answer": make_kfp_answer,
}

NAMED_AS = {
    "inputs": ("",),
    "kfp_answer": ("http://127.0.0.1",),
    # Beside the repository, the field that the weights' description leaves to the experiment.
    "hub_config": ("hf-hub:me/net", "teacher.model", "students.0.model"),
    "hub_card": ("hf-hub:me/net",),
    "hub_weights": ("hf-hub:me/net",),
    "pretrained": ("hf-hub:me/net", "store/pretrained"),
}
"""What else than its path names a kind of file in an error."""


@pytest.mark.parametrize("kind", KINDS)
def test_changed_file_is_read_or_refused_in_one_line(kind, tmp_path, make_label_set, recwarn):
    make = KINDS[kind]
    with_labels = "make_label_set" in make.__code__.co_varnames[: make.__code__.co_argcount]
    path, change, read = make(tmp_path, make_label_set) if with_labels else make(tmp_path)
    read()
    good, faults = path.read_bytes(), []
    for seed in range(MUTATIONS):
        path.write_bytes(change(random.Random(f"{kind}-{seed}"), good))
        try:
            read()
        except NsError as error:
            # An experiment has a line per fault. The file may be named by its folder; inputs are named themselves.
            lines = str(error).split("\n")
            named = all(any(name in line for name in NAMED_AS.get(kind, (path.name, str(path.parent)))) for line in lines)
            if not named or (len(lines) > 1 and not isinstance(error, ConfigError)):
                faults.append(f"{seed}: {type(error).__name__}: {error}")
        except Exception as error:
            faults.append(f"{seed}: {type(error).__name__}: {str(error)[:300]} ({error.__traceback__ and _find_line(error)})")
    assert not faults, "\n".join(faults)


def _find_line(error: BaseException) -> str:
    trace, lines = error.__traceback__, []
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if "/ns/" in file or "/pipelines/" in file:
            lines.append(f"{Path(file).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(lines[-3:])
