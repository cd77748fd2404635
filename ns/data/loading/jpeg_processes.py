"""Decodes the smallest JPEGs in processes: threads would wait for each other's interpreter lock for longer than they work."""

import math
import multiprocessing
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError
from ns.core.process_pool import ProcessPool
from ns.data.loading.decode import EncodedJpeg, decode_into

CAPACITY = 1 << 24
"""Bytes of decoded images that the processes share, at most."""

_shared: npt.NDArray[np.uint8]


class JpegProcesses:
    """Processes that decode JPEGs of one size, beside the process that calls.

    They are started when they are first needed, in a tenth of a second, and end with this object or with its process.
    """

    def __init__(self, processes: int) -> None:
        memory = multiprocessing.get_context("forkserver").RawArray("B", CAPACITY)
        self._shared = np.frombuffer(memory, np.uint8)
        # See `allocate_images`.
        self._offset = (16 - self._shared.ctypes.data) % 32
        self._processes = processes
        self._pool = ProcessPool(processes, _keep_shared_memory, (memory,))
        weakref.finalize(self, self._pool.shutdown)

    @staticmethod
    def can_decode(images: Sequence[object]) -> bool:
        """Whether all images are JPEGs of one size that have room together."""
        first = images[0] if images else None
        if not isinstance(first, EncodedJpeg) or len(images) * first.width * first.height * 3 > CAPACITY - 32:
            return False
        size = first[1:]
        return all(isinstance(image, EncodedJpeg) and image[1:] == size for image in images)

    def decode_images(self, jpegs: Sequence[EncodedJpeg]) -> tuple[npt.NDArray[np.uint8], dict[int, str]]:
        """uint8 [N, H, W, 3], in memory that the next call overwrites, and row → reason of unreadable images, of any content."""
        height, width = jpegs[0].height, jpegs[0].width
        bytes_each = height * width * 3
        pixels = self._shared[self._offset :][: len(jpegs) * bytes_each].reshape(len(jpegs), height, width, 3)
        share = -(-len(jpegs) // (self._processes + 1))
        encoded = [jpeg.data for jpeg in jpegs]
        futures = {
            start: self._pool.submit(
                _decode_part,
                self._offset + start * bytes_each,
                pixels[start : start + share].shape,
                b"".join(encoded[start : start + share]),
                list(map(len, encoded[start : start + share])),
            )
            for start in range(share, len(jpegs), share)
        }
        errors = _decode_rows(encoded[:share], pixels)
        for start, future in futures.items():
            try:
                part_errors = future.result()
            except BrokenProcessPool:
                # It was killed, and the next call starts another one.
                part_errors = _decode_rows(encoded[start : start + share], pixels[start:])
            errors |= {start + row: reason for row, reason in part_errors.items()}
        return pixels, errors


def _keep_shared_memory(memory: object) -> None:
    global _shared
    _shared = np.frombuffer(memory, np.uint8)  # type: ignore[call-overload]


def _decode_part(offset: int, shape: tuple[int, ...], data: bytes, lengths: Sequence[int]) -> dict[int, str]:
    """Decodes JPEGs that lie one after another in `data` into the shared memory. Returns row → reason of unreadable ones."""
    ends = np.cumsum(lengths).tolist()
    view = memoryview(data)
    encoded = [view[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return _decode_rows(encoded, _shared[offset : offset + math.prod(shape)].reshape(shape))


def _decode_rows(encoded: Iterable[bytes | memoryview], pixels: npt.NDArray[np.uint8]) -> dict[int, str]:
    errors: dict[int, str] = {}
    for row, (data, target) in enumerate(zip(encoded, pixels, strict=False)):
        try:
            decode_into(data, target)
        except DataError as error:
            errors[row] = str(error)
    return errors
