"""Fixtures: a small model, and small images of its classes."""

import numpy as np
import pytest
import torch

from ns.config.schema import ModelConfig, NoiseConfig
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.modeling import factory as models
from ns.modeling.manifest import Lineage
from ns.storage import LocalStore

CLASSES = tuple("abcde")


@pytest.fixture(scope="session")
def make_model():
    """Function: saves an untrained model in `folder`; `seed` draws its weights."""

    def make(folder, seed=0, classes=CLASSES, resolution=32, crop="none"):
        store = LocalStore(folder)
        config, noise = ModelConfig(arch="test_efficientnet", resolution=resolution, crop=crop), NoiseConfig()
        torch.manual_seed(seed)
        network = models.build_model(config, noise, len(classes))
        # Larger than the initial weights, so that answers differ from image to image.
        torch.nn.init.normal_(network.get_classifier().weight, std=1.0)
        fields = {"generation": 0, "model": config, "noise": noise, "classes": classes, "parameters": 1, "steps": 0}
        models.save_model(store, network.state_dict(), {**fields, "lineage": Lineage(config="0", labeled="0")}, [])
        return store

    return make


@pytest.fixture(scope="session")
def model(make_model, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_labeled_images(picture):
    """Function: writes `count` labeled images to `folder` in shards of `per_shard`; image 2 is damaged."""

    def make(folder, count=24, per_shard=10, classes=CLASSES, size=16, damaged=(2,), role="evaluation", kind="PNG"):
        store = LocalStore(folder)
        extension = {"PNG": "png", "JPEG": "jpg"}[kind]
        with ShardWriter(store, max_samples=per_shard, max_bytes=1 << 30) as writer:
            for number in range(count):
                data = picture(number, kind, size)
                writer.add_image(
                    f"image-{number:03d}", extension, data[:60] if number in damaged else data, number % len(classes)
                )
        dataset = Dataset(name="images", role=role, classes=classes, shards=writer.shards)
        dataset.save(store)
        return store, dataset

    return make


@pytest.fixture
def make_pixels():
    """Function: random images, uint8 [count, size, size, 3]."""

    def make(count, size, seed=0):
        return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)

    return make
