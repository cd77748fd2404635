"""Models in MLflow's registry: what `ns promote` and `ns promote back` put into use, as ONNX with its signature, which anybody's MLflow can
load.

A version is written once: a model that has one gets only the alias.
"""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ns.core import log
from ns.core.digest import shorten_digest
from ns.core.errors import RunError
from ns.core.mlflow_client import describe_failure, is_tracked
from ns.modeling.manifest import ModelManifest
from ns.promotion.promote import ModelPointer
from ns.reporting.mlflow_runs import open_mlflow_model_run, open_mlflow_run
from ns.runs.lookup import read_experiment_name, read_prepared_data
from ns.storage import Store, open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST_TAG = "noisy_student.digest"
MODEL_FOLDER = "model"
"""Folder of the model among the artifacts of its run."""
CHECKED_IMAGES = 64
"""Held-out images that the ONNX form is checked on."""


class RegisteredVersion(NamedTuple):
    """A version of a registered model."""

    name: str
    version: str


def register_model(pointer: ModelPointer, before: ModelPointer | None, alias: str) -> RegisteredVersion | None:
    """Registers the model that a pointer names under its experiment's name, and moves the alias from the model before to its version.

    None without a server, and if it fails, which is told in one line: the pointer is what counts, and another call registers it.
    """
    if not is_tracked():
        return None
    try:
        root = open_store(pointer.root)
        name = _read_registered_name(pointer)
        run = open_mlflow_run(root, pointer.run, name)
        client, run_id = open_mlflow_model_run(
            run, pointer.generation, pointer.model.removeprefix(f"{root.uri}/")
        ).find_or_create()
        version = _find_version(client, name, run_id, pointer.digest)
        if version is None:
            with tempfile.TemporaryDirectory(prefix="mlflow-") as scratch:
                folder = Path(scratch) / MODEL_FOLDER
                _write_model(open_store(pointer.model), root, pointer.run, folder)
                client.log_artifacts(run_id, str(folder), MODEL_FOLDER)
            _ensure_registered(client, name)
            tags = {DIGEST_TAG: pointer.digest, "noisy_student.model": pointer.model, "noisy_student.run": pointer.run}
            description = f"{pointer.run}, generation {pointer.generation}, {shorten_digest(pointer.digest)}"
            created = client.create_model_version(name, f"runs:/{run_id}/{MODEL_FOLDER}", run_id, tags, description=description)
            version = str(created.version)
        client.set_registered_model_alias(name, alias, version)
        # Each registered model has aliases of its own.
        if before and before.digest != pointer.digest and (name_before := _read_registered_name(before)) != name:
            client.delete_registered_model_alias(name_before, alias)
        return RegisteredVersion(name, version)
    # Servers, proxies and plugins of MLflow raise what they like.
    except Exception as error:
        warning = f"not registered in MLflow; `ns promote {pointer.run}` tries again"
        log.get_logger().warning(warning, reason=describe_failure(error))
        return None


def _read_registered_name(pointer: ModelPointer) -> str:
    name = read_experiment_name(open_store(pointer.root), pointer.run)
    if name is None:
        raise RunError(f"run {pointer.run}: its experiment in {pointer.root} has no name")
    return name


def _find_version(client: "MlflowClient", name: str, run_id: str, digest: str) -> str | None:
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    matching = (version for version in versions if version.name == name and version.tags.get(DIGEST_TAG) == digest)
    return next((str(version.version) for version in matching), None)


def _ensure_registered(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _write_model(model: Store, root: Store, run: str, folder: Path) -> None:
    """Writes MLflow's folder of a model: its ONNX form, which holds no pickle, with signature, `preprocess.py` and export.json."""
    from ns.export import ExportManifest, export_model
    from ns.export.exporter import PREPROCESS_FILE

    heldout = read_prepared_data(root, run).heldout.open_dataset(root)
    manifest = ModelManifest.load(model)
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        exported_path = Path(scratch) / "export"
        exported = export_model(model, exported_path, ["onnx"], heldout, count=CHECKED_IMAGES)
        import mlflow.onnx
        import onnx
        import onnxruntime
        from mlflow.models.signature import ModelSignature
        from mlflow.types import Schema, TensorSpec

        network = onnx.load(exported_path / exported.checks[0].file)
        size = exported.resolution
        signature = ModelSignature(
            Schema([TensorSpec(np.dtype(np.uint8), (-1, size, size, 3), network.graph.input[0].name)]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, len(manifest.classes)), network.graph.output[0].name)]),
        )
        requirements = [f"onnx=={onnx.__version__}", f"onnxruntime=={onnxruntime.__version__}", f"numpy=={np.__version__}"]
        classes = {"classes": list(manifest.classes)}
        mlflow.onnx.save_model(
            network,
            str(folder),
            signature=signature,
            pip_requirements=requirements,
            metadata=classes,
            save_as_external_data=False,
        )
        for file in (PREPROCESS_FILE, ExportManifest.filename):
            shutil.copyfile(exported_path / file, folder / file)
