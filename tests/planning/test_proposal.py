import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ns.cli.app import run_command_line
from ns.config.loader import load_experiment
from ns.config.schema import OptimizerConfig
from ns.core.errors import ConfigError, DataError
from ns.data.importing.tables import list_table
from ns.planning import proposal
from ns.planning.cost import PlanRequest, estimate_checkpoint_bytes, estimate_run
from ns.planning.data_stats import KnownCounts
from ns.planning.proposal import (
    count_classes,
    find_parts,
    fit_epochs,
    format_image_table,
    make_document,
    measure_short_side,
    propose_experiment,
    remark_folder_groups,
    split_hours,
    split_labeled,
)


def write_images(folder, count, side=32, name="image"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)).save(folder / f"{name}-{number}.jpg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes with 24 and 8 labeled images, and 20 in the pool."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    write_images(folder / "Train" / "cat", 24)
    write_images(folder / "Train" / "dog", 8)
    write_images(folder / "unlabeled", 20)
    return folder


def test_find_parts_by_their_names(photos):
    assert find_parts(photos, {}) == {"labeled": photos / "Train", "pool": photos / "unlabeled"}


def test_find_parts_takes_given_ones_and_class_folders_alone(photos):
    pool = photos / "unlabeled"
    assert find_parts(photos / "Train", {"pool": pool}) == {"labeled": photos / "Train", "pool": pool}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            (),
            r"has no folder labeled or label.ed or train or training; make one \(one subfolder for each class\), or name it: --labeled",
        ),
        (("train",), "has no folder pool or unlabeled"),
        (("train", "labeled", "pool"), "labeled and train may both be the labeled images; say which: --labeled"),
    ],
)
def test_find_parts_says_what_is_missing(tmp_path, folders, message):
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=message):
        find_parts(tmp_path, {})
    with pytest.raises(DataError, match="name a folder that holds your images"):
        find_parts(tmp_path / "nowhere", {})


@pytest.mark.parametrize(
    ("folders", "given", "message"),
    [
        (("cat", "pool"), {"pool": "pool"}, "pool: lies in ., the folder of the labeled images"),
        (("train/cat", "train/pool"), {"pool": "train/pool"}, "train/pool: lies in train, the folder of the labeled images"),
        (("all",), {"labeled": "all", "pool": "all"}, "all: lies in all, the folder of the "),
    ],
)
def test_find_parts_refuses_one_in_another(tmp_path, monkeypatch, folders, given, message):
    """The pool would be a class of its own."""
    monkeypatch.chdir(tmp_path)
    for name in folders:
        Path(name).mkdir(parents=True)
    with pytest.raises(DataError) as error:
        find_parts(Path(), {part: Path(name) for part, name in given.items()})
    assert str(error.value).startswith(message)


def test_find_parts_names_a_table_that_may_be_the_labeled_images(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "labels.csv").touch()
    with pytest.raises(DataError, match=rf"or name it: --labeled {tmp_path}/labels\.csv$"):
        find_parts(tmp_path, {})


def test_split_holds_out_a_quarter_of_each_class(photos):
    parts = split_labeled(photos / "Train")
    assert parts == split_labeled(photos / "Train")
    counts = {part: [class_name for _, class_name in rows] for part, rows in parts.items()}
    assert (counts["heldout"].count("cat"), counts["heldout"].count("dog")) == (6, 2)
    assert (counts["labeled"].count("cat"), counts["labeled"].count("dog")) == (18, 6)
    assert not set(parts["heldout"]) & set(parts["labeled"])


def test_split_leaves_a_class_of_one_image_to_be_learned(tmp_path):
    write_images(tmp_path / "rare", 1)
    write_images(tmp_path / "common", 9)
    parts = split_labeled(tmp_path)
    assert [row for row in parts["labeled"] if row[1] == "rare"] == [("rare/image-0.jpg", "rare")]
    assert "rare" not in [class_name for _, class_name in parts["heldout"]]


@pytest.mark.parametrize(("side", "resolution"), [(32, 32), (60, 64), (300, 224)])
def test_networks_fit_the_size_of_images(side, resolution):
    short_side = measure_short_side([np.zeros((side, 2 * side, 3), np.uint8)])
    networks = next(networks for limit, networks in proposal.NETWORKS.items() if short_side <= limit)
    assert networks[0].resolution == resolution


def test_epochs_fit_the_time():
    """10¹² multiply-adds per second: the estimate of what is proposed takes four fifths of the hours."""
    network = proposal.NETWORKS[48][1]
    request = PlanRequest(
        KnownCounts({"labeled": 5000, "pool": 50_000, "heldout": 1000}, classes=10), multiply_adds_per_second=1e12
    )
    uris = {"labeled": "./a", "pool": "./b", "heldout": "./c"}

    def parse(epochs):
        return proposal.parse_experiment(make_document("timed", uris, network, 5000, epochs), "test")

    trial = estimate_run(parse(proposal.TRIAL_EPOCHS), request)
    epochs = fit_epochs(trial, hours=0.1)
    epoch_hours, other_hours = split_hours(trial)
    hours = estimate_run(parse(epochs), request).hours
    assert hours == pytest.approx(0.8 * 0.1, rel=0.05)
    assert hours == pytest.approx(other_hours + epochs * epoch_hours, rel=0.01)
    assert 0 < other_hours < hours


def test_init_writes_an_experiment_of_the_users_images(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proposal, "MEASURE_SECONDS", 0.05)
    monkeypatch.setattr(proposal, "NETWORKS", {1 << 16: proposal.NETWORKS[48][1:]})
    monkeypatch.chdir(tmp_path)
    assert run_command_line(["init", str(photos), "--hours", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "written: photos-heldout.csv" in lines
    assert (
        "note: 8 held-out images show large changes only; `ns config check EXPERIMENT --heldout 8 --classes 2` says how large"
        in lines
    )
    assert "note: dog has 8 labeled images: label more, if you can; below 10 a class is hardly learned" in lines
    assert lines[-1] == "next: ns run photos.yaml"
    text = (tmp_path / "photos.yaml").read_text()
    assert "# 24 labeled images of 2 classes (cat: 24 … dog: 8), 20 in the pool, 8 held out" in text
    experiment = load_experiment("photos.yaml")
    assert (experiment.teacher.model.resolution, experiment.data.heldout) == (32, "photos-heldout.csv")
    assert Path(experiment.data.pool).resolve() == photos / "unlabeled"
    rows = list(csv.DictReader((tmp_path / "photos-heldout.csv").open()))
    assert len(rows) == 8
    assert all((tmp_path / row["path"]).is_file() for row in rows)


def test_init_writes_tables_for_imports_and_spreadsheets_of_any_names(tmp_path, monkeypatch, capsys):
    class_name = "=1+1"
    monkeypatch.setattr(proposal, "MEASURE_SECONDS", 0.05)
    monkeypatch.setattr(proposal, "NETWORKS", {1 << 16: proposal.NETWORKS[48][1:]})
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "in" / "train" / class_name, 8)
    write_images(tmp_path / "in" / "train" / "dog", 8)
    write_images(tmp_path / "in" / "pool", 8)
    image = tmp_path / "in" / "train" / "dog" / "image-0.jpg"
    for name in (b"b\xffd.jpg", b"two\nlines.jpg"):
        shutil.copyfile(os.fsencode(image), os.fsencode(image.parent) + b"/" + name)
    assert run_command_line(["init", "in", "--hours", "2"]) == 0
    assert "note: 2 labeled images are left out: a table cannot hold their names" in capsys.readouterr().out
    entries = [entry for part in ("labeled", "heldout") for entry in list_table(f"in-{part}.csv", "labeled", None)]
    assert {entry.class_label for entry in entries} == {class_name, "dog"}
    assert all((tmp_path / entry.path).is_file() for entry in entries)
    assert "," + class_name not in (tmp_path / "in-labeled.csv").read_text()


def test_time_that_is_too_short_is_refused(photos, monkeypatch):
    monkeypatch.setattr(proposal, "NETWORKS", {1 << 16: proposal.NETWORKS[48][1:]})
    with pytest.raises(
        ConfigError, match=r"--hours 1e-06: too short for 24 labeled images .* and an epoch .*; give more hours"
    ):
        propose_experiment(find_parts(photos, {}), name="photos", hours=1e-6, output_dir=photos.parent, measure_seconds=0.05)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train/cat": 8, "train/dog": 0}, "{}/train: class folder 'dog' has no images; add some, or remove the folder"),
        ({"train/cat": 8}, "in/train: has 1 class, and at least 2 are needed"),
        ({"train": 8}, "{}/train: image-0.jpg lies outside any class folder; labeled images belong in one subfolder per class"),
        ({"train/cat": 8, "train/dog": 8, "pool": 0}, "in/pool: has no images"),
        (
            {"train/cat": 1, "train/dog": 1, "train/emu": 1},
            "in/train: 3 labeled images are too few: label at least 8 to train on, and in some class two or more, "
            "so that one can be held out",
        ),
        (
            {"train/cat": 8, "train/dog": 8, "val/emu": 1},
            "in/val: class 'emu' is none of the labeled classes (cat, dog); rename or remove it",
        ),
    ],
)
def test_init_says_what_is_wrong_with_the_images(tmp_path, monkeypatch, capsys, counts, message):
    monkeypatch.chdir(tmp_path)
    for name, count in {"pool": 8, **counts}.items():
        write_images(tmp_path / "in" / name, count)
    assert run_command_line(["init", "in"]) == 3
    assert capsys.readouterr().err.splitlines()[-1] == "error: " + message.format(tmp_path / "in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_folders_in_class_folders_are_asked_about(tmp_path):
    for name in ("animals/cat", "animals/dog", "plants", "plants/2025", "planes/images"):
        write_images(tmp_path / name, 1)
    counts, groups = count_classes({"labeled": tmp_path})
    assert (counts, groups) == ({"animals": 2, "plants": 2, "planes": 1}, {"animals": ["cat", "dog"]})
    assert list(remark_folder_groups(Path("train"), groups)) == [
        "all images below train/animals are of class animals; if its folders (cat, dog) are the classes, move them into train"
    ]


def test_images_that_cannot_be_read_are_told_by_their_folder(tmp_path):
    for name in ("train/cat", "train/dog", "pool"):
        write_images(tmp_path / name, 4)
    for path in (tmp_path / "pool").iterdir():
        path.write_bytes(b"no image")
    parts = {"labeled": tmp_path / "train", "pool": tmp_path / "pool"}
    with pytest.raises(DataError, match=rf"^{tmp_path}/pool: none of the images that were tried can be read; `ns data import "):
        propose_experiment(parts, name="x", hours=1, output_dir=tmp_path, measure_seconds=0.05)


def test_a_table_of_labels_is_split(tmp_path, monkeypatch):
    """Paths of a table are relative to its folder, absolute, or addresses, and stay so in the tables that are written elsewhere."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "in" / "photos", 8)
    rows = [f"photos/image-{number}.jpg,{'cat' if number % 2 else 'dog'}" for number in range(7)]
    table = tmp_path / "in" / "labels.csv"
    table.write_text("\n".join(["path,label", *rows, f"{tmp_path}/in/photos/image-7.jpg,cat", "s3://nobody/a.jpg,dog"]))
    parts = split_labeled(Path("in/labels.csv"))
    assert [class_name for _, class_name in parts["heldout"]] == ["cat", "dog"]
    (tmp_path / "out").mkdir()
    written = tmp_path / "out" / "all.csv"
    written.write_text(format_image_table([*parts["labeled"], *parts["heldout"]], Path("in/labels.csv"), tmp_path / "out"))
    paths = {entry.path for entry in list_table(str(written), "labeled", None)}
    assert "s3://nobody/a.jpg" in paths
    assert {(written.parent / path).resolve() for path in paths - {"s3://nobody/a.jpg"}} == set(
        (tmp_path / "in/photos").iterdir()
    )


def test_init_writes_nothing_over_a_file(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("photos.yaml", "photos-heldout.csv"):
        (tmp_path / name).write_text("mine")
        assert run_command_line(["init", str(photos)]) == 2
        cure = "is there already; choose another name with --output, or replace it with --force"
        assert capsys.readouterr().err == f"error: {name}: {cure}\n"
        (tmp_path / name).unlink()


def test_checkpoints_of_timms_optimizers_are_estimated():
    assert estimate_checkpoint_bytes(10, 12, OptimizerConfig(name="lamb")) == 4 * (24 + 20)
