"""What data loaders hold in shared memory (`/dev/shm`), and how the images of a step are cut into parts so that they fit there.

A loader's process hands its images over in shared memory, which containers often limit to 64 MiB. Parts that are made, waiting or
in use are bounded before the first step: a loader that finds no room could only end the training.
"""

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from ns.core.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")
CONTAINER_DEFAULT = 64 << 20
"""Size of `/dev/shm` in a container that says nothing of it, bytes."""

PART_BYTES = 32 << 20
"""Bytes of a part of a step: enough that handing it over costs nothing, and small enough that all loaders share in each step."""
STEPS_AHEAD = 2
"""Steps whose parts may wait while the network works, if a step has several parts: loaders then never stand still."""
BATCHES_AHEAD = 4
"""Whole steps per loader that may wait, if a step is one part."""
IN_USE = 2
"""Parts that the training process holds: the one it works on, and the one that it takes next."""
USABLE_SHARE = 0.9
"""Share of the free shared memory that is planned with: other programs use it too."""


@dataclass(frozen=True)
class StepShape:
    """The images of a step in one training process."""

    labeled: int
    pseudo: int
    resolution: int
    """px"""
    classes: int
    is_mixed: bool = False
    """Whether images are mixed in pairs, and have labels of two."""

    @property
    def largest_split(self) -> int:
        return max(1, self.labeled, self.pseudo)

    def count_part_bytes(self, parts: int) -> int:
        """Bytes of shared memory of the largest of `parts` equal parts."""
        labeled, pseudo = math.ceil(self.labeled / parts), math.ceil(self.pseudo / parts)
        labels = (labeled * 8, pseudo * self.classes * 4)
        tensors = [(labeled + pseudo) * self.resolution**2 * 3, *labels]
        if self.is_mixed:
            tensors += [*labels, (labeled + pseudo) * 4]
        return sum(math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE for size in tensors)


@dataclass(frozen=True)
class StepSplit:
    """How loaders make the images of a step."""

    parts: int = 1
    """Parts of a step, each made by one loader."""
    ahead: int = BATCHES_AHEAD
    """Parts per loader that are made or wait."""
    bytes_in_flight: int = 0
    """Most bytes that they take together with those in use."""


def split_step(shape: StepShape, workers: int, available: int | None = None) -> StepSplit:
    """Cuts the steps of a training process with `workers` loaders so that they take at most `available` bytes of shared memory.

    Without `available`: as they are cut where there is enough. Raises ConfigError if not even single images fit.
    """
    if workers == 0:
        return StepSplit()

    def make_split(parts: int, ahead: int) -> StepSplit:
        return StepSplit(parts, ahead, (workers * ahead + IN_USE) * shape.count_part_bytes(parts))

    parts = min(shape.largest_split, math.ceil(shape.count_part_bytes(1) / PART_BYTES))
    split = make_split(parts, BATCHES_AHEAD if parts == 1 else max(2, math.ceil(STEPS_AHEAD * parts / workers)))
    if available is None or split.bytes_in_flight <= available:
        return split
    ahead = (available // shape.count_part_bytes(parts) - IN_USE) // workers
    if ahead >= 2:
        return make_split(parts, ahead)
    while parts < shape.largest_split:
        parts = min(2 * parts, shape.largest_split)
        if (split := make_split(parts, 2)).bytes_in_flight <= available:
            return split
    if (split := make_split(parts, 1)).bytes_in_flight <= available:
        return split
    raise ConfigError(
        f"train.loader_workers: {workers}: even single images of {shape.resolution} px need {split.bytes_in_flight:,} bytes of "
        f"{SHARED_MEMORY}, of which {available:,} can be used: give the container more (docker run --shm-size), "
        "or set train.loader_workers to 0"
    )


def measure_available() -> int:
    """Bytes of shared memory that training processes on this machine may use together: what is free in `/dev/shm`, and at most half
    of the memory that is left, because shared memory is part of it."""
    free = os.statvfs(SHARED_MEMORY)
    return min(int(USABLE_SHARE * free.f_bavail * free.f_frsize), _measure_free_memory() // 2)


def _measure_free_memory() -> int:
    """Bytes of memory that are left on the machine or, if less, in the container."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (CGROUP / limit_name).read_text().strip(), int((CGROUP / used_name).read_text())
        except OSError:
            continue
        if limit.isdigit():  # otherwise `max`
            free = min(free, max(0, int(limit) - used))
    return free
