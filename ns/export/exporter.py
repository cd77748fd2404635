"""Models for programs that know nothing of ours: plain timm, ONNX, torch.export.

    OUT/config.json           what timm builds the network from, with the classes' names and the preprocessing
    OUT/model.safetensors     the averaged weights, by timm's names
    OUT/model.onnx            float32 [N, 3, R, R], normalised → float32 [N, classes], logits
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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ns import __version__
from ns.core.digest import sha256_file
from ns.core.errors import ConfigError, DataError, StoreError
from ns.data.augment.transforms import EvalTransform
from ns.data.dataset import Dataset
from ns.data.loading.decode import room
from ns.data.loading.shard_reader import ImageSource
from ns.evaluation.result import Subsample
from ns.evaluation.subsample import drawn
from ns.modeling import factory as models
from ns.modeling.manifest import WEIGHTS, ModelCard
from ns.storage import Store
from ns.storage.documents import Document, pretty

Form = Literal["timm", "onnx", "torch"]
EXPORT = "export.json"
CARD = "README.md"
FILES: dict[Form, str] = {"timm": "config.json", "onnx": "model.onnx", "torch": "model.pt2"}
OPSET = 20
"""Of ONNX: runtimes from 2024 on know it."""
TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit: kernels add up float32 in another order."""


class Check(Document):
    """One form of the model beside our own, on the same images."""

    form: Form
    file: str
    sha256: str
    images: int
    largest_difference: float
    """Of logits, ours in 'float32'."""
    largest_logit: float
    same_top1: float
    """Share of images that get the same class."""


class Exported(Document):
    """`export.json`."""

    format: Literal[1] = 1
    model: str
    """Digest of the model's card."""
    weights_sha256: str
    dataset: str
    """Digest of the dataset that the check's images are from."""
    resolution: int
    checks: tuple[Check, ...]
    version: str
    """Of this package."""


def export(
    folder: Store,
    out: Path,
    forms: Sequence[Form],
    images: tuple[Store, Dataset],
    *,
    count: int = 64,
    describe: Callable[[ModelCard, Exported], str] | None = None,
) -> Exported:
    """Writes a model to the folder `out` in each of the forms, checked on `count` images of a dataset.

    `describe` gives the text of README.md. `out` appears whole or not at all; one that holds an earlier export of ours is replaced.

    Raises ConfigError if a library is missing or the network cannot be exported, DataError if a form does not give what our own
    network does, StoreError if `out` holds anything else.
    """
    _require(forms)
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: is a file; name an empty or a new folder")
    if out.exists() and any(out.iterdir()) and not (out / EXPORT).exists():
        raise StoreError(f"{out}: is not empty and holds no {EXPORT}; name an empty or a new folder")
    network, card = models.load(folder)
    batch = _batch(card, *images, count)
    expected = _run(network, batch)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch) / "export"
        made.mkdir()
        checks = tuple(_checked(form, made, network, card, folder, batch, expected) for form in forms)
        exported = Exported(
            model=card.digest,
            weights_sha256=card.weights_sha256,
            dataset=images[1].digest,
            resolution=card.model.inference_resolution,
            checks=checks,
            version=__version__,
        )
        if describe:
            (made / CARD).write_text(describe(card, exported), encoding="utf-8")
        (made / EXPORT).write_bytes(pretty(exported.model_dump(mode="json")))
        # Only now does the earlier export go; its name is free for a moment, and never holds half of anything.
        if out.exists():
            out.rename(Path(scratch) / "earlier")
        made.rename(out)
    return exported


def timm_config(card: ModelCard) -> dict[str, Any]:
    """`config.json` as timm writes and reads it. The crop is that of our evaluation.

    timm cannot be asked for reduced strides: `noisy_student.dense` names the modules of its network that then change, and to what.
    """
    size = card.model.inference_resolution
    outputs = card.model.outputs or len(card.classes)
    photographs = card.noise.crop == "resized"
    with torch.device("meta"):
        fixed = bool(getattr(models.build(card.model, card.noise, outputs), "pretrained_cfg", {}).get("fixed_input_size"))
    crop = ("center", size / (size + card.model.test_margin_px)) if photographs else ("squash", 1.0)
    return {
        "architecture": card.model.arch,
        "num_classes": outputs,
        "model_args": card.model.args,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            # Where positions are learnt, timm must build the network for these images and not for its usual ones.
            "fixed_input_size": fixed,
            "interpolation": "bicubic",
            "crop_mode": crop[0],
            "crop_pct": crop[1],
            "mean": list(card.mean),
            "std": list(card.std),
            "num_classes": outputs,
            "label_names": list(card.classes),
        },
        "noisy_student": {"model": card.digest, "dense": _dense(card)},
    }


def _dense(card: ModelCard) -> dict[str, dict[str, int]]:
    """Module → the attributes in which our network differs from timm's."""
    plain = card.model.model_copy(update={"reduce_stride": 1})
    outputs = len(card.classes)
    with torch.device("meta"):
        theirs, ours = (models.build(model, card.noise, outputs) for model in (plain, card.model))
    found: dict[str, dict[str, int]] = {}
    for (name, one), (_, other) in zip(theirs.named_modules(), ours.named_modules(), strict=True):
        for attribute in ("stride", "kernel_size"):
            if getattr(one, attribute, None) != getattr(other, attribute, None):
                found.setdefault(name, {})[attribute] = int(getattr(other, attribute)[0])
    return found


def _require(forms: Sequence[Form]) -> None:
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
    for form in forms:
        if missing := [name for name in needed.get(form, ()) if find_spec(name) is None]:
            raise ConfigError(f"--form {form}: {' and '.join(missing)} not installed; pip install 'noisy-student[export]'")


def _batch(card: ModelCard, folder: Store, dataset: Dataset, count: int) -> Tensor:
    """Real images as the network is fed with: float32 [n, 3, R, R], normalised; n is less than `count` if some cannot be read."""
    if dataset.role == "unlabelled":
        raise DataError(
            f"{folder.uri}: has no labels, by which images of all classes are drawn; name a labelled dataset, or one to evaluate on"
        )
    size = card.model.inference_resolution
    source = ImageSource(folder, dataset)
    rows = drawn(source, len(dataset.shards), len(dataset.classes), Subsample(images=count, seed=0))
    pictures = [image for shard, own in rows.items() for row in own for image in source.encoded(shard, int(row), int(row) + 1)]
    pixels = room(len(pictures), size)
    unreadable = EvalTransform(size, card.noise.crop, card.model.test_margin_px).batch(pictures, pixels)
    readable = [row for row in range(len(pictures)) if row not in unreadable]
    if not readable:
        raise DataError(f"{folder.uri}: none of its images can be read, so an export cannot be checked on them")
    batch: Tensor = models.Normalize(card.mean, card.std)(torch.from_numpy(pixels[: len(pictures)][readable]))
    return batch


def _run(network: Callable[[Tensor], Tensor], batch: Tensor) -> npt.NDArray[np.float32]:
    """Logits, float32 [n, classes]: of one image and of the others apart, so that more than one size of batch is tried."""
    with torch.inference_mode():
        parts = [network(part).float().numpy() for part in (batch[:1], batch[1:]) if len(part)]
    return np.concatenate(parts)


def _checked(
    form: Form,
    folder: Path,
    network: nn.Module,
    card: ModelCard,
    model: Store,
    batch: Tensor,
    expected: npt.NDArray[np.float32],
) -> Check:
    write, read = _WAYS[form]
    file = folder / FILES[form]
    try:
        write(file, network, card, model)
        found = _run(read(file), batch)
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f"--form onnx: {card.model.arch} cannot be exported: {str(error).splitlines()[0]}") from error
    except torch._dynamo.exc.UserError as error:
        raise ConfigError(f"--form {form}: {card.model.arch} cannot be exported: {str(error).splitlines()[0]}") from error
    check = Check(
        form=form,
        file=file.name,
        sha256=sha256_file(file),
        images=len(batch),
        largest_difference=float(np.abs(found - expected).max()),
        largest_logit=float(np.abs(expected).max()),
        same_top1=float((found.argmax(1) == expected.argmax(1)).mean()),
    )
    # A NaN differs from everything.
    if not check.largest_difference <= TOLERANCE * check.largest_logit:
        raise DataError(
            f"--form {form}: logits differ from our own network's by up to {check.largest_difference:.3g} on {check.images} images "
            f"(the largest logit is {check.largest_logit:.3g}), so nothing was written; please report it with {card.model.arch} "
            f"and torch {torch.__version__}"
        )
    return check


def _write_timm(file: Path, network: nn.Module, card: ModelCard, model: Store) -> None:
    del network
    shutil.copyfile(model.path(WEIGHTS), file.parent / WEIGHTS)
    file.write_bytes(pretty(timm_config(card)))


def _read_timm(file: Path) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(f"local-dir:{file.parent}", pretrained=True)
    for name, attributes in json.loads(file.read_bytes())["noisy_student"]["dense"].items():
        for attribute, value in attributes.items():
            setattr(network.get_submodule(name), attribute, (value, value))
    return network.eval()


def _write_torch(file: Path, network: nn.Module, card: ModelCard, model: Store) -> None:
    del model
    images = torch.export.Dim("images", min=1)
    torch.export.save(torch.export.export(network, (_example(card),), dynamic_shapes=({0: images},)), file)


def _read_torch(file: Path) -> Callable[[Tensor], Tensor]:
    network: nn.Module = torch.export.load(file).module()
    return network


def _write_onnx(file: Path, network: nn.Module, card: ModelCard, model: Store) -> None:
    del model
    torch.onnx.export(
        network,
        (_example(card),),
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

    described = onnx.load(file)
    facts = {
        "classes": json.dumps(card.classes),
        "mean": json.dumps(card.mean),
        "std": json.dumps(card.std),
        "model": card.digest,
    }
    onnx.helper.set_model_props(described, facts)
    onnx.checker.check_model(described, full_check=True)
    onnx.save(described, file)


def _read_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])


def _example(card: ModelCard) -> Tensor:
    size = card.model.inference_resolution
    # Two: a batch of one would be taken for a constant.
    return torch.zeros(2, 3, size, size).contiguous(memory_format=torch.channels_last)


_WAYS: dict[Form, tuple[Callable[[Path, nn.Module, ModelCard, Store], None], Callable[[Path], Callable[[Tensor], Tensor]]]] = {
    "timm": (_write_timm, _read_timm),
    "onnx": (_write_onnx, _read_onnx),
    "torch": (_write_torch, _read_torch),
}
