from functools import partial

import pytest
import structlog
import torch

from ns.modeling import precision
from ns.modeling.precision import (
    DTYPES,
    PrecisionMode,
    can_compile,
    choose_precision,
    list_native_precisions,
    resolve_mode,
    warn_if_emulated,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_process():
    """What is said once per process may be said again."""
    warn_if_emulated.cache_clear()
    can_compile.cache_clear()


@pytest.fixture
def set_hardware(monkeypatch):
    """Function: the machine has these extensions of the CPU, and GPUs of this compute capability."""

    def set_hardware(extensions=(), capability=(0, 0)):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False} | dict.fromkeys(extensions, True)
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    return set_hardware


@pytest.mark.parametrize("mode", [PrecisionMode(name, compiled) for name in DTYPES for compiled in (False, True)])
def test_mode_reads_back_from_its_name(mode):
    assert PrecisionMode.parse(str(mode)) == mode


@pytest.mark.parametrize("text", ["", "float64", "float32+", "float32+fast", "float32+compile+compile"])
def test_mode_refuses_other_names(text):
    with pytest.raises(ValueError, match="is no mode"):
        PrecisionMode.parse(text)


@pytest.mark.parametrize(
    ("extensions", "expected"),
    [((), "float32"), (("avx512_fp16",), "float32"), (("avx512_bf16",), "bfloat16"), (("amx_bf16", "avx512_fp16"), "bfloat16")],
)
def test_precision_on_a_cpu_follows_its_instructions(set_hardware, extensions, expected):
    set_hardware(extensions)
    assert choose_precision("infer", CPU)[0] == expected
    assert choose_precision("train", CPU)[0] == "float32"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
@pytest.mark.parametrize("task", ["train", "infer"])
def test_precision_on_a_gpu_follows_its_compute_capability(set_hardware, capability, expected, task):
    set_hardware(capability=capability)
    assert choose_precision(task, GPU) == (expected, "compute capability {}.{}".format(*capability))


def test_native_precisions_of_this_machine_can_be_listed():
    assert list_native_precisions(CPU)[0] == "float32"


def test_automatic_precision_is_logged_with_its_reason(set_hardware):
    set_hardware(["amx_bf16"])
    with structlog.testing.capture_logs() as lines:
        assert resolve_mode("auto", compiled=False, task="infer", device=CPU) == PrecisionMode("bfloat16")
    assert [(line["event"], line["precision"], line["reason"]) for line in lines] == [
        ("precision chosen", "bfloat16", "the processor has instructions for bfloat16")
    ]


def test_emulated_precision_is_used_with_one_warning(set_hardware):
    set_hardware()
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            assert resolve_mode("bfloat16", compiled=False, task="infer", device=CPU) == PrecisionMode("bfloat16")
            assert resolve_mode("float32", compiled=False, task="train", device=CPU) == PrecisionMode("float32")
    assert [(line["log_level"], line["event"], line["precision"]) for line in lines] == [
        ("warning", "this machine only emulates the precision, which is slow", "bfloat16")
    ]


def test_compiling_falls_back_with_one_warning(monkeypatch):
    def fail(_function):
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(precision.torch, "compile", fail)
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            assert resolve_mode("float32", compiled=True, task="train", device=CPU) == PrecisionMode("float32")
    said = "torch.compile does not work here: networks run uncompiled, equal up to rounding"
    assert [(line["log_level"], line["event"], line["reason"]) for line in lines] == [("warning", said, "no C++ compiler")]


def test_compiling_is_asked_for_separately(monkeypatch):
    monkeypatch.setattr(precision, "can_compile", lambda _: True)
    assert resolve_mode("bfloat16", compiled=True, task="train", device=CPU) == PrecisionMode("bfloat16", compiled=True)
    assert resolve_mode("bfloat16", compiled=False, task="train", device=CPU) == PrecisionMode("bfloat16")


@pytest.mark.integration
def test_each_network_of_a_process_is_compiled_for_its_own_sizes(monkeypatch):
    any_size = []

    def keep_graph(graph, inputs):
        any_size.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph

    monkeypatch.setattr(precision.torch, "compile", partial(torch.compile, backend=keep_graph))
    for pixels in (16, 24):
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        images = torch.rand(2, 3, pixels, pixels)
        assert torch.equal(PrecisionMode(compiled=True).prepare_network(network)(images), network(images))
    assert any_size == [False, False]
