"""Runs that start because data, settings or image changed: one run per change, however many clients check."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ns.cli import app as cli
from ns.config.loader import load_experiment, resolve_preset
from ns.core.errors import ConfigError, DataError, RunError
from ns.runs.records import write_stage_failure
from ns.storage import LocalStore
from ns.storage.documents import encode_json
from pipelines import trigger, upload
from pipelines.kfp_client import KfpClient
from pipelines.remote_run import build_request
from pipelines.trigger import DataSnapshot, Trigger
from tests.pipelines.conftest import PLATFORM, render_platform
from tests.pipelines.kfp_api import KfpApi
from tests.storage.conftest import environment, moto, store_at  # noqa: F401

PARTS = {"labeled": 100, "pool": 1000, "heldout": 50}


@pytest.fixture(scope="module")
def experiment():
    return load_experiment(resolve_preset("quickstart"))


@pytest.fixture
def root(tmp_path):
    return LocalStore(tmp_path)


def make_trigger(run="digits-1", settings="a", image="worker:1", **shards) -> Trigger:
    """What is there: for each part, shards and their images."""
    held = {part: {f"{part}-0": images} for part, images in PARTS.items()} | shards
    data = {part: DataSnapshot(digest=str(sorted(one)), images=sum(one.values()), shards=one) for part, one in held.items()}
    whole = json.dumps([settings, image, {part: one.digest for part, one in data.items()}])
    return Trigger(
        digest=trigger.digest_json(whole),
        run=run,
        settings_digest=settings,
        image=image,
        data=data,
        claimed_by=f"client:{time.monotonic_ns()}",
        claimed_at=trigger.utc_timestamp(),
    )


def write_claim(root, one: Trigger, name="digits") -> None:
    """As the client leaves it that started the run."""
    root.put(f"store/triggers/{name}/{one.digest}.json", encode_json(one.model_dump(mode="json")))


def decide(root, one: Trigger, **options):
    return trigger.decide_trigger(root, "digits", one, **options)


def test_decide_trigger_starts_the_first_run(root):
    assert decide(root, make_trigger())[:2] == ("start", "no run of digits was started before")


def test_decide_trigger_same_inputs_start_only_again(root):
    write_claim(root, make_trigger())
    assert decide(root, make_trigger())[:2] == ("known", "data, settings and image are those of run digits-1")
    assert decide(root, make_trigger(), again=True).action == "start"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": "b"}, "the settings have changed"),
        ({"image": "worker:2"}, "the image is worker:2, was worker:1"),
        ({"pool": {"pool-0": 1000, "pool-1": 20}}, "pool: 20 of 1,020 images are new (2.0%)"),
        ({"pool": {}}, "pool: 1,000 of 0 images are new"),
        ({"labeled": {"labeled-mended": 100}}, "labeled: 100 of 100 images are new (100.0%)"),
        ({"heldout": {"heldout-0": 50, "heldout-1": 1}}, "heldout: 1 of 51 images are new (2.0%)"),
    ],
)
def test_decide_trigger_reasons(root, change, reason):
    write_claim(root, make_trigger())
    decision = decide(root, make_trigger(**change))
    assert decision.action == "start"
    assert decision.reason.startswith(reason)
    assert decision.reason.endswith("since run digits-1")


def test_decide_trigger_small_changes_add_up(root):
    write_claim(root, make_trigger())
    little = make_trigger(pool={"pool-0": 1000, "pool-1": 20})
    decision = decide(root, little, min_change=0.05)
    assert decision[:2] == ("nothing", "pool: 20 of 1,020 images are new (2.0%): less than 5.0%, since run digits-1")
    more = make_trigger(pool={"pool-0": 1000, "pool-1": 20, "pool-2": 40})
    assert decide(root, more, min_change=0.05).action == "start"


def test_decide_trigger_small_change_with_another_reason(root):
    write_claim(root, make_trigger())
    assert decide(root, make_trigger(image="worker:2", pool={"pool-0": 1000, "pool-1": 1}), min_change=0.5).action == "start"
    assert decide(root, make_trigger(heldout={"heldout-0": 50, "heldout-1": 1}), min_change=0.5).action == "start"


def test_decide_trigger_compares_with_the_last_run(root):
    write_claim(root, make_trigger())
    write_claim(root, make_trigger(run="digits-2", image="worker:2"))
    assert "since run digits-2" in decide(root, make_trigger(run="digits-3", image="worker:3")).reason


def test_count_new_images_without_shards(root):
    def found(images, digest):
        return DataSnapshot(digest=digest, images=images, shards={})

    assert found(110, "b").count_new_images(found(100, "a")) == 10
    assert found(100, "b").count_new_images(found(100, "a")) == 100


def test_propose_trigger_digest_covers_content_not_uris(tmp_path, make_pool, picture):
    folders = {}
    for part in ("labeled", "heldout"):
        for index, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / f"{part}.png").write_bytes(picture(index))
        folders[part] = str(tmp_path / part)
    make_pool(tmp_path / "pool", [["a", "b"], ["c"]])

    def look(*overrides, image="worker:1", **places):
        asked = {**folders, "pool": str(tmp_path / "pool")} | places
        one = load_experiment(resolve_preset("quickstart"), [*(f"data.{k}={v}" for k, v in asked.items()), *overrides])
        return trigger.propose_trigger(one, image)

    first = look()
    assert first.run == f"quickstart-{first.digest[:8]}"
    assert {part: (one.images, len(one.shards)) for part, one in first.data.items()} == {
        "labeled": (2, 0),
        "pool": (3, 2),
        "heldout": (2, 0),
        "test": (400, 1),
    }
    (tmp_path / "pool").rename(tmp_path / "elsewhere")
    assert look(pool=str(tmp_path / "elsewhere")).digest == first.digest
    make_pool(tmp_path / "pool", [["a", "b"], ["c"], ["d"]])
    keys = tmp_path / "keys.txt"
    keys.write_text("a\n")
    others = [look(), look("seed=1"), look(image="worker:2"), look(f"data.exclude={keys}")]
    keys.write_text("a\nb\n")
    others.append(look(f"data.exclude={keys}"))
    assert len({one.digest for one in [first, *others]}) == 6


def test_propose_trigger_names_unreadable_data(experiment, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data.pool: .*empty"):
        trigger._snapshot_data("pool", str(tmp_path / "empty"))


def start(root, experiment, one=None, **options):
    decision = trigger.decide_trigger(root, experiment.name, one or make_trigger(), **options)
    return trigger.start_triggered_run(KfpClient(), root, experiment, decision, lambda run: build_request(root, run), **options)


def at_once(clients: int, call):
    """What each of several clients got."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(call())) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.integration
def test_start_triggered_run_once(root, kfp, platform, experiment):
    first = start(root, experiment)
    assert (first.name, first.new) == ("digits-1", True)
    for state in ("RUNNING", "SUCCEEDED", "FAILED"):
        kfp.end(first.run_id, state)
        again = start(root, experiment)
        assert (again.run_id, again.state, again.new) == (first.run_id, state, False)
    assert len(kfp.all("runs")) == 1


@pytest.mark.integration
def test_start_triggered_run_again_after_failure(root, kfp, platform, experiment, monkeypatch):
    monkeypatch.setattr(trigger, "CLAIM_SECONDS", 0.05)
    monkeypatch.setattr(trigger, "WAIT_SECONDS", 0.01)
    first = start(root, experiment)
    assert not start(root, experiment, again=True).new, "it is under way"
    kfp.end(first.run_id, "FAILED")
    assert start(root, experiment, again=True).new


@pytest.mark.integration
def test_start_triggered_run_by_two_clients_at_once(root, kfp, platform, experiment, monkeypatch):
    monkeypatch.setattr(trigger, "WAIT_SECONDS", 0.01)
    # Both have looked, and found no run, before either goes on.
    gate = threading.Barrier(2, timeout=20)

    reached: list[str] = []

    def before(request):
        if request == "GET /runs" and len(reached) < 2:
            reached.append(request)
            gate.wait()

    kfp.before = before
    found = at_once(2, lambda: start(root, experiment))
    assert len(reached) == 2
    assert sorted(run.new for run in found) == [False, True]
    assert len({run.run_id for run in found}) == len(kfp.all("runs")) == 1


@pytest.mark.integration
def test_start_triggered_run_takes_over_a_dead_claim(root, kfp, platform, experiment, monkeypatch):
    monkeypatch.setattr(trigger, "WAIT_SECONDS", 0.01)
    write_claim(root, make_trigger().model_copy(update={"claimed_at": "2026-01-01T00:00:00+00:00"}), experiment.name)
    found = at_once(2, lambda: start(root, experiment))
    assert sorted(run.new for run in found) == [False, True]
    assert len(kfp.all("runs")) == 1


@pytest.mark.integration
def test_start_triggered_run_after_an_outage(root, kfp, platform, experiment, monkeypatch, tmp_path):
    url = kfp.url
    kfp.close()
    with pytest.raises(RunError, match="cannot be reached"):
        start(root, experiment)
    assert list(tmp_path.rglob("*")) == []
    back = KfpApi()
    monkeypatch.setenv("NS_KFP_URL", back.url)
    try:
        upload.upload_package(KfpClient(), render_platform())
        assert back.url != url
        assert start(root, experiment).new
    finally:
        back.close()


@pytest.mark.integration
def test_start_triggered_run_with_wrong_input_leaves_nothing(root, kfp, platform, experiment, tmp_path):
    decision = trigger.decide_trigger(root, experiment.name, make_trigger())
    with pytest.raises(ConfigError, match="gpus: is not an input"):
        trigger.start_triggered_run(
            KfpClient(), root, experiment, decision, lambda run: build_request(root, run, inputs=["gpus=1"])
        )
    assert list(tmp_path.rglob("*")) == []


def ns(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.run_command_line(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def on_s3(kfp, platform, moto, tmp_path, monkeypatch):  # noqa: F811
    """Options of both commands, and the store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.setattr(trigger, "SETTLE_SECONDS", 0.1)
    store = store_at(moto, tmp_path / "cache")
    return ["quickstart", "--root", store.uri], store


@pytest.mark.integration
def test_trigger_command(capsys, kfp, on_s3):
    options, store = on_s3
    code, out, _ = ns(capsys, "trigger", *options, "--dry-run")
    assert code == 0
    assert out == "would start a run: no run of quickstart was started before\n"
    assert (list(store.list("")), kfp.all("runs")) == ([], [])

    code, out, _ = ns(capsys, "trigger", *options)
    (run,) = kfp.all("runs")
    assert out == (
        f"started {run.display_name}: no run of quickstart was started before: {kfp.url}/#/runs/details/{run.run_id}\n"
    )
    assert load_experiment(run.runtime_config.parameters["config"]).name == "quickstart"
    code, out, _ = ns(capsys, "trigger", *options)
    assert out.startswith(f"nothing to do: data, settings and image are those of run {run.display_name}: run ")
    code, out, _ = ns(capsys, "trigger", *options, "--image", "worker:2", "--json")
    assert json.loads(out)["reason"].startswith(f"the image is worker:2, was {PLATFORM.worker_image}")
    assert (code, len(kfp.all("runs"))) == (0, 2)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("states", "code", "words"),
    [
        (["SUCCEEDED"], 0, ""),
        (["FAILED"], 6, "error: train: the loss is nan: lower the learning rate; logs: http"),
        (["CANCELING", "FAILED"], 8, "was terminated in Kubeflow; the same command continues"),
    ],
)
def test_trigger_command_waits_for_the_end(capsys, kfp, on_s3, states, code, words):
    options, store = on_s3

    def play():
        while not kfp.all("runs"):
            time.sleep(0.01)
        (run,) = kfp.all("runs")
        error = "the loss is nan: lower the learning rate"
        write_stage_failure(store, run.display_name, 0, "train", error, note_name="train")
        for state in states:
            kfp.end(run.run_id, state)

    player = threading.Thread(target=play)
    player.start()
    found, out, err = ns(capsys, "trigger", *options, "--wait")
    player.join()
    assert (found, out.startswith("started quickstart-")) == (code, True)
    assert words in err


@pytest.mark.integration
def test_start_triggered_run_by_several_clients_on_s3(kfp, on_s3, experiment):
    _, store = on_s3
    found = at_once(4, lambda: start(store, experiment))
    assert sorted(run.new for run in found) == [False, False, False, True]
    assert len(kfp.all("runs")) == 1


@pytest.mark.integration
def test_trigger_command_with_unreachable_server(capsys, kfp, on_s3):
    options, store = on_s3
    kfp.close()
    code, out, err = ns(capsys, "trigger", *options)
    assert (code, out) == (6, "")
    assert "cannot be reached" in err
    assert list(store.list("")) == []


@pytest.mark.integration
def test_watch_command_survives_failures_and_ends_on_sigterm(kfp, on_s3):
    options, _ = on_s3
    outages = [RunError, None]

    def before(request):
        if outages and outages.pop(0):
            raise ConnectionError

    kfp.before = before
    command = [sys.executable, "-m", "ns", "watch", *options, "--every", "0.01"]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert watcher.stdout is not None
    lines = [watcher.stdout.readline() for _ in range(3)]
    watcher.send_signal(signal.SIGTERM)
    _, err = watcher.communicate(timeout=60)
    said = [line.partition(" ")[2] for line in lines]
    assert said[0].startswith("error: http")
    assert said[0].endswith("; next try in 0.01 min\n")
    assert said[1].startswith("started quickstart-")
    assert said[2].startswith("nothing to do: data, settings and image are those of run quickstart-")
    assert (watcher.returncode, err) == (0, "")
    assert len(kfp.all("runs")) == 1
