import json
import sys
import time

import pytest
from structlog.testing import capture_logs

from ns.core import telemetry
from ns.core.errors import ConfigError, StoreError
from ns.storage import LocalStore
from ns.training import monitor
from ns.training.monitor import Monitor

POINT = {"step": 2.0, "images": 20.0, "loss": 3.0, "loss_labeled": 1.0, "loss_pseudo": 2.0, "accuracy_labeled": 0.5}
POINT |= {"agreement": 0.25, "lr": 0.1}


def watch(watching: Monitor, steps: int = 4) -> None:
    with watching:
        watching.on_train_start(step=0, steps=steps, images_per_step=10, checkpoint_seconds=60)
        for step in range(1, steps + 1):
            if step == 2:
                watching.on_log([POINT])
            watching.on_step_end(step, waited_seconds=0.0)
        watching.on_checkpoint()


def value(name, **labels):
    return telemetry.REGISTRY.get_sample_value(name, labels)


def test_monitor_writes_progress_and_metrics(tmp_path):
    telemetry.begin_stage("train", 1, "watched")
    before = value("nst_images_processed_total", stage="train")
    watch(Monitor(LocalStore(tmp_path), name="1-train"))
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert (progress["training"], progress["step"], progress["steps"], progress["images"]) == ("1-train", 4, 4, 40)
    assert progress["latest"] == POINT
    assert progress["seconds_left"] == 0
    assert value("nst_images_processed_total", stage="train") == before + 40
    assert value("nst_loss", part="pseudo") == 2
    assert value("nst_teacher_student_agreement_ratio") == 0.25
    assert value("nst_training_steps_done") == 4
    assert value("nst_checkpoint_age_seconds") < 5


def test_monitor_warns_once_of_failed_writes(tmp_path, monkeypatch):
    class Full(LocalStore):
        def put(self, key, data):
            raise StoreError(f"{key}: no space left on device")

    monkeypatch.setattr(monitor, "PROGRESS_SECONDS", 0.0)
    with capture_logs() as logs:
        full = Monitor(Full(tmp_path))
        watch(full, steps=50)
        assert full.write_document("not-finite.json", {}) is None
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == [
        "progress cannot be written; training goes on",
        "cannot be written",
    ]


def test_tensorboard_has_each_point_of_a_continued_training_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(monitor, "EVENTS_SECONDS", 0.0)
    # Killed after step 3 with a checkpoint of step 1: the steps from 2 on come again, with other losses here.
    for start, points in ((0, [(1, 4.0), (2, 9.0), (3, 9.0)]), (1, [(2, 3.0), (3, 2.0), (4, 1.0)])):
        if start:
            time.sleep(1.1)  # TensorBoard reads the files of a folder by the seconds in their names.
        with Monitor(LocalStore(tmp_path), name="1-train", tensorboard=True) as watching:
            watching.on_train_start(step=start, steps=4, images_per_step=10, checkpoint_seconds=60)
            for step, loss in points:
                watching.on_log([{**POINT, "step": float(step), "loss": loss}])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "1-train"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert "agreement" in events.Tags()["scalars"]


def test_tensorboard_setting_is_refused_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"train.tensorboard: TensorBoard is not installed; pip install 'noisy-student\[tens"):
        Monitor(LocalStore(tmp_path), tensorboard=True)
