import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ns.cli.app import run_command_line
from ns.config.schema import GateConfig, ImportConfig, SelectionConfig
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.importing.ingest import import_images
from ns.data.prepared import PreparedData, PreparedDataset
from ns.data.shards import read_samples
from ns.evaluation.gate import LabelQuality
from ns.labeling import audit as audit_module
from ns.labeling.audit import (
    MIN_PER_STRATUM,
    SAMPLE_SALT,
    AuditSheet,
    LabelAudit,
    allocate_sample,
    check_audit,
    check_audit_sheet,
    choose_deciding_audit,
    draw_audit_sample,
    estimate_precision,
    load_audits,
    save_audit,
)
from ns.labeling.selection import hash_keys, make_selection
from ns.runs.lookup import open_run_label_set
from ns.runs.records import RunRecord, write_stage_note
from ns.stages.gate import _collect_label_evidence
from ns.storage import LocalStore

CLASSES = ("cat", "dog", "ox")


def rows_of(count, seed=0):
    """(key, class, confidence), few of them in the low bands, some unreadable."""
    rng = random.Random(seed)
    rows = [(f"k{n}", rng.choice([0, 0, 0, 1, 1, 2]), 1 - rng.random() ** 2 * 0.7) for n in range(count)]
    return [(key, label, None if n % 50 == 7 else float(np.float32(sure))) for n, (key, label, sure) in enumerate(rows)]


def shards_of(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.fixture
def labels(make_label_set, tmp_path):
    return make_label_set(tmp_path / "labels", shards_of(rows_of(900), 250), CLASSES)


# Sampling


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(0, 3000))
def test_allocate_sample_is_proportional_above_minimum(sizes, extra):
    total = sum(min(MIN_PER_STRATUM, size) for size in sizes) + extra
    drawn = allocate_sample(sizes, total)
    assert sum(drawn) == min(total, sum(sizes))
    assert all(min(MIN_PER_STRATUM, size) <= own <= size for own, size in zip(drawn, sizes, strict=True))
    # What is above the minimum is proportional to what is there above it, to within one image.
    rest = sum(max(0, size - MIN_PER_STRATUM) for size in sizes)
    above = sum(drawn) - sum(min(MIN_PER_STRATUM, size) for size in sizes)
    for own, size in zip(drawn, sizes, strict=True):
        if size > MIN_PER_STRATUM:
            assert abs(own - MIN_PER_STRATUM - above * (size - MIN_PER_STRATUM) / rest) < 1


def test_audit_sample_holds_every_stratum_whatever_the_shards(make_label_set, labels, tmp_path):
    sheet = draw_audit_sample(*labels, sample_size=120, seed=3)
    assert len(sheet.images) == 120 == len({image.key for image in sheet.images})
    assert sum(stratum.images for stratum in sheet.strata) == 900 - 18
    for number, stratum in enumerate(sheet.strata):
        own = [image for image in sheet.images if image.stratum == number]
        assert len(own) == stratum.sampled >= min(MIN_PER_STRATUM, stratum.images)
        assert all(image.class_name == stratum.class_name and stratum.low <= image.confidence <= stratum.high for image in own)
    assert draw_audit_sample(*labels, sample_size=120, seed=3) == sheet
    other = draw_audit_sample(*make_label_set(tmp_path / "one", [rows_of(900)], CLASSES), sample_size=120, seed=3)
    assert [image.key for image in other.images] == [image.key for image in sheet.images]
    assert {i.key for i in draw_audit_sample(*labels, sample_size=120, seed=4).images} != {i.key for i in sheet.images}


def test_audit_sample_draws_lowest_hashes_of_each_stratum(labels):
    sheet = draw_audit_sample(*labels, sample_size=100, seed=0)
    drawn = {image.key for image in sheet.images}
    for stratum in sheet.strata:
        own = [
            key
            for key, label, sure in rows_of(900)
            if sure is not None and CLASSES[label] == stratum.class_name and stratum.low <= sure < stratum.high
        ]
        by_hash = sorted(own, key=lambda key: int(hash_keys([key], SAMPLE_SALT)[0]))
        assert set(own) & drawn == set(by_hash[: stratum.sampled])


@pytest.mark.parametrize("images", [5, 12, 25, 60, 130])
def test_audit_sample_is_drawn_in_one_reading(make_label_set, tmp_path, monkeypatch, images):
    """What is let go between shards is never drawn, at any fineness of the strata."""
    store, label_set = make_label_set(tmp_path / "labels", shards_of(rows_of(900), 20), CLASSES)
    whole = draw_audit_sample(store, label_set, sample_size=images, seed=3)
    held, readings = [], []
    keep_drawable, read_rows = audit_module._keep_drawable, audit_module.iter_label_rows
    monkeypatch.setattr(audit_module, "MAX_HELD_ROWS", 0)
    monkeypatch.setattr(audit_module, "iter_label_rows", lambda *args: readings.append(args) or read_rows(*args))
    monkeypatch.setattr(
        audit_module, "_keep_drawable", lambda *args: held.append((len(args[0]), len(kept := keep_drawable(*args)))) or kept
    )
    assert draw_audit_sample(store, label_set, sample_size=images, seed=3) == whole
    assert len(readings) == 1
    assert any(after < before for before, after in held)
    assert len({image.key for image in whole.images}) == images


@pytest.mark.parametrize(
    ("images", "by_class", "by_band"), [(120, True, True), (60, True, False), (12, True, False), (7, False, False)]
)
def test_audit_sample_of_few_images_has_coarser_strata(labels, images, by_class, by_band):
    sheet = draw_audit_sample(*labels, sample_size=images, seed=0)
    assert len(sheet.images) == images
    assert all((stratum.class_name is not None) == by_class for stratum in sheet.strata)
    assert any(stratum.high - stratum.low < 0.2 for stratum in sheet.strata) == by_band


def test_audit_sample_of_small_and_empty_label_sets(make_label_set, tmp_path):
    assert len(draw_audit_sample(*make_label_set(tmp_path / "a", [rows_of(30)], CLASSES), sample_size=400, seed=0).images) == 29
    with pytest.raises(DataError, match="no labeled images to look at"):
        draw_audit_sample(*make_label_set(tmp_path / "b", [[("x", 0, None)]], CLASSES), sample_size=400, seed=0)


def test_audit_sample_of_selected_images(labels):
    store, label_set = labels
    policy = SelectionConfig(per_class=20, min_confidence=0.6)
    selection = make_selection(store, label_set, policy, seed=0, label_set_key=".")
    sheet = draw_audit_sample(store, label_set, sample_size=400, seed=0, selection=selection)
    assert len(sheet.images) == selection.kept == 60
    assert sheet.selection == selection.digest
    assert min(image.confidence for image in sheet.images) > 0.6


# Estimates


def answered(sheet, wrong=(), reviewed=lambda image: True, correct=None):
    """The sheet as a person fills it in."""
    images = tuple(
        image.model_copy(
            update={
                "reviewed": reviewed(image),
                "wrong": image.key in wrong,
                "correct_class": (correct or {}).get(image.key),
            }
        )
        for image in sheet.images
    )
    return sheet.model_copy(update={"images": images})


def test_estimate_precision_of_all_images_is_exact(labels):
    sheet = draw_audit_sample(*labels, sample_size=5000, seed=0)
    wrong = {image.key for image in sheet.images[:100]}
    audit = estimate_precision(answered(sheet, wrong), "x")
    assert (audit.reviewed, audit.wrong, audit.images) == (882, 100, 882)
    assert audit.precision == audit.precision_low == audit.precision_high == pytest.approx(782 / 882)


def test_estimate_precision_widens_without_reviews(labels):
    sheet = draw_audit_sample(*labels, sample_size=120, seed=0)
    whole = estimate_precision(answered(sheet), "x")
    part = estimate_precision(answered(sheet, reviewed=lambda image: image.class_name != "ox"), "x")
    assert whole.precision == part.precision == 1
    assert part.precision_low < whole.precision_low < 1
    unseen = [stratum for stratum in part.strata if stratum.class_name == "ox"]
    assert {(s.precision, s.precision_low, s.precision_high) for s in unseen} == {(None, 0, 1)}
    with pytest.raises(DataError, match="x: images: none of them was reviewed"):
        estimate_precision(sheet, "x")


# What comes back


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(label_set="f" * 64), r"label_set: 'ffff.*an audit of another label set"),
        (lambda d: d.update(seed=7), r"seed: 7: expected 0; if you made the page with --seed 7, give"),
        (lambda d: d.update(seed=2**40), r"seed: Input should be less than or equal to 2147483647 \(got 1099511627776\)"),
        (lambda d: d.update(requested=2), r"requested: 2: expected 60; if you made the page with --images 2, give"),
        (lambda d: d.update(selection="f" * 64), r"selection: 'f.*made with --selected-only"),
        (lambda d: d["images"][3].update(key="zz"), "images: are not those of the sample"),
        (lambda d: d["images"][3].update(key=d["images"][2]["key"]), "images: are not those of the sample"),
        (lambda d: d["images"][3].update(confidence=0.1), r"images\.3\.confidence: 0.1: the label set says"),
        (lambda d: d["images"][3].update(class_name="dgo"), r"images\.3\.class_name: 'dgo': the label set says 'cat'"),
        (lambda d: d["images"].pop(3), "images: are not those of the sample"),
        (lambda d: d["strata"][0].update(images=5), r"strata: are not those of"),
        (lambda d: d["images"][3].update(wrong=True, correct_class="dgo"), "correct_class: 'dgo': no such class; .*cat, dog, ox"),
        (lambda d: d["images"][3].update(correct_class="dog"), r"images\.3\.correct_class: 'dog': given for an image that is not"),
        (lambda d: d["images"][3].update(wrong=True, correct_class="cat"), r"images\.3\.correct_class: 'cat': is the teacher's"),
        (lambda d: d["images"][3].update(wrong=True, reviewed=False), r"images\.3\.reviewed: False: an image that is marked wrong"),
        (lambda d: d["images"][3].update(wrong="perhaps"), r"images\.3\.wrong: Input should be a valid boolean.*'perhaps'"),
        (lambda d: d.update(format=2), r"audit\.json: format: Input should be 1 \(got 2\)"),
    ],
)  # fmt: skip
def test_check_audit_sheet_names_file_and_field(labels, change, said):
    sheet = answered(draw_audit_sample(*labels, sample_size=60, seed=0))
    fields = json.loads(sheet.model_dump_json())
    check_audit_sheet(AuditSheet.validate_fields(fields, "audit.json"), "audit.json", *labels, None, sample_size=60, seed=0)
    change(fields)
    with pytest.raises(DataError, match=said) as refused:
        check_audit_sheet(AuditSheet.validate_fields(fields, "audit.json"), "audit.json", *labels, None, sample_size=60, seed=0)
    assert str(refused.value).startswith("audit.json: ")


def test_choose_deciding_audit_prefers_selection_then_size(labels):
    store, label_set = labels
    small = estimate_precision(answered(draw_audit_sample(*labels, sample_size=60, seed=0)), "x")
    large = estimate_precision(answered(draw_audit_sample(*labels, sample_size=90, seed=1)), "x")
    assert len({save_audit(audit, store) for audit in (small, large, small)}) == 2
    found = load_audits(store, label_set)
    assert {audit.digest for audit in found} == {small.digest, large.digest}
    assert choose_deciding_audit(found, None) == large
    selection = SimpleNamespace(digest="s")
    own, others = (small.model_copy(update={"selection": name}) for name in ("s", "t"))
    assert choose_deciding_audit([*found, own, others], selection) == own
    assert choose_deciding_audit([others], selection) is None


@pytest.fixture
def run(make_label_set, make_pool, tmp_path):
    """A root with a run of two generations, without models: prepared data, label sets and selections."""
    root = LocalStore(tmp_path / "root")
    rows = shards_of(rows_of(120), 50)
    _, images = make_pool(tmp_path / "root" / "pool", [[row[0] for row in shard] for shard in rows])
    prepared = PreparedData(**dict.fromkeys(("labeled", "pool", "heldout"), PreparedDataset(uri="pool", digest=images.digest)))
    prepared.save_file(root, "prepared.json")
    write_stage_note(root, "r", 0, "prepare", {"data": "prepared.json"}, 1, reused=False)
    for generation in (1, 2):
        # In the second generation, every tenth image is an ox.
        changed = [[(k, 2 if generation == 2 and int(k[1:]) % 10 == 0 else c, s) for k, c, s in shard] for shard in rows]
        store, made = make_label_set(root.root / f"labels/{generation}", changed, CLASSES, images, teacher=str(generation))
        policy = SelectionConfig(per_class=30, min_confidence=0.4)
        selection = make_selection(store, made, policy, seed=0, label_set_key=f"labels/{generation}")
        selection.save_file(root, f"selection-{generation}.json")
        outputs = {
            "teacher": "teacher/model.json",
            "label_set": f"labels/{generation}/labelset.json",
            "selection": f"selection-{generation}.json",
        }
        write_stage_note(root, "r", generation, "select", outputs, 1, reused=False)
    RunRecord(run="r", config_digest="0", state="succeeded", started_at="2026", version="0").save_file(
        root, "store/runs/r.json"
    )
    return root


def test_audit_commands_make_page_and_apply_answers(run, tmp_path, capsys):
    page, where = tmp_path / "audit.html", ["r/gen-1", "--root", str(run.root)]
    assert run_command_line(["labels", "audit", *where, "--images", "40", "--selected-only", "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count('src="data:image/png') == 40
    sheet = AuditSheet.parse(text.split('id="audit">')[1].split("</script>")[0].encode(), "page")
    wrong = [image for image in sheet.images if image.class_name == "cat"][:3]
    correct = {wrong[0].key: "dog", wrong[2].key: "ox"}
    file = tmp_path / "audit.json"
    file.write_text(answered(sheet, {image.key for image in wrong}, correct=correct).model_dump_json())
    target = tmp_path / "corrections"
    capsys.readouterr()
    assert run_command_line(["labels", "audit", "apply", str(file), *where, "--images=40", "--corrections", str(target)]) == 0
    assert "2 corrected images" in capsys.readouterr().out
    assert run_command_line(["labels", "show", *where]) == 0
    assert "40 of" in capsys.readouterr().out
    (audit,) = load_audits(run.at("labels/1"), open_run_label_set(run, "r", 1).label_set)
    assert (audit.reviewed, audit.wrong, len(audit.mistakes)) == (40, 3, 3)
    # Applied to what it is not of.
    assert run_command_line(["labels", "audit", "apply", str(file), "r/gen-2", "--images=40", "--root", str(run.root)]) == 3
    assert "an audit of another label set" in capsys.readouterr().err
    assert run_command_line(["labels", "audit", "apply", str(file), "--images=40", str(run.root / "labels/1")]) == 3
    assert "name the run's generation" in capsys.readouterr().err
    assert run_command_line(["labels", "audit", "apply", str(tmp_path / "no.json"), *where]) == 4
    # The corrections are a labeled dataset, with the images' own bytes.
    data = Dataset.load(LocalStore(target))
    (shard,) = data.shards
    found = {sample.key: sample for sample in read_samples(target / shard.name)}
    assert {key: data.classes[one.class_id] for key, one in found.items()} == correct
    lines = (target / "corrections.csv").read_text().splitlines()
    assert lines[0] == "key,label,teacher,confidence"
    assert {line.split(",")[0]: line.split(",")[1] for line in lines[1:]} == correct
    assert (
        run_command_line(
            ["labels", "audit", "apply", str(file), *where, "--images=40", "--corrections", str(run.root / "pool")]
        )
        == 3
    )
    assert "holds another dataset" in capsys.readouterr().err


def test_corrections_import_with_other_shards(run, labels, make_pool, tmp_path):
    from ns.data.importing.writer import ShardWriter
    from ns.labeling.audit import write_corrections

    known = open_run_label_set(run, "r", 1)
    sheet = draw_audit_sample(known.store, known.label_set, sample_size=30, seed=0)
    wrong = [image.key for image in sheet.images if image.class_name == "cat"][:2]
    audit = estimate_precision(answered(sheet, wrong, correct=dict.fromkeys(wrong, "ox")), "x")
    merged = LocalStore(tmp_path / "merged")
    with ShardWriter(merged, max_samples=100, max_bytes=1 << 20) as writer:
        for number, (_, _, data) in enumerate(_pictures(known.open_pool(run))):
            writer.add_image(f"train{number}", "png", data, number % 3)
    target = LocalStore(tmp_path / "corrections")
    made = write_corrections(audit, CLASSES, *known.open_pool(run), target)
    merged.put(made.shards[0].name, target.get(made.shards[0].name))
    config = ImportConfig(max_rejected_share=0.1, shard_samples=1000, shard_mib=256, max_side=None)
    both = import_images(
        str(merged.root), LocalStore(tmp_path / "both"), name="both", role="labeled", config=config, classes=CLASSES, workers=1
    )
    assert (both.samples, both.classes) == (6 + 2, CLASSES)
    assert write_corrections(estimate_precision(answered(sheet), "x"), CLASSES, *known.open_pool(run), target) is None


def _pictures(opened):
    folder, images = opened
    for sample_ in read_samples(folder.path(images.shards[0].name))[:6]:
        yield sample_.key, sample_.extension, folder.get_range(images.shards[0].name, sample_.offset, sample_.size)


# The gate


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(precision=0.99), "precision: is not what follows from the answers"),
        (lambda d: d.update(precision_low=0.99), "precision_low: is not what follows"),
        (lambda d: d.update(mistakes=[], wrong=0), "precision: is not what follows"),
        (lambda d: d["strata"][0].update(reviewed=10_000), "strata: have other numbers of images"),
        (lambda d: d["strata"][0].update(images=10_000), "strata: are not those of the label set"),
        (lambda d: d.update(seed=1), "mistakes: 'k.*': is not in the sample"),
        (lambda d: d["mistakes"][0].update(key="zz"), "mistakes: 'zz': is not in the sample"),
    ],
)
def test_check_audit_believes_only_what_follows_from_the_answers(labels, change, said):
    sheet = draw_audit_sample(*labels, sample_size=60, seed=0)
    audit = estimate_precision(answered(sheet, {image.key for image in sheet.images[::7]}), "x")
    check_audit(audit, *labels, None)
    fields = json.loads(audit.model_dump_json())
    change(fields)
    # A person who writes such a file gives it the digest that belongs to it.
    with pytest.raises(DataError, match=said):
        check_audit(LabelAudit.model_validate(fields), *labels, None)


def test_gate_evidence_has_churn_and_audits(run):
    def facts(generation, **limits):
        experiment = SimpleNamespace(gate=GateConfig(**limits))
        return _collect_label_evidence(SimpleNamespace(experiment=experiment, root=run, run="r"), generation)

    assert facts(2) == LabelQuality()
    assert facts(1, max_churn=0.1) == LabelQuality()
    found = facts(2, max_churn=0.1, min_audited_precision=0.5)
    assert found.churn == pytest.approx(12 / 117)
    assert found.shrunk_class in CLASSES
    assert found.audited_precision is None
    labels = open_run_label_set(run, "r", 2)
    audit = estimate_precision(answered(draw_audit_sample(labels.store, labels.label_set, sample_size=30, seed=0)), "x")
    save_audit(audit, labels.store)
    assert facts(2, min_audited_precision=0.5).audited_precision == (1.0, audit.precision_low, 30)
