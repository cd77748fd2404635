"""The report of a made-up run: what it says, that it is safe, and that it is the same every time."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ns import config, report, runs
from ns.card import Lineage, ModelCard
from ns.config import GateConfig, LabellingConfig, SelectionConfig
from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.data.prepared import Prepared, Source
from ns.data.writer import ShardWriter
from ns.digest import sha256_bytes
from ns.document import pretty
from ns.evaluate import gate
from ns.evaluate.accuracy import summarise, table_of
from ns.inference import Predictions
from ns.label import predict
from ns.label.labelset import join
from ns.label.selection import select_from
from ns.proportion import wilson
from ns.report.pictures import THUMBNAIL_PX
from ns.store import LocalStore

CLASSES = ("cat", "<script>alert(1)</script>", 'quote"s & co')
RUN = "made-up"


def dataset(folder, role: str, count: int, px: int = 12) -> Dataset:
    rng = np.random.default_rng(count)
    with ShardWriter(folder, max_samples=40, max_bytes=1 << 24) as writer:
        for index in range(count):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (px, px, 3), np.uint8)).save(png, "PNG")
            writer.add(f"{role}/<b>{index}", "png", png.getvalue(), None if role == "unlabelled" else index % 3)
    made = Dataset(name=role, role=role, classes=() if role == "unlabelled" else CLASSES, shards=writer.shards)
    made.save(folder)
    return made


def probabilities(rng, count: int, sharpness: float) -> np.ndarray:
    logits = sharpness * rng.normal(size=(count, 3))
    values = np.exp(logits - logits.max(1, keepdims=True))
    return (values / values.sum(1, keepdims=True)).astype(np.float32)


@pytest.fixture
def made_up(tmp_path):
    """A run of one finished generation and one whose student is still to be trained."""
    root = LocalStore(tmp_path)
    experiment = config.parse(
        {
            "name": "made-up",
            "generations": 2,
            "data": {"labelled": "l", "pool": "p", "heldout": "h"},
            "report": {"pictures": 5},
            "selection": {"per_class": 10, "min_confidence": 0.5},
        },
        "here",
    )
    runs.start(root, RUN, experiment, "1.2.3")

    def note(generation, step, **outputs):
        runs.note(root, RUN, generation, step, outputs, 1.5 + generation, reused=generation == 2)

    parts = {}
    for part, role, count, px in (
        ("labelled", "labelled", 9, 12),
        ("pool", "unlabelled", 60, 2 * THUMBNAIL_PX),
        ("heldout", "evaluation", 30, 12),
    ):
        made = dataset(root.at(f"store/datasets/{part}"), role, count, px)
        parts[part] = (Source(ref=f"store/datasets/{part}", dataset=made.digest), made)
    prepared = Prepared(**{part: source for part, (source, _) in parts.items()})
    prepared.write(root, "store/prepared/x/prepared.json")
    note(0, "prepare-data", data="store/prepared/x/prepared.json")

    rng = np.random.default_rng(0)
    tables = {}
    for generation in (0, 1):
        folder = root.at(f"store/models/{generation}")
        card = ModelCard(
            generation=generation,
            model=experiment.teacher.model,
            noise=experiment.teacher.noise,
            classes=CLASSES,
            parameters=1234567,
            steps=4,
            lineage=Lineage(config="0", labelled="0"),
            weights_sha256="0",
        )
        card.write(folder, "model.json")
        point = {"loss": 1.0, "loss_labelled": 0.5, "accuracy_labelled": 0.5, "lr": 0.1, "images": 8.0}
        if generation:
            point |= {"loss_pseudo": 0.4, "agreement": 0.8}
        folder.put("history.json", pretty([{"step": float(step), **point} for step in range(1, 5)]))
        note(generation, "train", model=f"store/models/{generation}/model.json")
        labels = np.arange(30) % 3
        guesses = probabilities(rng, 30, 0.5)
        guesses[np.arange(30), labels] += 0.1 + generation
        tables[generation] = table_of([f"k{i}" for i in range(30)], labels, guesses / guesses.sum(1, keepdims=True))
        sink = io.BytesIO()
        pq.write_table(tables[generation], sink)
        evaluation = summarise(
            tables[generation],
            model=card.digest,
            dataset=parts["heldout"][1].digest,
            classes=CLASSES,
            unreadable=0,
            predictions_sha256=sha256_bytes(sink.getvalue()),
        )
        evaluation.write(root, f"store/evaluations/{generation}/evaluation.json")
        note(generation, "evaluate", evaluation=f"store/evaluations/{generation}/evaluation.json")

    pool = parts["pool"][1]
    for generation in (1, 2):
        where = root.at(f"store/labels/{generation}")
        for shard in pool.shards:
            from ns.data.shards import read_index

            samples = read_index(root.at("store/datasets/pool").path(shard.name))
            errors = {3: "truncated"} if shard.name == "shard-00000.tar" else {}
            guesses = probabilities(rng, len(samples), 2.0)
            guesses[list(errors)] = np.nan
            found = Predictions(ShardIndex.of(samples, [(0, 0)] * len(samples)), guesses, errors)
            predict.write(where, shard, [found], LabellingConfig(), "float32")
        label_set = join(where, pool, teacher=f"t{generation}", code="c", classes=CLASSES, top_k=10)
        label_set.write(where, "labelset.json")
        policy = SelectionConfig(per_class=10, min_confidence=0.5)
        selection = select_from(where, label_set, policy, seed=0, labels=f"store/labels/{generation}")
        selection.write(root, f"store/selections/{generation}/selection.json")
        note(
            generation,
            "commit-labels",
            labels=f"store/labels/{generation}/labelset.json",
            selection=f"store/selections/{generation}/selection.json",
        )
    verdict = gate.judge(
        GateConfig(),
        generation=1,
        teacher="store/models/0",
        student="store/models/1",
        labels=tables[0]["label"].to_numpy(),
        teacher_correct=tables[0]["rank"].to_numpy() == 0,
        student_correct=tables[1]["rank"].to_numpy() == 0,
        classes=CLASSES,
        seed=0,
    )
    verdict.write(root, "store/verdicts/1/verdict.json")
    note(1, "gate", verdict="store/verdicts/1/verdict.json")
    return root


def page_of(root) -> str:
    return " ".join(root.get(report.write(root, RUN)).decode().split())


def test_it_says_what_the_run_found(made_up):
    page = page_of(made_up)
    summary = runs.summarise(made_up, RUN)
    (row,) = summary.generations
    assert f"{100 * summary.teacher_top1:.1f} % → {100 * row.student_top1:.1f} %" in page
    assert f"<b>{row.kept}</b> of 60 images kept" in page
    assert "1 unreadable" in page
    assert "threshold 0.5" in page
    assert "1,234,567 parameters" in page
    assert "per_class: 10" in page
    assert "of 59 images have another label than in the generation before" in page


def test_names_from_outside_cannot_become_markup(made_up):
    page = page_of(made_up)
    assert "<script" not in page
    assert "/<b>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_it_needs_nothing_from_elsewhere(made_up):
    page = page_of(made_up)
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(http" not in page
    assert "@import" not in page


def test_the_same_run_gives_the_same_bytes(made_up):
    assert page_of(made_up) == page_of(made_up)


def test_large_pictures_are_shrunk_and_groups_are_as_large_as_asked(made_up):
    page = page_of(made_up)
    assert page.count("<img ") <= 4 * 5
    assert page.count("data:image/jpeg") == page.count("<img ") > 10
    assert len(page) < 1_000_000


def test_charts_are_well_formed_and_their_ids_are_unique(made_up):
    page = page_of(made_up)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(charts) >= 9
    for chart in charts:
        ElementTree.fromstring(chart.replace("xlink:href", "href"))


@pytest.mark.parametrize("reached", ["nothing", "prepare-data", "train", "evaluate"])
def test_an_unfinished_run_has_a_report_too(made_up, reached):
    order = ["prepare-data", "train", "evaluate"]
    keep = order[: order.index(reached) + 1] if reached in order else []
    for key in list(made_up.at(RUN).list("steps/")):
        if key not in [f"steps/0-{step}.json" for step in keep]:
            made_up.at(RUN).delete(key)
    page = page_of(made_up)
    assert "No labels yet." in page
    assert ("No model is evaluated yet" in page) == (reached != "evaluate")


def test_wilson_interval():
    # Brown, Cai & DasGupta (2001): 0 of 10 gives an upper bound of about 0.278.
    low, high = wilson(0.0, 10)
    assert low == pytest.approx(0, abs=1e-9)
    assert high == pytest.approx(0.2775, abs=1e-3)


@pytest.mark.parametrize("count", [1, 7, 60, 500, 100_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_an_interval_holds_its_share_to_the_last_bit(share, count):
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high <= 1
