import hashlib
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ns.config.schema import ModelConfig, NoiseConfig
from ns.core.errors import TrainingError
from ns.modeling import factory as models
from ns.modeling import precision
from ns.modeling.precision import PrecisionMode, Workload, choose

SMALL = ModelConfig(arch="test_efficientnet", resolution=32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "precision.json"


@pytest.fixture
def workload():
    network = models.build_model(SMALL, NoiseConfig(dropout=0.5, stochastic_depth=0.5), 3)
    return Workload("train", network, 4, 32, torch.device("cpu"), models.describe_architecture(SMALL))


@pytest.fixture
def stopwatch(monkeypatch):
    """Instead of measuring: seconds a batch by mode. Lists what was measured."""
    measured = []
    times = {"float32": 1.0, "bfloat16": 0.5, "bfloat16+compile": 0.25, "float32+compile": 0.9}
    monkeypatch.setattr(Workload, "step", lambda self, mode: str(mode))

    def seconds(step, device):
        if step not in measured:
            measured.append(step)
        if isinstance(times[step], Exception):
            raise times[step]
        return times[step]

    monkeypatch.setattr(precision, "_seconds", seconds)
    return times, measured


@pytest.mark.parametrize("mode", [PrecisionMode(p, c) for p in precision.DTYPES for c in (False, True)])
def test_a_mode_reads_back_from_its_name(mode):
    assert PrecisionMode.parse(str(mode)) == mode


@pytest.mark.parametrize("text", ["", "float64", "float32+", "float32+fast", "float32+compile+compile"])
def test_other_names_are_no_modes(text):
    with pytest.raises(ValueError, match="is no mode"):
        PrecisionMode.parse(text)


def test_the_fastest_is_chosen_and_remembered(workload, stopwatch, cache):
    _, measured = stopwatch
    assert choose(workload, images=100) == choose(workload, images=100) == PrecisionMode("bfloat16")
    assert measured == ["float32", "bfloat16"]
    assert json.loads(cache.read_text()) == {workload.key: {"float32": 4.0, "bfloat16": 8.0}}


def test_another_shape_or_kind_of_work_is_measured_for_itself(workload):
    others = [
        Workload("infer", workload.network, 4, 32, workload.device, workload.about),
        Workload("train", workload.network, 8, 32, workload.device, workload.about),
        Workload("train", workload.network, 4, 64, workload.device, workload.about),
        Workload("train", workload.network, 4, 32, workload.device, {**workload.about, "arch": "lcnet_035"}),
    ]
    assert len({workload.key, *(other.key for other in others)}) == 5


def test_a_gain_within_the_noise_leaves_float32(workload, stopwatch):
    stopwatch[0]["bfloat16"] = 0.95
    assert choose(workload, images=100) == PrecisionMode("float32")


def test_only_the_precisions_asked_for_are_measured(workload, stopwatch):
    assert choose(workload, images=100, precisions=["float32"]) == PrecisionMode("float32")
    assert stopwatch[1] == ["float32"]


def test_compiling_is_tried_when_there_is_much_to_do_and_used_when_it_pays(workload, stopwatch):
    times, measured = stopwatch
    assert choose(workload, images=8 * 1199) == PrecisionMode("bfloat16")
    assert choose(workload, images=8 * 1201) == PrecisionMode("bfloat16", compiled=True)
    assert measured == ["float32", "bfloat16", "bfloat16+compile"]
    # What is remembered for long work does not decide about short work.
    assert choose(workload, images=100) == PrecisionMode("bfloat16")
    times["bfloat16+compile"] = 0.49
    other = Workload("infer", workload.network, 4, 32, workload.device, workload.about)
    assert choose(other, images=8 * 1201) == PrecisionMode("bfloat16")


def test_what_cannot_be_compiled_runs_as_it_is(workload, stopwatch):
    stopwatch[0]["bfloat16+compile"] = RuntimeError("no C++ compiler\nand a long trace")
    assert choose(workload, images=10**9) == PrecisionMode("bfloat16")


def test_what_is_measured_on_a_busy_processor_serves_once_and_is_not_remembered(workload, stopwatch, cache, monkeypatch):
    waited = iter([0.0, 10.0])
    monkeypatch.setattr(precision, "_waited_seconds", lambda: next(waited, 10.0))
    assert choose(workload, images=100) == PrecisionMode("bfloat16")
    assert not cache.exists()
    stopwatch[0]["float32"] = 0.25
    assert choose(workload, images=100) == PrecisionMode("float32")
    assert json.loads(cache.read_text())[workload.key]["float32"] == 16


def test_waiting_for_a_core_is_noticed():
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("the system does not say how long threads wait")
    before, core = precision._waited_seconds(), os.sched_getaffinity(0)
    together = threading.Barrier(2)

    def work():
        os.sched_setaffinity(0, {min(core)})  # of this thread
        together.wait()
        ends = time.thread_time() + 0.05
        while time.thread_time() < ends:
            hashlib.sha256(bytes(1_000_000))  # lets go of the interpreter

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    waited = before
    while any(thread.is_alive() for thread in threads):
        waited = max(waited, precision._waited_seconds())
    assert waited - before > 0.02


@pytest.mark.parametrize("precise", ["float32", "bfloat16"])
def test_a_mode_of_elsewhere_is_taken_without_compiling_where_there_is_no_compiler(workload, stopwatch, precise):
    compiled, plain = PrecisionMode(precise, compiled=True), PrecisionMode(precise)
    assert precision.workable(workload, compiled) == compiled
    assert precision.workable(workload, plain) == plain
    stopwatch[0][str(compiled)] = RuntimeError("no C++ compiler\nand a long trace")
    assert precision.workable(workload, compiled) == plain


def test_what_is_remembered_of_compiling_is_tried_before_it_is_used(workload, stopwatch):
    times, _ = stopwatch
    assert choose(workload, images=8 * 1201) == PrecisionMode("bfloat16", compiled=True)
    times["bfloat16+compile"] = RuntimeError("no C++ compiler")
    assert choose(workload, images=8 * 1201) == PrecisionMode("bfloat16")


def test_a_mode_that_memory_does_not_suffice_for_is_left_out(workload, stopwatch):
    stopwatch[0]["bfloat16"] = torch.OutOfMemoryError()
    assert choose(workload, images=100) == PrecisionMode("float32")
    stopwatch[0]["float32"] = torch.OutOfMemoryError()
    other = Workload("infer", workload.network, 4, 32, workload.device, workload.about)
    with pytest.raises(TrainingError, match=r"out of memory with 4 images of 32 px: lower train\.labeled_batch"):
        choose(other, images=100)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 3}'])
def test_a_damaged_memory_is_replaced(workload, stopwatch, cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    assert choose(workload, images=100) == PrecisionMode("bfloat16")
    assert list(json.loads(cache.read_text())) == [workload.key]


def test_a_memory_that_cannot_be_written_is_no_error(workload, stopwatch, cache):
    cache.parent.write_text("a file where the folder should be")
    assert choose(workload, images=100) == PrecisionMode("bfloat16")


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_measuring_changes_neither_the_network_nor_what_is_drawn_next(workload, monkeypatch, kind):
    monkeypatch.setattr(precision, "MEASURED_SECONDS", 0.01)
    before = {name: value.clone() for name, value in workload.network.state_dict().items()}
    workload = Workload(kind, workload.network, 4, 32, workload.device, workload.about)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    choose(workload, images=100)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, before[name]) for name, value in workload.network.state_dict().items())
    assert all(parameter.grad is None for parameter in workload.network.parameters())


def test_a_network_that_takes_longer_than_there_is_time_is_measured_once(workload, stopwatch):
    # A second a pass, half a second for each mode.
    assert precision.measure_speed(workload, seconds=1) == precision.MeasuredSpeed(PrecisionMode("float32"), 2.0, 2)
    assert stopwatch[1] == ["float32"]


def test_a_quick_measurement_finds_the_fastest_mode(workload, stopwatch):
    rate = precision.measure_speed(replace(workload, batch=16), seconds=24)
    assert rate == precision.MeasuredSpeed(PrecisionMode("bfloat16"), 8.0, 4)
    assert set(stopwatch[1]) == {"float32", "bfloat16"}


def test_memory_that_is_gone_meanwhile_ends_the_measurement(workload, stopwatch, monkeypatch):
    monkeypatch.setattr(precision, "_measure", lambda *_, **__: precision._Found({}, undisturbed=True))
    with pytest.raises(TrainingError, match=f"out of memory with 2 images of {workload.resolution} px"):
        precision.measure_speed(replace(workload, batch=16), seconds=24)


def test_a_batch_that_does_not_fit_is_halved(workload, stopwatch, monkeypatch):
    rounds = iter(
        [precision._Found({}, undisturbed=True), precision._Found({"float32": 3.0, "bfloat16": 3.1}, undisturbed=True)]
    )
    monkeypatch.setattr(precision, "_measure", lambda *_, **__: next(rounds))
    assert precision.measure_speed(replace(workload, batch=16), seconds=24) == precision.MeasuredSpeed(
        PrecisionMode("float32"), 3.0, 2
    )
