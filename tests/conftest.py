"""What all tests share."""

import os
from pathlib import Path

import pytest

# One thread: tests run beside each other, and sums come out in one order on any machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder of real images beside the checkout."""
    if not DATA.is_dir():
        pytest.skip("needs the images in ../shared/data/cifar10")
    return DATA
