"""Published sets, as small copies of them: what is read, in which order, and what is counted."""

import io

import numpy as np
import pytest
from PIL import Image

from ns.config.schema import EvaluationConfig
from ns.core.errors import DataError
from ns.data.loading.decode import decode_image
from ns.evaluation.result import Robustness
from ns.evaluation.robustness.published import CIFAR10_CLASSES, PublishedSet, digest_listing, measure_published_set
from ns.modeling.predictor import Predictor
from ns.storage import LocalStore

CONFIG = EvaluationConfig(severities=(1, 5))


@pytest.fixture(scope="module")
def predictor(make_model, tmp_path_factory):
    return Predictor(make_model(tmp_path_factory.mktemp("cifar"), classes=CIFAR10_CLASSES), batch=8)


def run_set(predictor, path, kind, out, config=CONFIG):
    folder, out = LocalStore(path), LocalStore(out)
    result = measure_published_set(predictor, folder, kind, "set", digest_listing(folder), config, out.at("units"), out)
    assert Robustness.load(out) == result
    return result


@pytest.fixture
def cifar10_c(tmp_path, make_pixels):
    path = tmp_path / "cifar10-c"
    path.mkdir()
    labels = np.tile(np.arange(10, dtype=np.uint8), 2)
    np.save(path / "labels.npy", np.tile(labels, 5))
    for number, kind in enumerate(("fog", "spatter", "motion_blur")):
        np.save(path / f"{kind}.npy", make_pixels(100, 32, seed=number))
    return path


def test_measure_published_set_reads_cifar10_c(predictor, cifar10_c, tmp_path):
    result = run_set(predictor, cifar10_c, "cifar10-c", tmp_path / "out")
    images, labels = np.load(cifar10_c / "fog.npy"), np.load(cifar10_c / "labels.npy")
    expected = []
    for severity in (1, 5):
        part = slice(20 * (severity - 1), 20 * severity)
        probabilities = next(predictor.predict_groups([list(images[part])]))
        names = [CIFAR10_CLASSES[label] for label in labels[part]]
        wrong = [
            predictor.manifest.classes[answer] != name for answer, name in zip(probabilities.argmax(1), names, strict=True)
        ]
        expected.append(np.mean(wrong))
    assert result.corruptions["fog"] == pytest.approx(tuple(expected))
    # Not asked for: the extra ones.
    assert set(result.corruptions) == {"fog", "motion_blur"}
    assert (result.kind, result.images, result.top1, result.severities) == ("cifar10-c", 20, None, (1, 5))
    assert not result.imagenet


def test_measure_published_set_draws_evenly(predictor, cifar10_c, tmp_path):
    result = run_set(predictor, cifar10_c, "cifar10-c", tmp_path / "out", CONFIG.model_copy(update={"images": 10}))
    assert (result.images, result.subsample.images) == (10, 10)


def test_measure_published_set_reads_imagenet_c(make_model, picture, tmp_path):
    names = ("n01", "n02", "n03")
    predictor = Predictor(make_model(tmp_path / "model", classes=names), batch=4)
    store = LocalStore(tmp_path / "imagenet-c")
    wrong = {1: 0, 5: 0}
    for severity in (1, 5):
        for number in range(7):
            data, name = picture(10 * severity + number, "JPEG", 224), names[number % 3]
            damaged = number == 4
            store.put(f"frost/{severity}/{name}/ILSVRC2012_val_{number:08d}.JPEG", data[:50] if damaged else data)
            if not damaged:
                whole = np.asarray(Image.fromarray(decode_image(data)).resize((32, 32), Image.Resampling.BICUBIC))
                answer = int(next(predictor.predict_groups([[whole]])).argmax())
                wrong[severity] += names[answer] != name
    result = run_set(predictor, tmp_path / "imagenet-c", "imagenet-c", tmp_path / "out")
    assert result.corruptions == {"frost": (pytest.approx(wrong[1] / 6), pytest.approx(wrong[5] / 6))}
    assert (result.images, result.unreadable) == (6, 1)
    other = Predictor(make_model(tmp_path / "other"), batch=4)
    with pytest.raises(DataError, match=r"frost/1/n01: the model has no class of this name"):
        run_set(other, tmp_path / "imagenet-c", "imagenet-c", tmp_path / "out")


def test_measure_published_set_reads_imagenet_p(make_model, tmp_path):
    av = pytest.importorskip("av")
    names = ("n01", "n02")
    predictor = Predictor(make_model(tmp_path / "model", classes=names), batch=8)
    store = LocalStore(tmp_path / "imagenet-p")
    rng = np.random.default_rng(0)
    for number in range(3):
        sink = io.BytesIO()
        with av.open(sink, "w", format="mp4") as film:
            stream = film.add_stream("mpeg4", rate=1)
            stream.width = stream.height = 224
            stream.pix_fmt = "yuv420p"
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((224, 224))
            for step in range(5):
                frame = np.roll(np.asarray(coarse), 20 * step, 1)
                film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            film.mux(stream.encode(None))
        store.put(f"translate/{names[number % 2]}/{number}.mp4", sink.getvalue())
    result = run_set(predictor, tmp_path / "imagenet-p", "imagenet-p", tmp_path / "out")
    assert list(result.perturbations) == ["translate"]
    assert (result.images, result.frames) == (3, 5)
    made = PublishedSet(store, "imagenet-p", names).find_entries("translate", 1)
    flipped = []
    for row in range(3):
        frames = made.load(row)
        assert [frame.shape for frame in frames] == [(224, 224, 3)] * 5
        answers = next(predictor.without_crop().predict_groups([frames])).argmax(1)
        flipped.append((answers[1:] != answers[:-1]).mean())
    assert result.perturbations["translate"].flip_probability == pytest.approx(np.mean(flipped))


def test_measure_published_set_reuses_units(predictor, cifar10_c, tmp_path, monkeypatch):
    first = run_set(predictor, cifar10_c, "cifar10-c", tmp_path / "out")
    monkeypatch.setattr(Predictor, "predict_groups", lambda *_: pytest.fail("done again"))
    assert run_set(predictor, cifar10_c, "cifar10-c", tmp_path / "out").digest == first.digest


@pytest.mark.parametrize(
    ("file", "array", "reason"),
    [
        ("fog.npy", np.zeros((7, 32, 32, 3), np.uint8), r"fog\.npy: uint8 \(7, 32, 32, 3\) for 100 labels: must be uint8"),
        ("fog.npy", np.zeros((100, 32), np.uint8), r"fog\.npy: has 2 dimensions, must have 4"),
        ("labels.npy", np.full(100, 77), r"labels\.npy: 77 … 77: must be class indices below 10"),
        ("labels.npy", np.array([{}] * 100), r"labels\.npy: not a NumPy array"),
    ],
)
def test_measure_published_set_refuses_other_arrays(predictor, cifar10_c, tmp_path, file, array, reason):
    np.save(cifar10_c / file, array, allow_pickle=True)
    with pytest.raises(DataError, match=reason):
        run_set(predictor, cifar10_c, "cifar10-c", tmp_path / "out")


def test_measure_published_set_refuses_folder_without_kinds(predictor, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is no imagenet-c set: none of its kinds is there"):
        run_set(predictor, tmp_path / "empty", "imagenet-c", tmp_path / "out")
