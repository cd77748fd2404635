import pytest
import torch
from safetensors.torch import save_file
from structlog.testing import capture_logs

from ns.config.schema import ModelConfig, NoiseConfig
from ns.core.digest import sha256_file
from ns.core.errors import ConfigError, DataError
from ns.modeling import factory as models
from ns.modeling.manifest import Lineage, ModelManifest, digest_weights
from ns.storage import LocalStore
from ns.training.warm_start import InitialWeights, copy_weights, read_model_weights, read_weights

SMALL = ModelConfig(arch="test_efficientnet", resolution=32)
ABC = ("a", "b", "c")


def network(outputs: int = 3) -> torch.nn.Module:
    return models.build_model(SMALL, NoiseConfig(), outputs)


@pytest.fixture
def teacher(tmp_path):
    """A model of classes a, b, c and the folder it is in."""
    net = network()
    fields = {"generation": 0, "model": SMALL, "noise": NoiseConfig(), "classes": ABC, "parameters": 1, "steps": 1}
    lineage = Lineage(config="0", labeled="0")
    models.save_model(LocalStore(tmp_path / "model"), net.state_dict(), {**fields, "lineage": lineage}, [])
    return net, tmp_path / "model"


def test_warm_start_copies_all_of_a_model_of_the_same_classes(teacher):
    net, folder = teacher
    student = network()
    copy_weights(student, read_model_weights(LocalStore(folder)), ABC)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("classes", [("a", "b", "c", "d", "e"), ("b", "a", "c")])
def test_warm_start_makes_a_fresh_head_for_other_classes(teacher, classes):
    net, folder = teacher
    student = network(len(classes))
    head = student.classifier.weight.clone()
    copy_weights(student, read_weights(str(folder)), classes)
    assert torch.equal(student.conv_stem.weight, net.conv_stem.weight)
    assert torch.equal(student.classifier.weight, head)


def test_warm_start_copies_from_a_file_by_shapes(teacher, tmp_path):
    net, folder = teacher
    same, wider = network(), network(5)
    told = []
    for student in (same, wider):
        with capture_logs() as logs:
            copy_weights(
                student, read_weights(str(folder / ModelManifest.load(LocalStore(folder)).weights_key)), ("x", "y", "z")
            )
        told.append(any("the classifier starts from random weights" in entry["event"] for entry in logs))
    assert told == [False, True]
    assert torch.equal(same.classifier.weight, net.classifier.weight)
    assert torch.equal(wider.conv_stem.weight, net.conv_stem.weight)


@pytest.mark.parametrize("wrappers", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_warm_start_reads_weights_of_a_wrapped_network(teacher, wrappers):
    net, _ = teacher
    student = network()
    wrapped = {f"{wrappers}{name}": value for name, value in net.state_dict().items()}
    copy_weights(student, InitialWeights("x", wrapped, None), ABC)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in student.state_dict().items())


def test_warm_start_refuses_weights_of_another_architecture():
    with pytest.raises(ConfigError, match=r"model\.pretrained: x: none of its 1 tensors"):
        copy_weights(network(), InitialWeights("x", {"layer1.0.conv1.weight": torch.zeros(3)}, None), ABC)


def test_read_weights_refuses_other_kinds_of_files(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(DataError, match=r"x\.safetensors: not a safetensors file"):
        read_weights(str(tmp_path / "x.safetensors"))


def test_digest_weights_depends_on_bytes_only(teacher, tmp_path):
    _, folder = teacher
    digest = sha256_file(folder / ModelManifest.load(LocalStore(folder)).weights_key)
    assert (
        digest_weights(str(folder))
        == digest_weights(str(folder / ModelManifest.load(LocalStore(folder)).weights_key))
        == digest
    )
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    assert digest_weights((tmp_path / "other.safetensors").as_uri()) != digest
