"""The arithmetic that a network runs in: what the experiment names, or a rule that can be predicted from the hardware.

A processor either has instructions for a type, or it emulates the type and is slower than with float32. `auto` never chooses a type
that is only emulated. What was chosen is part of the result: training checkpoints and model manifests keep it.
"""

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from ns.config.schema import Precision
from ns.core import log

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_INSTRUCTIONS: dict[Precision, tuple[str, ...]] = {
    "bfloat16": ("amx_bf16", "avx512_bf16"),
    "float16": ("amx_fp16", "avx512_fp16"),
}
"""Extensions of the instruction set that compute in a type; one of them suffices."""
GPU_CAPABILITIES: dict[Precision, int] = {"bfloat16": 8, "float16": 7}
"""The major compute capability from which NVIDIA's GPUs have tensor cores for a type."""

Task = Literal["train", "infer"]


class PrecisionMode(NamedTuple):
    """How a network is run. Weights and losses are float32 in every mode."""

    precision: Precision = "float32"
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.precision}+compile" if self.compiled else self.precision

    @classmethod
    def parse(cls, text: str) -> Self:
        """The mode that `str` made `text` of. Raises ValueError for other texts."""
        precision, plus, suffix = text.partition("+")
        if precision not in get_args(Precision) or suffix != "compile" * bool(plus):
            raise ValueError(f"{text!r} is no mode")
        return cls(precision, compiled=bool(plus))  # type: ignore[arg-type]

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, DTYPES[self.precision], enabled=self.precision != "float32")

    def prepare_network(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """What to call instead of `network`; its weights and its training flag stay those of `network`.

        It is compiled for the sizes of its first images. By default, torch compiles the second network of a process for any sizes, if
        its images have other ones than those of the first, and then it is slower (ResNet-18, 64 px: by 3 %).
        """
        return torch.compile(network, dynamic=False) if self.compiled else network


FLOAT32 = PrecisionMode()


def resolve_mode(precision: Literal["auto"] | Precision, *, compiled: bool, task: Task, device: torch.device) -> PrecisionMode:
    """The mode that a configuration stands for on a device. Logs what `auto` means and why.

    Warns of a precision that the device only emulates, and runs uncompiled where there is no compiler.
    """
    if precision == "auto":
        precision, reason = choose_precision(task, device)
        log.get_logger().info("precision chosen", task=task, precision=precision, reason=reason)
    else:
        warn_if_emulated(precision, device)
    return PrecisionMode(precision, compiled and can_compile(device))


def choose_precision(task: Task, device: torch.device) -> tuple[Precision, str]:
    """The precision that `auto` means on a device, and the reason.

    GPUs: bfloat16 from compute capability 8.0, float16 from 7.0, float32 below. CPUs: float32 in training, where bfloat16 takes up
    to twice as long (EfficientNet-B0 and ResNet-18, 64 px, two cores of a Xeon with AVX-512); bfloat16 in inference if the processor
    has AMX or AVX-512 instructions for it.
    """
    native_types = list_native_precisions(device)
    if device.type == "cuda":
        precision: Precision = next((name for name in GPU_CAPABILITIES if name in native_types), "float32")
        return precision, "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    if task == "train":
        return "float32", "training on a CPU is fastest in float32"
    if "bfloat16" in native_types:
        return "bfloat16", "the processor has instructions for bfloat16"
    return "float32", "the processor has no instructions for bfloat16"


def list_native_precisions(device: torch.device) -> tuple[Precision, ...]:
    """The precisions that a device has instructions for; it emulates the others."""
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return ("float32", *(name for name, least in GPU_CAPABILITIES.items() if major >= least))
    capabilities = torch.cpu.get_capabilities()
    return ("float32", *(name for name, extensions in CPU_INSTRUCTIONS.items() if any(map(capabilities.get, extensions))))


@cache
def warn_if_emulated(precision: Precision, device: torch.device) -> None:
    """Says once per process that a device only emulates a precision."""
    if precision not in list_native_precisions(device):
        log.get_logger().warning(
            "this machine only emulates the precision, which is slow", precision=precision, device=str(device)
        )


@cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; in an image without a C++ compiler, say, it does not. Warns once per process."""
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=device))
    except Exception as error:  # torch.compile fails in many ways, with exceptions of many kinds
        reason = str(error).strip().partition("\n")[0]
        log.get_logger().warning(
            "torch.compile does not work here: networks run uncompiled, equal up to rounding", reason=reason
        )
        return False
    return True
