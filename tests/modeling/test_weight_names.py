"""Weights that fit a network or do not, known from the header of their file."""

import pytest
import torch
from safetensors.torch import save_file

from ns.config.schema import ModelConfig, NoiseConfig
from ns.core.errors import ConfigError, DataError
from ns.modeling.factory import build_model
from ns.modeling.tensor_shapes import read_tensor_shapes
from ns.modeling.weight_names import check_weights_fit, strip_wrappers


@pytest.fixture(scope="module")
def network():
    return build_model(ModelConfig(arch="test_efficientnet"), NoiseConfig(), 3)


def save(path, network, wrapper=""):
    save_file({f"{wrapper}{name}": value.contiguous() for name, value in network.state_dict().items()}, path, {"format": "pt"})
    return str(path)


def test_read_tensor_shapes_reads_the_header_alone(network, tmp_path):
    uri = save(tmp_path / "a.safetensors", network)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert read_tensor_shapes(uri) == expected
    with (tmp_path / "a.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size - 1000)
        file.write(b"\xff" * 1000)
        assert read_tensor_shapes(uri) == expected
        file.truncate(size - 1000)
    with pytest.raises(DataError, match=f"has {size - 1000:,} bytes, must have {size:,}; it was cut off"):
        read_tensor_shapes(uri)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a zip archive, long enough", b"\x80\x02}q\x00.", b"\x04" + bytes(7) + b"[1] "], ids=range(4)
)
def test_other_files_are_no_safetensors(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.safetensors: not a safetensors file"):
        read_tensor_shapes(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
def test_weights_of_the_network_fit(network, tmp_path, wrapper):
    uri = save(tmp_path / "a.safetensors", network, wrapper)
    assert check_weights_fit(network, uri, read_tensor_shapes(uri)).describe() is None


def test_weights_of_another_architecture_are_refused(network, tmp_path):
    save_file({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"model\.pretrained: a: none of its 1 tensors has the name and shape of one"):
        check_weights_fit(network, "a", read_tensor_shapes(str(tmp_path / "a.safetensors")))


def test_strip_wrappers_leaves_names_that_fit():
    assert strip_wrappers({"model.a": 1, "model.b": 2}, {"model.a"}) == {"model.a": 1, "model.b": 2}
    assert strip_wrappers({"model.a": 1, "b": 2}, {"a"}) == {"model.a": 1, "b": 2}
