"""The forms of an exported model: how each is written, and read back without this package's network."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ns.modeling.factory import Normalize, build_on_meta
from ns.modeling.manifest import WEIGHTS, ModelManifest
from ns.storage import Store
from ns.storage.documents import encode_json

ExportForm = Literal["timm", "onnx", "torch"]
TRITON_FILE = "config.pbtxt"
OPSET, IR_VERSION = 18, 8
"""ONNX operator set and format. onnxruntime 1.14 of 2023 reads them, which is in the Triton that KServe 0.20 starts by default (23.05)."""
MAX_BATCH = 64
"""Images that Triton computes at once."""


def make_timm_config(manifest: ModelManifest) -> dict[str, Any]:
    """`config.json` in timm's format, with the crop of our evaluation.

    timm cannot build reduced strides: `noisy_student.dense` names the modules of timm's network to change, and their new values.
    """
    size = manifest.model.inference_resolution
    outputs = manifest.model.outputs or len(manifest.classes)
    network = build_on_meta(manifest.model, manifest.noise, outputs)
    is_cropped = manifest.model.crop == "resized"
    return {
        "architecture": manifest.model.arch,
        "num_classes": outputs,
        "model_args": manifest.model.args,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            # With learned positions, timm must build the network for this resolution and not for its default.
            "fixed_input_size": bool(getattr(network, "pretrained_cfg", {}).get("fixed_input_size")),
            "interpolation": manifest.model.interpolation,
            "crop_mode": "center" if is_cropped and manifest.model.test_crop != "squash" else "squash",
            "crop_pct": _compute_crop_share(size, manifest.model.test_margin_px) if is_cropped else 1.0,
            "mean": list(manifest.mean),
            "std": list(manifest.std),
            "num_classes": outputs,
            "label_names": list(manifest.classes),
        },
        "noisy_student": {"model": manifest.digest, "dense": _find_dense_modules(manifest)},
    }


def _compute_crop_share(size: int, margin_px: int) -> float:
    """timm's `crop_pct`: it resizes to ⌊size / crop_pct⌋ px, which must be size + margin_px."""
    share = size / (size + margin_px)
    return share if math.floor(size / share) == size + margin_px else size / (size + margin_px + 0.5)


def _find_dense_modules(manifest: ModelManifest) -> dict[str, dict[str, int]]:
    """Module → the attributes in which our network differs from timm's, with our values."""
    plain = manifest.model.model_copy(update={"reduce_stride": 1})
    outputs = len(manifest.classes)
    theirs, ours = (build_on_meta(model, manifest.noise, outputs) for model in (plain, manifest.model))
    changes: dict[str, dict[str, int]] = {}
    for (name, plain_module), (_, dense_module) in zip(theirs.named_modules(), ours.named_modules(), strict=True):
        for attribute in ("stride", "kernel_size"):
            if getattr(plain_module, attribute, None) != getattr(dense_module, attribute, None):
                changes.setdefault(name, {})[attribute] = int(getattr(dense_module, attribute)[0])
    return changes


def _write_timm(file: Path, _: nn.Module, manifest: ModelManifest, store: Store) -> None:
    shutil.copyfile(store.path(manifest.weights_key), file.parent / WEIGHTS)
    file.write_bytes(encode_json(make_timm_config(manifest)))


def _read_timm(file: Path) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(f"local-dir:{file.parent}", pretrained=True)
    config = json.loads(file.read_bytes())
    for name, attributes in config["noisy_student"]["dense"].items():
        for attribute, value in attributes.items():
            setattr(network.get_submodule(name), attribute, (value, value))
    about = config["pretrained_cfg"]
    return nn.Sequential(Normalize(tuple(about["mean"]), tuple(about["std"])), network).eval()


def _write_torch(file: Path, network: nn.Module, manifest: ModelManifest, _: Store) -> None:
    images = torch.export.Dim("images", min=1)
    program = torch.export.export(
        _with_normalization(network, manifest), (_make_example_batch(manifest),), dynamic_shapes=({0: images},)
    )
    torch.export.save(program, file)


def _read_torch(file: Path) -> Callable[[Tensor], Tensor]:
    network: nn.Module = torch.export.load(file).module()
    return network


def _write_onnx(file: Path, network: nn.Module, manifest: ModelManifest, _: Store) -> None:
    # torch does not decompose its fused attention where a mask is added, as in BEiT, at a batch of any size.
    with sdpa_kernel(SDPBackend.MATH):
        torch.onnx.export(
            _with_normalization(network, manifest),
            (_make_example_batch(manifest),),
            file,
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
            verbose=False,
        )
    import onnx

    onnx_model = onnx.load(file)
    onnx_model.ir_version = IR_VERSION
    properties = {
        "classes": json.dumps(manifest.classes),
        "model": manifest.digest,
    }
    onnx.helper.set_model_props(onnx_model, properties)
    onnx.checker.check_model(onnx_model, full_check=True)
    onnx.save(onnx_model, file)
    file.with_name(TRITON_FILE).write_text(_format_triton_config(manifest), encoding="utf-8")


def _format_triton_config(manifest: ModelManifest) -> str:
    """Triton's description of model.onnx, in protobuf's text form. Triton names a model by its folder."""
    size, outputs = manifest.model.inference_resolution, manifest.model.outputs or len(manifest.classes)
    return f"""backend: "onnxruntime"
max_batch_size: {MAX_BATCH}
input [ {{ name: "images", data_type: TYPE_UINT8, dims: [ {size}, {size}, 3 ] }} ]
output [ {{ name: "logits", data_type: TYPE_FP32, dims: [ {outputs} ] }} ]
dynamic_batching {{ }}
"""


def _read_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])


def _make_example_batch(manifest: ModelManifest) -> Tensor:
    size = manifest.model.inference_resolution
    # A batch of two: the exporters would take a size of one for a constant.
    return torch.zeros(2, size, size, 3, dtype=torch.uint8)


class _ConstantNormalize(nn.Module):
    """`Normalize` in operations that every runtime has. uint8 [N, R, R, 3] → float32 [N, 3, R, R]."""

    mean: Tensor
    std: Tensor

    def __init__(self, manifest: ModelManifest) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(manifest.mean))
        self.register_buffer("std", 255 * torch.tensor(manifest.std))

    def forward(self, images: Tensor) -> Tensor:
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)


def _with_normalization(network: nn.Module, manifest: ModelManifest) -> nn.Module:
    return nn.Sequential(_ConstantNormalize(manifest), network).eval()


class FormIO(NamedTuple):
    """How a form is written to `file`, and read back as a function from uint8 images [N, R, R, 3] to logits."""

    filename: str
    write: Callable[[Path, nn.Module, ModelManifest, Store], None]
    read: Callable[[Path], Callable[[Tensor], Tensor]]


FORMS: dict[ExportForm, FormIO] = {
    "timm": FormIO("config.json", _write_timm, _read_timm),
    "onnx": FormIO("model.onnx", _write_onnx, _read_onnx),
    "torch": FormIO("model.pt2", _write_torch, _read_torch),
}
