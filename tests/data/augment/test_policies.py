import numpy as np
import pytest
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform

from ns.config.schema import NoiseConfig
from ns.data.augment import policies
from ns.data.augment.policies import AugmentPolicy
from ns.data.augment.transforms import TrainTransform, make_augmentation
from tests.data.augment.reference_values import make_picture

POLICIES = ("rand-m9-mstd0.5-inc1", "rand-m5-n3-p1", "rand-m2", "augmix-m5-w4-d2", "augmix-m3-b1", "trivialaugment")


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_follow_their_generator(policy):
    augment = AugmentPolicy(NoiseConfig(policy=policy).policy, 32)
    image = make_picture(32)
    results = [(augment(image, np.random.default_rng(seed))) for seed in (*range(15), *range(15))]
    assert all(np.array_equal(a, b) for a, b in zip(results[:15], results[15:], strict=True))
    assert len({result.tobytes() for result in results}) > 5
    assert all(result.shape == (32, 32, 3) and result.dtype == np.uint8 for result in results)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m0-p1", "augmix-m10-w8"])
def test_policies_survive_posterizing_to_no_bits(policy):
    """Pillow 13 refuses 0 bits, which timm asks for at high, or low, magnitudes."""
    augment = AugmentPolicy(policy, 32)
    image = Image.fromarray(make_picture(32))
    for seed in range(300):
        augment(make_picture(32), np.random.default_rng(seed))
    assert np.asarray(policies._posterize_image(image, 0)).max() == 0
    assert policies._posterize_image(image, 2).tobytes() == ImageOps.posterize(image, 2).tobytes()
    assert policies._posterize_image(image, 8) is image


def test_policy_has_timms_operations_and_replaces_randaugment():
    settings = {"translate_const": 100, "img_mean": (124, 116, 104)}
    expected = rand_augment_transform("rand-m7-n3-inc1", settings)
    augment = make_augmentation(NoiseConfig(policy="rand-m7-n3-inc1", randaugment="reference", randaugment_layers=0), 224)
    assert repr(augment._transform) == repr(expected)
    assert [operation.hparams for operation in augment._transform.ops] == [operation.hparams for operation in expected.ops]


def test_policies_are_those_that_timm_understands():
    for policy in ("rand-m9-tweights", "rand-mmax15-m14-inc0", "rand", "augmix", *POLICIES):
        assert NoiseConfig(policy=policy).policy == policy
        AugmentPolicy(policy, 64)
    for policy in ("", "rand-m", "rand-x3", "augmix-d-1", "randm9", "original", "rand-m9 "):
        with pytest.raises(ValueError, match="must be trivialaugment, rand with parts of"):
            NoiseConfig(policy=policy)


def test_kind_timm_takes_whole_magnitudes():
    with pytest.raises(ValueError, match=r"randaugment_magnitude: 6.5: must be a whole number for kind timm"):
        NoiseConfig(randaugment="timm", randaugment_magnitude=6.5)
    assert TrainTransform(NoiseConfig(randaugment="timm", randaugment_magnitude=6.0), 32, "none")
