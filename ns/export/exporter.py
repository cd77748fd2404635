"""Exports a model to programs that do not know this package: plain timm, ONNX, torch.export.

    OUT/config.json           timm's description of the network, with class names and preprocessing
    OUT/model.safetensors     the averaged weights, by timm's names
    OUT/model.onnx            uint8 [N, R, R, 3] → float32 [N, classes], logits; it normalizes the pixels itself
    OUT/config.pbtxt          Triton's description of model.onnx
    OUT/model.pt2             the same as a torch.export program
    OUT/preprocess.py         reads image files as the model must see them, with numpy and Pillow alone
    OUT/README.md             the model card
    OUT/export.json           what was exported, and how it was checked; written last

Each form is compared with our own network on real images before it is kept. N is free; R is the model's test resolution.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ns import __version__
from ns.config.schema import Crop, Interpolation, TestCrop
from ns.core.digest import sha256_file
from ns.core.errors import ConfigError, DataError, StoreError
from ns.data.augment.transforms import EvalTransform
from ns.data.dataset import Dataset
from ns.data.loading.decode import allocate_images
from ns.data.loading.shard_reader import ImageSource
from ns.data.subsample import Subsample, draw_rows
from ns.evaluation.accuracy import read_encoded_images
from ns.export.forms import FORMS, ExportForm
from ns.modeling.factory import Normalize, load_model
from ns.modeling.manifest import ModelManifest
from ns.storage import Store
from ns.storage.documents import FileName, JsonDocument, Sha256, encode_json

CARD_FILE = "README.md"
PREPROCESS_FILE = "preprocess.py"
TOLERANCE = 1e-3
"""Largest difference of logits as a share of the largest logit: kernels sum float32 in different orders."""


class ExportCheck(JsonDocument):
    """One form of the model compared with our own network on the same images."""

    form: ExportForm
    file: FileName
    sha256: Sha256
    images: int
    largest_difference: float
    """Largest absolute difference of logits from our network in float32."""
    largest_logit: float
    """Largest absolute logit of our network."""
    same_top1: float
    """Share of images that get the same class, 0–1."""


class ExportManifest(JsonDocument):
    """The record of an export and its checks."""

    filename: ClassVar[str] = "export.json"

    format: Literal[1] = 1
    model: str
    """Digest of the model's manifest."""
    weights_sha256: str
    dataset: str
    """Digest of the dataset whose images were used for the checks."""
    resolution: int
    """px"""
    crop: Crop
    test_margin_px: int
    test_crop: TestCrop = "paper"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...]
    checks: tuple[ExportCheck, ...]
    version: str
    """Version of this package."""


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

    `describe` returns the text of README.md. `out` appears whole or not at all; an earlier export in it is replaced.

    Raises ConfigError if a library is missing or the network cannot be exported, DataError if the logits of a form differ from our
    network's, StoreError if `out` holds anything but an export.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if "onnx" in forms and missing:
        raise ConfigError(f"--form onnx: {' and '.join(missing)} not installed; pip install 'noisy-student[export]'")
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: is a file; name an empty or a new folder")
    if out.exists() and any(out.iterdir()) and not (out / ExportManifest.filename).exists():
        raise StoreError(f"{out}: is not empty and holds no {ExportManifest.filename}; name an empty or a new folder")
    network, manifest = load_model(store)
    batch = _load_batch(manifest, *images, count)
    expected = _run_network(nn.Sequential(Normalize(manifest.mean, manifest.std), network), batch)
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
            crop=manifest.model.crop,
            test_margin_px=manifest.model.test_margin_px,
            test_crop=manifest.model.test_crop,
            interpolation=manifest.model.interpolation,
            mean=manifest.mean,
            std=manifest.std,
            classes=manifest.classes,
            checks=checks,
            version=__version__,
        )
        shutil.copyfile(Path(__file__).with_name(PREPROCESS_FILE), export_path / PREPROCESS_FILE)
        if describe:
            (export_path / CARD_FILE).write_text(describe(manifest, export_manifest), encoding="utf-8")
        (export_path / ExportManifest.filename).write_bytes(encode_json(export_manifest.model_dump(mode="json")))
        # The earlier export goes last: `out` is absent for a moment, but never incomplete.
        if out.exists():
            out.rename(Path(scratch) / "earlier")
        export_path.rename(out)
    return export_manifest


def _load_batch(manifest: ModelManifest, store: Store, dataset: Dataset, count: int) -> Tensor:
    """Real images, cropped and resized: uint8 [n, R, R, 3]; n is smaller than `count` if some cannot be read."""
    if dataset.role == "unlabeled":
        raise DataError(
            f"{store.uri}: has no labels, which are needed to draw images of all classes; name a labeled or an evaluation dataset"
        )
    size = manifest.model.inference_resolution
    source = ImageSource(store, dataset)
    rows = draw_rows(source, len(dataset.shards), len(dataset.classes), Subsample(images=count, seed=0))
    encoded = [image for shard, shard_rows in rows.items() for image in read_encoded_images(source, shard, shard_rows)]
    pixels = allocate_images(len(encoded), size)
    unreadable = EvalTransform.for_model(manifest.model).transform_batch(encoded, pixels)
    readable = [row for row in range(len(encoded)) if row not in unreadable]
    if not readable:
        raise DataError(f"{store.uri}: none of its images can be read, so an export cannot be checked on them")
    return torch.from_numpy(pixels[: len(encoded)][readable])


def _run_network(network: Callable[[Tensor], Tensor], batch: Tensor) -> npt.NDArray[np.float32]:
    """Logits, float32 [n, classes]. The first image is a batch of its own, so that two batch sizes are tried."""
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
    filename, write, read = FORMS[form]
    file = out / filename
    try:
        write(file, network, manifest, store)
        logits = _run_network(read(file), batch)
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError) as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ConfigError(f"--form {form}: {manifest.model.arch} cannot be exported: {reason}") from error
    check = ExportCheck(
        form=form,
        file=filename,
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
            f"(the largest logit is {check.largest_logit:.3g}), so nothing was written; please report it with the names "
            f"{manifest.model.arch} and torch {torch.__version__}"
        )
    return check
