import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ns.core.errors import DataError
from ns.data.loading import sampler
from ns.data.loading.sampler import MAX_WINDOW_SHARDS, MIN_WINDOW_SHARDS, ShardShuffle, cut_windows

COPIES = st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 3, 7]), max_size=6), min_size=1, max_size=150).filter(
    lambda shards: any(any(shard) for shard in shards)
)


def make_shuffle(shards, seed: int = 0) -> ShardShuffle:
    return ShardShuffle([np.array(shard, np.int64) for shard in shards], (seed, 0))


def draw_copies(shards: int, rows: int, values, *, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(values, rows).astype(np.uint8) for _ in range(shards)]


def cut_passes(shuffle: ShardShuffle, epoch: int) -> list[list[tuple[int, int]]]:
    starts = shuffle._epoch(epoch).starts.tolist()
    order = shuffle.positions(epoch * shuffle.epoch_size, shuffle.epoch_size)
    return [order[start:stop] for start, stop in itertools.pairwise(starts)]


# How often and when an image is seen


@given(COPIES, st.integers(0, 3))
def test_epoch_holds_each_image_as_often_as_its_copies(shards, epoch):
    shuffle = make_shuffle(shards)
    locations = shuffle.positions(epoch * shuffle.epoch_size, shuffle.epoch_size)
    expected = {(s, r): count for s, shard in enumerate(shards) for r, count in enumerate(shard) if count}
    assert Counter(locations) == expected


@given(COPIES, st.integers(0, 3))
def test_pass_holds_no_image_twice(shards, epoch):
    passes = cut_passes(make_shuffle(shards), epoch)
    assert len(passes) == max(max(shard, default=0) for shard in shards)
    assert all(len(set(one_pass)) == len(one_pass) > 0 for one_pass in passes)


def test_image_is_not_repeated_before_all_of_its_group_were_seen():
    copies = draw_copies(20, 50, [0, 1, 3, 10])
    seen: Counter[tuple[int, int]] = Counter()
    for locations in cut_passes(ShardShuffle(copies, (0, 0)), 1):
        seen.update(locations)
        for shard, shard_copies in enumerate(copies):
            for value in (1, 3, 10):
                times = [seen[shard, row] for row in np.flatnonzero(shard_copies == value).tolist()]
                assert max(times) - min(times) <= 1


def test_passes_have_the_same_size_and_share_of_each_number_of_copies():
    copies = draw_copies(200, 40, [1, 2, 5, 100])
    passes = cut_passes(ShardShuffle(copies, (0, 0)), 0)
    sizes = np.array([[sum(copies[s][r] == value for s, r in locations) for value in (1, 2, 5, 100)] for locations in passes])
    expected = [value * sum(int((shard == value).sum()) for shard in copies) / 100 for value in (1, 2, 5, 100)]
    # Rounding is spread: without offsets, all images with one copy of groups below 100 would be in the last pass.
    assert np.all(np.abs(sizes - expected) < 6 * np.sqrt(expected) + 1)
    assert sizes[:, 3].tolist() == [expected[3]] * 100


@pytest.mark.parametrize("copies", [1, 13, 100])
@pytest.mark.parametrize("shards", [8, 50, 400])
def test_most_images_are_seen_after_three_times_as_many_positions(copies, shards):
    rows = 8000 // shards
    shuffle = ShardShuffle([np.full(rows, copies, np.uint8) for _ in range(shards)], (0, 0))
    assert len(set(shuffle.positions(0, 3 * shards * rows))) > 0.9 * shards * rows


@pytest.mark.parametrize("copies", [13, 100])
@pytest.mark.parametrize("shards", [8, 50, 400])
def test_images_with_few_copies_are_seen_from_the_start(copies, shards):
    """A quarter of an epoch sees a quarter of the images with one copy."""
    rows = 8000 // shards
    kept = draw_copies(shards, rows, [1, copies])
    shuffle = ShardShuffle(kept, (0, 0))
    seen = set(shuffle.positions(0, shuffle.epoch_size // 4))
    single = sum(int((shard == 1).sum()) for shard in kept)
    assert sum(kept[shard][row] == 1 for shard, row in seen) / single == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("shards", [8, 50, 400])
def test_fifty_steps_have_the_mix_of_classes_of_the_selection(shards, monkeypatch):
    # Windows as small as shards are here.
    monkeypatch.setattr(sampler, "WINDOW_IMAGES", 5000)
    rng = np.random.default_rng(0)
    class_ids = [rng.integers(0, 10, 40_000 // shards) for _ in range(shards)]
    # A class with fewer images has more copies, and classes 8 and 9 remain rarer.
    times = np.array([1, 1, 2, 3, 5, 10, 13, 100, 1, 1])
    keep = np.array([1, 1, 0.5, 0.33, 0.2, 0.1, 0.08, 0.01, 0.5, 0.5])
    copies = [times[ids] * (rng.random(len(ids)) < keep[ids]) for ids in class_ids]
    selected = sum(np.bincount(ids, shard, 10) for ids, shard in zip(class_ids, copies, strict=True))
    shuffle = ShardShuffle(copies, (0, 0))
    positions = 50 * 512
    for start in range(0, shuffle.epoch_size, positions):
        seen = np.bincount([class_ids[shard][row] for shard, row in shuffle.positions(start, positions)], minlength=10)
        assert np.abs(seen / positions / (selected / selected.sum()) - 1).max() < 0.1


def test_single_copies_in_few_shards_are_shuffled_as_a_whole():
    shuffle = make_shuffle([[1] * 500] * 8)
    for epoch in range(3):
        order = np.array(shuffle.positions(epoch * 4000, 4000))
        assert len(np.unique(order, axis=0)) == 4000
        for part in np.split(order[:, 0], 4):
            assert np.bincount(part, minlength=8).min() > 80


# A pure function of seed and position


@given(COPIES, st.integers(0, 3000), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_positions_do_not_depend_on_earlier_reads(shards, start, counts):
    whole = make_shuffle(shards).positions(start, sum(counts))
    pieces = []
    for count in counts:
        # A new object each time: nothing may depend on what was read before.
        pieces += make_shuffle(shards).positions(start + len(pieces), count)
    assert pieces == whole


@given(COPIES, st.integers(0, 3000), st.integers(1, 12), st.integers(1, 5))
def test_ranks_together_take_the_positions_of_a_step(shards, start, batch_size, world_size):
    step = make_shuffle(shards).positions(start, batch_size)
    bounds = [rank * batch_size // world_size for rank in range(world_size + 1)]
    parts = [make_shuffle(shards).positions(start + a, b - a) for a, b in itertools.pairwise(bounds)]
    assert list(itertools.chain(*parts)) == step


def test_shuffle_differs_by_pass_epoch_and_seed():
    shuffle = make_shuffle([[2] * 10] * 8)
    orders = [shuffle.positions(start, 80) for start in (0, 80, 160)]
    orders.append(make_shuffle([[2] * 10] * 8, seed=1).positions(0, 80))
    assert all(first != second for first, second in itertools.combinations(orders, 2))


def test_shuffle_refuses_empty_data():
    with pytest.raises(DataError, match="no images to train on"):
        make_shuffle([[0, 0], []])


# Windows


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=700))
def test_windows_have_a_bounded_number_of_shards(sizes):
    counts = np.diff(cut_windows(np.array(sizes)))
    assert counts.sum() == len(sizes)
    assert counts.max() <= MAX_WINDOW_SHARDS
    assert counts.min() >= min(MIN_WINDOW_SHARDS, len(sizes))


@pytest.mark.parametrize(
    ("sizes", "windows"),
    [([10_000] * 100, [11] * 9), ([10_000] * 15, [15]), ([100] * 128, [64, 64]), ([100_000] * 24, [8, 8, 8])],
)
def test_windows_have_about_equal_numbers_of_images(sizes, windows):
    counts = np.diff(cut_windows(np.array(sizes)))
    assert len(counts) == len(windows)
    assert np.abs(counts - windows).max() <= 1


def test_windows_have_enough_images_if_shards_differ_in_size():
    sizes = np.random.default_rng(0).integers(1, 10_000, 500)
    images = np.add.reduceat(sizes, cut_windows(sizes)[:-1])
    assert images.min() >= sampler.WINDOW_IMAGES
    assert images.max() < 1.2 * images.min()


def test_positions_stay_within_a_window_of_shards():
    shuffle = make_shuffle([[1] * 5] * 640)
    locations = shuffle.positions(0, shuffle.epoch_size)
    for start in range(0, len(locations), 5 * MAX_WINDOW_SHARDS):
        assert len({shard for shard, _ in locations[start : start + 5 * MAX_WINDOW_SHARDS]}) == MAX_WINDOW_SHARDS


@pytest.mark.parametrize("copies", [1, 2])
def test_prefetch_names_shards_of_next_window(copies):
    shuffle = make_shuffle([[copies] * 3] * 100 + [[0] * 3] * 50)
    windows = [[shard for shard, _ in shuffle.positions(start, 150)] for start in range(0, 1200, 150)]
    assert all(len(set(shards)) == 50 for shards in windows)
    for number, following in enumerate(windows[1:]):
        for position in (150 * number, 150 * number + 149):
            assert set(shuffle.prefetch(position)) == set(following)


def test_window_rows_do_not_grow_with_copies(monkeypatch):
    monkeypatch.setattr(sampler, "WINDOW_IMAGES", 5000)

    def measure_window_bytes(values) -> int:
        shuffle = ShardShuffle(draw_copies(100, 1000, values), (0, 0))
        cuts = shuffle._pass(0, 0).cuts
        return max(shuffle._window_rows(0, 0, window).nbytes for window in range(len(cuts) - 1))

    single = measure_window_bytes([1])
    assert single <= 8 * 20 * 1000
    assert measure_window_bytes([100]) == single
    # Fewer images of a shard are in a pass, and a window has more shards, not more images.
    assert measure_window_bytes([1, 13, 100]) <= single


def test_shuffle_keeps_only_the_current_and_next_window():
    shuffle = make_shuffle([[3] * 5] * 320)
    shuffle.positions(0, 2 * shuffle.epoch_size)
    assert shuffle._window_rows.cache_info().currsize <= 2
