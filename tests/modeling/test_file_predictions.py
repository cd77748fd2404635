import numpy as np
import pytest
import torch
from PIL import Image

from ns.config.schema import ModelConfig, NoiseConfig
from ns.modeling import factory, file_predictions
from ns.modeling.file_predictions import predict_files
from ns.modeling.manifest import Lineage
from ns.storage import LocalStore


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = LocalStore(tmp_path_factory.mktemp("model"))
    config, noise = ModelConfig(arch="test_resnet", resolution=32, crop="none"), NoiseConfig()
    torch.manual_seed(0)
    state = factory.build_model(config, noise, 3).state_dict()
    about = {"model": config, "noise": noise, "lineage": Lineage(config="0", labeled="0")}
    factory.save_model(folder, state, {"generation": 0, "classes": tuple("abc"), "parameters": 1, "steps": 0} | about, [])
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Seven images, of which the third is damaged; the sixth is not there."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(7)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    paths[5].unlink()
    return paths


def test_answers_do_not_depend_on_how_many_files_are_in_memory(model, files, monkeypatch):
    whole = list(predict_files(model, files, 2))
    assert [prediction.path for prediction in whole] == files
    assert [index for index, prediction in enumerate(whole) if prediction.error] == [2, 5]
    assert whole[5].error == "No such file or directory"
    monkeypatch.setattr(file_predictions, "FILES_IN_MEMORY", 2)
    parts = list(predict_files(model, files, 2))
    for one, other in zip(whole, parts, strict=True):
        assert (one.path, one.error) == (other.path, other.error)
        assert [name for name, _ in one.classes] == [name for name, _ in other.classes]
        # Batches of another size may add in another order.
        assert [share for _, share in one.classes] == pytest.approx([share for _, share in other.classes], abs=1e-5)


def test_a_folder_is_told_how_to_name_its_files(model, files):
    (answer,) = predict_files(model, [files[0].parent], 1)
    assert answer.error == "is a folder; name its files: FOLDER/*.jpg"


def test_files_are_read_as_their_answers_are_asked_for(model, files, monkeypatch):
    monkeypatch.setattr(file_predictions, "FILES_IN_MEMORY", 1)
    read = []
    monkeypatch.setattr(type(files[0]), "read_bytes", lambda path: read.append(path) or path.open("rb").read())
    answers = predict_files(model, files[:2], 1)
    assert next(iter(answers)).path == files[0]
    assert [path for path in read if path in files] == files[:1]
