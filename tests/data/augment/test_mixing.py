import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup

from ns.data.augment.mixing import PairMixer, blend_pair, draw_cut

RNG = np.random.default_rng(0)
FIRST, SECOND = (RNG.integers(0, 256, (20, 30, 3), np.uint8) for _ in range(2))


def test_mixup_blends_both_by_the_share():
    first, second, share = PairMixer(0.8, 0)(FIRST, SECOND, np.random.default_rng(3))
    assert 0 < share < 1
    a, b = FIRST.astype(float), SECOND.astype(float)
    assert np.abs(first - (share * a + (1 - share) * b)).max() <= 0.51
    assert np.abs(second - (share * b + (1 - share) * a)).max() <= 0.51


def test_cutmix_exchanges_a_box_whose_area_is_the_share():
    for seed in range(50):
        first, second, share = PairMixer(0, 1)(FIRST, SECOND, np.random.default_rng(seed))
        exchanged = (first != FIRST).any(2)
        assert np.array_equal(first[exchanged], SECOND[exchanged])
        assert np.array_equal(second[exchanged], FIRST[exchanged])
        assert np.array_equal(second[~exchanged], SECOND[~exchanged])
        # A pixel in some hundred thousand is equal in both by chance.
        assert share == pytest.approx(1 - exchanged.mean(), abs=1e-6)


def test_both_take_turns():
    kinds = [
        np.array_equal(PairMixer(1, 1)(FIRST, SECOND, np.random.default_rng(seed))[0][0, 0], FIRST[0, 0]) for seed in range(300)
    ]
    assert 100 < sum(kinds) < 220


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_are_drawn_from_beta(alpha):
    shares = np.array(
        [PairMixer(alpha, 0)(FIRST[:1, :1], SECOND[:1, :1], np.random.default_rng(seed))[2] for seed in range(2000)]
    )
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_boxes_are_timms(monkeypatch):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        share = rng.random()
        state = rng.bit_generator.state
        ours = draw_cut(20, 30, share, rng)
        rng.bit_generator.state = state
        monkeypatch.setattr(timm_mixup.np.random, "randint", lambda low, high, size=None, rng=rng: rng.integers(low, high))
        (top, bottom, left, right), _ = timm_mixup.cutmix_bbox_and_lam((3, 20, 30), share)
        assert ours == (top, bottom, left, right)


def test_blends_are_timms():
    mixer = timm_mixup.FastCollateMixup(mixup_alpha=1, mode="pair", num_classes=2)
    mixer._params_per_elem = lambda count: (np.full(count, 0.3, np.float32), np.zeros(count, bool))
    out = np.zeros((2, 3, 20, 30), np.uint8)
    batch = [(image.transpose(2, 0, 1), 0) for image in (FIRST, SECOND)]
    output = torch.from_numpy(out)
    mixer._mix_pair_collate(output, batch)
    assert np.array_equal(output[0].numpy().transpose(1, 2, 0), blend_pair(FIRST, SECOND, 0.3))
    assert np.array_equal(output[1].numpy().transpose(1, 2, 0), blend_pair(SECOND, FIRST, 0.3))


def test_inputs_stay():
    first, second = FIRST.copy(), SECOND.copy()
    for seed in range(20):
        PairMixer(1, 1)(FIRST, SECOND, np.random.default_rng(seed))
    assert np.array_equal(FIRST, first)
    assert np.array_equal(SECOND, second)
