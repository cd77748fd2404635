"""Training checkpoints: everything that the next step depends on, as tensors and JSON in one safetensors file.

    step-00000120-SHA.safetensors     SHA: the first 16 digits of the file's sha256, checked on load

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
from ns.modeling.precision import FLOAT32, PrecisionMode
from ns.storage import Store
from ns.training.ema import Ema

CHECKPOINT_NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})\.safetensors")


@dataclass
class TrainingState:
    """What training continues from."""

    network: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    mode: PrecisionMode = FLOAT32
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    """Scales the gradients of float16; does nothing for other precisions."""
    step: int = 0
    """The next step, counted from 0."""
    seconds: float = 0.0
    """Seconds of training so far."""
    history: list[dict[str, float]] = field(default_factory=list)
    metric_sums: Tensor | None = None
    """Sums of the measurements since the last point of the history, float32 [5]."""
    summed_steps: int = 0
    """Steps in `metric_sums`."""

    def set_mode(self, mode: PrecisionMode) -> None:
        """Sets the mode that the network runs in; before the first step only."""
        self.mode = mode
        device = next(self.network.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=mode.precision == "float16")


class CheckpointWriter:
    """Writes checkpoints in a thread while training goes on. Leaving its context waits for the last one."""

    def __init__(self, store: Store, keep: int) -> None:
        """`keep`: how many of the last checkpoints are kept."""
        self._store = store
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, state: TrainingState) -> None:
        """Copies the state as it is now and starts to write it, after the checkpoint before is written.

        A checkpoint that cannot be written is logged and does not stop training; the one before stays.
        """
        self._wait_or_warn()
        self._writing = self._thread.submit(write_checkpoint, self._store, state.step, take_snapshot(state), self._keep)

    def wait_for_write(self) -> None:
        """Waits until the checkpoint is written. Raises StoreError if it cannot be."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _wait_or_warn(self) -> None:
        try:
            self.wait_for_write()
        except StoreError as error:
            log.get_logger().warning("checkpoint not written; training goes on", error=str(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wait_or_warn()
        self._thread.shutdown()


class Snapshot(NamedTuple):
    """A copy of a state's values, on the CPU."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def take_snapshot(state: TrainingState) -> Snapshot:
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
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(state.optimizer.param_groups):
        counts = _list_group_state(state.optimizer, group)
        tensors |= {f"group.{index}.{name}": value for name, value in counts.items() if isinstance(value, Tensor)}
        groups.append({name: value for name, value in counts.items() if not isinstance(value, Tensor)})
    if state.metric_sums is not None:
        tensors["metric_sums"] = state.metric_sums
    metadata = {
        "step": state.step,
        "seconds": state.seconds,
        "history": list(state.history),
        "summed_steps": state.summed_steps,
        "optimizer": plain,
        "groups": groups,
        "mode": str(state.mode),
        "scaler": state.scaler.state_dict(),
    }
    return Snapshot({name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}, metadata)


def _list_group_state(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer counts for a group of parameters as a whole: LAMB and Adan keep their step there. Settings are none of it."""
    settings = {"params", "lr_scale", *optimizer.defaults}
    return {name: value for name, value in group.items() if name not in settings and isinstance(value, Tensor | int | float)}


def write_checkpoint(store: Store, step: int, state_snapshot: Snapshot, keep: int) -> None:
    """Writes a checkpoint and drops all but the last `keep`."""
    tensors = {name: value.contiguous() for name, value in state_snapshot.tensors.items()}
    blob = save_tensors(tensors, metadata={"state": json.dumps(state_snapshot.metadata)})
    key = f"step-{step:08d}-{sha256_bytes(blob)[:16]}.safetensors"
    store.put(key, blob)
    listed = [(int(match[1]), match[0]) for match in _list_checkpoints(store)]
    # Training went on before these, so they are damaged; as the last ones they would be kept, and this one dropped.
    damaged = [name for at_step, name in listed if at_step >= step and name != key]
    whole = [name for _, name in listed if name not in damaged]
    for name in [*damaged, *whole[keep:]]:
        store.delete(name)


def restore_state(store: Store, state: TrainingState) -> bool:
    """Loads the newest undamaged checkpoint into `state`. Returns False if there is none.

    Raises StoreError if a checkpoint cannot be read: it may be whole, and to start again would throw it away.
    """
    for match in _list_checkpoints(store):
        blob = store.get(match[0])
        if sha256_bytes(blob)[:16] == match[2]:
            _load_state(blob, state)
            return True
        log.get_logger().warning("checkpoint is damaged, trying the one before", checkpoint=f"{store.uri}/{match[0]}")
    return False


def clear_checkpoints(store: Store) -> None:
    """Removes all checkpoints. Once a model is finished, it needs none."""
    for match in _list_checkpoints(store):
        store.delete(match[0])


def _list_checkpoints(store: Store) -> list[re.Match[str]]:
    """The keys of the checkpoints as matches of CHECKPOINT_NAME, newest first."""
    matches = (CHECKPOINT_NAME.fullmatch(key) for key in sorted(store.list("step-"), reverse=True))
    return [match for match in matches if match]


def _load_state(blob: bytes, state: TrainingState) -> None:
    tensors = load_tensors(blob)
    # safetensors: the length of a JSON header in 8 bytes, the header, the tensors.
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    metadata = json.loads(header["__metadata__"]["state"])
    state.network.load_state_dict(_select_prefix(tensors, "network."))
    for name, value in _select_prefix(tensors, "ema.").items():
        state.ema.shadow[name].copy_(value)
    optimizer = state.optimizer.state_dict()
    slots: dict[int, dict[str, Any]] = {}
    for name, value in _select_prefix(tensors, "optimizer.").items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = value
    for index, values in metadata["optimizer"].items():
        slots.setdefault(int(index), {}).update(values)
    optimizer["state"] = slots
    for number, (group, counts) in enumerate(zip(optimizer["param_groups"], metadata["groups"], strict=True)):
        group.update(counts | _select_prefix(tensors, f"group.{number}."))
    state.optimizer.load_state_dict(optimizer)
    state.set_mode(PrecisionMode.parse(metadata["mode"]))
    state.scaler.load_state_dict(metadata["scaler"])
    state.step = int(metadata["step"])
    state.seconds = float(metadata["seconds"])
    state.history = metadata["history"]
    state.summed_steps = int(metadata["summed_steps"])
    state.metric_sums = tensors.get("metric_sums")


def _select_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
