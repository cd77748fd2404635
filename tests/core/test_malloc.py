import ctypes
import platform
import resource
import subprocess
import sys

import pytest

from ns.core import malloc as memory

FAULTS = """
import resource, sys, torch
from ns.core.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return torch.ones(10_000_000).sum()
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str) -> int:
    return int(subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True).stdout)


@pytest.mark.integration
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_keep_freed_memory_saves_page_faults():
    pages = 5 * 40_000_000 / resource.getpagesize()
    assert faults("keep") < 0.1 * pages


def test_keep_freed_memory_needs_glibc(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert memory.keep_freed_memory() is False
