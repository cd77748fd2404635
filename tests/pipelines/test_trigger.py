"""Runs that start when there is a reason: once for each, whoever looks, and however often."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from ns.cli import app as cli
from ns.config import schema as config
from ns.core.errors import ConfigError, DataError, RunError
from ns.planning.prices import read_prices
from ns.storage import LocalStore
from ns.storage.documents import encode_json
from pipelines import remote_run as cluster
from pipelines import trigger
from pipelines.kfp_client import KfpClient
from pipelines.trigger import DataSnapshot, Trigger
from tests.pipelines.kfp_api import KfpApi
from tests.storage.conftest import environment, moto, store_at  # noqa: F401

PARTS = {"labeled": 100, "pool": 1000, "heldout": 50}


@pytest.fixture(scope="module")
def experiment():
    return config.load_experiment(config.resolve_preset("quickstart"))


@pytest.fixture
def root(tmp_path):
    return LocalStore(tmp_path)


def seen(run="digits-1", settings="a", image="worker:1", **shards) -> Trigger:
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


def keep(root, one: Trigger, name="digits") -> None:
    """As the client leaves it that started the run."""
    root.put(f"store/triggers/{name}/{one.digest}.json", encode_json(one.model_dump(mode="json")))


def decide(root, one: Trigger, **options):
    return trigger.decide_trigger(root, "digits", one, **options)


def test_the_first_look_starts_a_run(root):
    assert decide(root, seen())[:2] == ("start", "no run of digits was started before")


def test_the_same_again_starts_none_unless_it_is_asked_for(root):
    keep(root, seen())
    assert decide(root, seen())[:2] == ("known", "data, settings and image are those of run digits-1")
    assert decide(root, seen(), again=True).action == "start"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"settings": "b"}, "the settings are others"),
        ({"image": "worker:2"}, "the image is worker:2, was worker:1"),
        ({"pool": {"pool-0": 1000, "pool-1": 20}}, "pool: 20 of 1,020 images are new (2.0%)"),
        ({"pool": {}}, "pool: 1,000 of 0 images are new"),
        ({"labeled": {"labeled-mended": 100}}, "labeled: 100 of 100 images are new (100.0%)"),
        ({"heldout": {"heldout-0": 50, "heldout-1": 1}}, "heldout: 1 of 51 images are new (2.0%)"),
    ],
)
def test_every_change_is_a_reason(root, change, why):
    keep(root, seen())
    decision = decide(root, seen(**change))
    assert decision.action == "start"
    assert decision.reason.startswith(why)
    assert decision.reason.endswith("since run digits-1")


def test_too_little_that_is_new_is_none_until_it_adds_up(root):
    keep(root, seen())
    little = seen(pool={"pool-0": 1000, "pool-1": 20})
    decision = decide(root, little, min_change=0.05)
    assert decision[:2] == ("nothing", "pool: 20 of 1,020 images are new (2.0%): less than 5.0%, since run digits-1")
    more = seen(pool={"pool-0": 1000, "pool-1": 20, "pool-2": 40})
    assert decide(root, more, min_change=0.05).action == "start"


def test_little_that_is_new_is_enough_beside_another_reason(root):
    keep(root, seen())
    assert decide(root, seen(image="worker:2", pool={"pool-0": 1000, "pool-1": 1}), min_change=0.5).action == "start"
    assert decide(root, seen(heldout={"heldout-0": 50, "heldout-1": 1}), min_change=0.5).action == "start"


def test_it_is_the_last_run_that_counts(root):
    keep(root, seen())
    keep(root, seen(run="digits-2", image="worker:2"))
    assert "since run digits-2" in decide(root, seen(run="digits-3", image="worker:3")).reason


def test_what_is_not_imported_is_compared_by_its_number(root):
    def found(images, digest):
        return DataSnapshot(digest=digest, images=images, shards={})

    assert found(110, "b").count_new_images(found(100, "a")) == 10
    assert found(100, "b").count_new_images(found(100, "a")) == 100


def test_a_look_sees_data_settings_and_image_and_no_places(tmp_path, pool, picture):
    folders = {}
    for part in ("labeled", "heldout"):
        for index, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / f"{part}.png").write_bytes(picture(index))
        folders[part] = str(tmp_path / part)
    pool(tmp_path / "pool", [["a", "b"], ["c"]])

    def look(*overrides, image="worker:1", **places):
        asked = {**folders, "pool": str(tmp_path / "pool")} | places
        one = config.load_experiment(
            config.resolve_preset("quickstart"), [*(f"data.{k}={v}" for k, v in asked.items()), *overrides]
        )
        return trigger.propose_trigger(one, image)

    first = look()
    assert first.run == f"quickstart-{first.digest[:8]}"
    assert {part: (one.images, len(one.shards)) for part, one in first.data.items()} == {
        "labeled": (2, 0),
        "pool": (3, 2),
        "heldout": (2, 0),
    }
    (tmp_path / "pool").rename(tmp_path / "elsewhere")
    assert look(pool=str(tmp_path / "elsewhere")).digest == first.digest
    pool(tmp_path / "pool", [["a", "b"], ["c"], ["d"]])
    keys = tmp_path / "keys.txt"
    keys.write_text("a\n")
    others = [look(), look("seed=1"), look(image="worker:2"), look(f"data.exclude={keys}")]
    keys.write_text("a\nb\n")
    others.append(look(f"data.exclude={keys}"))
    assert len({one.digest for one in [first, *others]}) == 6


def test_data_that_cannot_be_looked_at_is_named(experiment, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data.pool: .*empty"):
        trigger._snapshot_data("pool", str(tmp_path / "empty"))


def start(root, experiment, one=None, **options):
    decision = trigger.decide_trigger(root, experiment.name, one or seen(), **options)
    return trigger.start_triggered_run(
        KfpClient(), root, experiment, decision, lambda run: cluster.build_inputs(f"{root.uri}/{run}", root, run), **options
    )


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
def test_a_run_is_started_and_found_from_then_on(root, kfp, experiment):
    first = start(root, experiment)
    assert (first.name, first.new) == ("digits-1", True)
    for state in ("RUNNING", "SUCCEEDED", "FAILED"):
        kfp.end(first.run_id, state)
        again = start(root, experiment)
        assert (again.run_id, again.state, again.new) == (first.run_id, state, False)
    assert len(kfp.load_all("runs")) == 1


@pytest.mark.integration
def test_a_run_that_failed_is_started_again_if_asked_for(root, kfp, experiment, monkeypatch):
    monkeypatch.setattr(trigger, "CLAIM_SECONDS", 0.05)
    monkeypatch.setattr(trigger, "WAIT_SECONDS", 0.01)
    first = start(root, experiment)
    assert not start(root, experiment, again=True).new, "it is under way"
    kfp.end(first.run_id, "FAILED")
    assert start(root, experiment, again=True).new


@pytest.mark.integration
def test_two_that_look_at_once_start_one_run(root, kfp, experiment, monkeypatch):
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
    assert len({run.run_id for run in found}) == len(kfp.load_all("runs")) == 1


@pytest.mark.integration
def test_a_claim_whose_client_was_killed_is_taken_over(root, kfp, experiment, monkeypatch):
    monkeypatch.setattr(trigger, "WAIT_SECONDS", 0.01)
    keep(root, seen().model_copy(update_weights={"claimed_at": "2026-01-01T00:00:00+00:00"}), experiment.name)
    found = at_once(2, lambda: start(root, experiment))
    assert sorted(run.new for run in found) == [False, True]
    assert len(kfp.load_all("runs")) == 1


@pytest.mark.integration
def test_a_server_that_is_down_leaves_nothing_and_the_same_call_does_it_later(root, kfp, experiment, monkeypatch, tmp_path):
    url = kfp.url
    kfp.close()
    with pytest.raises(RunError, match="cannot be reached"):
        start(root, experiment)
    assert list(tmp_path.rglob("*")) == []
    back = KfpApi()
    monkeypatch.setenv("NS_KFP_URL", back.url)
    try:
        assert back.url != url
        assert start(root, experiment).new
    finally:
        back.close()


@pytest.mark.integration
def test_a_wrong_input_leaves_nothing(root, kfp, experiment, tmp_path):
    decision = trigger.decide_trigger(root, experiment.name, seen())
    with pytest.raises(ConfigError, match="gpus: is no input"):
        trigger.start_triggered_run(
            KfpClient(), root, experiment, decision, lambda run: cluster.build_inputs("c", root, run, inputs=["gpus=1"])
        )
    assert list(tmp_path.rglob("*")) == []


def test_prices_are_read_and_what_is_wrong_is_named(tmp_path):
    assert {"T4", "L4", "A100", "H100"} <= set(read_prices())
    table = tmp_path / "prices.yaml"
    table.write_text(yaml.safe_dump({"mine": {"peak": 100, "price": [1, 2]}}))
    assert read_prices(str(table))["mine"].price == (1, 2)
    for wrong in ("mine: {peak: 0, price: [1, 2]}", "mine: {peak: 1}", "- 1", "a: ["):
        table.write_text(wrong)
        with pytest.raises(ConfigError, match=r"prices\.yaml: "):
            read_prices(str(table))


def ns(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.run_command_line(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def on_s3(kfp, moto, tmp_path, monkeypatch):  # noqa: F811
    """Options of both commands, and the store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.setattr(trigger, "SETTLE_SECONDS", 0.1)
    store = store_at(moto, tmp_path / "cache")
    return ["quickstart", "--root", store.uri], store


@pytest.mark.integration
def test_the_command_says_what_it_would_do_then_does_it_then_has_nothing_to_do(capsys, kfp, on_s3):
    options, store = on_s3
    code, out, _ = ns(capsys, "trigger", *options, "--dry-run")
    assert code == 0
    assert out.startswith("would start a run: no run of quickstart was started before\n")
    assert "generation 1: label" in out
    assert "2 of 2 shards, 1,247 of 1,247 images" in out
    assert "A100" in out
    assert (list(store.list("")), kfp.requests) == ([], [])

    code, out, _ = ns(capsys, "trigger", *options)
    (run,) = kfp.load_all("runs")
    assert out == (
        f"started {run.display_name}: no run of quickstart was started before: {kfp.url}/#/runs/details/{run.run_id}\n"
    )
    assert config.load_experiment(run.runtime_config.parameters["config"]).name == "quickstart"
    code, out, _ = ns(capsys, "trigger", *options)
    assert out.startswith(f"nothing to do: data, settings and image are those of run {run.display_name}: run ")
    code, out, _ = ns(capsys, "trigger", *options, "--image", "worker:2", "--json")
    assert json.loads(out)["why"].startswith("the image is worker:2, was noisy-student/worker:")
    assert (code, len(kfp.load_all("runs"))) == (0, 2)


@pytest.mark.integration
def test_two_commands_at_once_start_one_run_on_s3(kfp, on_s3, experiment):
    _, store = on_s3
    found = at_once(4, lambda: start(store, experiment))
    assert sorted(run.new for run in found) == [False, False, False, True]
    assert len(kfp.load_all("runs")) == 1


@pytest.mark.integration
def test_a_server_that_is_down_ends_the_command_with_its_code(capsys, kfp, on_s3):
    options, store = on_s3
    kfp.close()
    code, out, err = ns(capsys, "trigger", *options)
    assert (code, out) == (6, "")
    assert "cannot be reached" in err
    assert list(store.list("")) == []


@pytest.mark.integration
def test_watching_says_a_line_each_time_outlives_failures_and_ends_on_sigterm(kfp, on_s3):
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
    assert said[0].endswith("; again in 0.01 min\n")
    assert said[1].startswith("started quickstart-")
    assert said[2].startswith("nothing to do: data, settings and image are those of run quickstart-")
    assert (watcher.returncode, err) == (0, "")
    assert len(kfp.load_all("runs")) == 1
