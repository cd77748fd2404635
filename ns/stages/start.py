"""Opens a run: of the whole loop, or of one more generation."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from ns import __version__
from ns.config.loader import load_with_overrides
from ns.core import log
from ns.core.errors import DataError
from ns.core.process import die_with_client
from ns.modeling.manifest import ModelManifest
from ns.modeling.pretrained import complete_models
from ns.runs.lifecycle import check_run_name, derive_generation_name, derive_run_name, open_run, record_inherited_teacher
from ns.runs.lookup import find_accepted_student
from ns.runs.records import write_stage_note
from ns.stages.context import STOP, RunRef, StageContext, announce_stage, keep_state
from ns.stages.gate import was_student_refused
from ns.stages.keys import read_labeled_classes
from ns.stages.label import split_pool
from ns.stages.prepare import count_images, write_prepared_data
from ns.stages.train import locate_first_teacher
from ns.storage import Store, open_store
from ns.storage.ledger import Ledger


def start_run(
    config: str, run: str, overrides: Sequence[str] = (), fields: Mapping[str, str | int] | None = None, *, root: str
) -> str:
    """Opens a run, new or begun before: reads the experiment (a URI or a preset), applies the changes, and keeps the result in the run.

    `run`: its name below `root`, or the URI of its folder. A run without a name gets one that is derived from the experiment.
    `overrides`: `a.b=c`. `fields`: values by field (`data.pool`); an empty value or 0 leaves the experiment's own. Returns the URI of
    the run's folder.
    """
    log.configure_logging()
    die_with_client()
    store, name = _locate_run(run, root)
    with _keep_failure(store, name):
        experiment = complete_models(load_with_overrides(config, overrides, fields), store)
        name = name or derive_run_name(experiment)
        open_run(store, name, experiment, __version__)
    return store.at(name).uri


def _keep_failure(store: Store, run: str) -> AbstractContextManager[None]:
    """Keeps why the start fails in the run's folder. A run without a name has none before its experiment is read.

    Raises ConfigError for a wrong name.
    """
    if not run:
        return nullcontext()
    check_run_name(run)
    return keep_state(RunRef.from_uri(store.at(run).uri), 0, "start", "start", with_try=False)


def _locate_run(run: str, root: str) -> tuple[Store, str]:
    """The root and the name of a run that is given by its name, or by the URI of its folder."""
    folder, slash, name = run.rpartition("/")
    return open_store(folder if slash else root), name


class NextGeneration(NamedTuple):
    """What one more generation begins with."""

    run: str
    """URI of the run's folder."""
    data: str
    """Key of `prepared.json`."""
    shards: list[str]
    """Ranges of the pool's shards (`split_pool`)."""
    generation: int
    """Number of the generation; its teacher's is one less."""
    teacher: str
    """Key of the model's folder, trained or not, or STOP if there is nothing new."""


def start_generation(
    config: str, run: str, overrides: Sequence[str] = (), fields: Mapping[str, str | int] | None = None, *, root: str
) -> NextGeneration:
    """Opens the run of one more generation, and prepares its data as `prepare_data` does. Arguments as for `start_run`.

    The teacher is the student that a gate accepted last in any run of an experiment of this name. Without one, the generation is the
    first, and its teacher is still to be trained. A run without a name gets one that is derived from experiment, data and teacher, so
    that a change in any of them makes another run. If this run has refused a student of the same data and teacher, there is nothing to
    do. Raises DataError if the accepted model knows other classes.
    """
    store, given_name = _locate_run(run, root)
    with announce_stage("start", 0) as log_fields, _keep_failure(store, given_name):
        started = time.monotonic()
        ledger = Ledger(store)
        experiment = complete_models(load_with_overrides(config, overrides, fields), store)
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
        name = given_name or derive_generation_name(
            experiment, generation, prepared.digest, manifest.digest if manifest else None
        )
        open_run(store, name, experiment, __version__)
        context = StageContext(name, generation, experiment, store, ledger, "start")
        write_stage_note(store, name, 0, "prepare", {"data": data}, seconds, reused=reused)
        if latest:
            record_inherited_teacher(store, name, latest)
        teacher = latest.model if latest else locate_first_teacher(context, data)
        if was_student_refused(context, data, teacher):
            log.get_logger().info("nothing new: the student of this data, teacher and settings was refused", run=name)
            teacher = STOP
        log_fields.update(reused=reused, **count_images(store, prepared))
        folder = store.at(name).uri
        return NextGeneration(folder, data, split_pool(RunRef.from_uri(folder), data=data), generation, teacher)
