import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from structlog.testing import capture_logs

from ns.config.loader import parse_experiment
from ns.config.schema import ImportConfig, ModelConfig, NoiseConfig
from ns.core.errors import ConfigError, DataError, StoreError
from ns.data.dataset import Dataset
from ns.data.importing import ingest
from ns.data.importing.digits import write_digits
from ns.data.importing.ingest import import_images
from ns.data.index import ShardIndex
from ns.data.leakage import load_left_out_rows
from ns.data.prepared import PART_ROLES
from ns.modeling.factory import build_model
from ns.stages.prepare import prepare_data, prepare_datasets, write_prepared_data
from ns.storage import LocalStore, lease
from ns.storage.ledger import Ledger
from tests.loop import open_tiny_run

CONFIG = ImportConfig(max_rejected_share=0, shard_samples=10, shard_mib=1)
NETWORK = {"model": {"arch": "test_efficientnet", "resolution": 32}}


def fill(folder, classes, count=3, seed=0) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            sink = io.BytesIO()
            pixels = np.random.default_rng([seed, index, len(name), ord(name[0])]).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(sink, "PNG")
            (folder / name / f"{seed}-{index}.png").write_bytes(sink.getvalue())


@pytest.fixture
def uris(tmp_path):
    fill(tmp_path / "labeled", ["cat", "dog"])
    fill(tmp_path / "heldout", ["cat", "dog"], seed=1)
    fill(tmp_path / "pool", ["any"], count=9, seed=2)
    return {part: str(tmp_path / part) for part in ("labeled", "pool", "heldout")}


def prepare(tmp_path, uris, **fields):
    root = LocalStore(tmp_path / "root")
    document = {"name": "x", "generations": 1, "data": uris, "teacher": NETWORK, "students": [NETWORK], **fields}
    return prepare_datasets(parse_experiment(document, "x.yaml"), root, Ledger(root)), root


def test_prepare_imports_folders_once(tmp_path, uris):
    (first, reused), root = prepare(tmp_path, uris)
    assert not reused
    assert first.pool.open_dataset(root)[1].samples == 9
    (second, reused), _ = prepare(tmp_path, uris)
    assert reused
    assert second == first


def test_prepare_imports_a_changed_folder_again(tmp_path, uris):
    (first, _), _ = prepare(tmp_path, uris)
    fill(tmp_path / "pool", ["any"], count=2, seed=5)
    (second, reused), root = prepare(tmp_path, uris)
    assert not reused
    assert second.pool.open_dataset(root)[1].samples == 11
    assert second.labeled == first.labeled
    assert second.digest != first.digest


@pytest.mark.parametrize("file", ["shard-00000.tar", "shard-00000.index.parquet"])
def test_import_that_was_killed_before_its_ledger_entry_is_checked_and_tidied(tmp_path, uris, file):
    (first, _), root = prepare(tmp_path, uris)
    root.delete_prefix("store/ledger/")
    data = root.at(first.pool.uri)
    kept = list(data.list())
    data.put(file, data.get(file)[:-100])
    data.put("parts/begun", b"")
    data.put("shard-00000-7.tar", b"of another cut")
    (second, _), _ = prepare(tmp_path, uris)
    assert second == first
    assert list(data.list()) == kept
    assert Ledger(root).list_entries("import")


@pytest.mark.parametrize("file", ["shard-00000.tar", "shard-00000.index.parquet", "dataset.json"])
def test_damaged_import_is_made_again(tmp_path, uris, file):
    (first, _), root = prepare(tmp_path, uris)
    data = root.at(first.pool.uri)
    kept = list(data.list())
    data.put(file, data.get(file)[:-10])
    (second, reused), _ = prepare(tmp_path, uris)
    assert not reused
    assert second == first
    assert list(data.list()) == kept


@pytest.mark.parametrize("step", ["_check_destination", "_list_rejects"])
def test_import_that_was_silent_and_taken_over_takes_nothing_away(tmp_path, uris, monkeypatch, step):
    (tmp_path / "pool" / "any" / "damaged.png").write_bytes(b"no picture")
    data = {**uris, "max_rejected_share": 0.5}
    take_step, delete = getattr(ingest, step), LocalStore.delete
    others, deleted = [], []

    def overtaken(*arguments):
        if not others:
            others.append("under way")
            others.append(prepare(tmp_path, data)[0][0])
        take_step(*arguments)

    def watched(store, key):
        deleted.append(key)
        delete(store, key)

    monkeypatch.setattr(lease, "STALE_SECONDS", 0)
    monkeypatch.setattr(ingest, step, overtaken)
    monkeypatch.setattr(LocalStore, "delete", watched)
    (own, _), root = prepare(tmp_path, data)
    assert own == others[1]
    assert own.pool.open_dataset(root)[1].rejected == 1
    # Those who read what the other has finished find its manifest at any time.
    assert Dataset.filename not in deleted
    assert list(root.list(f"{lease.LEASES}/")) == []


def test_prepare_uses_a_dataset_where_it_is(tmp_path, uris):
    options = {"config": CONFIG}
    pool = import_images(uris["pool"], LocalStore(tmp_path / "made"), name="p", role="unlabeled", **options)
    (prepared, _), _ = prepare(tmp_path, {**uris, "pool": str(tmp_path / "made")})
    assert prepared.pool.digest == pool.digest
    assert prepared.pool.uri == (tmp_path / "made").as_uri()


def test_open_dataset_refuses_a_changed_dataset(tmp_path, uris):
    options = {"config": CONFIG, "name": "p", "role": "unlabeled", "workers": 1}
    import_images(uris["pool"], LocalStore(tmp_path / "made"), **options)
    (prepared, _), root = prepare(tmp_path, {**uris, "pool": str(tmp_path / "made")})
    fill(tmp_path / "pool", ["any"], count=2, seed=5)
    import_images(uris["pool"], LocalStore(tmp_path / "made"), **options)
    with pytest.raises(DataError, match="changed since it was prepared"):
        prepared.pool.open_dataset(root)


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("pool", "nowhere", "data.pool: .*nowhere: no such folder"),
        ("heldout", "digits:training", "no such part; there are digits:labeled"),
        (
            "heldout",
            "digits:heldout",
            "its classes .* are not those of data.labeled, .*; import it with the same classes in the same order$",
        ),
        ("test", "digits:test", "its classes .* are not those of data.labeled, .*, or set data.test=null$"),
    ],
)
def test_prepare_refuses_unusable_uris(tmp_path, uris, part, value, reason):
    with pytest.raises(DataError, match=reason):
        prepare(tmp_path, {**uris, part: value})


def test_prepare_refuses_heldout_equal_to_labeled(tmp_path, uris):
    options = {"config": CONFIG, "name": "l", "role": "labeled"}
    import_images(uris["labeled"], LocalStore(tmp_path / "made"), **options)
    made, copied = str(tmp_path / "made"), shutil.copytree(tmp_path / "made", tmp_path / "copied")
    with pytest.raises(DataError, match=r"is the same as data\.labeled"):
        prepare(tmp_path, {**uris, "labeled": made, "heldout": str(copied)})


def test_prepare_refuses_more_classes_than_outputs(tmp_path, uris):
    fill(tmp_path / "labeled", ["emu"])
    fill(tmp_path / "heldout", ["emu"], seed=1)
    with pytest.raises(ConfigError, match=r"teacher\.model\.outputs: invalid value 2: the labeled data has 3 classes"):
        prepare(tmp_path, uris, teacher={"model": {**NETWORK["model"], "outputs": 2}})


def test_prepare_checks_initial_weights_each_time(tmp_path, uris):
    prepare(tmp_path, uris)
    weights = tmp_path / "weights.safetensors"
    network = build_model(ModelConfig.model_validate(NETWORK["model"]), NoiseConfig(), 2)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, weights)
    student = {**NETWORK, "model": {**NETWORK["model"], "pretrained": str(weights)}}
    prepare(tmp_path, uris, students=[student])
    weights.write_bytes(b"any")
    with pytest.raises(DataError, match=r"students\.0\.model\.pretrained: .*weights\.safetensors: not a safetensors file"):
        prepare(tmp_path, uris, students=[student])
    weights.unlink()
    with pytest.raises(ConfigError, match=r"students\.0\.model\.pretrained: .*there is no such file"):
        prepare(tmp_path, uris, students=[student])


def test_prepare_checks_networks_at_the_resolution_of_finetuning(tmp_path, uris):
    networks = {"arch": "vit_tiny_patch16_224", "args": {"img_size": 32}, "resolution": 32}
    prepare(tmp_path, uris, teacher={"model": networks}, students=[{"model": networks}])
    tuned = {"model": networks, "train": {"finetune": {"resolution": 48}}}
    with pytest.raises(ConfigError, match=r"students\.0\.model: the network does not take images of 48 px"):
        prepare(tmp_path, uris, teacher={"model": networks}, students=[tuned])


def copy_heldout(tmp_path) -> None:
    """Two held-out images find their way into the pool."""
    for number, path in enumerate(sorted((tmp_path / "heldout").rglob("*.png"))[:2]):
        (tmp_path / "pool" / "any" / f"copy-{number}.png").write_bytes(path.read_bytes())


def test_leak_guard_leaves_heldout_images_out_of_the_pool(tmp_path, uris):
    (clean, _), root = prepare(tmp_path, uris)
    assert clean.left_out is None
    copy_heldout(tmp_path)
    with capture_logs() as logs:
        (prepared, _), root = prepare(tmp_path, uris)
    (warning,) = [line for line in logs if line["event"] == "images of the pool are also in evaluation sets, and get no label"]
    assert (warning["images"], warning["same_bytes"]) == (2, 2)
    rows = load_left_out_rows(root.at(prepared.left_out.key))
    _, pool = prepared.pool.open_dataset(root)
    assert list(rows) == [pool.shards[0].sha256]
    assert len(rows[pool.shards[0].sha256]) == 2
    (again, reused), _ = prepare(tmp_path, uris)
    assert reused
    assert again == prepared


@pytest.mark.parametrize("role", ["labeled", "evaluation"])
def test_leak_guard_works_for_a_pool_with_labels(tmp_path, uris, role):
    fill(tmp_path / "pool", ["other"], seed=2)
    copy_heldout(tmp_path)
    import_images(uris["pool"], LocalStore(tmp_path / "made"), name="p", role=role, config=CONFIG, workers=1)
    (prepared, _), root = prepare(tmp_path, {**uris, "pool": str(tmp_path / "made")})
    assert sum(map(len, load_left_out_rows(root.at(prepared.left_out.key)).values())) == 2


def test_labeled_images_may_have_the_evaluation_role(tmp_path, uris):
    import_images(uris["labeled"], LocalStore(tmp_path / "made"), name="l", role="evaluation", config=CONFIG)
    (prepared, _), root = prepare(tmp_path, {**uris, "labeled": str(tmp_path / "made")})
    assert prepared.labeled.open_dataset(root)[1].role == "evaluation"


@pytest.mark.parametrize("part", ["labeled", "pool", "heldout"])
def test_prepare_refuses_an_empty_dataset(tmp_path, uris, part):
    Dataset(name="x", role=PART_ROLES[part], classes=() if part == "pool" else ("cat", "dog"), shards=()).save(
        LocalStore(tmp_path / "made")
    )
    with pytest.raises(DataError, match=rf"data\.{part}: .*made/dataset\.json: has no images"):
        prepare(tmp_path, {**uris, part: str(tmp_path / "made")})


def test_leak_guard_covers_test_and_further_sets(tmp_path, uris):
    fill(tmp_path / "test", ["cat", "dog"], seed=3)
    fill(tmp_path / "hard", ["cat", "dog"], seed=4)
    for name in ("test", "hard"):
        path = next((tmp_path / name / "dog").iterdir())
        (tmp_path / "pool" / "any" / f"copy-{name}.png").write_bytes(path.read_bytes())
    data = {**uris, "test": str(tmp_path / "test")}
    hard = {"sets": {"hard": {"uri": str(tmp_path / "hard"), "classes": "own"}}}
    (prepared, _), root = prepare(tmp_path, uris, data=data, evaluation=hard)
    assert list(prepared.evaluation_sets) == ["heldout", "test", "set:hard"]
    assert prepared.reported_set == prepared.test
    assert prepared.sets["hard"].open_dataset(root)[1].classes == ("cat", "dog")
    (rows,) = load_left_out_rows(root.at(prepared.left_out.key)).values()
    assert sorted(reason.partition(": ")[0] for reason in rows.values()) == ["also in set:hard", "also in test"]
    (without, _), _ = prepare(tmp_path, uris)
    assert without.left_out is None
    assert without.digest != prepared.digest


@pytest.mark.parametrize("part", ["calibration", "test"])
@pytest.mark.parametrize("other", ["labeled", "heldout"])
def test_prepare_refuses_evaluation_images_equal_to_other_parts(tmp_path, uris, part, other):
    made = str(tmp_path / "made")
    options = {"config": CONFIG, "name": "l", "role": "evaluation"}
    import_images(uris[other], LocalStore(tmp_path / "made"), **options)
    copied = str(shutil.copytree(tmp_path / "made", tmp_path / "copied"))
    with pytest.raises(DataError, match=rf"data\.{part}: .* is the same as data\.{other}"):
        prepare(tmp_path, uris, data={**uris, other: made, part: copied})


def read_keys(root, source):
    store, dataset = source.open_dataset(root)
    return [key for shard in dataset.shards for key in ShardIndex.load(store, shard).keys]


def test_a_precision_sets_a_part_of_the_heldout_images_apart(tmp_path, uris):
    selection = {"precision": 0.9}
    (whole, _), _ = prepare(tmp_path, uris)
    (prepared, reused), root = prepare(tmp_path, uris, selection=selection)
    assert not reused
    assert list(prepared.evaluation_sets) == ["heldout", "calibration"]
    assert prepared.digest != whole.digest
    kept, set_apart = read_keys(root, prepared.heldout), read_keys(root, prepared.calibration)
    assert sorted(kept + set_apart) == sorted(read_keys(root, whole.heldout))
    assert [len(kept), len(set_apart)] == [2, 4]
    assert prepared.calibration.open_dataset(root)[1].classes == ("cat", "dog")
    assert prepare(tmp_path, uris, selection=selection)[0] == (prepared, True)
    (other, _), _ = prepare(tmp_path, uris, selection=selection, seed=7)
    assert other.digest == prepared.digest, "runs with other seeds are decided on the same images"
    (third, _), _ = prepare(tmp_path, uris, selection=selection, data={**uris, "calibration_share": 0.3})
    assert third.calibration.digest != prepared.calibration.digest


def test_given_calibration_images_leave_all_heldout_images_to_the_gate(tmp_path, uris):
    fill(tmp_path / "calibration", ["cat", "dog"], seed=3)
    path = next((tmp_path / "calibration" / "dog").iterdir())
    (tmp_path / "pool" / "any" / "copy.png").write_bytes(path.read_bytes())
    data = {**uris, "calibration": str(tmp_path / "calibration")}
    (whole, _), _ = prepare(tmp_path, uris)
    for selection in ({}, {"precision": 0.9}):
        (prepared, _), root = prepare(tmp_path, uris, data=data, selection=selection)
        assert prepared.heldout == whole.heldout
        assert len(read_keys(root, prepared.calibration)) == 6
    (rows,) = load_left_out_rows(root.at(prepared.left_out.key)).values()
    assert [reason.partition(": ")[0] for reason in rows.values()] == ["also in calibration"]


def test_too_few_heldout_images_cannot_be_divided(tmp_path, uris):
    fill(tmp_path / "few", ["cat", "dog"], count=1, seed=5)
    with pytest.raises(DataError, match=r"data\.calibration_share: .* no class has the two images that it takes"):
        prepare(tmp_path, uris, data={**uris, "heldout": str(tmp_path / "few")}, selection={"precision": 0.9})


def test_prepare_refuses_sets_with_unknown_classes(tmp_path, uris):
    fill(tmp_path / "hard", ["dog", "emu"], seed=4)
    hard = {"sets": {"hard": {"uri": str(tmp_path / "hard")}}}
    with pytest.raises(DataError, match=r"evaluation\.sets\.hard\.uri: .*\(emu\) are no classes of data\.labeled"):
        prepare(tmp_path, uris, data=uris, evaluation=hard)


def test_prepare_refuses_evaluation_sets_of_another_role(tmp_path, uris):
    options = {"config": CONFIG, "name": "l", "role": "labeled"}
    import_images(uris["heldout"], LocalStore(tmp_path / "made"), **options)
    with pytest.raises(DataError, match=r"heldout: .*has the role labeled; import it with --role evaluation"):
        prepare(tmp_path, {**uris, "heldout": str(tmp_path / "made")})


@pytest.mark.parametrize("guard", ["report", "off"])
def test_leak_guard_can_leave_the_pool_alone(tmp_path, uris, guard):
    copy_heldout(tmp_path)
    prepared = prepare(tmp_path, uris, data={**uris, "leak_guard": guard})[0][0]
    assert prepared.left_out is None
    assert bool(prepared.check) == (guard == "report")


@pytest.mark.parametrize("guard", ["exclude", "report", "off"])
@pytest.mark.parametrize("part", ["heldout", "test"])
def test_images_that_measure_are_no_labeled_ones(tmp_path, uris, guard, part):
    fill(tmp_path / "test", ["cat", "dog"], seed=3)
    data = {**uris, "test": str(tmp_path / "test"), "leak_guard": guard}
    path = next((tmp_path / part / "cat").iterdir())
    (tmp_path / "labeled" / "cat" / "copy.png").write_bytes(path.read_bytes())
    with pytest.raises(
        DataError, match=rf"^data\.{part}: 1 images of data\.labeled are also here, byte for byte \(listed in .*parquet"
    ):
        prepare(tmp_path, data)


def test_copied_folder_is_not_accepted_as_heldout(tmp_path, uris):
    shutil.rmtree(tmp_path / "heldout")
    shutil.copytree(tmp_path / "labeled", tmp_path / "heldout")
    with pytest.raises(DataError, match=r"^data\.heldout: 6 images of data\.labeled are also here, byte for byte"):
        prepare(tmp_path, {**uris, "leak_guard": "off"})


def fill_scenes(folder, seeds, quality) -> None:
    folder.mkdir(parents=True)
    for seed in seeds:
        colors = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(colors).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{seed}.jpg", quality=quality)


def test_large_overlap_by_looks_stops_and_asks(tmp_path, uris):
    """One of twenty held-out images is a labeled one, and six of twenty of the pool are held out, saved again."""
    for name, seeds, quality in (
        ("scenes/cat", range(20), 95),
        ("scenes/dog", range(20, 40), 95),
        ("apart/cat", [2, *range(100, 109)], 90),
        ("apart/dog", range(109, 119), 90),
        ("scene-pool/any", [100, 101, 103, 104, 106, 107, *range(200, 214)], 85),
    ):
        fill_scenes(tmp_path / name, seeds, quality)
    data = {"labeled": tmp_path / "scenes", "heldout": tmp_path / "apart", "pool": tmp_path / "scene-pool"}
    data = {part: str(path) for part, path in data.items()}
    apart = r"^data\.heldout: 1 of its 20 images \(5%\) are nearly alike to .* raise data\.max_heldout_overlap \(0\.04\)$"
    with pytest.raises(DataError, match=apart):
        prepare(tmp_path, {**data, "max_heldout_overlap": 0.04})
    with capture_logs() as logs:
        assert prepare(tmp_path, {**data, "max_heldout_overlap": 0.04, "leak_guard": "off"})[0][0].left_out is None
    (warning,) = [line for line in logs if line["event"].startswith("held-out images are also trained on")]
    assert (warning["set"], warning["nearly_alike"]) == ("heldout", 1)
    asked = r"^data\.max_left_out_share: 0\.2: 6 images of the pool \(30%\) are .*\(0 with the same bytes, 6 nearly alike; listed in "
    with pytest.raises(DataError, match=asked):
        prepare(tmp_path, data)
    (prepared, _), root = prepare(tmp_path, {**data, "max_left_out_share": 0.3})
    (rows,) = load_left_out_rows(root.at(prepared.left_out.key)).values()
    assert len(rows) == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.exclude=/nowhere/keys.txt", "data.exclude: /nowhere/keys.txt: cannot read"),
        ("labeling.ensemble=[/nowhere]", "labeling.ensemble.0: /nowhere/model.json: cannot read"),
        (
            "evaluation.sets={real: {uri: digits:heldout, multi_label: /nowhere}}",
            "evaluation.sets.real.multi_label: /nowhere",
        ),
    ],
)
def test_prepare_data_checks_what_later_stages_read(digits_store, override, message):
    ref = open_tiny_run(digits_store, override)
    with pytest.raises(StoreError, match=message):
        prepare_data(ref)


def test_limit_of_rejects_counts_for_data_that_a_laxer_run_imported(tmp_path, uris):
    for number in range(3):
        (tmp_path / "pool" / f"{number}.jpg").write_bytes(b"no image")
    (before, _), _ = prepare(tmp_path, uris, data={**uris, "max_rejected_share": 0.3})
    with pytest.raises(
        DataError, match=r"data\.pool: .*pool: 3 of 12 files were left out, more than data\.max_rejected_share = 10\.0%"
    ):
        prepare(tmp_path, uris)
    (after, _), _ = prepare(tmp_path, uris, data={**uris, "max_rejected_share": 0.25})
    assert after == before


def test_prepare_data_warns_of_trainings_of_few_steps(digits_store, capsys):
    """The quickstart has 50 labeled images."""
    ref = open_tiny_run(digits_store, "teacher.train.labeled_batch=2048", "teacher.train.epochs=3")
    prepare_data(ref)
    logged = "".join(capsys.readouterr())
    (line,) = [line for line in logged.splitlines() if "a training has few steps for its batch" in line and "teacher" in line]
    assert '"field": "teacher", "steps": 1, "epochs": 3.0, "labeled_batch": 2048, "labeled_images": 50' in line


@pytest.mark.parametrize(("share", "is_few"), [(0.1, True), (0.5, False)])
def test_prepare_data_warns_of_few_calibration_images(digits_store, capsys, share, is_few):
    """The quickstart has 500 held-out images."""
    prepare_data(open_tiny_run(digits_store, "labeling.temperature=fitted", f"data.calibration_share={share}"))
    lines = [line for line in "".join(capsys.readouterr()).splitlines() if "few calibration images" in line]
    assert len(lines) == is_few
    assert all('"images": 50, "cure": "100 and more' in line for line in lines)


def test_prepare_data_names_classes_without_calibration_images(tmp_path, uris, capsys):
    fill(tmp_path / "calibration", ["cat"], seed=3)
    data, roles = {**uris, "calibration": str(tmp_path / "calibration")}, {"teacher": NETWORK, "students": [NETWORK]}
    document = {"name": "x", "generations": 1, "data": data, "labeling": {"temperature": "fitted"}, **roles}
    root = LocalStore(tmp_path / "root")
    write_prepared_data(parse_experiment(document, "x.yaml"), root, Ledger(root))
    assert re.search(r"classes_without\W+dog\b.*few calibration images", "".join(capsys.readouterr()))


@pytest.mark.parametrize("part", ["heldout", "test"])
def test_prepare_data_names_classes_that_nothing_measures(tmp_path, uris, capsys, part):
    fill(tmp_path / "some", ["cat"], seed=3)
    document = {"name": "x", "generations": 1, "teacher": NETWORK, "students": [NETWORK]}
    root = LocalStore(tmp_path / "root")
    for data, is_told in ((uris, False), ({**uris, part: str(tmp_path / "some")}, True)):
        write_prepared_data(parse_experiment({**document, "data": data}, "x.yaml"), root, Ledger(root))
        told = "".join(capsys.readouterr())
        assert ("classes without any image" in told) == is_told
        assert (re.search(rf"classes_without\W+dog\b.*data\.{part}: add images", told) is not None) == is_told


def test_data_exclude_names_images_of_the_pool(digits_store, tmp_path, capsys):
    excluded = tmp_path / "withdrawn.txt"
    excluded.write_text("photos/1.jpg\nphotos/2.jpg\n")
    ref = open_tiny_run(digits_store, f"data.exclude={excluded}")
    reason = r"data\.exclude: .*withdrawn\.txt: none of its 2 lines names an image of the pool; the first: photos/1\.jpg"
    with pytest.raises(DataError, match=reason):
        prepare_data(ref)
    pool = LocalStore(tmp_path / "pool")
    key = ShardIndex.load(pool, write_digits("digits:pool", pool).shards[0]).keys[0]
    excluded.write_text(f"photos/1.jpg\n{key}.png\n")
    prepare_data(ref)
    logged = capsys.readouterr()
    assert "lines of data.exclude name no image of the pool" in logged.out + logged.err
