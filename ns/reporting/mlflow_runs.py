"""What MLflow is told of a run: a run of its own with the experiment, the measurements by generation and the report, and below it a run for
each model, with its settings and the curves of its training.

Every call logs what is missing, so that a stage that was killed, or found no server, needs no memory of what it did.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ns.config.loader import flatten_fields, load_experiment
from ns.config.schema import Experiment
from ns.core.digest import digest_json, shorten_digest
from ns.core.mlflow_client import MetricPoint, MlflowRun, is_tracked
from ns.modeling.manifest import FINETUNED, ModelManifest, read_history
from ns.runs.records import BASELINE_TRAIN, CONFIG_FILE, REPORT_FILE, RunRecord, find_stage_note, record_key
from ns.runs.summary import list_current_notes
from ns.storage import Store, parent_key
from ns.storage.scratch import make_scratch_dir


def open_mlflow_run(root: Store, run: str, experiment: str) -> MlflowRun:
    """MLflow's run of a run. `experiment`: name of the experiment."""
    record = RunRecord.find_file(root, record_key(run))
    # A run that was deleted and begun again is another one.
    identity = _derive_identity(root.at(run).uri, record.started_at if record else "")
    return MlflowRun(experiment, run, identity, tags={"noisy_student.run": root.at(run).uri})


def open_mlflow_model_run(parent: MlflowRun, generation: int, model: str, *, is_baseline: bool = False) -> MlflowRun:
    """MLflow's run of a model. `model`: key of its folder, trained or not."""
    title = "labeled-only" if is_baseline else f"student-{generation}" if generation else "teacher"
    name = f"{title}-{FINETUNED}" if model.endswith(f"/{FINETUNED}") else title
    identity = _derive_identity(parent.identity, model)
    return MlflowRun(parent.experiment, name, identity, parent, tags={"noisy_student.model": model})


def publish_mlflow_generation(root: Store, run: str, generation: int) -> None:
    """Logs the model of a generation, once it is evaluated: settings, curves, measurements. Does nothing without a server."""
    if not is_tracked():
        return
    from ns.reporting.artifacts import collect_generation_metrics
    from ns.reporting.context import gather_context
    from ns.reporting.metrics import collect_metrics, flatten_metrics

    experiment = _load_experiment(root, run)
    parent = open_mlflow_run(root, run, experiment.name)
    parent.set_status("RUNNING")
    parent.log_params(_make_params(experiment.model_dump(mode="json")))
    values = collect_generation_metrics(root, run, generation)
    parent.log_metrics(MetricPoint(name, value, generation) for name, value in values.items())
    context = gather_context(root, run, generation=generation, pictures=0)
    role = experiment.get_student(generation) if generation else experiment.teacher
    for stage in ("train", BASELINE_TRAIN):
        note = find_stage_note(root, run, generation, stage)
        for name, key in note.outputs.items() if note else ():
            manifest = ModelManifest.load_file(root, key)
            model = parent_key(key)
            model_run = open_mlflow_model_run(parent, generation, model, is_baseline=stage == BASELINE_TRAIN)
            model_run.log_params(_make_params(role.model_dump(mode="json")))
            model_run.log_curves(read_history(root.at(model), manifest))
            trained = context.baseline if stage == BASELINE_TRAIN else context.models[-1]
            if name == "model" and trained:
                measured = flatten_metrics(collect_metrics(context, trained))
                model_run.log_metrics(MetricPoint(metric, value, manifest.steps) for metric, value in measured.items())
            model_run.set_status("FINISHED")


def publish_mlflow_run(root: Store, run: str) -> None:
    """Logs all of a run that is missing, its experiment and its report, and ends MLflow's run. Does nothing without a server."""
    if not is_tracked():
        return
    for note in list_current_notes(root, run, "evaluate"):
        publish_mlflow_generation(root, run, note.generation)
    tracked = open_mlflow_run(root, run, _load_experiment(root, run).name)
    with make_scratch_dir("mlflow") as folder:
        for file in (CONFIG_FILE, REPORT_FILE):
            path = Path(folder) / file
            path.write_bytes(root.get(f"{run}/{file}"))
            tracked.log_file(path)
    tracked.set_status("FINISHED")


def publish_mlflow_failure(root: Store, run: str, experiment: str) -> None:
    """Says that a stage of the run failed. `experiment`: name of the experiment. Does nothing without a server."""
    if is_tracked():
        open_mlflow_run(root, run, experiment).set_status("FAILED")


def _load_experiment(root: Store, run: str) -> Experiment:
    return load_experiment(f"{root.uri}/{run}/{CONFIG_FILE}")


def _make_params(fields: Mapping[str, Any]) -> dict[str, str]:
    """Field → value, with the names that MLflow takes."""
    return {name: text for name, text in flatten_fields(fields).items() if text != ""}


def _derive_identity(*parts: str) -> str:
    return shorten_digest(digest_json(parts))
