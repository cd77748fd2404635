"""A small made-up run whose names are markup."""

import io
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ns.config.loader import parse_experiment
from ns.config.schema import GateConfig, LabelingConfig, SelectionConfig
from ns.core.digest import sha256_bytes
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.data.index import ShardIndex
from ns.data.leakage import LeakageReport, Overlap
from ns.data.prepared import PreparedData, PreparedDataset
from ns.data.shards import read_samples
from ns.data.subsample import Subsample
from ns.evaluation import gate
from ns.evaluation.accuracy import build_predictions_table, summarize_predictions
from ns.evaluation.result import AttackResult, PerturbationResult, Robustness
from ns.labeling import predict
from ns.labeling.label_set import join_label_shards
from ns.labeling.selection import make_selection
from ns.modeling.manifest import Lineage, ModelManifest
from ns.modeling.predictor import ShardPredictions
from ns.reporting.page import write_report
from ns.reporting.pictures import THUMBNAIL_PX
from ns.runs.lifecycle import open_run
from ns.runs.records import write_stage_note
from ns.storage import LocalStore
from ns.storage.documents import encode_json

CLASSES = ("cat", "<script>alert(1)</script>", 'quote"s & co')
RUN = "made-up"
KINDS = ("fog", "snow")


def make_dataset(folder, role: str, count: int, px: int = 12) -> Dataset:
    rng = np.random.default_rng(count)
    with ShardWriter(folder, max_samples=40, max_bytes=1 << 24) as writer:
        for index in range(count):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (px, px, 3), np.uint8)).save(png, "PNG", compress_level=0)
            writer.add_image(f"{role}/<b>{index}", "png", png.getvalue(), None if role == "unlabeled" else index % 3)
    made = Dataset(name=role, role=role, classes=() if role == "unlabeled" else CLASSES, shards=writer.shards)
    made.save(folder)
    return made


def draw_probabilities(rng, count: int, sharpness: float) -> np.ndarray:
    logits = sharpness * rng.normal(size=(count, 3))
    values = np.exp(logits - logits.max(1, keepdims=True))
    return (values / values.sum(1, keepdims=True)).astype(np.float32)


def make_robustness(card: ModelManifest, data: Dataset, error: float) -> Robustness:
    return Robustness(
        model=card.digest,
        dataset=data.digest,
        name="held <i>out",
        num_classes=3,
        imagenet=False,
        images=20,
        unreadable=0,
        subsample=Subsample(images=20, seed=0),
        seed=0,
        mode="float32",
        top1=1 - error,
        severities=(1, 5),
        corruptions=dict.fromkeys(KINDS, (error, 1.5 * error)),
        frames=3,
        perturbations={"snow": PerturbationResult(flip_probability=error / 10, top5_distance=1.0)},
        attacks=(
            AttackResult(name="fgsm", epsilon=4, steps=1, step_size=4, top1=0.5 - error),
            AttackResult(name="pgd", epsilon=16, steps=10, step_size=4, top1=0.05),
        ),
        predictions_sha256="0",
        seconds=1.0,
    )


@pytest.fixture(scope="session")
def unchanged(tmp_path_factory):
    """The store of a run with one finished generation and one whose student is not trained yet, and of another experiment's run with a
    weaker student. Tests must not change it."""
    root = LocalStore(tmp_path_factory.mktemp("made-up"))
    return make_run(make_run(root), "other", seed=1, lift=0.1)


@pytest.fixture(scope="session")
def page(unchanged):
    """The report of `unchanged`."""
    return page_of(unchanged)


def page_of(root: LocalStore) -> str:
    """A run's report, with single spaces."""
    return " ".join(root.get(write_report(root, RUN)).decode().split())


@pytest.fixture
def made_up(unchanged, tmp_path):
    """A copy of `unchanged` that a test may change."""
    shutil.copytree(unchanged.root, tmp_path, dirs_exist_ok=True)
    return LocalStore(tmp_path)


def make_run(root: LocalStore, run: str = RUN, *, seed: int = 0, lift: float = 0.3) -> LocalStore:
    """Writes a run. `lift`: the student's gain in the probability of the true class."""
    experiment = parse_experiment(
        {
            "name": "made-up",
            "seed": seed,
            "generations": 2,
            "data": {"labeled": "l", "pool": "p", "heldout": "h"},
            "report": {"pictures": 5},
            "selection": {"per_class": 10, "min_confidence": 0.5},
        },
        "here",
    )
    open_run(root, run, experiment, "1.2.3")

    def note(generation, stage, **outputs):
        write_stage_note(root, run, generation, stage, outputs, 1.5 + generation, reused=generation == 2)

    parts = {}
    for part, role, count, px in (
        ("labeled", "labeled", 9, 12),
        ("pool", "unlabeled", 60, 2 * THUMBNAIL_PX),
        ("heldout", "evaluation", 30, 12),
    ):
        made = make_dataset(root.at(f"store/datasets/{part}"), role, count, px)
        parts[part] = (PreparedDataset(uri=f"store/datasets/{part}", digest=made.digest), made)
    prepared = PreparedData(**{part: source for part, (source, _) in parts.items()}, check="store/checks/x/check.json")
    prepared.save_file(root, "store/prepared/x/prepared.json")
    LeakageReport(
        datasets={part: made.digest for part, (_, made) in parts.items()},
        images={},
        classes={},
        overlaps=(Overlap(of="pool", within="heldout", same=3, near=4),),
        left_out=7,
        bits=4,
        skipped=0,
    ).save_file(root, "store/checks/x/check.json")
    note(0, "prepare", data="store/prepared/x/prepared.json")

    rng = np.random.default_rng(seed)
    tables = {}
    for generation in (0, 1):
        folder = root.at(f"store/models/{seed}{generation}")
        card = ModelManifest(
            generation=generation,
            model=experiment.teacher.model,
            noise=experiment.teacher.noise,
            classes=CLASSES,
            parameters=1234567 + seed,
            steps=4,
            lineage=Lineage(config="0", labeled="0"),
            weights_sha256="0",
        )
        card.save_file(folder, "model.json")
        point = {"loss": 1.0, "loss_labeled": 0.5, "accuracy_labeled": 0.5, "lr": 0.1, "images": 8.0, "processes": 3.0}
        if generation:
            point |= {"loss_pseudo": 0.4, "agreement": 0.8}
        folder.put(card.history_key, encode_json([{"step": float(step), **point} for step in range(1, 5)]))
        note(generation, "train", model=f"store/models/{seed}{generation}/model.json")
        class_ids = np.arange(30) % 3
        guesses = draw_probabilities(rng, 30, 0.5)
        guesses[np.arange(30), class_ids] += 0.1 + generation * lift
        tables[generation] = build_predictions_table(
            [f"evaluation/<b>{i}" for i in range(30)], class_ids, guesses / guesses.sum(1, keepdims=True)
        )
        sink = io.BytesIO()
        pq.write_table(tables[generation], sink)
        evaluation = summarize_predictions(
            tables[generation],
            model=card.digest,
            dataset=parts["heldout"][1].digest,
            classes=CLASSES,
            unreadable=0,
            mode="float32",
            name="heldout",
            predictions_sha256=sha256_bytes(sink.getvalue()),
        )
        root.put(f"store/evaluations/{seed}{generation}/{evaluation.predictions_key}", sink.getvalue())
        evaluation.save_file(root, f"store/evaluations/{seed}{generation}/evaluation.json")
        robust = f"store/robustness/{seed}{generation}/robustness.json"
        make_robustness(card, parts["heldout"][1], 0.4 - 0.1 * generation).save_file(root, robust)
        evaluated = f"store/evaluations/{seed}{generation}/evaluation.json"
        note(generation, "evaluate", evaluation=evaluated, test=evaluated, robustness=robust)

    pool = parts["pool"][1]
    for generation in (1, 2):
        label_store = root.at(f"store/labels/{seed}{generation}")
        for shard in pool.shards:
            samples = read_samples(root.at("store/datasets/pool").path(shard.name))
            errors = {3: "truncated"} if shard.name == "shard-00000.tar" else {}
            guesses = draw_probabilities(rng, len(samples), 2.0)
            guesses[list(errors)] = np.nan
            predictions = ShardPredictions(ShardIndex.from_samples(samples, [(0, 0)] * len(samples)), guesses, errors)
            predict.write_label_shard(label_store, shard, [predictions], LabelingConfig(), "float32")
        label_set = join_label_shards(label_store, pool, teacher=f"t{seed}{generation}", code="c", classes=CLASSES, top_k=10)
        label_set.save_file(label_store, "labelset.json")
        policy = SelectionConfig(per_class=10, min_confidence=0.5)
        selection = make_selection(label_store, label_set, policy, seed=0, label_set_key=f"store/labels/{seed}{generation}")
        selection.save_file(root, f"store/selections/{seed}{generation}/selection.json")
        note(
            generation,
            "select",
            label_set=f"store/labels/{seed}{generation}/labelset.json",
            selection=f"store/selections/{seed}{generation}/selection.json",
        )
    verdict = gate.evaluate_gate(
        GateConfig(max_class_drop=0.5),
        generation=1,
        teacher=f"store/models/{seed}0",
        student=f"store/models/{seed}1",
        class_ids=tables[0]["class_id"].to_numpy(),
        teacher_correct=tables[0]["rank"].to_numpy() == 0,
        student_correct=tables[1]["rank"].to_numpy() == 0,
        classes=CLASSES,
        seed=0,
    )
    verdict.save_file(root, f"store/verdicts/{seed}1/verdict.json")
    note(1, "gate", verdict=f"store/verdicts/{seed}1/verdict.json")
    return root
