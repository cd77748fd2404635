"""How stages end."""

import contextlib
import multiprocessing
import os
import signal
import time
from datetime import datetime, timedelta

import pytest

from ns.core.errors import ConfigError, DataError, Interrupted, NsError, StoreError
from ns.runs.records import find_stage_failure, list_stage_failures, list_stage_tries, write_stage_failure
from ns.stages.context import stage
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from ns.storage import LocalStore
from ns.storage.ledger import Ledger
from ns.training import runner as training
from tests.loop import open_tiny_run


def test_stage_failure_is_kept_until_the_next_try(finished_run, monkeypatch):
    store, ref = finished_run
    data = prepare_data(ref)
    # The run is that of all tests here, and stages of it have failed before.
    store.delete_prefix(f"{ref.run}/failures/")

    def full(*_, **__):
        raise StoreError("the disk is full: free some space")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "get_or_run", full)
        with pytest.raises(StoreError):
            train_generation(ref, data=data, generation=0)
        (failure,) = list_stage_failures(store, ref.run)
        assert (str(failure), failure.exit_code) == ("train: the disk is full: free some space", 4)
        # A client that watches is told, and keeps no second record.
        store.delete_prefix(f"{ref.run}/failures/")
        patch.setenv("NS_EVENTS", str(store.root / "events"))
        with pytest.raises(StoreError):
            train_generation(ref, data=data, generation=0)
        assert list_stage_failures(store, ref.run) == []
    write_stage_failure(store, ref.run, 0, "train", "killed", note_name="train")
    train_generation(ref, data=data, generation=0)
    assert list_stage_failures(store, ref.run) == []


@pytest.mark.parametrize(
    ("error", "is_left"), [(None, False), (StoreError("the disk is full"), False), (SystemExit(137), True)], ids=str
)
def test_stage_keeps_that_it_is_under_way_until_it_says_how_it_ended(tmp_path, monkeypatch, error, is_left):
    store = LocalStore(tmp_path)
    ref = open_tiny_run(store)
    monkeypatch.setenv("KFP_RETRY_INDEX", "2")
    monkeypatch.setenv("KFP_POD_NAME", "pod-1")
    with contextlib.suppress(StoreError, SystemExit), stage("label", ref, 1, shards="0-2"):
        (stage_try,) = list_stage_tries(store, ref.run)
        assert (stage_try.generation, stage_try.stage, stage_try.number, stage_try.pod) == (1, "label-0-2", 3, "pod-1")
        if error:
            raise error
    assert (list_stage_tries(store, ref.run) != []) is is_left


def test_stage_tells_its_own_error_where_the_store_fails_too(tmp_path, monkeypatch):
    """MLflow's run is named by the run's record, which then cannot be read."""

    def fail(*_):
        raise StoreError("no connection")

    monkeypatch.setattr("ns.reporting.mlflow_runs.publish_mlflow_failure", fail)
    with pytest.raises(DataError, match="labeled: no image"), stage("label", open_tiny_run(LocalStore(tmp_path)), 1):
        raise DataError("labeled: no image")


@pytest.mark.parametrize(
    ("error", "index", "age_seconds", "reached"),
    [
        (ConfigError("teacher.model.arch: unknown"), 1, 60, False),
        (DataError("labeled: no image"), 3, 60, False),
        # A person began again, or came back after mending the cause.
        (ConfigError("teacher.model.arch: unknown"), 0, 60, True),
        (ConfigError("teacher.model.arch: unknown"), 1, 3600, True),
        (StoreError("the disk is full"), 1, 60, True),
        (RuntimeError("killed"), 1, 60, True),
    ],
)
def test_useless_retry_by_argo_ends_at_once_with_the_first_message(
    digits_store, monkeypatch, error, index, age_seconds, reached
):
    store = digits_store
    ref = open_tiny_run(store)
    write_stage_failure(store, ref.run, 0, "prepare", error, note_name="prepare")
    failure = find_stage_failure(store, ref.run, 0, note_name="prepare")
    old = datetime.fromisoformat(failure.failed_at) - timedelta(seconds=age_seconds)
    failure.model_copy(update={"failed_at": old.isoformat()}).save_file(store, f"{ref.run}/failures/0-prepare.json")
    monkeypatch.setenv("KFP_RETRY_INDEX", str(index))
    if reached:
        assert prepare_data(ref)
    else:
        with pytest.raises(type(error), match=str(error)):
            prepare_data(ref)
        # The reason stays.
        assert find_stage_failure(store, ref.run, 0, note_name="prepare").error == str(error)


def test_interrupted_stage_exits_with_130(digits_store, monkeypatch):
    ref = open_tiny_run(digits_store)
    data = prepare_data(ref)

    def stopped(*_, **__):
        raise Interrupted("stopped at step 3 of 30; the same command continues there")

    monkeypatch.setattr(training, "train_model", stopped)
    with pytest.raises(SystemExit) as caught:
        train_generation(ref, data=data, generation=0)
    assert caught.value.code == 130


def test_stage_that_is_asked_to_stop_gives_its_lease_back(tmp_path):
    store = LocalStore(tmp_path)
    ref = open_tiny_run(store)

    def work():
        assert list(store.list("store/leases/"))
        # As what can do without a result does.
        with contextlib.suppress(NsError):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    with pytest.raises(SystemExit) as caught, stage("label", ref, 1, shards="0-2") as context:
        context.get_or_run("label", {}, work)
    assert caught.value.code == 130
    assert list(store.list("store/leases/")) == []
    assert [stage_try.stage for stage_try in list_stage_tries(store, ref.run)] == ["label-0-2"]
    assert list_stage_failures(store, ref.run) == []


def test_process_that_a_stage_has_forked_ends_as_it_is_told(tmp_path):
    with stage("label", open_tiny_run(LocalStore(tmp_path)), 1, shards="0-2"):
        fork = multiprocessing.get_context("fork")
        runs = fork.Event()
        process = fork.Process(target=lambda: (runs.set(), time.sleep(30)))
        process.start()
        # Python forgets signals that arrive before a forked process has begun.
        assert runs.wait(20)
        process.terminate()
        process.join(20)
    assert process.exitcode == -signal.SIGTERM
