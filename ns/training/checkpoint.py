"""Training checkpoints: everything that the next step depends on, as tensors and JSON in one safetensors blob.

    step-00000120-SHA.safetensors     SHA: first 16 digits of the blob's sha256, checked on load

The data order and all noise are functions of (seed, step), so no random state is kept.
"""

import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ns.core import log
from ns.core.digest import sha256_bytes
from ns.core.errors import StoreError
from ns.modeling.precision import FLOAT32, Mode
from ns.storage import Store
from ns.training.ema import Ema

NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})\.safetensors")


@dataclass
class State:
    """What training continues from."""

    network: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    mode: Mode = FLOAT32
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    """Of the gradients of float16; does nothing for other precisions."""
    step: int = 0
    """The next step."""
    seconds: float = 0.0
    """Spent in training so far."""
    history: list[dict[str, float]] = field(default_factory=list)
    sums: Tensor | None = None
    """What was measured since the last point of the history, added up."""
    counted: int = 0
    """Steps in `sums`."""

    def run_in(self, mode: Mode) -> None:
        """Decides how the network is run, before the first step."""
        self.mode = mode
        device = next(self.network.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=mode.precision == "float16")


class Writer:
    """Writes checkpoints while training goes on, one at a time. Leave its context to be sure of the last one."""

    def __init__(self, folder: Store, keep: int) -> None:
        """`keep`: how many are kept, the last ones."""
        self._folder = folder
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, state: State) -> None:
        """Copies the state as it is now, and has it written. Waits if the checkpoint before is still being written.

        A checkpoint that cannot be written is no reason to stop: it is logged, and the one before stays.
        """
        self._finish_one()
        self._writing = self._thread.submit(write, self._folder, state.step, snapshot(state), self._keep)

    def flush(self) -> None:
        """Waits for the checkpoint under way. Raises StoreError if it cannot be written."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _finish_one(self) -> None:
        try:
            self.flush()
        except StoreError as error:
            log.get().warning("checkpoint not written; training goes on", error=str(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish_one()
        self._thread.shutdown()


class Snapshot(NamedTuple):
    """A state's values, on the CPU and apart from it."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def snapshot(state: State) -> Snapshot:
    """A copy of everything that the next step depends on."""
    tensors = {f"network.{name}": value for name, value in state.network.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in state.ema.shadow.items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, slots in state.optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    if state.sums is not None:
        tensors["record.sums"] = state.sums
    facts = {
        "step": state.step,
        "seconds": state.seconds,
        "history": list(state.history),
        "counted": state.counted,
        "optimizer": plain,
        "mode": str(state.mode),
        "scaler": state.scaler.state_dict(),
    }
    return Snapshot({name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}, facts)


def write(folder: Store, step: int, taken: Snapshot, keep: int) -> None:
    """Writes a checkpoint and drops all but the last `keep`."""
    tensors = {name: value.contiguous() for name, value in taken.tensors.items()}
    blob = save_tensors(tensors, metadata={"state": json.dumps(taken.facts)})
    folder.put(f"step-{step:08d}-{sha256_bytes(blob)[:16]}.safetensors", blob)
    for key in _found(folder)[keep:]:
        folder.delete(key)


def restore(folder: Store, state: State) -> bool:
    """Loads the newest checkpoint that is whole into `state`. False if there is none.

    Raises StoreError if a checkpoint cannot be read: that is no damage, and starting again would throw it away.
    """
    for key in _found(folder):
        match = NAME.fullmatch(key)
        blob = folder.get(key)
        if match and sha256_bytes(blob)[:16] == match[2]:
            _load(blob, state)
            return True
        log.get().warning("checkpoint is damaged, trying the one before", checkpoint=f"{folder.uri}/{key}")
    return False


def clear(folder: Store) -> None:
    """Removes all checkpoints: the finished model takes their place."""
    for key in _found(folder):
        folder.delete(key)


def _found(folder: Store) -> list[str]:
    """Keys of the checkpoints, newest first."""
    return sorted((key for key in folder.list("step-") if NAME.fullmatch(key)), reverse=True)


def _load(blob: bytes, state: State) -> None:
    tensors = load_tensors(blob)
    # safetensors: the length of a JSON header in 8 bytes, the header, the tensors.
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    facts = json.loads(header["__metadata__"]["state"])
    state.network.load_state_dict(_part(tensors, "network."))
    for name, value in _part(tensors, "ema.").items():
        state.ema.shadow[name].copy_(value)
    optimizer = state.optimizer.state_dict()
    slots: dict[int, dict[str, Any]] = {}
    for name, value in _part(tensors, "optimizer.").items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = value
    for index, values in facts["optimizer"].items():
        slots.setdefault(int(index), {}).update(values)
    optimizer["state"] = slots
    state.optimizer.load_state_dict(optimizer)
    state.run_in(Mode.parse(facts["mode"]))
    state.scaler.load_state_dict(facts["scaler"])
    state.step = int(facts["step"])
    state.seconds = float(facts["seconds"])
    state.history = facts["history"]
    state.counted = int(facts["counted"])
    state.sums = tensors.get("record.sums")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
