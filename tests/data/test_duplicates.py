import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ns.data import duplicates
from ns.data.duplicates import find_duplicates
from ns.data.fingerprint import Fingerprints, compute_phashes


def make_fingerprints(contents, hashes, comparable=None):
    return Fingerprints(
        np.array([hashlib.sha256(str(content).encode()).digest() for content in contents], "S32"),
        np.array(hashes, np.uint64),
        np.ones(len(hashes), np.bool_) if comparable is None else np.array(comparable, np.bool_),
    )


def pairs(found):
    return {(int(a), int(b)): int(bits) for a, b, bits in zip(*found, strict=True)}


def brute(contents, hashes, comparable, bits):
    """The pairs same, alike and near, by comparing all images with all."""
    count = range(len(contents))
    same = {(i, min(j for j in count if contents[j] == contents[i])): 0 for i in count}
    good = [i for i in count if comparable[i]]
    alike = {(i, min(j for j in good if hashes[j] == hashes[i])): 0 for i in good}
    firsts = [i for i, j in alike if i == j]
    near = {}
    for i in firsts:
        for j in firsts:
            distance = (hashes[i] ^ hashes[j]).bit_count()
            if j < i and distance <= bits:
                near[i, j] = distance
    return *({pair: 0 for pair in group if pair[0] != pair[1]} for group in (same, alike)), near


@st.composite
def images(draw):
    """Hashes in clusters, so that many are near."""
    centers = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flips = st.lists(st.integers(0, 63), max_size=6)
    rows = draw(st.lists(st.tuples(st.sampled_from(centers), flips, st.integers(0, 5), st.booleans()), max_size=40))
    hashes = []
    for center, bits, _, _ in rows:
        for bit in bits:
            center ^= 1 << bit
        hashes.append(center)
    return [row[2] for row in rows], hashes, [row[3] for row in rows]


@settings(max_examples=80, deadline=None)
@given(images(), st.integers(0, 8), st.integers(1, 50))
def test_find_duplicates_equals_brute_force(tmp_path_factory, rows, bits, shard_samples):
    contents, hashes, comparable = rows
    parts = [slice(start, start + shard_samples) for start in range(0, len(contents), shard_samples)]
    shards = [make_fingerprints(contents[part], hashes[part], comparable[part]) for part in parts]
    found = find_duplicates(shards, tmp_path_factory.mktemp("scratch"), bits)
    assert (pairs(found.same), pairs(found.alike), pairs(found.near)) == brute(contents, hashes, comparable, bits)
    assert found.skipped == 0


def test_find_duplicates_is_linear_for_equal_hashes(tmp_path):
    found = find_duplicates([make_fingerprints(range(100_000), [7] * 100_000)], tmp_path, 4)
    assert len(found.alike.later) == 99_999
    assert len(found.near.later) == 0


def test_find_duplicates_counts_skipped_comparisons(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_NEIGHBORS", 10)
    # All share their lower half, so that one band of two puts them together.
    found = find_duplicates([make_fingerprints(range(50), [(n * 0x9E3779B1) % 2**32 << 32 for n in range(50)])], tmp_path, 1)
    assert found.skipped == 39 * 40 // 2


def test_find_duplicates_empties_scratch_dir(tmp_path):
    find_duplicates([make_fingerprints(range(1000), range(1000))], tmp_path, 4)
    assert not list(tmp_path.iterdir())


def test_phashes_equal_definition():
    """imagehash.phash: scipy's DCT over columns, then rows, the 8 × 8 lowest, above their median."""
    from scipy.fftpack import dct

    gray = np.random.default_rng(0).integers(0, 256, (20, 32, 32), np.uint8)
    for image, found in zip(gray, compute_phashes(gray), strict=True):
        low = dct(dct(image.astype(float), axis=0), axis=1)[:8, :8]
        bits = (low > np.median(low)).flatten()
        assert int("".join("1" if bit else "0" for bit in bits), 2) == int(found)


MEASURE = r"""
import re, sys, tempfile
from pathlib import Path
import numpy as np
from ns.data.duplicates import find_duplicates
from ns.data.fingerprint import Fingerprints

def shards(count):
    rng = np.random.default_rng(0)
    for _ in range(count // 10_000):
        sha = np.frombuffer(rng.bytes(32 * 10_000), "S32")
        yield Fingerprints(sha, rng.integers(0, 2**64, 10_000, np.uint64), np.ones(10_000, bool))

with tempfile.TemporaryDirectory() as scratch:
    find_duplicates(shards(int(sys.argv[1])), Path(scratch), 4)
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.integration
def test_memory_of_find_duplicates_is_flat():
    import subprocess
    import sys

    small, large = (
        int(subprocess.run([sys.executable, "-c", MEASURE, count], capture_output=True, text=True, check=True).stdout)
        for count in ("10000", "1000000")
    )
    assert large < 1.1 * small
