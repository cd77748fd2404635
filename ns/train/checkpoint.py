"""Training checkpoints: everything that the next step depends on, as tensors and JSON in one safetensors blob.

    step-00000120-SHA.safetensors     SHA: first 16 digits of the blob's sha256, checked on load

The data order and all noise are functions of (seed, step), so no random state is kept.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ns import log
from ns.digest import sha256_bytes
from ns.errors import StoreError
from ns.precision import FLOAT32, Mode
from ns.store import Store
from ns.train.ema import Ema

KEEP = 2
"""A damaged checkpoint falls back on the one before."""

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


def save(folder: Store, state: State) -> None:
    """Writes a checkpoint and drops all but the last KEEP."""
    tensors = {f"network.{name}": value for name, value in state.network.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in state.ema.shadow.items()}
    optimizer = state.optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, slots in optimizer["state"].items():
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
        "history": state.history,
        "counted": state.counted,
        "optimizer": plain,
        "mode": str(state.mode),
        "scaler": state.scaler.state_dict(),
    }
    blob = save_tensors(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        metadata={"state": json.dumps(facts)},
    )
    folder.put(f"step-{state.step:08d}-{sha256_bytes(blob)[:16]}.safetensors", blob)
    for key in _found(folder)[KEEP:]:
        folder.delete(key)


def restore(folder: Store, state: State) -> bool:
    """Loads the newest checkpoint that is whole into `state`. False if there is none."""
    for key in _found(folder):
        match = NAME.fullmatch(key)
        blob = folder.get(key)
        if match is None or sha256_bytes(blob)[:16] != match[2]:
            log.get().warning("checkpoint is damaged, trying the one before", checkpoint=f"{folder.uri}/{key}")
            continue
        _load(folder.path(key), state)
        return True
    return False


def clear(folder: Store) -> None:
    """Removes all checkpoints: the finished model takes their place."""
    for key in _found(folder):
        folder.delete(key)


def _found(folder: Store) -> list[str]:
    """Keys of the checkpoints, newest first."""
    return sorted((key for key in folder.list("step-") if NAME.fullmatch(key)), reverse=True)


def _load(path: Any, state: State) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["state"])
            # Not a dict: it has keys() and cannot be iterated.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"{path}: not a training checkpoint: {error}; delete it to start this training again") from error
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
