"""Data-parallel training: one process per GPU, on one node or on several.

torchrun starts the processes, and gives each its rank and the address of the first (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT). Each takes its part of the images of every step. Gradients, batch-norm statistics and metrics are means over all
processes, so a step does not depend on their number.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ns.core.errors import ConfigError, Interrupted, NsError, TrainingError, find_error_kind
from ns.core.process import CLIENT_VARIABLE, count_cores, handle_signals, identify_process
from ns.storage.scratch import make_scratch_dir

FAILURE_VARIABLE = "NS_FAILURE_FILE"
"""Path of the file in which the first process that fails leaves its error, for `launch_processes` to raise it."""


@dataclass(frozen=True)
class World:
    """The group of processes that train together, and the rank of this one."""

    rank: int = 0
    world_size: int = 1
    local_processes: int = 1
    """Number of them on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Replaces `values` by their mean over all processes, and returns them."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any process has it set. Costs a message between CPUs, and no wait for the GPU."""
        if self.world_size == 1:
            return flags
        maxima = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in maxima.tolist())

    def all_gather(self, value: int) -> list[int]:
        """The values of all processes, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        gathered = torch.zeros(self.world_size, dtype=torch.int64)
        gathered[self.rank] = value
        dist.all_reduce(gathered)
        return [int(item) for item in gathered.tolist()]

    def broadcast(self, make: Callable[[], str]) -> str:
        """Calls `make` in the main process and returns its text, at most 256 bytes of UTF-8, in all processes."""
        if self.world_size == 1:
            return make()
        text = torch.zeros(256, dtype=torch.uint8)
        if self.is_main:
            encoded = make().encode()
            text[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        dist.broadcast(text, 0)
        return bytes(text.tolist()).rstrip(b"\0").decode()

    def barrier(self) -> None:
        """Waits until all processes have come here."""
        if self.world_size > 1:
            dist.barrier()

    def sync_grads_on(self, forward: Any, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """The context for forward and backward of a part of a step: only the last part exchanges gradients."""
        is_deferred = self.world_size > 1 and not is_last
        return forward.no_sync() if is_deferred else contextlib.nullcontext()

    def wrap_ddp(self, network: nn.Module, prepare: Callable[[nn.Module], Any]) -> Any:
        """What to call for a forward pass, so that the backward pass leaves the mean of all gradients in every process.

        `prepare` is applied to the network first. Batch-norm layers of `network` will use the images of all processes.
        """
        if self.world_size == 1:
            return prepare(network)
        network = sync_batch_norms(network, self)
        return DistributedDataParallel(prepare(network), forward_sync_buffers=False, gradient_as_bucket_view=True)


SINGLE = World()


@contextmanager
def process_group() -> Iterator[World]:
    """The process group that torchrun's variables describe; SINGLE without them."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield SINGLE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), world_size, int(os.environ["LOCAL_WORLD_SIZE"]))
    finally:
        dist.destroy_process_group()


def count_local_processes(configured: int | str) -> int:
    """Number of training processes on this machine: as configured; with `auto` one per GPU, or one without a GPU."""
    return max(1, torch.cuda.device_count()) if configured == "auto" else int(configured)


# --- Batch norm over the images of all processes


class _AllReduceSum(torch.autograd.Function):
    """The sum over all processes. The losses of all processes depend on it, so its gradient is a sum too."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def sync_normalize(layer: _BatchNorm, images: Tensor, world: World) -> Tensor:
    """Batch norm in training over the images of all processes, [N, C, H, W] with the same N in each.

    The means and variances of the processes are combined as those of equal parts of one sample.
    """
    values = images.float()
    variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    rank_mask = torch.zeros(world.world_size, 1, 1, device=values.device)
    rank_mask[world.rank] = 1
    statistics: Tensor = _AllReduceSum.apply(rank_mask * torch.stack([mean, variance]))
    means, variances = statistics.unbind(1)  # [size, C] each
    mean = means.mean(0)
    variance = variances.mean(0) + means.var(0, correction=0)
    if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None:
        count = world.world_size * values.numel() // values.shape[1]
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.add_(1)
        momentum = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        layer.running_mean.lerp_(mean.detach(), momentum)
        layer.running_var.lerp_(variance.detach() * (count / max(1, count - 1)), momentum)
    scale = (variance + layer.eps).rsqrt()
    # The mean is subtracted first: folded into the bias, it would cost digits if it is far from zero.
    centered = values - mean.view(1, -1, 1, 1)
    if not layer.affine:
        return (centered * scale.view(1, -1, 1, 1)).to(images.dtype)
    scale = scale * layer.weight
    return torch.addcmul(layer.bias.view(1, -1, 1, 1), centered, scale.view(1, -1, 1, 1)).to(images.dtype)


def sync_batch_norms(network: nn.Module, world: World) -> nn.Module:
    """Makes the batch-norm layers use statistics over all processes in training; their names and tensors stay.

    torch's SyncBatchNorm works on GPUs only. Raises ConfigError for other kinds of batch norm than those of 2-d maps.
    """
    from timm.layers import BatchNormAct2d

    if next(network.parameters()).is_cuda:
        return convert_batch_norms(network)

    class SyncedBatchNorm(nn.BatchNorm2d):
        is_synced = True

        def forward(self, images: Tensor) -> Tensor:
            return sync_normalize(self, images, world) if self.training else super().forward(images)

    class SyncedBatchNormAct(BatchNormAct2d):  # type: ignore[misc]
        is_synced = True

        def forward(self, images: Tensor) -> Tensor:
            if not self.training:
                return super().forward(images)  # type: ignore[no-any-return]
            return self.act(self.drop(sync_normalize(self, images, world)))  # type: ignore[no-any-return]

    kinds: dict[type, type] = {nn.BatchNorm2d: SyncedBatchNorm, BatchNormAct2d: SyncedBatchNormAct}
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and not getattr(module, "is_synced", False):
            if type(module) not in kinds:
                raise ConfigError(f"{name}: {type(module).__name__} cannot be shared by processes; set train.processes: 1")
            # The class is changed in place, because the optimizer and the EMA refer to the layer and its tensors.
            module.__class__ = kinds[type(module)]
    return network


def convert_batch_norms(network: nn.Module) -> nn.Module:
    """Replaces the batch-norm layers by torch's SyncBatchNorm, which shares their tensors; once, however often it is called."""
    from timm.layers import convert_sync_batchnorm

    if any(isinstance(module, nn.SyncBatchNorm) for module in network.modules()):
        # timm would take its own converted layers for plain ones, and lose their activations.
        return network
    converted: nn.Module = convert_sync_batchnorm(network)
    return converted


# --- Starting processes


def launch_processes(processes: int, module: str, arguments: Sequence[str]) -> None:
    """Runs `python -m MODULE ARGUMENTS` in several processes on this machine, by torchrun, and waits for their end.

    SIGTERM and SIGINT are passed on as SIGTERM. Raises the error of the first process that failed, Interrupted if asked to stop.
    """
    with make_scratch_dir("processes") as scratch:
        failure_path = scratch / "failure.json"
        environment = {**os.environ, FAILURE_VARIABLE: str(failure_path), CLIENT_VARIABLE: identify_process(os.getpid())}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // processes)))
        torchrun = [sys.executable, "-m", "ns.modeling.torchrun", "--standalone", f"--nproc-per-node={processes}"]
        # A new session: Ctrl-C in a terminal would reach every process, and torchrun kills those that stop first.
        launcher = subprocess.Popen([*torchrun, "-m", module, *arguments], env=environment, start_new_session=True)
        signals: list[int] = []

        def terminate_once(number: int, _frame: FrameType | None) -> None:
            if not signals:
                launcher.terminate()
            signals.append(number)

        with handle_signals(terminate_once):
            try:
                code = launcher.wait()
            except BaseException:
                launcher.kill()
                raise
        if code == 0:
            return
        if failure_path.exists():
            failure_record = json.loads(failure_path.read_text())
            raise find_error_kind(failure_record["exit_code"], TrainingError)(failure_record["error"])
        if signals:
            raise Interrupted("stopped; the same command continues from the last checkpoint")
        raise TrainingError(
            f"one of {processes} training processes exited without an error message (killed? out of memory?); the same command continues"
        )


@contextmanager
def report_failure() -> Iterator[None]:
    """Leaves the error of this process for `launch_processes` if it is the first one to fail, and exits with the error's code."""
    try:
        yield
    except Exception as error:
        is_ns_error = isinstance(error, NsError)
        code = error.exit_code if isinstance(error, NsError) else 1
        failure_path = os.environ.get(FAILURE_VARIABLE)
        if failure_path and not _is_peer_failure(error):
            draft_path = Path(f"{failure_path}.{os.getpid()}")
            draft_path.write_text(
                json.dumps({"error": str(error) if is_ns_error else f"{type(error).__name__}: {error}", "exit_code": code})
            )
            with contextlib.suppress(FileExistsError):
                os.link(draft_path, failure_path)  # atomic, and only the first process succeeds
        if not is_ns_error:
            raise
        raise SystemExit(code) from error


def _is_peer_failure(error: Exception) -> bool:
    """Whether a process fails only because another one failed: its message would hide the reason. gloo's errors have no own type."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
