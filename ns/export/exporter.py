"""Models for programs that know nothing of ours: plain timm, ONNX, torch.export.

    OUT/config.json           what timm builds the network from, with the classes' names and the preprocessing
    OUT/model.safetensors     the averaged weights, by timm's names
    OUT/model.onnx            float32 [N, 3, R, R], normalized → float32 [N, classes], logits
    OUT/model.pt2             the same as a torch.export program
    OUT/README.md             the model card
    OUT/export.json           what was exported, and how it was checked; written last

Every form is checked against our own network on real images before it is kept. N is free; R is the model's test resolution.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ns import __version__
from ns.core.digest import sha256_file
from ns.core.errors import ConfigError, DataError, StoreError
from ns.data.augment.transforms import EvalTransform
from ns.data.dataset import Dataset
from ns.data.loading.decode import allocate_images
from ns.data.loading.shard_reader import ImageSource
from ns.evaluation.result import Subsample
from ns.evaluation.subsample import draw_rows
from ns.modeling import factory as models
from ns.modeling.manifest import WEIGHTS, ModelManifest
from ns.storage import Store
from ns.storage.documents import JsonDocument, encode_json

ExportForm = Literal["timm", "onnx", "torch"]
CARD = "README.md"
FILES: dict[ExportForm, str] = {"timm": "config.json", "onnx": "model.onnx", "torch": "model.pt2"}
OPSET = 20
"""Of ONNX: runtimes from 2024 on know it."""
TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit: kernels add up float32 in another order."""


class ExportCheck(JsonDocument):
    """One form of the model beside our own, on the same images."""

    form: ExportForm
    file: str
    sha256: str
    images: int
    largest_difference: float
    """Of logits, ours in 'float32'."""
    largest_logit: float
    same_top1: float
    """Share of images that get the same class."""


class ExportManifest(JsonDocument):
    """`export.json`."""

    filename: ClassVar[str] = "export.json"

    format: Literal[1] = 1
    model: str
    """Digest of the model's card."""
    weights_sha256: str
    dataset: str
    """Digest of the dataset that the check's images are from."""
    resolution: int
    checks: tuple[ExportCheck, ...]
    version: str
    """Of this package."""


def export_model(
    store: Store,
    out: Path,
    forms: Sequence[ExportForm],
    images: tuple[Store, Dataset],
    *,
    count: int = 64,
    describe: Callable[[ModelManifest, ExportManifest], str] | None = None,
) -> ExportManifest:
    """Writes a model to the folder `out` in each of the forms, checked on `count` images of a dataset.

    `describe` gives the text of README.md. `out` appears whole or not at all; one that holds an earlier export of ours is replaced.

    Raises ConfigError if a library is missing or the network cannot be exported, DataError if a form does not give what our own
    network does, StoreError if `out` holds anything else.
    """
    _require_libraries(forms)
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: is a file; name an empty or a new folder")
    if out.exists() and any(out.iterdir()) and not (out / ExportManifest.filename).exists():
        raise StoreError(f"{out}: is not empty and holds no {ExportManifest.filename}; name an empty or a new folder")
    network, manifest = models.load_model(store)
    batch = _load_batch(manifest, *images, count)
    expected = _run_network(network, batch)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        export_path = Path(scratch) / "export"
        export_path.mkdir()
        checks = tuple(_check_form(form, export_path, network, manifest, store, batch, expected) for form in forms)
        export_manifest = ExportManifest(
            model=manifest.digest,
            weights_sha256=manifest.weights_sha256,
            dataset=images[1].digest,
            resolution=manifest.model.inference_resolution,
            checks=checks,
            version=__version__,
        )
        if describe:
            (export_path / CARD).write_text(describe(manifest, export_manifest), encoding="utf-8")
        (export_path / ExportManifest.filename).write_bytes(encode_json(export_manifest.model_dump(mode="json")))
        # Only now does the earlier export go; its name is free for a moment, and never holds half of anything.
        if out.exists():
            out.rename(Path(scratch) / "earlier")
        export_path.rename(out)
    return export_manifest


def make_timm_config(manifest: ModelManifest) -> dict[str, Any]:
    """`config.json` as timm writes and reads it. The crop is that of our evaluation.

    timm cannot be asked for reduced strides: `noisy_student.dense` names the modules of its network that then change, and to what.
    """
    size = manifest.model.inference_resolution
    outputs = manifest.model.outputs or len(manifest.classes)
    photographs = manifest.noise.crop == "resized"
    with torch.device("meta"):
        fixed = bool(
            getattr(models.build_model(manifest.model, manifest.noise, outputs), "pretrained_cfg", {}).get("fixed_input_size")
        )
    crop = ("center", size / (size + manifest.model.test_margin_px)) if photographs else ("squash", 1.0)
    return {
        "architecture": manifest.model.arch,
        "num_classes": outputs,
        "model_args": manifest.model.args,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            # Where positions are learnt, timm must build the network for these images and not for its usual ones.
            "fixed_input_size": fixed,
            "interpolation": "bicubic",
            "crop_mode": crop[0],
            "crop_pct": crop[1],
            "mean": list(manifest.mean),
            "std": list(manifest.std),
            "num_classes": outputs,
            "label_names": list(manifest.classes),
        },
        "noisy_student": {"model": manifest.digest, "dense": _find_dense_modules(manifest)},
    }


def _find_dense_modules(manifest: ModelManifest) -> dict[str, dict[str, int]]:
    """Module → the attributes in which our network differs from timm's."""
    plain = manifest.model.model_copy(update={"reduce_stride": 1})
    outputs = len(manifest.classes)
    with torch.device("meta"):
        theirs, ours = (models.build_model(model, manifest.noise, outputs) for model in (plain, manifest.model))
    changes: dict[str, dict[str, int]] = {}
    for (name, plain_module), (_, dense_module) in zip(theirs.named_modules(), ours.named_modules(), strict=True):
        for attribute in ("stride", "kernel_size"):
            if getattr(plain_module, attribute, None) != getattr(dense_module, attribute, None):
                changes.setdefault(name, {})[attribute] = int(getattr(dense_module, attribute)[0])
    return changes


def _require_libraries(forms: Sequence[ExportForm]) -> None:
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
    for form in forms:
        if missing := [name for name in needed.get(form, ()) if find_spec(name) is None]:
            raise ConfigError(f"--form {form}: {' and '.join(missing)} not installed; pip install 'noisy-student[export]'")


def _load_batch(manifest: ModelManifest, store: Store, dataset: Dataset, count: int) -> Tensor:
    """Real images as the network is fed with: float32 [n, 3, R, R], normalized; n is less than `count` if some cannot be read."""
    if dataset.role == "unlabeled":
        raise DataError(
            f"{store.uri}: has no labels, by which images of all classes are drawn; name a labeled dataset, or one to evaluate on"
        )
    size = manifest.model.inference_resolution
    source = ImageSource(store, dataset)
    rows = draw_rows(source, len(dataset.shards), len(dataset.classes), Subsample(images=count, seed=0))
    pictures = [
        image
        for shard, shard_rows in rows.items()
        for row in shard_rows
        for image in source.read_encoded(shard, int(row), int(row) + 1)
    ]
    pixels = allocate_images(len(pictures), size)
    unreadable = EvalTransform(size, manifest.noise.crop, manifest.model.test_margin_px).transform_batch(pictures, pixels)
    readable = [row for row in range(len(pictures)) if row not in unreadable]
    if not readable:
        raise DataError(f"{store.uri}: none of its images can be read, so an export cannot be checked on them")
    batch: Tensor = models.Normalize(manifest.mean, manifest.std)(torch.from_numpy(pixels[: len(pictures)][readable]))
    return batch


def _run_network(network: Callable[[Tensor], Tensor], batch: Tensor) -> npt.NDArray[np.float32]:
    """Logits, float32 [n, classes]: of one image and of the others apart, so that more than one size of batch is tried."""
    with torch.inference_mode():
        parts = [network(part).float().numpy() for part in (batch[:1], batch[1:]) if len(part)]
    return np.concatenate(parts)


def _check_form(
    form: ExportForm,
    out: Path,
    network: nn.Module,
    manifest: ModelManifest,
    store: Store,
    batch: Tensor,
    expected: npt.NDArray[np.float32],
) -> ExportCheck:
    write, read = _FORM_IO[form]
    file = out / FILES[form]
    try:
        write(file, network, manifest, store)
        logits = _run_network(read(file), batch)
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f"--form onnx: {manifest.model.arch} cannot be exported: {str(error).splitlines()[0]}") from error
    except torch._dynamo.exc.UserError as error:
        raise ConfigError(f"--form {form}: {manifest.model.arch} cannot be exported: {str(error).splitlines()[0]}") from error
    check = ExportCheck(
        form=form,
        file=file.name,
        sha256=sha256_file(file),
        images=len(batch),
        largest_difference=float(np.abs(logits - expected).max()),
        largest_logit=float(np.abs(expected).max()),
        same_top1=float((logits.argmax(1) == expected.argmax(1)).mean()),
    )
    # A NaN differs from everything.
    if not check.largest_difference <= TOLERANCE * check.largest_logit:
        raise DataError(
            f"--form {form}: logits differ from our own network's by up to {check.largest_difference:.3g} on {check.images} images "
            f"(the largest logit is {check.largest_logit:.3g}), so nothing was written; please report it with {manifest.model.arch} "
            f"and torch {torch.__version__}"
        )
    return check


def _write_timm(file: Path, network: nn.Module, manifest: ModelManifest, store: Store) -> None:
    del network
    shutil.copyfile(store.path(WEIGHTS), file.parent / WEIGHTS)
    file.write_bytes(encode_json(make_timm_config(manifest)))


def _read_timm(file: Path) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(f"local-dir:{file.parent}", pretrained=True)
    for name, attributes in json.loads(file.read_bytes())["noisy_student"]["dense"].items():
        for attribute, value in attributes.items():
            setattr(network.get_submodule(name), attribute, (value, value))
    return network.eval()


def _write_torch(file: Path, network: nn.Module, manifest: ModelManifest, store: Store) -> None:
    del store
    images = torch.export.Dim("images", min=1)
    torch.export.save(torch.export.export(network, (_make_example_batch(manifest),), dynamic_shapes=({0: images},)), file)


def _read_torch(file: Path) -> Callable[[Tensor], Tensor]:
    network: nn.Module = torch.export.load(file).module()
    return network


def _write_onnx(file: Path, network: nn.Module, manifest: ModelManifest, store: Store) -> None:
    del store
    torch.onnx.export(
        network,
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
    properties = {
        "classes": json.dumps(manifest.classes),
        "mean": json.dumps(manifest.mean),
        "std": json.dumps(manifest.std),
        "model": manifest.digest,
    }
    onnx.helper.set_model_props(onnx_model, properties)
    onnx.checker.check_model(onnx_model, full_check=True)
    onnx.save(onnx_model, file)


def _read_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])


def _make_example_batch(manifest: ModelManifest) -> Tensor:
    size = manifest.model.inference_resolution
    # Two: a batch of one would be taken for a constant.
    return torch.zeros(2, 3, size, size).contiguous(memory_format=torch.channels_last)


_FORM_IO: dict[
    ExportForm, tuple[Callable[[Path, nn.Module, ModelManifest, Store], None], Callable[[Path], Callable[[Tensor], Tensor]]]
] = {
    "timm": (_write_timm, _read_timm),
    "onnx": (_write_onnx, _read_onnx),
    "torch": (_write_torch, _read_torch),
}
