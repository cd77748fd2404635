import threading

import pytest
import torch
from structlog.testing import capture_logs
from torch import nn

from ns.config.schema import OptimizerConfig
from ns.core.errors import StoreError
from ns.modeling.precision import PrecisionMode
from ns.storage import LocalStore
from ns.training import checkpoint
from ns.training.checkpoint import CheckpointWriter, TrainingState
from ns.training.ema import Ema
from ns.training.optim import make_optimizer


def state(seed: int = 0, optimizer: str = "rmsprop") -> TrainingState:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    return TrainingState(network, Ema(network, 0.9), make_optimizer(network, OptimizerConfig(name=optimizer), 0.1))


def advance(some: TrainingState) -> None:
    some.optimizer.zero_grad()
    some.network(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for group in some.optimizer.param_groups:
        group["lr"] = 0.1
    some.optimizer.step()
    some.ema.update(some.step)
    some.step += 1
    some.history.append({"step": float(some.step)})


def values(some: TrainingState) -> dict[str, torch.Tensor]:
    return checkpoint.take_snapshot(some).tensors


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def saved(folder: LocalStore, steps: int, keep: int = 2) -> TrainingState:
    """A state after `steps` steps, with a checkpoint after each."""
    some = state()
    with CheckpointWriter(folder, keep) as writer:
        for _ in range(steps):
            advance(some)
            writer.save(some)
    return some


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd", "adamw", "lamb", "adan"])
def test_restore_state_brings_back_all_that_the_next_step_needs(tmp_path, optimizer):
    folder = LocalStore(tmp_path)
    some = state(optimizer=optimizer)
    some.set_mode(PrecisionMode("bfloat16", compiled=True))
    advance(some)
    some.metric_sums, some.summed_steps, some.seconds = torch.rand(5), 3, 1.5
    with CheckpointWriter(folder, 2) as writer:
        writer.save(some)
    other = state(seed=1, optimizer=optimizer)
    assert checkpoint.restore_state(folder, other)
    assert equal(values(other), values(some))
    assert other.network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert (other.step, other.summed_steps, other.seconds, other.history) == (1, 3, 1.5, [{"step": 1.0}])
    assert str(other.mode) == "bfloat16+compile"
    for each in (some, other):
        torch.manual_seed(2)
        advance(each)
    assert equal(values(other), values(some))


def test_restore_state_brings_back_the_scaler(tmp_path):
    some = state()
    some.set_mode(PrecisionMode("float16"))
    some.scaler.load_state_dict({**some.scaler.state_dict(), "scale": 123.0})
    checkpoint.write_checkpoint(LocalStore(tmp_path), 0, checkpoint.take_snapshot(some), 2)
    other = state()
    assert checkpoint.restore_state(LocalStore(tmp_path), other)
    assert other.scaler.state_dict()["scale"] == 123


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_write_checkpoint_keeps_the_last_ones(tmp_path, keep):
    folder = LocalStore(tmp_path)
    saved(folder, 4, keep)
    assert [key[:13] for key in folder.list()] == ["step-00000002", "step-00000003", "step-00000004"][-keep:]
    checkpoint.clear_checkpoints(folder)
    assert not list(folder.list())


def test_checkpoint_holds_the_state_at_the_time_of_save(tmp_path, monkeypatch):
    folder = LocalStore(tmp_path)
    go = threading.Event()
    write = checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *arguments: go.wait(10) and write(*arguments))
    some = state()
    advance(some)
    before = values(some)
    with CheckpointWriter(folder, 2) as writer:
        writer.save(some)
        advance(some)  # training goes on while the checkpoint is written
        go.set()
    other = state(seed=1)
    assert checkpoint.restore_state(folder, other)
    assert equal(values(other), before)
    assert other.history == [{"step": 1.0}]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"x", lambda data: b""])
def test_restore_state_skips_damaged_checkpoints(tmp_path, damage):
    folder = LocalStore(tmp_path)
    saved(folder, 3)
    last = list(folder.list())[-1]
    folder.put(last, damage(folder.get(last)))
    other = state()
    assert checkpoint.restore_state(folder, other)
    assert other.step == 2
    for key in list(folder.list()):
        folder.put(key, b"")
    assert not checkpoint.restore_state(folder, state())


def test_a_checkpoint_is_kept_although_a_later_one_was_damaged(tmp_path):
    folder = LocalStore(tmp_path)
    saved(folder, 3, keep=1)
    (last,) = folder.list()
    folder.put(last, b"")
    saved(folder, 1, keep=1)
    other = state()
    assert checkpoint.restore_state(folder, other)
    assert other.step == 1


class Full(LocalStore):
    """A disk that has room for one checkpoint."""

    def put(self, key: str, data: bytes) -> None:
        if list(self.list()):
            raise StoreError(f"{key}: cannot write: the disk is full")
        super().put(key, data)


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    folder = Full(tmp_path)
    some = state()
    with capture_logs() as logs, CheckpointWriter(folder, 2) as writer:
        for _ in range(3):
            advance(some)
            writer.save(some)
        with pytest.raises(StoreError, match="the disk is full"):
            writer.wait_for_write()
        advance(some)
        writer.save(some)  # leaving the context logs the error
    assert {(line["event"], line["log_level"]) for line in logs} == {("checkpoint not written; training goes on", "warning")}
    other = state()
    assert checkpoint.restore_state(folder, other)
    assert other.step == 1


def test_restore_state_fails_if_a_checkpoint_cannot_be_read(tmp_path, monkeypatch):
    saved(LocalStore(tmp_path), 2)

    def unreadable(self, key):
        raise StoreError(f"{key}: cannot read: the server does not answer")

    monkeypatch.setattr(LocalStore, "get", unreadable)
    with pytest.raises(StoreError, match="does not answer"):
        checkpoint.restore_state(LocalStore(tmp_path), state())
