import numpy as np
import pytest

from ns.config.schema import ImportConfig
from ns.data.calibration_split import copy_split_part, draw_calibration_images
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.data.loading.shard_reader import ImageSource
from ns.storage import LocalStore

CONFIG = ImportConfig(shard_samples=4, shard_mib=1)


@pytest.fixture(scope="module")
def images():
    class_ids = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [100, 11, 2, 1]))
    return [f"image-{number}" for number in range(len(class_ids))], class_ids


@pytest.mark.parametrize(("share", "expected"), [(0.5, [50, 6, 1, 0]), (0.2, [20, 2, 1, 0]), (0.99, [99, 10, 1, 0])])
def test_each_class_gives_its_share_and_keeps_an_image_in_either_part(images, share, expected):
    drawn = draw_calibration_images(*images, share, 0)
    assert np.bincount(images[1][drawn], minlength=4).tolist() == expected


def test_draw_depends_on_keys_and_seed_alone(images):
    keys, class_ids = images
    drawn = draw_calibration_images(keys, class_ids, 0.5, 0)
    order = np.random.default_rng(1).permutation(len(keys))
    shuffled = draw_calibration_images([keys[index] for index in order], class_ids[order], 0.5, 0)
    assert (shuffled == drawn[order]).all()
    assert (draw_calibration_images(keys, class_ids, 0.5, 1) != drawn).any()


def test_parts_hold_each_image_once_with_its_bytes_and_class(tmp_path, picture):
    samples = {f"cat/{number}": (picture(number, ("PNG", "JPEG")[number % 2]), number % 3) for number in range(13)}
    store = LocalStore(tmp_path / "whole")
    with ShardWriter(store, max_samples=5, max_bytes=1 << 20) as writer:
        for number, (key, (data, class_id)) in enumerate(samples.items()):
            writer.add_image(key, ("png", "jpg")[number % 2], data, class_id)
    whole = Dataset(name="whole", role="evaluation", classes=("a", "b", "c"), shards=writer.shards)
    found = {}
    for part in ("calibration", "rest"):
        target = LocalStore(tmp_path / part)
        dataset = copy_split_part(store, whole, target, part, 0.4, 3, CONFIG)
        assert dataset == Dataset.load(target)
        assert max(shard.samples for shard in dataset.shards) == 4
        source = ImageSource(target, dataset)
        for shard in range(len(dataset.shards)):
            class_ids = source.read_class_ids(shard, 3).tolist()
            for key, image, class_id in zip(source.read_index(shard).keys, source.read_encoded(shard), class_ids, strict=True):
                assert key not in found
                found[key] = (bytes(getattr(image, "data", image)), class_id)
    assert found == samples
