"""Opens a run: of the whole loop, or of one more generation."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ns import __version__
from ns.config.loader import load_with_overrides
from ns.core import log
from ns.core.errors import DataError
from ns.core.process import die_with_client
from ns.modeling.manifest import ModelManifest
from ns.runs.lifecycle import derive_generation_name, derive_run_name, open_run, record_inherited_teacher
from ns.runs.lookup import find_accepted_student
from ns.runs.records import CONFIG_FILE, write_stage_note
from ns.stages.context import StageContext, TeacherSignal, announce_stage
from ns.stages.gate import was_student_refused
from ns.stages.keys import read_labeled_classes
from ns.stages.prepare import count_images, write_prepared_data
from ns.stages.train import locate_first_teacher
from ns.storage import open_store
from ns.storage.ledger import Ledger


def start_run(
    config_uri: str, root: str, run: str, overrides: Sequence[str] = (), fields: Mapping[str, str | int] | None = None
) -> tuple[str, str]:
    """Opens a run, new or begun before: reads the experiment (a URI or a preset), applies the changes, and keeps the result in the run.

    `overrides`: `a.b=c`. `fields`: values by field (`data.pool`); an empty value or 0 leaves the experiment's own. A run without a name
    gets one that is derived from the experiment. Returns the URI of the kept experiment, and the run's name.
    """
    log.configure_logging()
    die_with_client()
    store = open_store(root)
    experiment = load_with_overrides(config_uri, overrides, fields)
    name = run or derive_run_name(experiment)
    open_run(store, name, experiment, __version__)
    return f"{store.uri}/{name}/{CONFIG_FILE}", name


class NextGeneration(NamedTuple):
    """What one more generation begins with."""

    config_uri: str
    run: str
    data: str
    """Key of `prepared.json`."""
    generation: int
    """Number of the generation; its teacher's is one less."""
    teacher_generation: int
    teacher: str
    """Key of the model's folder, TeacherSignal.TRAIN if there is no teacher yet, or TeacherSignal.STOP if there is nothing new."""


def start_generation(
    config_uri: str, root: str, run: str, overrides: Sequence[str] = (), fields: Mapping[str, str | int] | None = None
) -> NextGeneration:
    """Opens the run of one more generation, and prepares its data as `prepare_data` does. Arguments as for `start_run`.

    The teacher is the student that a gate accepted last in any run of an experiment of this name. Without one, the generation is the
    first, and its teacher is still to be trained. A run without a name gets one that is derived from experiment, data and teacher, so
    that a change in any of them makes another run. If this run has refused a student of the same data and teacher, there is nothing to
    do. Raises DataError if the accepted model knows other classes.
    """
    with announce_stage("start-generation", 0) as log_fields:
        started = time.monotonic()
        store = open_store(root)
        ledger = Ledger(store)
        experiment = load_with_overrides(config_uri, overrides, fields)
        data, prepared, reused = write_prepared_data(experiment, store, ledger)
        seconds = time.monotonic() - started
        latest = find_accepted_student(store, experiment.name)
        generation = latest.generation + 1 if latest else 1
        manifest = ModelManifest.load(store.at(latest.model)) if latest else None
        if latest and manifest and manifest.classes != read_labeled_classes(store, data):
            raise DataError(
                f"data.labeled: {experiment.data.labeled}: its classes are not those of the model that was accepted last (run "
                f"{latest.run}); give the experiment another name, to begin with a teacher of these classes"
            )
        name = run or derive_generation_name(experiment, generation, prepared.digest, manifest.digest if manifest else None)
        open_run(store, name, experiment, __version__)
        context = StageContext(name, generation, experiment, store, ledger, "start-generation")
        write_stage_note(store, name, 0, "prepare-data", {"data": data}, seconds, reused=reused)
        if latest:
            record_inherited_teacher(store, name, latest)
        teacher = latest.model if latest else locate_first_teacher(context, data)
        if was_student_refused(context, data, teacher):
            log.get_logger().info("nothing new: the student of this data, teacher and settings was refused", run=name)
            teacher = TeacherSignal.STOP
        elif not latest:
            teacher = TeacherSignal.TRAIN
        log_fields.update(reused=reused, **count_images(store, prepared))
        return NextGeneration(f"{store.uri}/{name}/{CONFIG_FILE}", name, data, generation, generation - 1, teacher)
