import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ns.cli.app import run_command_line
from ns.config.schema import SelectionConfig
from ns.core.errors import DataError
from ns.labeling.diff import DiffSide, LabelDiff, compare_label_sets
from ns.labeling.selection import hash_keys, make_selection
from ns.reporting.label_set_pages import render_diff_markdown

CLASSES = ("cat", "dog", "ox|<b>*")
SURE = st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]), st.floats(0, 1, width=32))
POLICY = SelectionConfig(per_class=3, min_confidence=0.3)


@st.composite
def pairs(draw):
    """Shards of (key, (old class, confidence), (new class, confidence))."""
    label = st.tuples(st.integers(0, 2), SURE)
    shards = draw(st.lists(st.lists(st.tuples(label, label), min_size=1, max_size=12), min_size=1, max_size=3))
    return [[(f"{s}/k{r}", *row) for r, row in enumerate(rows)] for s, rows in enumerate(shards)]


def sides(make_label_set, folder, shards, policy=None):
    made = []
    for side in (0, 1):
        store, labels = make_label_set(
            folder / str(side), [[(row[0], *row[1 + side]) for row in rows] for rows in shards], CLASSES
        )
        selection = None
        if policy:
            selection = make_selection(store, labels, policy, seed=1, label_set_key=".")
        made.append(DiffSide(store, labels, selection))
    return made


def kept(rows, side):
    """Keys by class that the policy keeps: a plain reading of what a selection is."""
    found = {}
    for label in range(3):
        own = [(-np.float32(row[1 + side][1]), int(hash_keys([row[0]], 1)[0]), row[0]) for row in rows if row[1 + side][0] == label
               and row[1 + side][1] is not None and np.float32(row[1 + side][1]) > np.float32(0.3)]  # fmt: skip
        found[label] = {key for _, _, key in sorted(own)[:3]}
    return found


@settings(max_examples=30, deadline=None)
@given(pairs())
def test_compare_label_sets_equals_counting_by_hand(make_label_set, shards):
    with tempfile.TemporaryDirectory() as folder:
        found = compare_label_sets(*sides(make_label_set, Path(folder), shards, POLICY), flips=4)
    rows = [row for shard in shards for row in shard]
    both = [row for row in rows if row[1][1] is not None and row[2][1] is not None]
    flipped = [row for row in both if row[1][0] != row[2][0]]
    assert (found.images, found.compared, found.changed) == (len(rows), len(both), len(flipped))
    assert found.only_before == sum(row[1][1] is not None and row[2][1] is None for row in rows)
    assert found.only_after == sum(row[1][1] is None and row[2][1] is not None for row in rows)
    assert found.churn == pytest.approx(len(flipped) / max(1, len(both)))
    assert found.confidence_shift == pytest.approx(fmean([row[2][1] - row[1][1] for row in both] or [0]), abs=1e-6)
    matrix = Counter((row[1][0], row[2][0]) for row in flipped)
    assert {(cell.old_class_id, cell.new_class_id): cell.images for cell in found.matrix} == matrix
    assert sum(found.histogram_before) == sum(row[1][1] is not None for row in rows)
    for number, change in enumerate(found.by_class):
        for side, images, mean in ((1, change.before, change.confidence_before), (2, change.after, change.confidence_after)):
            own = [row[side][1] for row in rows if row[side][1] is not None and row[side][0] == number]
            assert images == len(own)
            assert mean == (pytest.approx(fmean(own), abs=1e-6) if own else None)
        assert change.lost == sum(row[1][0] == number for row in flipped)
        assert change.gained == sum(row[2][0] == number for row in flipped)
        moved = [row[2][1] - row[1][1] for row in both if row[1][0] == number]
        assert change.shift == (pytest.approx(fmean(moved), abs=1e-6) if moved else None)
    for number, band in enumerate(found.churn_bins):
        own = [row for row in both if min(9, sum(np.float32(row[1][1]) >= np.float32(e / 10) for e in range(1, 10))) == number]
        assert (band.images, band.changed) == (len(own), sum(row[1][0] != row[2][0] for row in own))
    before, after = kept(rows, 0), kept(rows, 1)
    was, now = set().union(*before.values()), set().union(*after.values())
    assert (found.stayed, found.entered, found.left) == (len(was & now), len(now - was), len(was - now))
    losses = [1 - len(after[label]) / len(before[label]) for label in range(3) if before[label]]
    assert found.shrinkage == pytest.approx(max(losses, default=0))
    surest = sorted(flipped, key=lambda row: -min(np.float32(row[1][1]), np.float32(row[2][1])))[:4]
    assert [flip.key for flip in found.flips] == [row[0] for row in surest]
    assert LabelDiff.parse(found.model_dump_json().encode(), "x") == found


TWO = [[("a", (0, 0.9), (1, 0.8)), ("b", (0, 0.4), (0, 0.6))], [("c", (1, 0.5), (2, None)), ("d", (2, 1.0), (0, 0.99))]]


def test_compare_label_sets_without_selections(make_label_set, tmp_path):
    found = compare_label_sets(*sides(make_label_set, tmp_path, TWO))
    assert (found.stayed, found.entered, found.left, found.by_class[0].kept_before) == (None, None, None, None)
    assert (found.shrinkage, found.shrunk_class) == (1.0, CLASSES[2])
    assert [flip.key for flip in found.flips] == ["d", "a"]
    assert compare_label_sets(*sides(make_label_set, tmp_path, TWO), flips=0).flips == ()


def test_compare_equal_label_sets(make_label_set, tmp_path):
    one = sides(make_label_set, tmp_path, TWO, POLICY)[0]
    found = compare_label_sets(one, one)
    assert (found.churn, found.confidence_shift, found.entered, found.left, found.shrinkage, found.matrix) == (
        0,
        0,
        0,
        0,
        0,
        (),
    )


def test_compare_label_sets_refuses_other_images_or_classes(make_label_set, tmp_path):
    old, new = sides(make_label_set, tmp_path, TWO)
    other = DiffSide(*make_label_set(tmp_path / "2", [[("z", 0, 0.5)]], CLASSES))
    with pytest.raises(DataError, match="only labels of the same images can be compared"):
        compare_label_sets(old, other)
    with pytest.raises(DataError, match=r"different classes, first 'dog' and 'cow'"):
        compare_label_sets(old, new._replace(label_set=new.label_set.model_copy(update={"classes": ("cat", "cow", "ox")})))
    two = old.label_set.model_copy(update={"classes": ("cat", "dog")})
    with pytest.raises(DataError, match="have different classes, first None and 'ox'"):
        compare_label_sets(
            old._replace(label_set=two),
            new._replace(label_set=two.model_copy(update={"classes": ("cat", "dog", "ox")})),
        )


def test_diff_markdown_escapes_class_names(make_label_set, tmp_path):
    text = render_diff_markdown(compare_label_sets(*sides(make_label_set, tmp_path, TWO, POLICY)), ("a_b", "c"))
    assert r"ox\|\<b\>\*" in text
    assert r"a\_b → c" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}) == 1


def test_diff_command_prints_table_json_markdown_and_page(make_label_set, make_pool, tmp_path, capsys):
    folder, images = make_pool(tmp_path / "pool", [["a", "b"], ["c", "d"]])
    for side in (0, 1):
        rows = [[(row[0], *row[1 + side]) for row in shard] for shard in TWO]
        make_label_set(tmp_path / str(side), rows, CLASSES, images)
    names = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert run_command_line(["labels", "diff", *names]) == 0
    assert "2 of 3 labels changed (66.7%)" in capsys.readouterr().out
    assert run_command_line(["labels", "diff", *names, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["churn"] == pytest.approx(2 / 3)
    assert run_command_line(["labels", "diff", *names, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("### Label sets: ")
    page = tmp_path / "diff.html"
    assert run_command_line(["labels", "diff", *names, "--html", str(page)]) == 6
    assert "name its folder with --pool" in capsys.readouterr().err
    assert run_command_line(["labels", "diff", *names, "--html", str(page), "--pool", str(folder.root)]) == 0
    text = page.read_text()
    assert text.count("data:image/png") == 2
    assert "<b>*" not in text
    assert run_command_line(["labels", "diff", *names, "--json", "--markdown"]) == 2
