"""What loaders hold in shared memory is bounded by what there is."""

import pytest

from ns.core.errors import ConfigError
from ns.data.loading import shared_memory
from ns.data.loading.shared_memory import IN_USE, StepShape, measure_available, split_step

MIB = 1 << 20


@pytest.mark.parametrize(
    ("shape", "megabytes"),
    [((50, 150, 32, 10), 3.8), ((2048, 0, 224, 1000), 679), ((2048, 6144, 380, 1000), 7350)],
    ids=["quickstart", "b0", "b4"],
)
def test_shared_memory_is_that_of_the_documents(shape, megabytes):
    """The table in docs/training.md."""
    assert split_step(StepShape(*shape), 1).bytes_in_flight / 1e6 == pytest.approx(megabytes, rel=0.02)


@pytest.mark.parametrize("workers", [1, 3, 16])
@pytest.mark.parametrize(
    "shape", [(2048, 0, 224, 1000), (10, 280, 475, 1000), (128, 384, 32, 21_841), (2, 0, 32, 2), (9, 31, 32, 10, True)]
)
@pytest.mark.parametrize("available", [1 * MIB, 64 * MIB, 1024 * MIB, 8192 * MIB, None])
def test_parts_in_flight_fit_into_what_is_available(shape, workers, available):
    step = StepShape(*shape)
    single_images = (workers + IN_USE) * step.count_part_bytes(step.largest_split)
    if available is not None and single_images > available:
        with pytest.raises(ConfigError, match=rf"train\.loader_workers: {workers}: even single images .*--shm-size"):
            split_step(step, workers, available)
        return
    split = split_step(step, workers, available)
    assert split.ahead >= 1
    assert split.bytes_in_flight == (workers * split.ahead + IN_USE) * step.count_part_bytes(split.parts)
    assert available is None or split.bytes_in_flight <= available


def test_enough_memory_changes_no_split():
    shape = StepShape(2048, 6144, 380, 1000)
    assert split_step(shape, 4, 1 << 40) == split_step(shape, 4)
    assert split_step(shape, 0, 0).bytes_in_flight == 0


def test_available_is_bounded_by_shm_and_by_half_of_the_containers_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "CGROUP", tmp_path)
    unlimited = measure_available()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert measure_available() == pytest.approx(unlimited, rel=0.2)
    (tmp_path / "memory.max").write_text("5000\n")
    assert measure_available() == 2000
    (tmp_path / "memory.current").write_text("6000\n")
    assert measure_available() == 0
