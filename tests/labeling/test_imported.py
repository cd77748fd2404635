"""Labels from elsewhere."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ns.config.schema import ImportConfig, SelectionConfig
from ns.core.errors import DataError
from ns.data.importing.ingest import import_images
from ns.data.importing.label_studio import build_interface, build_task
from ns.data.index import ShardIndex
from ns.labeling.imported import import_labels
from ns.labeling.label_set import iter_label_rows, verify_label_set
from ns.labeling.selection import make_selection
from ns.runs.lookup import open_label_set
from ns.storage import LocalStore


@pytest.fixture(scope="module")
def pool(finished_run):
    """URI, store, dataset, keys and classes of a pool."""
    store, ref = finished_run
    labels = open_label_set(store, f"{ref.run}/gen-1")
    pool_store, dataset = labels.open_pool(store)
    keys = [key for shard in dataset.shards for key in ShardIndex.load(pool_store, shard).keys]
    return pool_store.uri, pool_store, dataset, keys, labels.label_set.classes


def import_text(pool, tmp_path, text: str, name: str = "labels.csv", **options):
    (tmp_path / name).write_text(text)
    return import_labels(str(tmp_path / name), pool[0], str(tmp_path / "out"), pool[4], **options)


def read_answers(tmp_path, label_set) -> dict[str, tuple[int, float]]:
    """Key → best class and confidence of the images with a label."""
    return {
        key: (int(top[0]), float(confidence))
        for rows in iter_label_rows(LocalStore(tmp_path / "out"), label_set)
        for key, top, confidence in zip(rows.keys, rows.top_class, rows.confidence, strict=True)
        if not np.isnan(confidence)
    }


def test_a_table_of_classes_becomes_a_label_set(pool, tmp_path):
    _, store, dataset, keys, classes = pool
    lines = [f"{key}.png,{classes[row % len(classes)]},{0.5 + row % 5 / 10}" for row, key in enumerate(keys[:40])]
    made = import_text(pool, tmp_path, "\n".join(["path,class,confidence", *lines, "elsewhere/0001.png,1,0.9"]))
    assert (made.labeled, made.unmatched) == (40, ["elsewhere/0001.png"])
    answers = read_answers(tmp_path, made.label_set)
    assert list(answers) == keys[:40]
    assert [answer for answer, _ in answers.values()] == [row % len(classes) for row in range(40)]
    np.testing.assert_allclose([confidence for _, confidence in answers.values()], [0.5 + row % 5 / 10 for row in range(40)])
    assert verify_label_set(LocalStore(tmp_path / "out"), made.label_set, (store, dataset)) == len(keys)
    selection = make_selection(
        LocalStore(tmp_path / "out"),
        made.label_set,
        SelectionConfig(min_confidence=0.65, policy="all"),
        seed=0,
        label_set_key="",
    )
    assert selection.kept == 24


def test_a_table_of_probabilities_keeps_them(pool, tmp_path):
    _, store, dataset, keys, classes = pool
    probabilities = np.random.default_rng(0).dirichlet(np.full(len(classes), 0.3), len(keys)).astype(np.float32)
    columns = {"key": keys} | {name: probabilities[:, number] for number, name in reversed(list(enumerate(classes)))}
    pq.write_table(pa.table(columns), tmp_path / "clip.parquet")
    made = import_labels(str(tmp_path / "clip.parquet"), pool[0], str(tmp_path / "out"), classes, source="CLIP")
    assert made.labeled == len(keys)
    assert verify_label_set(LocalStore(tmp_path / "out"), made.label_set, (store, dataset)) == len(keys)
    answers = read_answers(tmp_path, made.label_set)
    assert [answer for answer, _ in answers.values()] == probabilities.argmax(1).tolist()


def test_the_source_is_part_of_the_digest(pool, tmp_path):
    text = f"key,label\n{pool[3][0]},{pool[4][0]}\n"
    (tmp_path / "again").mkdir()
    one, other = (
        import_text(pool, folder, text, source=source).label_set.digest
        for folder, source in ((tmp_path, "a"), (tmp_path / "again", "b"))
    )
    assert one != other


def test_label_studio_prefers_people_to_models(pool, tmp_path):
    _, _, _, keys, classes = pool
    tasks = [build_task(key, f"/data/local-files/?d=images/{key}.png", classes[1], 0.8, "teacher") for key in keys[:4]]
    chosen = {"value": {"choices": [classes[3]]}, "type": "choices"}
    tasks[0]["annotations"] = [{"result": [chosen]}]
    tasks[1]["annotations"] = [{"result": [chosen], "was_cancelled": True}]
    tasks[2] |= {"predictions": [], "annotations": []}
    del tasks[3]["data"]["key"]
    tasks[3]["data"]["image"] = f"https://example.org/{keys[3]}.png"
    made = import_text(pool, tmp_path, json.dumps(tasks), "export.json")
    assert read_answers(tmp_path, made.label_set) == {
        keys[0]: (3, 1.0),
        keys[1]: (1, pytest.approx(0.8)),
        keys[3]: (1, pytest.approx(0.8)),
    }


def test_the_newest_annotation_counts_and_json_min_is_read(pool, tmp_path):
    _, _, _, keys, classes = pool
    answers = [
        {"updated_at": f"2026-01-0{day}T00:00:00Z", "result": [{"value": {"choices": [classes[day]]}}]} for day in (2, 3, 1)
    ]
    tasks = [
        {"data": {"key": keys[0]}, "annotations": answers},
        {"image": f"/data/upload/1/0a1b2c3d-{keys[1]}.png", "choice": classes[2]},
        {"image": f"/data/upload/1/0a1b2c3d-{keys[2]}.png", "class": {"choices": [classes[4]]}},
    ]
    made = import_text(pool, tmp_path, json.dumps(tasks), "export.json")
    assert {key: answer for key, (answer, _) in read_answers(tmp_path, made.label_set).items()} == {
        keys[0]: 3,
        keys[1]: 2,
        keys[2]: 4,
    }


@pytest.mark.parametrize("form", ["json", "csv", "tsv"])
def test_exports_of_label_studio_are_read_as_1_23_writes_them(pool, tmp_path, form):
    """Two people annotated the first image, and nobody the third; predictions are numbers in its JSON."""
    _, _, _, keys, classes = pool
    chosen = [(keys[0], 1, "09:00", classes[3]), (keys[0], 1, "08:00", classes[2]), (keys[1], 2, "08:00", classes[4])]
    if form == "json":
        annotations = {number: [] for number in (1, 2, 3)}
        for _, number, time, name in chosen:
            value = {"type": "choices", "value": {"choices": [name]}, "from_name": "class", "to_name": "image"}
            made_at = f"2026-11-30T{time}:26.238160Z"
            annotations[number].append({"id": 1, "was_cancelled": False, "result": [value], "updated_at": made_at})
        tasks = [
            {"id": number, "annotations": annotations[number], "predictions": [number], "data": {"image": "", "key": key}}
            for number, key in enumerate(keys[:3], 1)
        ]
        text = json.dumps(tasks)
    else:
        columns = ["annotation_id", "annotator", "class", "created_at", "id", "image", "key", "lead_time", "updated_at"]
        rows = [["7", "1", name, "", number, "", key, "", f"2026-11-30T{time}"] for key, number, time, name in chosen]
        rows.append(["", "", "", "", 3, "", keys[2], "", ""])
        sink = io.StringIO()
        csv.writer(sink, delimiter="\t" if form == "tsv" else ",", quoting=csv.QUOTE_NONNUMERIC).writerows([columns, *rows])
        text = sink.getvalue()
    made = import_text(pool, tmp_path, text, f"export.{form}")
    assert read_answers(tmp_path, made.label_set) == {keys[0]: (3, 1.0), keys[1]: (4, 1.0)}
    assert made.unmatched == []


def test_a_row_that_names_an_image_again_is_no_stranger(pool, tmp_path):
    key, name = pool[3][0], pool[4][0]
    made = import_text(pool, tmp_path, f"key,label\n{key},{name}\n{key},{name}\nnone,{name}\n")
    assert (made.labeled, made.unmatched) == (1, ["none"])


def test_numbers_with_leading_zeros_are_indices(pool, tmp_path):
    keys = pool[3]
    made = import_text(pool, tmp_path, f"key,class\n{keys[0]},003\n", "labels.csv")
    assert read_answers(tmp_path, made.label_set) == {keys[0]: (3, 1.0)}


def test_an_image_that_is_named_twice_with_one_label_counts_once(pool, tmp_path):
    keys = pool[3]
    made = import_text(pool, tmp_path, f"key,class\n{keys[0]},1\n{keys[0]}.png,1\nnowhere,1\n", "labels.csv")
    assert (made.labeled, made.unmatched) == (1, ["nowhere"])


@pytest.mark.parametrize("names", [("IMG_1.jpg", "IMG_1.png"), ("a.b.png", "a_b.png")])
def test_files_whose_names_would_give_one_key_have_labels_of_their_own(tmp_path, names):
    """As of a phone's photograph and its copy in another format."""
    images = tmp_path / "images"
    images.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(images / name)
    import_images(str(images), LocalStore(tmp_path / "pool"), name="pool", role="unlabeled", config=ImportConfig(), workers=1)
    (tmp_path / "labels.csv").write_text(f"path,class,confidence\n{names[0]},a,0.9\n{names[1]},b,0.8\n")
    made = import_labels(str(tmp_path / "labels.csv"), str(tmp_path / "pool"), str(tmp_path / "out"), ("a", "b"))
    assert (made.labeled, made.unmatched) == (2, [])
    answers = read_answers(tmp_path, made.label_set)
    assert [round(confidence, 2) for _, confidence in sorted(answers.values())] == [0.9, 0.8]


@pytest.mark.parametrize("address", ["http://[bad/0.png", "http://exa\u2100mple/0.png", "//[::1/0.png"])
def test_what_is_no_address_names_no_image(pool, tmp_path, address):
    _, _, _, keys, classes = pool
    answer = [{"result": [{"value": {"choices": [classes[1]]}}]}]
    with pytest.raises(
        DataError, match=r"task 1: data: has neither 'key' nor the address of an image; its fields are \(image\)"
    ):
        import_text(pool, tmp_path, json.dumps([{"data": {"image": address}, "annotations": answer}]), "export.json")
    made = import_text(
        pool, tmp_path, json.dumps([{"data": {"image": address, "key": keys[0]}, "annotations": answer}]), "export.json"
    )
    assert made.labeled == 1


def test_half_a_character_is_told(pool, tmp_path):
    with pytest.raises(DataError, match=r"export\.json: not JSON: .*surrogates not allowed; export the project as JSON again"):
        import_text(pool, tmp_path, '[{"data": {"key": "\\ud800"}}]', "export.json")


def test_the_interface_offers_the_classes():
    assert '<Choice value="a &amp; b"/>' in build_interface(("a & b", "c"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "key,class\n{0},zebra\n",
            r"row 1: class 'zebra': is none of the labeled classes \(0, 1.*rename it, or remove its rows",
        ),
        ("key,class,score\n{0},1,high\n", r"row 1: score: 'high': must be a number from 0 to 1"),
        ("key,class,score\n{0},1,1.5\n", r"row 1: score: '1.5': must be a number from 0 to 1"),
        ("key,class,score\n{0},1,0.05\n", r"row 1: confidence 0.05: below 1 / 10 classes.*give the best class"),
        ("key,class\n{0},1\n{0}.png,2\n", r"row 1 and row 2: .*: '1' \(1\) and '2' \(1\); keep one of them"),
        ("key,class,score\n{0},1,0.9\n{0},1,0.6\n", r"row 1 and row 2: .*: '1' \(0.9\) and '1' \(0.6\); keep one of them"),
        (
            "key,0,1,2,3,4,5,6,7,8,9\n{0},.6,.4,0,0,0,0,0,0,0,0\n{0},.6,0,.4,0,0,0,0,0,0,0\n",
            r"row 1 and row 2: .*: '0' \(0.6\) and '0' \(0.6\); keep one of them",
        ),
        ("key,class,Class\n{0},1,2\n", r"has two columns Class; remove one, or rename it"),
        ("key,class\n{0},²\n", r"row 1: class '²': is none of the labeled classes"),
        ("key,class\n{0},\u0661\n", r"row 1: class '\u0661': is none of the labeled classes"),
        ("key,class\n{0}," + 5000 * "9" + "\n", r"row 1: class '9+': is none of the labeled classes"),
        ("key,class\nnowhere,1\n", r"none of its 1 names is an image of .*; the first: 'nowhere'; give keys, or paths"),
        ("key,class\n", r"has no rows"),
        ("name,class\n{0},1\n", r"has no column for the key or path of each image"),
        ("key,truth\n{0},1\n", r"has no column for its class"),
        ("key,class\n,1\n", r"row 1: key: is empty"),
        ("key,0,1,2,3,4,5,6,7,8,9\n{0},1,1,0,0,0,0,0,0,0,0\n", r"row 1: its probabilities sum to 2; .*not logits"),
    ],
)
def test_bad_tables_are_told_by_row_and_value(pool, tmp_path, text, problem):
    with pytest.raises(DataError, match=rf"labels\.csv: {problem}"):
        import_text(pool, tmp_path, text.format(*pool[3]))


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        ({"tasks": []}, r"export\.json: must be a list of tasks"),
        ([{"id": 7, "data": {"text": "x"}}], r"task 7: data: has neither 'key' nor the address of an image"),
        (
            [{"data": {"key": "a"}, "annotations": [{"result": [{"value": {"choices": ["1", "2"]}}]}]}],
            r"task 1: has the classes \(1, 2\); .*choose one",
        ),
        (
            [{"data": {"key": "a"}, "predictions": [{"score": 3, "result": [{"value": {"choices": ["1"]}}]}]}],
            r"task 1: score: 3: must be a number",
        ),
        (
            [{"data": {"key": "a"}, "annotations": {}}, {"data": {"key": "a"}, "annotations": "x"}],
            r"task 2: annotations: must be",
        ),
    ],
)
def test_bad_exports_are_told_by_task(pool, tmp_path, tasks, problem):
    with pytest.raises(DataError, match=problem):
        import_text(pool, tmp_path, json.dumps(tasks), "export.json")


def test_an_import_is_taken_up_and_never_mixed_with_another(pool, tmp_path):
    text = f"key,label\n{pool[3][0]},{pool[4][0]}\n"
    first = import_text(pool, tmp_path, text)
    (tmp_path / "out" / "labelset.json").unlink()
    assert import_text(pool, tmp_path, text) == first
    with pytest.raises(DataError, match=r"holds labels of another teacher: .*; name another folder"):
        import_text(pool, tmp_path, text.replace(pool[3][0], pool[3][1]))
