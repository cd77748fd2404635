import pytest

from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.data.index import ShardIndex, build_index_key
from ns.data.verify import find_damage
from ns.storage import LocalStore


@pytest.fixture
def data(tmp_path, picture):
    """The store and manifest of a labeled dataset of two shards."""
    store = LocalStore(tmp_path)
    with ShardWriter(store, max_samples=3, max_bytes=1 << 20) as writer:
        for number in range(6):
            writer.add_image(f"image-{number}", "png", picture(number), number % 2)
    dataset = Dataset(name="d", role="labeled", classes=("cat", "dog"), shards=writer.shards)
    dataset.save(store)
    return store, dataset


def replace_shard(dataset, **fields):
    return dataset.model_copy(update={"shards": (dataset.shards[0].model_copy(update=fields), *dataset.shards[1:])})


def test_good_dataset_has_no_damage(data):
    store, dataset = data
    assert not list(find_damage(store, dataset))
    store.delete(build_index_key(dataset.shards[0]))
    assert not list(find_damage(store, dataset))


@pytest.mark.parametrize("at", [0, 600, -1])
def test_each_damaged_tar_is_named(data, at):
    store, dataset = data
    for shard in dataset.shards:
        content = bytearray(store.get(shard.name))
        content[at] ^= 1
        store.put(shard.name, bytes(content))
    problems = list(find_damage(store, dataset))
    assert [shard.name in problem for shard, problem in zip(dataset.shards, problems, strict=True)] == [True, True]
    assert "its sha256 is not that of dataset.json" in problems[0]


def test_missing_tar_is_named(data):
    store, dataset = data
    store.delete("shard-00001.tar")
    (problem,) = find_damage(store, dataset)
    assert "shard-00001.tar" in problem


def test_wrong_index_is_named(data):
    store, dataset = data
    key = build_index_key(dataset.shards[0])
    wrong = ShardIndex.load(store, dataset.shards[1]).save(store, dataset.shards[0])
    (problem,) = find_damage(store, dataset)
    assert f"{key}: its sha256 is not that of dataset.json; delete it" in problem
    # Even if the manifest was changed with it.
    (problem,) = find_damage(store, replace_shard(dataset, index_sha256=wrong.index_sha256))
    assert f"{key}: is not the index of its tar" in problem


def test_wrong_counts_and_labels_are_named(data):
    store, dataset = data
    (problem,) = find_damage(store, replace_shard(dataset, samples=4))
    assert "shard-00000.tar: 3 images, dataset.json says 4" in problem
    problems = list(find_damage(store, dataset.model_copy(update={"classes": ("cat",)})))
    assert "shard-00000.tar: image-1: label 1: is none of a dataset with the role labeled" in problems[0]
    assert "image-0: label 0" in next(find_damage(store, dataset.model_copy(update={"role": "unlabeled", "classes": ()})))


def test_keys_that_are_there_twice_are_counted(data):
    store, dataset = data
    (problem,) = find_damage(store, dataset.model_copy(update={"shards": dataset.shards[:1] * 2}))
    assert "3 keys are there twice" in problem
