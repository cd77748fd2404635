from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ns.core.errors import DataError
from ns.data.loading.sampler import WINDOW_SHARDS, ShardShuffle

COPIES = st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=3 * WINDOW_SHARDS).filter(
    lambda shards: any(any(shard) for shard in shards)
)


def order_of(shards: list[list[int]], seed: int = 0) -> ShardShuffle:
    return ShardShuffle([np.array(shard, np.int64) for shard in shards], (seed, 0))


@given(COPIES, st.integers(0, 3))
def test_epoch_holds_each_image_as_often_as_its_copies(shards, epoch):
    order = order_of(shards)
    places = order.positions(epoch * order.epoch_size, order.epoch_size)
    wanted = {(s, r): count for s, shard in enumerate(shards) for r, count in enumerate(shard) if count}
    assert Counter(places) == wanted


@given(COPIES, st.integers(0, 200), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_positions_do_not_depend_on_earlier_reads(shards, start, counts):
    whole = order_of(shards).positions(start, sum(counts))
    pieces = []
    for count in counts:
        # A new object each time: nothing may depend on what was read before.
        pieces += order_of(shards).positions(start + len(pieces), count)
    assert pieces == whole


def test_shuffle_differs_by_epoch_and_seed():
    shards = [[1] * 10 for _ in range(WINDOW_SHARDS)]
    order = order_of(shards)
    first, second = order.positions(0, 10 * WINDOW_SHARDS), order.positions(10 * WINDOW_SHARDS, 10 * WINDOW_SHARDS)
    assert first != second
    assert first != order_of(shards, seed=1).positions(0, 10 * WINDOW_SHARDS)


def test_positions_stay_within_a_window_of_shards():
    shards = [[1] * 5 for _ in range(4 * WINDOW_SHARDS)]
    places = order_of(shards).positions(0, 5 * 4 * WINDOW_SHARDS)
    for start in range(0, len(places), 5 * WINDOW_SHARDS):
        assert len({shard for shard, _ in places[start : start + 5 * WINDOW_SHARDS]}) == WINDOW_SHARDS


def test_shuffle_refuses_empty_data():
    with pytest.raises(DataError, match="no images to train on"):
        order_of([[0, 0], []])
