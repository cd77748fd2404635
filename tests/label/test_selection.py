"""The selection against a brute-force reading of the paper on made-up tables."""

import tracemalloc
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ns.config import SelectionConfig
from ns.label import selection as selection_module
from ns.label.calibration import NEVER, Calibration, ClassCalibration
from ns.label.labelset import Rows, Scores, row_schema
from ns.label.selection import Selection, copies, key_hashes, select

CLASSES = 4


def rows_of(entries: list[tuple[str, int, float | None]]) -> Rows:
    """(key, class, confidence) → rows; None is an unreadable image."""
    table = pa.table(
        [
            [key for key, _, _ in entries],
            pa.array([confidence for _, _, confidence in entries], pa.float32()),
            pa.array(
                [None if confidence is None else [label, (label + 1) % CLASSES] for _, label, confidence in entries],
                pa.list_(pa.uint16(), 2),
            ),
            pa.array(
                [None if confidence is None else [np.float16(confidence), np.float16(0)] for _, _, confidence in entries],
                pa.list_(pa.float16(), 2),
            ),
            pa.array([None if confidence is not None else "truncated" for _, _, confidence in entries], pa.string()),
        ],
        schema=row_schema(2),
    )
    return Rows(table)


def run(shards: list[Rows], policy: SelectionConfig, seed: int = 0) -> Selection:
    def read() -> Iterator[Scores]:
        return (rows.scores(policy.classes_per_image) for rows in shards)

    unreadable = sum(int((~rows.readable).sum()) for rows in shards)
    return select(read, CLASSES, policy, seed=seed, label_set="0" * 64, labels="labels", unreadable=unreadable)


def brute_force(entries: list[tuple[str, int, float | None]], policy: SelectionConfig, seed: int) -> dict[str, int]:
    """Copies by key, by sorting everything."""
    wanted: dict[str, int] = {}
    for label in range(CLASSES):
        ranked = sorted(
            (
                (-np.float32(confidence), int(key_hashes([key], seed)[0]), key)
                for key, own, confidence in entries
                if own == label and confidence is not None and np.float32(confidence) > np.float32(policy.min_confidence)
            ),
        )
        if policy.policy == "all":
            wanted |= {key: 1 for _, _, key in ranked}
            continue
        ranked = ranked[: policy.per_class]
        for rank, (_, _, key) in enumerate(ranked):
            times = 1
            if policy.repeat:
                base, extra = divmod(policy.per_class, len(ranked))
                times = min(policy.max_repeat, base + (rank < extra))
            wanted[key] = times
    return wanted


# Few distinct confidences, so that ties are common; the threshold itself is among them.
CONFIDENCE = st.sampled_from([None, 0.1, 0.3, 0.30000001, 0.5, 0.5, 0.75, 0.9, 1.0])
TABLE = st.lists(st.tuples(st.integers(0, CLASSES - 1), CONFIDENCE), max_size=60)
POLICY = st.builds(
    SelectionConfig,
    policy=st.sampled_from(["paper", "all"]),
    min_confidence=st.sampled_from([0.0, 0.3, 0.6]),
    per_class=st.integers(1, 40),
    repeat=st.booleans(),
    max_repeat=st.integers(1, 12),
)


@pytest.mark.parametrize("sorted_rows", [0, 1 << 20], ids=["narrowed to the end", "sorted at once"])
@settings(max_examples=150, deadline=None)
@given(table=TABLE, policy=POLICY, seed=st.integers(0, 5), split=st.integers(0, 60))
def test_selection_equals_brute_force(sorted_rows, table, policy, seed, split):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_module, "SORTED_ROWS", sorted_rows)
        patch.setattr(selection_module, "COUNTERS", 64 if sorted_rows == 0 else 1 << 12)
        _compare(table, policy, seed, split)


def _compare(table, policy, seed, split):
    entries = [(f"key-{index}", label, confidence) for index, (label, confidence) in enumerate(table)]
    shards = [rows_of(entries[:split]), rows_of(entries[split:])]
    selection = run(shards, policy, seed)
    got = {key: int(times) for rows in shards for key, times in zip(rows.keys, copies(selection, rows), strict=True) if times}
    wanted = brute_force(entries, policy, seed)
    assert got == wanted
    assert selection.kept == len(wanted)
    assert selection.images == sum(wanted.values())
    assert selection.unreadable == sum(confidence is None for _, _, confidence in entries)
    assert selection.kept + selection.balanced_out + selection.low_confidence + selection.unreadable == len(entries)


def test_repeats_make_every_class_exactly_as_large_as_asked():
    entries = [(f"a{i}", 0, 0.9 - i / 100) for i in range(7)] + [(f"b{i}", 1, 0.8) for i in range(30)]
    rows = rows_of(entries)
    selection = run([rows], SelectionConfig(per_class=20))
    times = copies(selection, rows)
    per_class = Counter()
    for (_, label, _), count in zip(entries, times, strict=True):
        per_class[label] += int(count)
    assert per_class == {0: 20, 1: 20}
    # 20 = 7 × 2 + 6: the six most confident are seen three times
    assert times[:7].tolist() == [3, 3, 3, 3, 3, 3, 2]


def test_the_threshold_is_exclusive_as_in_the_paper():
    rows = rows_of([("at", 0, 0.3), ("above", 0, 0.31)])
    selection = run([rows], SelectionConfig(min_confidence=0.3, per_class=1))
    assert copies(selection, rows).tolist() == [0, 1]
    assert selection.low_confidence == 1


def test_ties_are_broken_by_the_seed_not_by_the_order_of_shards():
    entries = [(f"key-{i}", 0, 0.5) for i in range(50)]
    policy = SelectionConfig(per_class=10)

    def kept(order: list[tuple[str, int, float | None]], seed: int) -> set[str]:
        rows = rows_of(order)
        times = copies(run([rows], policy, seed), rows)
        return {key for key, count in zip(rows.keys, times, strict=True) if count}

    assert kept(entries, 1) == kept(entries[::-1], 1)
    assert kept(entries, 1) != kept(entries, 2)


def test_a_class_without_candidates_is_empty_and_no_error():
    selection = run([rows_of([("a", 0, 0.9)])], SelectionConfig(per_class=2))
    assert [rule.kept for rule in selection.rules] == [1, 0, 0, 0]


def test_digest_follows_the_content_and_not_the_place():
    rows = rows_of([("a", 0, 0.9), ("b", 1, 0.4)])
    selection = run([rows], SelectionConfig())
    elsewhere = selection.model_copy(update={"labels": "another/place"})
    other = run([rows], SelectionConfig(min_confidence=0.5))
    assert selection.digest == elsewhere.digest != other.digest


def test_rules_survive_json(tmp_path):
    from ns.store import LocalStore

    rows = rows_of([(f"k{i}", i % CLASSES, np.float32(0.3 + i / 97)) for i in range(60)])
    selection = run([rows], SelectionConfig(per_class=7))
    selection.write(LocalStore(tmp_path), "selection.json")
    again = Selection.read(LocalStore(tmp_path), "selection.json")
    assert copies(again, rows).tolist() == copies(selection, rows).tolist()


@pytest.mark.parametrize("per_class", [1, 3, 1000])
def test_max_repeat_bounds_what_one_image_can_stand_for(per_class):
    rows = rows_of([("only", 2, 0.9)])
    selection = run([rows], SelectionConfig(per_class=per_class, max_repeat=5))
    assert copies(selection, rows).tolist() == [min(per_class, 5)]


def test_an_image_is_picked_for_several_of_its_best_classes():
    rng = np.random.default_rng(3)
    probabilities = np.sort(rng.dirichlet(np.ones(CLASSES), 40).astype(np.float16), axis=1)[:, ::-1]
    classes = np.argsort(rng.random((40, CLASSES)), axis=1)[:, :2]
    table = pa.table(
        [
            [f"key-{row}" for row in range(40)],
            pa.array(probabilities[:, 0].astype(np.float32)),
            pa.array(classes.tolist(), pa.list_(pa.uint16(), 2)),
            pa.array(list(probabilities[:, :2]), pa.list_(pa.float16(), 2)),
            pa.array([None] * 40, pa.string()),
        ],
        schema=row_schema(2),
    )
    rows = Rows(table)
    policy = SelectionConfig(classes_per_image=2, min_confidence=0.2, per_class=6)
    selection = run([rows], policy)
    wanted: Counter[str] = Counter()
    for label in range(CLASSES):
        ranked = sorted(
            (-float(probabilities[row, rank]), int(key_hashes([f"key-{row}"], 0)[0]), f"key-{row}")
            for row in range(40)
            for rank in (0, 1)
            if classes[row, rank] == label and np.float32(probabilities[row, rank]) > np.float32(0.2)
        )[:6]
        base, extra = divmod(6, len(ranked))
        for place, (_, _, key) in enumerate(ranked):
            wanted[key] += base + (place < extra)
    got = {key: int(times) for key, times in zip(rows.keys, copies(selection, rows), strict=True) if times}
    assert got == dict(wanted)
    assert max(rule.kept for rule in selection.rules) <= 6


def test_thresholds_of_a_wanted_precision_are_each_classes_own():
    calibrated = [ClassCalibration(threshold=t, heldout=1, correct=1, bound=0.9, pooled=False) for t in (0.8, 0.1, NEVER, 0.5)]
    calibration = Calibration(precision=0.9, confidence=0.95, evaluation="0" * 64, classes=tuple(calibrated))
    rows = rows_of([(f"{label}-{conf}", label, conf) for label in range(4) for conf in (0.2, 0.4, 0.6, 0.9)])
    policy = SelectionConfig(policy="all", min_confidence=0.3, precision=0.9)
    selection = select(
        lambda: [rows.scores(1)], CLASSES, policy, seed=0, label_set="0" * 64, labels="", calibration=calibration
    )
    got = [key for key, times in zip(rows.keys, copies(selection, rows), strict=True) if times]
    assert got == ["0-0.9", "1-0.4", "1-0.6", "1-0.9", "3-0.6", "3-0.9"]
    assert [round(rule.threshold, 3) for rule in selection.rules] == [0.8, 0.3, 2, 0.5]
    assert selection.low_confidence == 10
    assert Selection.model_validate_json(selection.model_dump_json()) == selection


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    """Twenty times the rows: what the ranking holds stays the same."""

    def peak(rows: int) -> int:
        def read() -> Iterator[Scores]:
            for shard in range(rows // 20_000):
                rng = np.random.default_rng(shard)
                confidence = (1 - rng.random((20_000, 1)) ** 3 * 0.9).astype(np.float32)
                classes = rng.integers(0, 10, (20_000, 1)).astype(np.uint16)
                yield Scores(np.ones(20_000, np.bool_), classes, confidence, lambda at: [str(row) for row in at.tolist()])

        tracemalloc.start()
        select(read, 10, SelectionConfig(per_class=1000), seed=0, label_set="0" * 64, labels="")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    monkeypatch.setattr(selection_module, "SORTED_ROWS", 20_000)
    assert peak(1_000_000) < 1.1 * peak(60_000)
