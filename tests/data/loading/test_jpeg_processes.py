"""JPEGs that several processes decode, of which any may be killed."""

import io
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ns.data.loading import jpeg_processes
from ns.data.loading.decode import EncodedJpeg, decode_image
from ns.data.loading.jpeg_processes import JpegProcesses

pytestmark = pytest.mark.integration


def make_jpegs(count, width=20, height=16):
    rng, jpegs = np.random.default_rng(0), []
    for _ in range(count):
        sink = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(sink, "JPEG")
        jpegs.append(EncodedJpeg(memoryview(sink.getvalue()), width, height))
    return jpegs


def list_workers(processes):
    return [worker._process.pid for worker in processes._pool._workers if worker._process]


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_pixels_are_those_of_the_decoder(count):
    jpegs = make_jpegs(count)
    pixels, errors = JpegProcesses(2).decode_images(jpegs)
    assert errors == {}
    assert np.array_equal(pixels, np.stack([decode_image(bytes(jpeg.data)) for jpeg in jpegs]))


def test_unreadable_images_are_told_by_row():
    jpegs = make_jpegs(9)
    for row in (0, 4, 8):
        jpegs[row] = jpegs[row]._replace(data=jpegs[row].data[:-30])
    pixels, errors = JpegProcesses(2).decode_images(jpegs)
    assert errors == dict.fromkeys((0, 4, 8), "truncated")
    assert np.array_equal(pixels[5], decode_image(bytes(jpegs[5].data)))


def test_images_of_one_size_that_have_room_together(monkeypatch):
    processes, jpegs = JpegProcesses(1), make_jpegs(3)
    assert processes.can_decode(jpegs)
    assert not processes.can_decode([])
    assert not processes.can_decode([*jpegs, make_jpegs(1, width=21)[0]])
    assert not processes.can_decode([*jpegs, b"another format"])
    assert not processes.can_decode([b"another format", *jpegs])
    monkeypatch.setattr(jpeg_processes, "CAPACITY", 3 * 20 * 16 * 3 + 31)
    assert not processes.can_decode(jpegs)
    assert processes.can_decode(jpegs[:2])


def test_work_of_a_killed_process_is_done_by_the_caller_and_later_by_another():
    processes, jpegs = JpegProcesses(2), make_jpegs(30)
    expected = processes.decode_images(jpegs)[0].copy()
    for _ in range(3):
        for pid in list_workers(processes):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        processes._shared[:] = 0
        pixels, errors = processes.decode_images(jpegs)
        assert errors == {}
        assert np.array_equal(pixels, expected)


def test_processes_end_with_their_object():
    processes = JpegProcesses(2)
    processes.decode_images(make_jpegs(30))
    workers = list_workers(processes)
    assert len(workers) == 2
    del processes
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
