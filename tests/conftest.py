"""What all tests share."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import structlog
from PIL import Image

# One thread: tests run beside each other, and sums come out in one order on any machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder of real images beside the checkout."""
    if not DATA.is_dir():
        pytest.skip("needs the images in ../shared/data/cifar10")
    return DATA


@pytest.fixture(autouse=True)
def log_of_its_own():
    """A test that configures the log leaves it writing to a stream that is closed afterwards."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def picture():
    """Function: an encoded picture of `size` px, a different one for each seed."""

    def make(seed: int, kind: str = "PNG", size: int = 8) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(sink, kind)
        return sink.getvalue()

    return make
