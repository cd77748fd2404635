import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture():
    """Function: an encoded picture of `size` px, a different one for each seed."""

    def make(seed: int, kind: str = "PNG", size: int = 8) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(sink, kind)
        return sink.getvalue()

    return make
