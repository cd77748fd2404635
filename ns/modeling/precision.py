"""In which arithmetic a network runs fastest on the machine at hand: measured for about a second each, logged, remembered.

What was measured is kept in ~/.cache/noisy-student/precision.json (or below NS_CACHE_DIR), by machine, network and shape, unless
others kept the processor busy meanwhile. What was chosen is part of the result: training checkpoints and model cards hold it.
"""

import contextlib
import copy
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from ns.config.schema import Precision
from ns.core import log
from ns.core.digest import digest_json
from ns.core.errors import TrainingError
from ns.storage.cache import BlobCache

MEASURED_SECONDS = 1.0
LEAST_ROUNDS = 3
MARGIN = 1.1
"""Anything but plain float32 must be faster than it by this: the choice should not hang on a noisy second."""
COMPILE_FROM_SECONDS = {"cpu": 1200.0, "cuda": 600.0}
"""torch.compile takes up to a minute, so it is only tried when there is more work left than this."""
COMPILE_SAVES_SECONDS = 120.0
"""And only used when it saves more than this."""

DISTURBED_SHARE = 0.1
"""Of the time measured: who waits for a core longer than this has measured the others too."""

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PrecisionMode(NamedTuple):
    """How a network is run. Weights and losses are float32 in every mode."""

    precision: Precision = "float32"
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.precision}+compile" if self.compiled else self.precision

    @classmethod
    def parse(cls, text: str) -> Self:
        """The mode that `str` made `text` of."""
        for precision in get_args(Precision):
            for mode in (cls(precision), cls(precision, compiled=True)):
                if str(mode) == text:
                    return mode
        raise ValueError(f"{text!r} is no mode")

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, DTYPES[self.precision], enabled=self.precision != "float32")

    def prepare_network(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """What to call instead of `network`; its weights and its training flag stay those of `network`."""
        return torch.compile(network) if self.compiled else network


FLOAT32 = PrecisionMode()


@dataclass(frozen=True)
class Workload:
    """What is to be done, and so what is measured. `network` is neither changed nor run itself: a copy is."""

    kind: Literal["train", "infer"]
    network: nn.Module
    batch: int
    resolution: int
    device: torch.device
    description: Mapping[str, Any]
    """What says which network it is, as JSON."""

    def make_step(self, mode: PrecisionMode) -> Callable[[], None]:
        """One forward pass, and in training one backward pass, over random images."""
        network = copy.deepcopy(self.network).train(self.kind == "train")
        forward = mode.prepare_network(network)
        images = torch.randn(self.batch, 3, self.resolution, self.resolution, device=self.device)
        images = images.to(memory_format=torch.channels_last)

        def run_inference() -> None:
            with torch.inference_mode(), mode.autocast(self.device):
                forward(images)

        def run_training() -> None:
            with mode.autocast(self.device):
                logits = forward(images)
            network.zero_grad(set_to_none=True)
            logits.float().square().mean().backward()  # type: ignore[no-untyped-call]

        return run_training if self.kind == "train" else run_inference

    @property
    def key(self) -> str:
        return digest_json(
            {
                "machine": describe_machine(self.device),
                "torch": torch.__version__,
                "kind": self.kind,
                "network": dict(self.description),
                "batch": self.batch,
                "resolution": self.resolution,
            }
        )


def choose(workload: Workload, *, images: int, precisions: Sequence[Precision] | None = None) -> PrecisionMode:
    """The fastest mode for work on `images` images, of the given precisions or of all that the device knows.

    Raises TrainingError if the memory suffices for none of them.
    """
    memory = _Memory.load()
    rates = dict(memory.rates.get(workload.key, {}))
    undisturbed = True

    def measure(modes: Sequence[PrecisionMode]) -> None:
        nonlocal undisturbed
        found = _measure(workload, modes)
        rates.update(found.rates)
        undisturbed = undisturbed and found.undisturbed

    candidates = [PrecisionMode(precision) for precision in precisions or list_supported_precisions(workload.device)]
    if not all(str(mode) in rates for mode in candidates):
        measure(candidates)
    known = [mode for mode in candidates if str(mode) in rates]
    if not known:
        raise TrainingError(
            f"out of memory with {workload.batch} images of {workload.resolution} px: "
            "lower train.labeled_batch or labeling.batch, or raise train.accumulate"
        )
    best = max(known, key=lambda mode: rates[str(mode)] / (1 if mode.precision == "float32" else MARGIN))
    compiled = PrecisionMode(best.precision, compiled=True)
    seconds = images / rates[str(best)]
    if seconds > COMPILE_FROM_SECONDS[workload.device.type]:
        remembered = str(compiled) in rates
        if not remembered:
            measure([best, compiled])
            seconds = images / rates[str(best)]
        if seconds - images / rates.get(str(compiled), 1e-9) > COMPILE_SAVES_SECONDS:
            best = workable(workload, compiled) if remembered else compiled
    if undisturbed:
        memory.keep(workload.key, rates)
    log.get_logger().info(
        "precision chosen",
        task=workload.kind,
        mode=str(best),
        images_per_second={mode: round(rate, 1) for mode, rate in rates.items()},
        batch=workload.batch,
        resolution=workload.resolution,
    )
    return best


def workable(workload: Workload, mode: PrecisionMode) -> PrecisionMode:
    """The mode, or the same precision without torch.compile if that cannot be had here: in an image without a compiler, say.

    The mode may come from another machine, in a checkpoint or in what is remembered. Compiles for one step of a copy; the network
    itself is then compiled out of torch's cache.
    """
    if not mode.compiled or str(mode) in _measure(workload, [mode], seconds=0, least_rounds=1).rates:
        return mode
    return PrecisionMode(mode.precision)


class MeasuredSpeed(NamedTuple):
    """What a short measurement found."""

    mode: PrecisionMode
    images_per_second: float
    batch: int
    """Images in the passes that were measured."""


def measure_speed(workload: Workload, *, seconds: float, precisions: Sequence[Precision] | None = None) -> MeasuredSpeed:
    """The fastest mode, without torch.compile, and its speed, measured for about `seconds` with as many images at a time as
    fit into that, at most `workload.batch`. A network of which one image takes longer is measured with one pass over it.

    Raises TrainingError if the memory does not suffice for two images.
    """
    modes = [PrecisionMode(precision) for precision in precisions or list_supported_precisions(workload.device)]
    budget = seconds / len(modes)
    # A batch norm whose map is one px wide cannot be trained with one image.
    batch = least = min(2, workload.batch)
    first, took = modes[0], float("inf")
    out_of_memory = f"out of memory with {batch} images of {workload.resolution} px"
    with torch.random.fork_rng([workload.device] if workload.device.type == "cuda" else []):
        step = replace(workload, batch=batch).make_step(first)
        for _ in range(2):
            try:
                took = min(took, _time_step(step, workload.device))
            except torch.OutOfMemoryError as error:
                raise TrainingError(out_of_memory) from error
            if took > budget / 4:
                break
    if took > budget / 2:
        return MeasuredSpeed(first, batch / took, batch)
    # Half of the time for the rounds, of which there are two at least, after a first one that allocates.
    batch = max(batch, min(workload.batch, int(batch * budget / 6 / took)))
    while not (rates := _measure(replace(workload, batch=batch), modes, seconds=budget / 2, least_rounds=2).rates):
        if batch == least:  # what sufficed just now has been taken by a neighbor
            raise TrainingError(out_of_memory)
        batch = max(least, batch // 2)
    best = max(modes, key=lambda mode: rates.get(str(mode), 0) / (1 if mode.precision == "float32" else MARGIN))
    return MeasuredSpeed(best, rates[str(best)], batch)


def list_supported_precisions(device: torch.device) -> list[Precision]:
    """What is worth measuring on a device. float16 needs one that computes in it, and a gradient scaler."""
    return ["float32", "bfloat16", "float16"] if device.type == "cuda" else ["float32", "bfloat16"]


def describe_machine(device: torch.device) -> str:
    """The processor that does the work, and how many threads it has for it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads"


class _Found(NamedTuple):
    rates: dict[str, float]
    """Images per second by mode."""
    undisturbed: bool
    """Whether the processor was free for it. What was found on a busy one serves for now, and is not worth remembering."""


def _measure(
    workload: Workload, modes: Sequence[PrecisionMode], *, seconds: float = MEASURED_SECONDS, least_rounds: int = LEAST_ROUNDS
) -> _Found:
    """Images per second of each mode that can be run, from `seconds` each.

    The modes take turns, and the shortest time of each counts: a neighbor on the same cores slows single steps down by any
    factor, and would decide for the mode that happened to be measured without it.
    """
    device = workload.device
    steps: dict[str, Callable[[], None]] = {}
    times: dict[str, list[float]] = {}
    # Measuring must not change what training draws afterwards.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for mode in modes:
            try:
                step = workload.make_step(mode)
                _time_step(step, device)  # the first time compiles, allocates, and finds out whether the memory suffices
                steps[str(mode)], times[str(mode)] = step, []
            except torch.OutOfMemoryError:
                log.get_logger().warning(
                    "not enough memory to measure", task=workload.kind, mode=str(mode), batch=workload.batch
                )
            except Exception as error:
                # torch.compile fails in its own ways: no C++ compiler, an operation that it does not know, …
                if not mode.compiled:
                    raise
                log.get_logger().warning("cannot compile", task=workload.kind, reason=str(error).strip().partition("\n")[0])
        spent, rounds, waited = 0.0, 0, _waited_seconds()
        while steps and (rounds < least_rounds or spent < seconds * len(steps)):
            for name, step in steps.items():
                times[name].append(_time_step(step, device))
            spent, rounds = sum(map(sum, times.values())), rounds + 1
        waited = _waited_seconds() - waited
    rates = {name: workload.batch / min(found) for name, found in times.items()}
    if steps and waited > DISTURBED_SHARE * spent:
        log.get_logger().warning(
            "measured on a busy processor: not remembered", task=workload.kind, seconds=round(spent, 2), waited=round(waited, 2)
        )
        return _Found(rates, undisturbed=False)
    return _Found(rates, undisturbed=True)


def _waited_seconds() -> float:
    """How long the threads of this process have been ready and had no core so far; 0 where the system does not say."""
    waited = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that has just ended
            waited += int(task.read_text().split()[1])
    return waited / 1e9


def _time_step(step: Callable[[], None], device: torch.device) -> float:
    """What one step takes."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@dataclass
class _Memory:
    """Images per second by workload and mode. A file that cannot be read or written costs a new measurement, nothing else."""

    path: Path
    rates: dict[str, dict[str, float]]

    @classmethod
    def load(cls) -> Self:
        path = BlobCache.from_environment().root / "precision.json"
        with contextlib.suppress(OSError, ValueError):
            rates = json.loads(path.read_text())
            if isinstance(rates, dict) and all(isinstance(entry, dict) for entry in rates.values()):
                return cls(path, rates)
        return cls(path, {})

    def keep(self, key: str, rates: dict[str, float]) -> None:
        if self.rates.get(key) == rates:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent)
            with os.fdopen(handle, "w") as file:
                # Read again: others may have measured in the meantime.
                json.dump({**self.load().rates, key: rates}, file, indent=1)
            Path(name).replace(self.path)
