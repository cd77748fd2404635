import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ns.core.errors import DataError
from ns.data.loading.sampler import ShardShuffle

COPIES = st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 3, 7]), max_size=6), min_size=1, max_size=60).filter(
    lambda shards: any(any(shard) for shard in shards)
)
WINDOW_SHARDS = st.sampled_from([1, 2, 5, 16, 128])
STEP = 512


def make_shuffle(shards, *, window_shards: int = 128, seed: int = 0) -> ShardShuffle:
    return ShardShuffle([np.array(shard, np.int64) for shard in shards], (seed, 0), window_shards)


def draw_copies(shards: int, rows: int, values, *, share=None) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.choice(values, rows, p=share).astype(np.uint8) for _ in range(shards)]


def draw_balanced(shards: int, rows: int, copies: int) -> list[np.ndarray]:
    """Images with one copy, and as many fewer with `copies`: both are equally frequent in an epoch."""
    return draw_copies(shards, rows, [1, copies], share=[copies / (copies + 1), 1 / (copies + 1)])


def cut_windows(shuffle: ShardShuffle, epoch: int) -> list[list[list[tuple[int, int]]]]:
    """The passes of each window of an epoch, in order."""
    windows = []
    at = epoch * shuffle.epoch_size
    for round_number, passes in enumerate(itertools.pairwise(shuffle._round_passes)):
        for number in range(shuffle._windows):
            groups = shuffle._window(epoch, round_number, number).groups
            visits = [int(shuffle._count_visits(groups, pass_number).sum()) for pass_number in range(passes[0], passes[1] + 1)]
            windows.append([shuffle.positions(at + a - visits[0], b - a) for a, b in itertools.pairwise(visits)])
            at += visits[-1] - visits[0]
    return windows


# How often and when an image is seen


@given(COPIES, WINDOW_SHARDS, st.integers(0, 3))
def test_epoch_holds_each_image_as_often_as_its_copies(shards, window_shards, epoch):
    shuffle = make_shuffle(shards, window_shards=window_shards)
    locations = shuffle.positions(epoch * shuffle.epoch_size, shuffle.epoch_size)
    expected = {(s, r): count for s, shard in enumerate(shards) for r, count in enumerate(shard) if count}
    assert Counter(locations) == expected


@given(COPIES, WINDOW_SHARDS, st.integers(0, 3))
def test_pass_holds_no_image_twice(shards, window_shards, epoch):
    for passes in cut_windows(make_shuffle(shards, window_shards=window_shards), epoch):
        assert all(len(set(locations)) == len(locations) for locations in passes)


@pytest.mark.parametrize("window_shards", [4, 128])
def test_image_is_not_repeated_before_all_of_its_group_were_seen(window_shards):
    copies = draw_copies(20, 50, [0, 1, 3, 10])
    seen: Counter[tuple[int, int]] = Counter()
    for locations in itertools.chain(*cut_windows(ShardShuffle(copies, (0, 0), window_shards), 1)):
        seen.update(locations)
        for shard, shard_copies in enumerate(copies):
            for value in (1, 3, 10):
                times = [seen[shard, row] for row in np.flatnonzero(shard_copies == value).tolist()]
                assert max(times) - min(times) <= 1


def test_passes_have_the_same_share_of_each_number_of_copies():
    copies = draw_copies(100, 40, [1, 2, 5, 50])
    (passes,) = cut_windows(ShardShuffle(copies, (0, 0)), 0)
    sizes = np.array([[sum(copies[s][r] == value for s, r in locations) for value in (1, 2, 5, 50)] for locations in passes])
    expected = [value * sum(int((shard == value).sum()) for shard in copies) / 50 for value in (1, 2, 5, 50)]
    # Rounding is spread: without offsets, all images with one copy of groups below 50 would be in the last pass.
    assert np.all(np.abs(sizes - expected) < 6 * np.sqrt(expected) + 1)
    assert sizes[:, 3].tolist() == [expected[3]] * 50


@pytest.mark.parametrize("copies", [1, 13, 100])
@pytest.mark.parametrize("shards", [8, 50, 400])
def test_all_images_are_seen_before_one_is_seen_twice(shards, copies):
    rows = 4000 // shards
    shuffle = ShardShuffle([np.full(rows, copies, np.uint8) for _ in range(shards)], (0, 0))
    for start in range(0, 3 * 4000, 4000):
        assert len(set(shuffle.positions(start, 4000))) == 4000


@pytest.mark.parametrize("copies", [13, 100])
@pytest.mark.parametrize("shards", [8, 50, 400])
def test_most_images_are_seen_after_three_times_as_many_positions(shards, copies):
    kept = draw_balanced(shards, 20_000 // shards, copies)
    shuffle = ShardShuffle(kept, (0, 0))
    assert len(set(shuffle.positions(0, 3 * 20_000))) == 20_000
    # From the start: a quarter of an epoch sees a quarter of the images with one copy.
    seen = set(shuffle.positions(0, shuffle.epoch_size // 4))
    single = sum(int((shard == 1).sum()) for shard in kept)
    assert sum(kept[shard][row] == 1 for shard, row in seen) / single == pytest.approx(0.25, abs=0.02)


# The mix of classes


def measure_mix_error(shuffle: ShardShuffle, class_ids, copies, positions: int) -> float:
    """Largest relative deviation of a class's share of so many positions from its share of the epoch."""
    selected = np.sum([np.bincount(ids, shard, 10) for ids, shard in zip(class_ids, copies, strict=True)], 0)
    expected = selected[selected > 0] / selected.sum()
    errors = []
    for start in range(0, min(shuffle.epoch_size, 8 * positions), positions):
        seen = np.bincount([class_ids[shard][row] for shard, row in shuffle.positions(start, positions)], minlength=10)
        errors.append(np.abs(seen[selected > 0] / positions / expected - 1).max())
    return max(errors)


@pytest.mark.parametrize("shards", [8, 50, 400])
def test_fifty_steps_have_the_mix_of_classes_of_the_selection(shards):
    rng = np.random.default_rng(0)
    class_ids = [rng.integers(0, 10, 1_000_000 // shards) for _ in range(shards)]
    # A class with fewer images has more copies, and classes 8 and 9 remain rarer.
    times = np.array([1, 1, 2, 3, 5, 10, 13, 100, 1, 1])
    keep = np.array([1, 1, 0.5, 0.33, 0.2, 0.1, 0.08, 0.01, 0.5, 0.5])
    copies = [(times[ids] * (rng.random(len(ids)) < keep[ids])).astype(np.uint8) for ids in class_ids]
    assert measure_mix_error(ShardShuffle(copies, (0, 0)), class_ids, copies, 50 * STEP) < 0.1


@pytest.mark.parametrize("copies", [1, 13, 100])
@pytest.mark.parametrize("shards", [8, 50, 400])
def test_fifty_steps_have_the_mix_of_classes_if_each_shard_holds_one(shards, copies):
    """The order of folders, whose names are classes."""
    rows = 200_000 // shards
    class_ids = [np.full(rows, shard * 10 // shards) for shard in range(shards)]
    repeats = [np.full(rows, copies, np.uint8) for _ in range(shards)]
    assert measure_mix_error(ShardShuffle(repeats, (0, 0)), class_ids, repeats, 50 * STEP) < 0.1


def test_images_of_a_window_are_shuffled_as_a_whole():
    shuffle = make_shuffle([[1] * 500] * 8)
    for epoch in range(3):
        order = np.array(shuffle.positions(epoch * 4000, 4000))
        assert len(np.unique(order, axis=0)) == 4000
        for part in np.split(order[:, 0], 4):
            assert np.bincount(part, minlength=8).min() > 80


# A pure function of seed and position


@given(COPIES, WINDOW_SHARDS, st.integers(0, 3000), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_positions_do_not_depend_on_earlier_reads(shards, window_shards, start, counts):
    whole = make_shuffle(shards, window_shards=window_shards).positions(start, sum(counts))
    pieces = []
    for count in counts:
        # A new object each time: nothing may depend on what was read before.
        pieces += make_shuffle(shards, window_shards=window_shards).positions(start + len(pieces), count)
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


@pytest.mark.parametrize("shards", [[], [[]], [[0, 0], []]])
def test_shuffle_refuses_empty_data(shards):
    with pytest.raises(DataError, match="no images to train on"):
        make_shuffle(shards)


# Windows


@given(st.integers(1, 300), WINDOW_SHARDS)
def test_windows_of_a_round_hold_each_shard_once(count, window_shards):
    shuffle = make_shuffle([[0] if shard % 3 == 1 else [1] for shard in range(count)], window_shards=window_shards)
    windows = shuffle._round(0, 0).windows
    assert sorted(np.concatenate(windows).tolist()) == [shard for shard in range(count) if shard % 3 != 1]
    sizes = list(map(len, windows))
    assert max(sizes) <= window_shards
    assert max(sizes) - min(sizes) <= 1


def test_windows_take_shards_from_everywhere():
    windows = make_shuffle([[1]] * 400, window_shards=100)._round(0, 0).windows
    for window in windows:
        # One of each four neighbors.
        assert (np.sort(window) // 4).tolist() == list(range(100))


@pytest.mark.parametrize(("values", "share", "rounds"), [([1], [1], 1), ([13], [1], 13), ([1, 100], [100 / 101, 1 / 101], 2)])
def test_shards_are_opened_as_often_as_their_images_have_copies_on_average(values, share, rounds):
    shuffle = ShardShuffle(draw_copies(40, 300, values, share=share), (0, 0), 8)
    locations = list(itertools.chain(*itertools.chain(*cut_windows(shuffle, 0))))
    assert locations == shuffle.positions(0, shuffle.epoch_size)
    opened = Counter(shard for passes in cut_windows(shuffle, 0) for shard in {shard for shard, _ in itertools.chain(*passes)})
    assert set(opened.values()) == {rounds}


@pytest.mark.parametrize("copies", [1, 2])
def test_prefetch_names_shards_of_this_window_and_the_next(copies):
    shuffle = make_shuffle([[copies] * 3] * 100 + [[0] * 3] * 50, window_shards=50)
    windows = [[shard for shard, _ in shuffle.positions(start, 150)] for start in range(0, 1200, 150)]
    assert all(len(set(shards)) == 50 for shards in windows)
    for number, (shards, following) in enumerate(itertools.pairwise(windows)):
        for position in (150 * number, 150 * number + 149):
            found = shuffle.prefetch(position)
            assert len(found) == len(set(found))
            assert set(found[:50]) == set(shards)
            assert set(found) == {*shards, *following}


def test_prefetch_of_a_single_window_names_all_its_shards():
    assert sorted(make_shuffle([[1], [0], [2]]).prefetch(7)) == [0, 2]


def test_memory_does_not_grow_with_copies():
    def measure_bytes(values, share=None) -> int:
        shuffle = ShardShuffle(draw_copies(100, 1000, values, share=share), (0, 0), 20)
        sizes = []
        for start in range(0, shuffle.epoch_size, max(shuffle.epoch_size // 20, 1)):
            shuffle.positions(start, STEP)
            caches = [shuffle._window.cache_info(), shuffle._block.cache_info()]
            assert all(cache.currsize <= 1 for cache in caches)
            epoch, round_number, number, offset = shuffle._locate_window(start)
            window = shuffle._window(epoch, round_number, number)
            block = int(np.searchsorted(window.starts, offset, side="right")) - 1
            sizes.append(window.images.nbytes + shuffle._block(epoch, round_number, number, block).nbytes)
        return max(sizes)

    single = measure_bytes([1])
    assert single == 2 * 4 * 20 * 1000
    assert measure_bytes([100]) == single
    assert measure_bytes([1, 13, 100]) <= single
    assert measure_bytes([1, 100], [100 / 101, 1 / 101]) <= single
