"""The selection against a brute-force reading of the paper on made-up tables."""

import hashlib
import io
import resource
import tracemalloc
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ns.config.schema import SelectionConfig
from ns.core.digest import sha256_bytes
from ns.core.errors import StoreError
from ns.labeling import selection as selection_module
from ns.labeling.label_set import LabelRows, LabelSet, LabelShard, ShardScores, build_row_schema, iter_label_rows
from ns.labeling.selection import (
    HIGHEST_BITS,
    HIGHEST_HASH,
    ClassRule,
    Selection,
    count_copies,
    hash_keys,
    make_selection,
    select_pseudo_labels,
)
from ns.labeling.thresholds import NEVER_SURE, ClassThreshold, Thresholds
from ns.storage import LocalStore

CLASSES = 4


def rows_of(entries: list[tuple[str, int, float | None]]) -> LabelRows:
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
        schema=build_row_schema(2),
    )
    return LabelRows(table)


def run(shards: list[LabelRows], policy: SelectionConfig, seed: int = 0) -> Selection:
    def read() -> Iterator[ShardScores]:
        return (rows.build_scores(policy.classes_per_image) for rows in shards)

    unreadable = sum(int((~rows.readable).sum()) for rows in shards)
    return select_pseudo_labels(
        read, CLASSES, policy, seed=seed, label_set="0" * 64, label_set_key="labels", unreadable=unreadable
    )


def brute_force(entries: list[tuple[str, int, float | None]], policy: SelectionConfig, seed: int) -> dict[str, int]:
    """Copies by key, by sorting everything."""
    wanted: dict[str, int] = {}
    for label in range(CLASSES):
        ranked = sorted(
            (
                (-np.float32(confidence), int(hash_keys([key], seed)[0]), key)
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


def confidence_at(depth: int) -> float:
    """So many float32 below the greatest confidence."""
    return float(np.array(HIGHEST_BITS - depth, np.uint32).view(np.float32))


# Few distinct confidences, so that ties are common; among them are the threshold, the greatest, and two that share a bin to the last.
BELOW, FIRST = confidence_at((5 << 20) + 1), confidence_at(5 << 20)
CONFIDENCE = st.sampled_from([None, 0.1, 0.3, 0.5, 0.5, BELOW, BELOW, BELOW, FIRST, 1.0, confidence_at(0)])
ROW = st.tuples(st.integers(0, CLASSES - 1), CONFIDENCE)
# The length comes first: left to itself, a list has about five rows, too few for repeats and ties within a class.
TABLE = st.integers(0, 60).flatmap(lambda rows: st.lists(ROW, min_size=rows, max_size=rows))
POLICY = st.builds(
    SelectionConfig,
    policy=st.sampled_from(["paper", "all"]),
    min_confidence=st.sampled_from([0.0, 0.3, 0.6]),
    per_class=st.integers(1, 40),
    repeat=st.booleans(),
    max_repeat=st.integers(1, 12),
)


@pytest.mark.parametrize("sorted_rows", [0, 1 << 20], ids=["narrowed to the end", "sorted at once"])
@settings(max_examples=100, deadline=None)
@given(table=TABLE, policy=POLICY, seed=st.integers(0, 5), split=st.integers(0, 60))
def test_selection_equals_brute_force(sorted_rows, table, policy, seed, split):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_module, "MAX_SORTED_ROWS", sorted_rows)
        patch.setattr(selection_module, "MAX_COUNTERS", 64 if sorted_rows == 0 else 1 << 12)
        _compare(table, policy, seed, split)


def _compare(table, policy, seed, split):
    entries = [(f"key-{index}", label, confidence) for index, (label, confidence) in enumerate(table)]
    shards = [rows_of(entries[:split]), rows_of(entries[split:])]
    selection = run(shards, policy, seed)
    got = {
        key: int(times) for rows in shards for key, times in zip(rows.keys, count_copies(selection, rows), strict=True) if times
    }
    wanted = brute_force(entries, policy, seed)
    assert got == wanted
    assert selection.kept == len(wanted)
    assert selection.images == sum(wanted.values())
    assert selection.unreadable == sum(confidence is None for _, _, confidence in entries)
    assert selection.kept + selection.balanced_out + selection.low_confidence + selection.unreadable == len(entries)
    assert [rule.low_confidence for rule in selection.rules] == [
        sum(
            own == label and conf is not None and np.float32(conf) <= np.float32(policy.min_confidence)
            for _, own, conf in entries
        )
        for label in range(CLASSES)
    ]


def test_hash_keys_is_stable():
    """Selections keep them: others would cut through equal confidences elsewhere."""
    hashes = hash_keys(["n01440764/1.jpg", "ß"], seed=258)
    assert hashes.dtype == np.uint64
    assert [f"{one:016x}" for one in hashes.tolist()] == [
        hashlib.blake2b(key, digest_size=8, key=bytes([2, 1, 0, 0, 0, 0, 0, 0])).hexdigest()
        for key in (b"n01440764/1.jpg", b"\xc3\x9f")
    ]


def test_selection_repeats_fill_every_class():
    entries = [(f"a{i}", 0, 0.9 - i / 100) for i in range(7)] + [(f"b{i}", 1, 0.8) for i in range(30)]
    rows = rows_of(entries)
    selection = run([rows], SelectionConfig(per_class=20))
    times = count_copies(selection, rows)
    assert times.dtype == np.int64
    per_class = Counter()
    for (_, label, _), count in zip(entries, times, strict=True):
        per_class[label] += int(count)
    assert per_class == {0: 20, 1: 20}
    # 20 = 7 × 2 + 6: the six most confident are seen three times
    assert times[:7].tolist() == [3, 3, 3, 3, 3, 3, 2]


def test_selection_threshold_is_exclusive():
    rows = rows_of([("at", 0, 0.3), ("above", 0, 0.31)])
    selection = run([rows], SelectionConfig(min_confidence=0.3, per_class=1))
    assert count_copies(selection, rows).tolist() == [0, 1]
    assert selection.low_confidence == 1


def test_selection_breaks_ties_by_seed_not_order():
    entries = [(f"key-{i}", 0, 0.5) for i in range(50)]
    policy = SelectionConfig(per_class=10)

    def kept(order: list[tuple[str, int, float | None]], seed: int) -> set[str]:
        rows = rows_of(order)
        times = count_copies(run([rows], policy, seed), rows)
        return {key for key, count in zip(rows.keys, times, strict=True) if count}

    assert kept(entries, 1) == kept(entries[::-1], 1)
    assert kept(entries, 1) != kept(entries, 2)


def test_selection_of_class_without_candidates():
    selection = run([rows_of([("a", 0, 0.9)])], SelectionConfig(per_class=2))
    assert [rule.kept for rule in selection.rules] == [1, 0, 0, 0]
    threshold = selection.rules[0].threshold
    nothing = ClassRule(
        candidates=0, low_confidence=0, threshold=threshold, kept=0, images=0, last_kept=None, copies=0, last_extra=None
    )
    assert selection.rules[1:] == (nothing,) * 3


@pytest.mark.parametrize(("per_class", "read"), [(3, 0), (4, 1), (5, 0)])
def test_selection_reads_keys_only_for_ties(per_class, read):
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.6, 0.5], np.float32)
    asked = []

    def keys(rows: np.ndarray) -> list[str]:
        asked.append(rows.tolist())
        return [f"key-{row}" for row in rows.tolist()]

    scores = ShardScores(np.ones(6, np.bool_), np.zeros((6, 1), np.uint16), confidence[:, None], keys)
    policy = SelectionConfig(per_class=per_class)
    selection = select_pseudo_labels(lambda: [scores], 1, policy, seed=0, label_set="0" * 64, label_set_key="", unreadable=0)
    assert asked == [[3, 4]] * read
    assert (selection.rules[0].last_kept.hash == HIGHEST_HASH) == (read == 0)


@pytest.mark.parametrize(("min_confidence", "passes"), [(0.3, 2), (0.9999, 1)])
def test_selection_takes_one_or_two_passes(min_confidence, passes, monkeypatch):
    rows, times = 20_000, 0
    confidence = np.linspace(min_confidence, 1, rows // 20, dtype=np.float32)

    def read() -> Iterator[ShardScores]:
        nonlocal times
        times += 1
        for label in range(20):
            classes = np.full((len(confidence), 1), label, np.uint16)
            yield ShardScores(
                np.ones(len(confidence), np.bool_), classes, confidence[:, None], lambda at: [str(row) for row in at]
            )

    monkeypatch.setattr(selection_module, "MAX_SORTED_ROWS", 200)
    policy = SelectionConfig(min_confidence=min_confidence, per_class=100)
    selection = select_pseudo_labels(read, 20, policy, seed=0, label_set="0" * 64, label_set_key="", unreadable=0)
    assert [rule.kept for rule in selection.rules] == [100] * 20
    assert times == passes


def test_selection_digest_ignores_label_set_key():
    rows = rows_of([("a", 0, 0.9), ("b", 1, 0.4)])
    selection = run([rows], SelectionConfig())
    elsewhere = selection.model_copy(update={"label_set_key": "another/key"})
    other = run([rows], SelectionConfig(min_confidence=0.5))
    assert selection.digest == elsewhere.digest != other.digest


def test_selection_round_trips_as_json(tmp_path):
    from ns.storage import LocalStore

    rows = rows_of([(f"k{i}", i % CLASSES, np.float32(0.3 + i / 97)) for i in range(60)])
    selection = run([rows], SelectionConfig(per_class=7))
    selection.save_file(LocalStore(tmp_path), "selection.json")
    again = Selection.load_file(LocalStore(tmp_path), "selection.json")
    assert count_copies(again, rows).tolist() == count_copies(selection, rows).tolist()


@pytest.mark.parametrize("per_class", [1, 3, 1000])
def test_selection_max_repeat_limits_copies(per_class):
    rows = rows_of([("only", 2, 0.9)])
    selection = run([rows], SelectionConfig(per_class=per_class, max_repeat=5))
    assert count_copies(selection, rows).tolist() == [min(per_class, 5)]


def ranked(images: int, seed: int) -> pa.Table:
    """Rows with two classes each, many of them equally likely, many quite so; some images could not be read."""
    rng = np.random.default_rng(seed)
    probabilities = np.sort(rng.dirichlet(np.full(CLASSES, 0.2), images) * 4, axis=1)[:, :-3:-1].round().astype(np.float16) / 4
    classes = np.argsort(rng.random((images, CLASSES)), axis=1)[:, :2].astype(np.uint16)
    lost = rng.random(images) < 0.1
    return pa.table(
        [
            [f"key-{seed}-{row}" for row in range(images)],
            pa.array(probabilities[:, 0].astype(np.float32), mask=lost),
            pa.array([None if lost[row] else classes[row] for row in range(images)], pa.list_(pa.uint16(), 2)),
            pa.array([None if lost[row] else probabilities[row] for row in range(images)], pa.list_(pa.float16(), 2)),
            pa.array(["truncated" if one else None for one in lost.tolist()], pa.string()),
        ],
        schema=build_row_schema(2),
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("per_class", [6, 90])
def test_selection_picks_image_for_several_classes(ranks, per_class):
    rows = LabelRows(ranked(200, seed=3))
    policy = SelectionConfig(classes_per_image=ranks, min_confidence=0.2, per_class=per_class)
    selection = run([rows], policy)
    wanted: Counter[str] = Counter()
    for label in range(CLASSES):
        best = sorted(
            (-float(rows.top_prob[row, rank]), int(hash_keys([key], 0)[0]), key)
            for row, key in enumerate(rows.keys)
            for rank in range(ranks)
            if rows.readable[row] and rows.top_class[row, rank] == label and rows.top_prob[row, rank] > np.float32(0.2)
        )[:per_class]
        base, extra = divmod(per_class, len(best))
        for place, (_, _, key) in enumerate(best):
            wanted[key] += base + (place < extra)
    got = {key: int(times) for key, times in zip(rows.keys, count_copies(selection, rows), strict=True) if times}
    assert got == dict(wanted)
    assert selection.images == per_class * CLASSES


@pytest.fixture
def label_set(tmp_path):
    """The store and the label set of two shards of rows with two classes each."""
    store, shards = LocalStore(tmp_path / "labels"), []
    for number, images in enumerate((40, 25)):
        sink = io.BytesIO()
        pq.write_table(ranked(images, seed=number), sink)
        data, name = sink.getvalue(), f"shard-{number:05d}.parquet"
        store.put(name, data)
        facts = {"source": str(number), "rows": images, "unreadable": 3, "left_out": 1}
        shards.append(LabelShard(name=name, **facts, bytes=len(data), sha256=sha256_bytes(data)))
    classes = tuple("abcd")
    return store, LabelSet(dataset="0", teacher="0", code="0", classes=classes, top_k=2, shards=tuple(shards))


@pytest.mark.parametrize("ranks", [1, 2])
def test_make_selection_reads_label_set_once(label_set, ranks, tmp_path, monkeypatch):
    store, labels = label_set
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    read = []
    all_scores = selection_module.iter_shard_scores
    monkeypatch.setattr(selection_module, "iter_shard_scores", lambda *arguments: read.append(1) or all_scores(*arguments))
    policy = SelectionConfig(classes_per_image=ranks, min_confidence=0.2, per_class=3)
    options = {"seed": 3, "label_set_key": "labels/x", "thresholds": make_thresholds(0.1, 0.1, 0.25, 0.1)}
    selection = make_selection(store, labels, policy, **options)
    shards = [LabelRows(pq.read_table(store.path(shard.name))) for shard in labels.shards]
    expected = select_pseudo_labels(
        lambda: [rows.build_scores(ranks) for rows in shards],
        CLASSES,
        policy,
        **options,
        label_set=labels.digest,
        unreadable=6,
        left_out=2,
    )
    assert selection == expected
    assert (selection.unreadable, selection.left_out) == (6, 2)
    assert read == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["labels"]


def test_make_selection_names_full_disk(label_set, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StoreError, match=r"scores: cannot keep scores: .*; free some space there, or set TMPDIR"):
            make_selection(*label_set, SelectionConfig(), seed=0, label_set_key="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def make_thresholds(*thresholds: float) -> Thresholds:
    classes = tuple(ClassThreshold(threshold=one, calibration=1, correct=1, bound=0.9, pooled=False) for one in thresholds)
    return Thresholds(precision=0.9, confidence=0.95, evaluation="0" * 64, classes=classes)


def test_selection_uses_threshold_of_each_class():
    thresholds = make_thresholds(0.8, 0.1, NEVER_SURE, 0.5)
    rows = rows_of([(f"{label}-{conf}", label, conf) for label in range(4) for conf in (0.2, 0.4, 0.6, 0.9)])
    policy = SelectionConfig(policy="all", min_confidence=0.3, precision=0.9, fallback_share=0)
    selection = select_pseudo_labels(
        lambda: [rows.build_scores(1)], CLASSES, policy, seed=0, label_set="0" * 64, label_set_key="", thresholds=thresholds
    )
    got = [key for key, times in zip(rows.keys, count_copies(selection, rows), strict=True) if times]
    assert got == ["0-0.9", "1-0.4", "1-0.6", "1-0.9", "3-0.6", "3-0.9"]
    assert [round(rule.threshold, 3) for rule in selection.rules] == [0.8, 0.3, 2, 0.5]
    assert selection.low_confidence == 10
    assert (selection.unreadable, selection.left_out) == (0, 0)
    assert selection.thresholds == thresholds
    assert Selection.model_validate_json(selection.model_dump_json()) == selection


@pytest.mark.parametrize(("share", "kept"), [(0.1, 1), (0.25, 2), (1.0, 8)])
@pytest.mark.parametrize("kind", ["all", "paper"])
def test_class_without_evidence_keeps_a_share_of_its_most_confident_images(share, kept, kind):
    rows = rows_of([(f"{label}-{rank}", label, 0.95 - 0.05 * rank) for label in (0, 2) for rank in range(8)])
    policy = SelectionConfig(policy=kind, min_confidence=0.3, precision=0.9, fallback_share=share, per_class=8)
    thresholds = make_thresholds(0.76, 0.1, NEVER_SURE, 0.5)
    selection = select_pseudo_labels(
        lambda: [rows.build_scores(1)], CLASSES, policy, seed=0, label_set="0" * 64, label_set_key="", thresholds=thresholds
    )
    copies = dict(zip(rows.keys, count_copies(selection, rows).tolist(), strict=True))
    assert [key for key, times in copies.items() if times and key.startswith("2")] == [f"2-{rank}" for rank in range(kept)]
    assert [rule.fallback for rule in selection.rules] == [False, False, True, False]
    assert [rule.kept for rule in selection.rules][:3] == [4, 0, kept]
    assert (selection.low_confidence, selection.unproven, selection.balanced_out) == (4, 8 - kept, 0)
    assert selection.describe_classes(("a", "b", "c", "d")) == [
        "2 of 4 classes have no pseudo-labels: b, d",
        f"1 of 4 classes have no evidence of the precision, and keep {share:.0%} of their candidates: c",
    ]


@settings(max_examples=60, deadline=None)
@given(table=TABLE, scale=st.sampled_from([0.5, 1.0, 1.5]))
def test_adaptive_thresholds_follow_the_mean_confidence_of_each_class(table, scale):
    entries = [(f"key-{index}", label, confidence) for index, (label, confidence) in enumerate(table)]
    policy = SelectionConfig(policy="adaptive", min_confidence=0.2, adaptive_scale=scale, per_class=1000, repeat=False)
    rows = rows_of(entries)
    selection = run([rows_of(entries[:20]), rows_of(entries[20:])], policy)
    expected = {}
    for label in range(CLASSES):
        sure = [(key, np.float32(conf)) for key, own, conf in entries if own == label and conf is not None]
        above = [conf for _, conf in sure if conf > np.float32(0.2)]
        threshold = max(np.float32(0.2), np.float32(scale) * np.float32(np.mean(above, dtype=np.float64))) if above else 0.2
        assert selection.rules[label].threshold == pytest.approx(threshold, rel=1e-6)
        expected |= {key: conf for key, conf in sure if conf > np.float32(selection.rules[label].threshold)}
    got = {key for key, times in zip(rows.keys, count_copies(selection, rows), strict=True) if times}
    assert got == set(expected)


@settings(max_examples=60, deadline=None)
@given(table=TABLE, policy=POLICY)
def test_mean_confidence_is_that_of_an_epoch(table, policy):
    rows = rows_of([(f"key-{index}", label, confidence) for index, (label, confidence) in enumerate(table)])
    selection = run([rows], policy.model_copy(update={"weights": "confidence"}))
    copies = count_copies(selection, rows)
    seen = copies > 0
    weights = rows.confidence[seen] / (selection.mean_confidence or 1)
    assert run([rows], policy).mean_confidence is None
    assert not seen.any() or (weights @ copies[seen]) / copies.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("sizes", "per_class", "copies"),
    [
        ((60, 30, 20, 10), 30, (1, 1, 1.5, 3)),
        ((40, 40, 40, 40), 40, (1, 1, 1, 1)),
        ((0, 0, 30, 90), 60, (0, 0, 2, 1)),
        ((1, 0, 0, 0), 1, (1, 0, 0, 0)),
    ],
)
def test_auto_balances_to_the_mean_of_the_classes(sizes, per_class, copies):
    rows = rows_of([(f"{label}-{rank}", label, 0.9) for label, size in enumerate(sizes) for rank in range(size)])
    selection = run([rows], SelectionConfig())
    assert selection.per_class == per_class
    assert [rule.images for rule in selection.rules] == [per_class if size else 0 for size in sizes]
    assert [rule.images / max(1, rule.kept) for rule in selection.rules] == list(copies)
    assert min(rule.copies for rule in selection.rules if rule.kept) == 1, "the whole pool is not repeated"
    assert run([rows], SelectionConfig(per_class=500, max_repeat=3)).per_class == 500


def test_auto_keeps_the_papers_limit(monkeypatch):
    monkeypatch.setattr(selection_module, "PAPER_PER_CLASS", 7)
    rows = rows_of([(f"{label}-{rank}", label, 0.9) for label in range(4) for rank in range(20)])
    assert [rule.images for rule in run([rows], SelectionConfig()).rules] == [7] * 4


def test_selection_names_classes_with_a_share_far_from_the_labeled_images():
    rows = rows_of([(f"{label}-{rank}", label, 0.9) for label, size in enumerate((1, 9, 60, 30)) for rank in range(size)])
    labeled = {"labeled_images": (20, 0, 4, 76)}
    selection = run([rows], SelectionConfig()).model_copy(update=labeled)
    assert selection.distorted_classes == {0: (0.01, 0.2), 2: (0.6, 0.04)}
    assert selection.represented_share == 0.75
    assert selection.describe_classes(tuple("abcd")) == [
        "1 of 4 classes have less than 1/5 of their share of the labeled images: a",
        "1 of 4 classes have more than 5 times their share of the labeled images: c",
    ]
    assert run([rows], SelectionConfig()).describe_classes(tuple("abcd")) == []


@pytest.mark.parametrize("classes", [5, 10, 20, 100])
def test_represented_share_reaches_a_limit_that_is_as_large(classes):
    """A share that is a little less than its spelling would refuse a student at the limit."""
    selection = run([rows_of([("image", 0, 0.9)])], SelectionConfig())
    kept, empty = selection.rules[:2]
    selection = selection.model_copy(update={"rules": (kept,) * (classes // 5) + (empty,) * (classes - classes // 5)})
    assert selection.represented_share == 0.2


@pytest.mark.parametrize("equal", [False, True], ids=["different confidences", "equal confidences"])
def test_selection_memory_does_not_grow_with_rows(equal, monkeypatch):
    """Twenty times the rows: what the ranking holds stays the same."""
    size, classes = (1000, 2) if equal else (20_000, 10)

    def peak(shards: int) -> int:
        def read() -> Iterator[ShardScores]:
            for shard in range(shards):
                rng = np.random.default_rng(shard)
                confidence = np.full((size, 1), 0.5) if equal else 1 - rng.random((size, 1)) ** 3 * 0.9
                labels = rng.integers(0, classes, (size, 1)).astype(np.uint16)
                shown = confidence.astype(np.float32)
                yield ShardScores(np.ones(size, np.bool_), labels, shown, lambda at: [str(row) for row in at.tolist()])

        tracemalloc.start()
        policy = SelectionConfig(per_class=100 if equal else 1000)
        select_pseudo_labels(read, classes, policy, seed=0, label_set="0" * 64, label_set_key="", unreadable=0)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    monkeypatch.setattr(selection_module, "MAX_SORTED_ROWS", size)
    monkeypatch.setattr(selection_module, "MAX_COUNTERS", 1 << 10 if equal else 1 << 22)
    assert peak(60) < 1.1 * peak(10 if equal else 3)


def make_scored_label_set(folder, entries, scores):
    """A label set of one shard of (key, class, confidence), None for an unreadable image, and foreign scores."""
    store = LocalStore(folder)
    rows = [
        (key, label, sure, None if sure is None else score) for (key, label, sure), score in zip(entries, scores, strict=True)
    ]
    table = pa.table(
        [
            [key for key, *_ in rows],
            pa.array([sure for _, _, sure, _ in rows], pa.float32()),
            pa.array([None if sure is None else [label] for _, label, sure, _ in rows], pa.list_(pa.uint16(), 1)),
            pa.array([None if sure is None else [np.float16(sure)] for _, _, sure, _ in rows], pa.list_(pa.float16(), 1)),
            pa.array(["truncated" if sure is None else None for _, _, sure, _ in rows], pa.string()),
            pa.array([score for *_, score in rows], pa.float32()),
        ],
        schema=build_row_schema(1, foreign_score=True),
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    store.put("shard-00000.parquet", sink.getvalue())
    unreadable = sum(sure is None for _, _, sure, _ in rows)
    shard = LabelShard(
        name="shard-00000.parquet",
        source="0",
        rows=len(rows),
        unreadable=unreadable,
        bytes=len(sink.getvalue()),
        sha256=sha256_bytes(sink.getvalue()),
    )
    classes = tuple("abcd"[:CLASSES])
    return store, LabelSet(
        dataset="0", teacher="0", code="0", classes=classes, top_k=1, shards=(shard,), foreign_score="distance"
    )


@pytest.mark.parametrize("policy", [SelectionConfig(per_class=20), SelectionConfig(policy="all"), SelectionConfig()])
def test_foreign_images_are_selected_as_if_they_were_not_there(tmp_path, policy):
    rng = np.random.default_rng(0)
    # Many equal confidences, so that cuts go through ties.
    entries = [
        (f"key-{row}", int(rng.integers(CLASSES)), None if row % 17 == 0 else float(np.float32(rng.integers(2, 20) / 20)))
        for row in range(400)
    ]
    scores = rng.exponential(size=400)
    store, label_set = make_scored_label_set(tmp_path, entries, scores)
    limit = float(np.float32(scores[5]))
    selection = make_selection(store, label_set, policy, seed=0, label_set_key="x", foreign_limit=limit)
    # An image at the limit is not above it.
    familiar = [entry for entry, score in zip(entries, scores, strict=True) if np.float32(score) <= limit]
    expected = run([rows_of(familiar)], policy)
    unchanged = {"foreign"}
    assert [rule.model_dump(exclude=unchanged) for rule in selection.rules] == [
        rule.model_dump(exclude=unchanged) for rule in expected.rules
    ]
    foreign = [
        entry for entry, score in zip(entries, scores, strict=True) if np.float32(score) > limit and entry[2] is not None
    ]
    assert [rule.foreign for rule in selection.rules] == [
        sum(label == class_id for _, label, _ in foreign) for class_id in range(CLASSES)
    ]
    assert selection.foreign == len(foreign) > 0
    (rows,) = iter_label_rows(store, label_set)
    copies = dict(zip(rows.keys, count_copies(selection, rows).tolist(), strict=True))
    assert not any(copies[key] for key, _, _ in foreign)
    assert sum(copies.values()) == selection.images
    total = selection.kept + selection.balanced_out + selection.low_confidence + selection.foreign + selection.unreadable
    assert total == len(entries)


def test_no_limit_leaves_no_image_out_as_foreign(tmp_path):
    entries = [(f"key-{row}", row % CLASSES, 0.9) for row in range(20)]
    store, label_set = make_scored_label_set(tmp_path, entries, np.arange(20))
    selection = make_selection(store, label_set, SelectionConfig(), seed=0, label_set_key="x")
    assert (selection.kept, selection.foreign) == (20, 0)


@pytest.mark.parametrize("policy", ["adaptive", "aligned"])
def test_foreign_images_do_not_change_what_a_policy_adapts_to(tmp_path, policy):
    rng = np.random.default_rng(1)
    entries = [(f"key-{row}", int(rng.integers(CLASSES)), float(np.float32(rng.uniform(0.3, 1)))) for row in range(300)]
    scores = rng.exponential(size=300)
    store, label_set = make_scored_label_set(tmp_path / "all", entries, scores)
    is_familiar = scores.astype(np.float32) <= np.float32(1)
    familiar = [entry for entry, keep in zip(entries, is_familiar, strict=True) if keep]
    familiar_store, familiar_set = make_scored_label_set(tmp_path / "familiar", familiar, scores[is_familiar])
    config = SelectionConfig(policy=policy, per_class=30)
    filtered = make_selection(store, label_set, config, seed=0, label_set_key="x", foreign_limit=1.0)
    expected = make_selection(familiar_store, familiar_set, config, seed=0, label_set_key="x")
    assert (filtered.alignment, filtered.foreign) == (expected.alignment, 300 - len(familiar))
    assert [rule.model_dump(exclude={"foreign"}) for rule in filtered.rules] == [
        rule.model_dump(exclude={"foreign"}) for rule in expected.rules
    ]
    (rows,) = iter_label_rows(store, label_set)
    assert sum(count_copies(filtered, rows)) == filtered.images
