import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from ns.config.schema import LabelingConfig, ModelConfig, NoiseConfig, SelectionConfig
from ns.core.errors import ConfigError, DataError
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.data.loading.decode import EncodedJpeg, decode_image, read_jpeg_size
from ns.data.loading.jpeg_processes import JpegProcesses
from ns.data.loading.shard_reader import ImageSource
from ns.data.shards import read_samples
from ns.labeling.label_set import LabelShard, read_label_rows
from ns.labeling.predict import label_pool_shards
from ns.labeling.selection import select_pseudo_labels
from ns.modeling import factory as models
from ns.modeling import predictor as inference
from ns.modeling.foreign import DistanceScorer, EnergyScorer
from ns.modeling.manifest import Lineage
from ns.modeling.precision import PrecisionMode
from ns.modeling.predictor import Predictor
from ns.storage import LocalStore
from tests.labeling.dense import expand_probabilities

CLASSES = tuple("abcde")
LABELING = LabelingConfig()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = LocalStore(tmp_path_factory.mktemp("model"))
    # Noise that would show: the teacher must not feel any of it.
    noise = NoiseConfig(dropout=0.9, stochastic_depth=0.9)
    config = ModelConfig(arch="test_efficientnet", resolution=32, crop="none")
    torch.manual_seed(0)
    network = models.build_model(config, noise, len(CLASSES))
    models.save_model(
        folder,
        network.state_dict(),
        {
            "generation": 0,
            "model": config,
            "noise": noise,
            "classes": CLASSES,
            "parameters": 1,
            "steps": 0,
            "lineage": Lineage(config="0", labeled="0"),
        },
        [],
    )
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Three shards of 20 images, the third of which is damaged."""
    folder = LocalStore(tmp_path_factory.mktemp("pool"))
    rng = np.random.default_rng(0)
    with ShardWriter(folder, max_samples=20, max_bytes=1 << 20) as writer:
        for index in range(60):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(png, "PNG")
            data = png.getvalue()[:60] if index == 2 else png.getvalue()
            writer.add_image(f"image-{index}", "png", data, None)
    dataset = Dataset(name="pool", role="unlabeled", classes=(), shards=writer.shards)
    dataset.save(folder)
    return folder, dataset


def test_predictions_are_the_same_however_images_are_decoded(model, monkeypatch):
    """In turns with the network, of several batches or one, by one thread or in parts by several, and ahead of it, as for a GPU."""
    rng, images = np.random.default_rng(0), []
    for number in range(50):
        sink = io.BytesIO()
        height, width = (32, 32) if number % 3 == 0 else (20, 24) if number % 3 == 1 else (70 + number % 5, 60)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(sink, ("JPEG", "PNG")[number % 2])
        data = sink.getvalue()[: 30 if number in (7, 8) else None]
        jpeg_size = read_jpeg_size(data)
        images.append(EncodedJpeg(data, *jpeg_size) if any(jpeg_size) else data)
    images.append(rng.integers(0, 255, (32, 32, 3), np.uint8))
    predictor = Predictor(model, batch=20)
    whole, errors = predictor.predict_images(images)
    assert sorted(errors) == [7, 8]
    assert np.flatnonzero(np.isnan(whole[:, 0])).tolist() == [7, 8]
    for name, value in (("PART_BYTES", 1), ("TURN_BYTES", 1), ("DECODE_THREADS", 2)):
        monkeypatch.setattr(inference, name, value)
        predictor._takes_turns = name != "DECODE_THREADS"
        found, found_errors = predictor.predict_images(images)
        np.testing.assert_array_equal(found, whole)
        assert found_errors == errors


@pytest.mark.integration
def test_many_small_images_are_decoded_by_processes(model, monkeypatch):
    rng, images = np.random.default_rng(0), []
    for number in range(60):
        sink = io.BytesIO()
        Image.fromarray(np.full((24, 24, 3), rng.integers(0, 256, 3), np.uint8)).save(sink, "JPEG")
        images.append(EncodedJpeg(sink.getvalue()[: -30 if number == 41 else None], 24, 24))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    expected, errors = Predictor(model, batch=8).predict_images(images)
    predictor = Predictor(model, batch=8, images=inference.COMPILE_FROM_IMAGES)
    decode, decoded = JpegProcesses.decode_images, []
    monkeypatch.setattr(JpegProcesses, "decode_images", lambda self, jpegs: decoded.append(len(jpegs)) or decode(self, jpegs))
    found, found_errors = predictor.predict_images(images)
    np.testing.assert_array_equal(found, expected)
    assert found_errors == errors == {41: "truncated"}
    # One of another format: threads decode them all.
    sink = io.BytesIO()
    Image.new("RGB", (24, 24)).save(sink, "PNG")
    np.testing.assert_array_equal(predictor.predict_images([*images, sink.getvalue()])[0][:60], expected)
    assert decoded == [60]


def test_predictions_are_bit_identical(model, pool):
    folder, dataset = pool
    first, second = (Predictor(model, batch=8).predict_shard(ImageSource(folder, dataset), 1) for _ in range(2))
    assert np.array_equal(first.probabilities, second.probabilities)


def test_predictions_are_those_of_the_plain_network(model, pool):
    folder, dataset = pool
    predictions = Predictor(model, batch=8).predict_shard(ImageSource(folder, dataset), 1)
    network, card = models.load_model(model)
    normalize = models.Normalize(card.mean, card.std)
    for row in (0, 7, 19):
        sample = read_samples(folder.path(dataset.shards[1].name))[row]
        data = folder.get_range(dataset.shards[1].name, sample.offset, sample.size)
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        with torch.inference_mode():
            expected = network(normalize(torch.from_numpy(np.array(image))[None])).softmax(1)[0].numpy()
        np.testing.assert_allclose(predictions.probabilities[row], expected, rtol=1e-4, atol=1e-6)


def test_labels_do_not_depend_on_the_library_that_resizes(model):
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)) for _ in range(60)]
    pictures = [picture.resize((130 + 3 * n, 97 + 4 * n), Image.Resampling.BICUBIC) for n, picture in enumerate(coarse)]
    pillows = [np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) for picture in pictures]
    predictor = Predictor(model, batch=8)
    ours, theirs = (predictor.predict_images(images)[0] for images in ([np.asarray(picture) for picture in pictures], pillows))
    assert np.array_equal(ours.argmax(1), theirs.argmax(1))
    assert np.abs(ours - theirs).max() < 1e-3


def test_unreadable_image_disturbs_no_other(model, pool):
    folder, dataset = pool
    predictions = Predictor(model, batch=8).predict_shard(ImageSource(folder, dataset), 0)
    assert list(predictions.errors) == [2]
    assert np.isnan(predictions.probabilities[2]).all()
    others = np.delete(predictions.probabilities, 2, axis=0)
    np.testing.assert_allclose(others.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_must_be_finite(model, pool, value):
    folder, dataset = pool
    predictor = Predictor(model, batch=8)
    with torch.no_grad():
        next(predictor._network.parameters())[0] = value
    with pytest.raises(DataError, match=f"{model.uri}: the model's outputs are not finite in float32; train it again"):
        predictor.predict_shard(ImageSource(folder, dataset), 0)


def test_labeling_is_done_once_per_shard_in_tar_order(model, pool, tmp_path):
    folder, dataset = pool
    labels = LocalStore(tmp_path)
    predictor = Predictor(model, batch=8)
    assert label_pool_shards([predictor], folder, dataset, labels, range(2), LABELING) == 40
    first = {key: labels.get(key) for key in labels.list()}
    assert label_pool_shards([predictor], folder, dataset, labels, range(3), LABELING) == 20
    assert {key: labels.get(key) for key in first} == first

    facts = LabelShard.load_file(labels, "shard-00000.json")
    rows = read_label_rows(labels, facts)
    assert (facts.rows, facts.unreadable) == (20, 1)
    assert rows.keys == [f"image-{index}" for index in range(20)]
    assert np.isnan(rows.confidence[2])
    probabilities = predictor.predict_shard(ImageSource(folder, dataset), 0).probabilities
    readable = rows.readable
    np.testing.assert_allclose(expand_probabilities(rows, 5)[readable], probabilities[readable], atol=2e-3)
    np.testing.assert_array_equal(rows.top_class[readable, 0], probabilities[readable].argmax(1))


def test_left_out_images_get_no_label(model, pool, tmp_path):
    folder, dataset = pool
    predictor = Predictor(model, batch=8)
    plain, guarded = LocalStore(tmp_path / "plain"), LocalStore(tmp_path / "guarded")
    label_pool_shards([predictor], folder, dataset, plain, range(1), LABELING)
    label_pool_shards(
        [predictor], folder, dataset, guarded, range(1), LABELING, find_left_out=lambda _: {5: "also in heldout: x"}
    )
    facts = LabelShard.load_file(guarded, "shard-00000.json")
    assert (facts.rows, facts.unreadable, facts.left_out) == (20, 1, 1)
    expected, rows = read_label_rows(plain, LabelShard.load_file(plain, "shard-00000.json")), read_label_rows(guarded, facts)
    assert np.flatnonzero(rows.left_out).tolist() == [5]
    assert np.flatnonzero(~rows.readable).tolist() == [2, 5]
    others = np.delete(np.arange(20), 5)
    np.testing.assert_array_equal(rows.confidence[others], expected.confidence[others])
    selection = select_pseudo_labels(
        lambda: [rows.build_scores(1)],
        5,
        SelectionConfig(policy="all", min_confidence=0),
        seed=0,
        label_set="0",
        label_set_key="x",
    )
    assert selection.kept == 18


def test_extract_features_is_equal_for_equal_images(model, pool):
    folder, dataset = pool
    first, _, _, other = ImageSource(folder, dataset).read_encoded(1, 0, 4)
    images = [first, first, other]
    features = Predictor(model, batch=8).extract_features(images)
    assert features.shape[0] == 3
    np.testing.assert_array_equal(features[0], features[1])
    assert not np.allclose(features[0], features[2])


def with_model_fields(model, folder, **fields_of_model):
    """The same model with other settings."""
    network, card = models.load_model(model)
    target = LocalStore(folder)
    changed = card.model.model_copy(update=fields_of_model)
    fields = {name: getattr(card, name) for name in ("generation", "noise", "classes", "parameters", "steps", "lineage")}
    models.save_model(target, network.state_dict(), {**fields, "model": changed}, [])
    return target


def test_predictor_uses_the_precision_of_the_manifest(model, pool, tmp_path):
    folder, dataset = pool
    plain = Predictor(model, batch=8)
    fast = Predictor(with_model_fields(model, tmp_path / "fast", inference_precision="bfloat16"), batch=8)
    assert (str(plain.mode), str(fast.mode)) == ("float32", "bfloat16")
    assert plain.manifest.digest != fast.manifest.digest
    ours, theirs = (predictor.predict_shard(ImageSource(folder, dataset), 1).probabilities for predictor in (plain, fast))
    assert not np.array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, atol=0.02)
    assert label_pool_shards([fast], folder, dataset, LocalStore(tmp_path / "labels"), range(1), LABELING) == 20
    assert LabelShard.load_file(LocalStore(tmp_path / "labels"), "shard-00000.json").mode == "bfloat16"


@pytest.mark.parametrize(("batch", "compiled"), [(8, [8, 8]), (7, [7, 7, 7])])
def test_compiled_network_sees_one_shape_only(model, pool, tmp_path, monkeypatch, batch, compiled):
    """Of the shard's 20 images a rest of up to half a batch goes without the compiler; a larger one is filled up."""
    folder, dataset = pool
    expected = Predictor(model, batch=batch).predict_shard(ImageSource(folder, dataset), 1).probabilities
    shapes = []

    def prepare(mode, network):
        assert mode.compiled
        return lambda images: shapes.append(len(images)) or network(images)

    monkeypatch.setattr(inference, "can_compile", lambda _: True)
    monkeypatch.setattr(PrecisionMode, "prepare_network", prepare)
    compiled_model = with_model_fields(model, tmp_path, inference_compile=True)
    predictor = Predictor(compiled_model, batch=batch, images=inference.COMPILE_FROM_IMAGES)
    np.testing.assert_allclose(predictor.predict_shard(ImageSource(folder, dataset), 1).probabilities, expected, rtol=1e-4)
    assert shapes == compiled


def test_compiling_needs_to_be_asked_for_and_many_images(model, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "can_compile", lambda _: True)
    monkeypatch.setattr(PrecisionMode, "prepare_network", lambda _, network: network)
    compiled_model = with_model_fields(model, tmp_path, inference_compile=True)
    assert not Predictor(compiled_model, batch=8, images=inference.COMPILE_FROM_IMAGES - 1).mode.compiled
    assert not Predictor(model, batch=8, images=inference.COMPILE_FROM_IMAGES).mode.compiled
    assert Predictor(compiled_model, batch=8, images=inference.COMPILE_FROM_IMAGES).mode.compiled


def test_predictions_of_a_shard_do_not_depend_on_its_neighbors(model, pool):
    folder, dataset = pool
    predictor = Predictor(model, batch=8)
    together = predictor.predict_shards(ImageSource(folder, dataset), [(0, {}), (1, {4: "why"}), (2, {})])
    for shard, found in enumerate(together):
        request = (shard, {4: "why"} if shard == 1 else {})
        alone = next(predictor.predict_shards(ImageSource(folder, dataset), [request]))
        np.testing.assert_array_equal(found.probabilities, alone.probabilities)
        assert found.errors == alone.errors
        assert found.index.keys == alone.index.keys
    assert shard == 2


@pytest.mark.parametrize("takes_turns", [True, False])
def test_predictor_reads_ahead(model, pool, monkeypatch, takes_turns):
    folder, dataset = pool
    predictor = Predictor(model, batch=1)
    predictor._takes_turns = takes_turns
    monkeypatch.setattr(inference, "TURN_BYTES", 1)
    # The first batch, those that wait for a decoder, and beside a GPU the decoders' own and the one that follows the first.
    expected = 1 + inference.TURNS_AHEAD + (0 if takes_turns else inference.DECODE_THREADS)
    source, read = ImageSource(folder, dataset), threading.Event()
    encoded = source.read_encoded

    def counted(shard):
        for row, image in enumerate(encoded(shard)):
            if row + 1 == expected:
                read.set()
            yield image

    monkeypatch.setattr(source, "read_encoded", counted)
    forward = predictor.forward_pass
    predictor.forward_pass = lambda images: forward(images) if read.wait(10) else pytest.fail("nothing was read ahead")
    predictor.predict_shard(source, 1)


def test_small_batches_are_decoded_together(model, monkeypatch):
    """Of 8 images of 32 px, 24 kB when decoded, and 3 kB, which counts too, before: two are too few for a turn, three enough."""
    predictor, done = Predictor(model, batch=8), []
    decode, forward = predictor._decode_in_parts, predictor.forward_pass
    monkeypatch.setattr(
        predictor, "_decode_in_parts", lambda images, threads: done.append(len(images)) or decode(images, threads)
    )
    predictor.forward_pass = lambda images: done.append("network") or forward(images)
    images = [np.zeros((16, 8, 3), np.uint8)] * 60
    monkeypatch.setattr(inference, "TURN_BYTES", 3 * 8 * (32 * 32 * 3 + 16 * 8 * 3))
    predictor.predict_images(images)
    assert done == [24, *["network"] * 3, 24, *["network"] * 3, 12, *["network"] * 2]


@pytest.mark.parametrize(("views", "seen"), [("flip", 2), ("five", 5), ("ten", 10)])
def test_predictor_averages_views(model, pool, views, seen):
    folder, dataset = pool
    predictor = Predictor(model, batch=8, views=views)
    passes = []
    forward = predictor.forward_pass
    predictor.forward_pass = lambda images: passes.append(tuple(images.shape)) or forward(images)
    found = predictor.predict_shard(ImageSource(folder, dataset), 1)
    plain = Predictor(model, batch=8).predict_shard(ImageSource(folder, dataset), 1)
    assert passes == [(8, 32, 32, 3)] * (2 * seen) + [(4, 32, 32, 3)] * seen
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-5)
    assert not np.array_equal(found.probabilities, plain.probabilities)


def test_flip_view_makes_mirror_images_equal(model, pool):
    folder, dataset = pool
    images = [
        image.decode_whole() if not isinstance(image, bytes) else decode_image(image)
        for image in ImageSource(folder, dataset).read_encoded(1, 0, 3)
    ]

    def png(pixels):
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        return sink.getvalue()

    predictor = Predictor(model, batch=8, views="flip")
    there, _ = predictor.predict_images([png(pixels) for pixels in images])
    back, _ = predictor.predict_images([png(np.ascontiguousarray(pixels[:, ::-1])) for pixels in images])
    np.testing.assert_allclose(there, back, atol=1e-5)


def test_ensemble_labels_with_the_mean(model, pool, tmp_path):
    folder, dataset = pool
    one, other = (
        Predictor(model, batch=8),
        Predictor(with_model_fields(model, tmp_path / "other", inference_precision="bfloat16"), batch=8),
    )
    labels = LocalStore(tmp_path / "labels")
    assert label_pool_shards([one, other], folder, dataset, labels, range(3), LABELING) == 60
    rows = read_label_rows(labels, LabelShard.load_file(labels, "shard-00001.json"))
    each = [predictor.predict_shard(ImageSource(folder, dataset), 1).probabilities for predictor in (one, other)]
    np.testing.assert_allclose(expand_probabilities(rows, 5), np.mean(each, axis=0), atol=2e-3)


def test_labels_of_the_first_worker_stay(model, pool, tmp_path, monkeypatch):
    folder, dataset = pool
    labels = LocalStore(tmp_path)
    predictor, shards = Predictor(model, batch=8), Predictor.predict_shards

    def overtaken(self, source, wanted, progress=None):
        for number, found in enumerate(shards(self, source, wanted, progress)):
            if number == 0:
                other = Predictor(model, batch=8)
                monkeypatch.setattr(Predictor, "predict_shards", shards)
                label_pool_shards([other], folder, dataset, labels, range(2), LABELING)
                first.update({key: labels.get(key) for key in labels.list()})
            # As on a machine that adds up in another order.
            found.probabilities[:] = np.roll(found.probabilities, 1, axis=1)
            yield found

    first = {}
    monkeypatch.setattr(Predictor, "predict_shards", overtaken)
    label_pool_shards([predictor], folder, dataset, labels, range(2), LABELING)
    assert len(first) == 6
    assert {key: labels.get(key) for key in labels.list()} == first


def test_labels_of_another_label_set_are_copied(model, pool, tmp_path):
    folder, dataset = pool
    predictor = Predictor(model, batch=8)
    first, second = LocalStore(tmp_path / "first"), LocalStore(tmp_path / "second")
    label_pool_shards([predictor], folder, dataset, first, range(2), LABELING)

    def known(shard):
        facts = {
            facts.source: facts for facts in (LabelShard.load_file(first, f"shard-0000{number}.json") for number in (0, 1))
        }
        return (first, facts[shard.sha256]) if shard.sha256 in facts else None

    # The pool has grown: its shards have other names now.
    renamed = tuple(shard.model_copy(update={"name": f"new-{shard.name}"}) for shard in dataset.shards[:2])
    grown = dataset.model_copy(update={"shards": (*renamed, dataset.shards[2])})
    assert label_pool_shards([predictor], folder, grown, second, range(3), LABELING, find_existing=known) == 20
    copied, damaged = (LabelShard.load_file(first, f"shard-0000{number}.json") for number in (0, 1))
    assert second.get(f"new-{copied.name}") == first.get(copied.name)
    first.put(damaged.name, b"damaged")
    third = LocalStore(tmp_path / "third")
    assert label_pool_shards([predictor], folder, dataset, third, range(2), LABELING, find_existing=known) == 20


def test_ensemble_needs_equal_classes(model, pool, tmp_path):
    folder, dataset = pool
    network, card = models.load_model(model)
    other = LocalStore(tmp_path / "other")
    fields = {name: getattr(card, name) for name in ("generation", "noise", "parameters", "steps", "lineage", "model")}
    models.save_model(other, network.state_dict(), {**fields, "classes": CLASSES[::-1]}, [])
    predictors = [Predictor(place, batch=8) for place in (model, other)]
    with pytest.raises(ConfigError, match=r"labeling\.ensemble: model .* has other classes, or another order of them"):
        label_pool_shards(predictors, folder, dataset, LocalStore(tmp_path / "labels"), range(1), LABELING)


def make_distance_scorer(model, folder, dataset):
    """Of the readable images of the first shard, as if they were labeled."""
    predictor = Predictor(model, batch=8)
    images = [image for row, image in enumerate(ImageSource(folder, dataset).read_encoded(0)) if row != 2]
    class_ids = torch.arange(len(images)) % 2
    return DistanceScorer.fit_stages(predictor.extract_stages(images), class_ids)


@pytest.mark.parametrize("views", ["one", "flip", "ten"])
def test_foreign_scores_leave_the_probabilities_as_they_are(model, pool, views):
    folder, dataset = pool
    plain = Predictor(model, batch=8, views=views).predict_shard(ImageSource(folder, dataset), 0)
    assert plain.foreign_scores is None
    for scorer in (EnergyScorer(), make_distance_scorer(model, folder, dataset)):
        scored = Predictor(model, batch=8, views=views, foreign_scorer=scorer).predict_shard(ImageSource(folder, dataset), 0)
        np.testing.assert_allclose(scored.probabilities, plain.probabilities, atol=1e-5)
        # The unreadable image has no score, and every other has one.
        assert np.flatnonzero(np.isnan(scored.foreign_scores)).tolist() == [2]


def test_foreign_score_is_the_mean_over_the_views(model, pool):
    folder, dataset = pool
    images = [decode_image(bytes(image)) for image in ImageSource(folder, dataset).read_encoded(1, 0, 3)]
    mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in images]
    scorer = make_distance_scorer(model, folder, dataset)
    with torch.inference_mode():
        scores = {
            (views, name): Predictor(model, batch=8, views=views, foreign_scorer=scorer)
            ._forward_batch(Predictor(model, batch=8).decode_pixels(group))
            .foreign_scores
            for views, name, group in (("one", "there", images), ("one", "back", mirrored), ("flip", "there", images))
        }
    expected = (scores["one", "there"] + scores["one", "back"]) / 2
    np.testing.assert_allclose(scores["flip", "there"], expected, rtol=1e-3)


def test_foreign_scores_of_an_ensemble_are_the_teachers(model, pool, tmp_path):
    folder, dataset = pool
    teacher = Predictor(model, batch=8, foreign_scorer=EnergyScorer())
    labels = LocalStore(tmp_path / "labels")
    label_pool_shards([teacher, Predictor(model, batch=8, views="flip")], folder, dataset, labels, range(3), LABELING)
    rows = read_label_rows(labels, LabelShard.load_file(labels, "shard-00001.json"))
    expected = teacher.predict_shard(ImageSource(folder, dataset), 1).foreign_scores
    np.testing.assert_allclose(rows.foreign_score, expected, rtol=1e-5)
    plain = LocalStore(tmp_path / "plain")
    label_pool_shards([Predictor(model, batch=8)], folder, dataset, plain, range(3), LABELING)
    assert read_label_rows(plain, LabelShard.load_file(plain, "shard-00001.json")).foreign_score is None


def test_network_without_stages_has_no_distance(model, pool):
    folder, dataset = pool
    predictor = Predictor(model, batch=8)
    predictor._network = torch.nn.Flatten()
    with pytest.raises(ConfigError, match=r"timm knows no stages of test_efficientnet; set energy, or another model\.arch"):
        predictor.extract_stages(list(ImageSource(folder, dataset).read_encoded(1)))
