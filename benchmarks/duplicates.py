"""Finding duplicates among a million images: time, memory, and what is found.

    python -m benchmarks.duplicates [--quick] [--json FILE] [--keep]

The images are fingerprints and gray pictures, as an import leaves them; decoding, once for each image that is compared, comes on top.
Of the images, 2 % are copies of others (brighter, with noise), 10 % come from cameras that do not move (noise, changing light, an object
somewhere), and all others are alone. Each size runs in its own process, whose peak memory the kernel reports.

    copies_found           share of the copies that are found
    cameras_mistaken       share of the cameras' pictures that are taken for a copy of another
    coarse_speedup         time to compare two pictures of a camera at full resolution only ÷ time as we do it
    minutes_per_million    for the largest size
    peak_mib               memory of the process with the largest size, all libraries included
    growth_10x             time for ten times the images ÷ ten times the time
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from benchmarks.measure import measure_rates, paired_ratio, parse_arguments, write_benchmark
from ns.data.duplicates import find_duplicates
from ns.data.fingerprint import HASH_SIDE_PX, Fingerprints, compute_phashes
from ns.data.picture_match import COARSE_PAIRS_AT_ONCE, PAIRS_AT_ONCE, SIDE_PX, Pictures, _match_fine, match_pictures

COPY_SHARE, CAMERA_SHARE = 0.02, 0.10
SHOTS = 1000
"""Pictures of one camera."""
NEAR_BITS = 4
SHARD_IMAGES = 10_000
DISC_RADIUS_PX = SIDE_PX / 20


def main() -> None:
    options = parse_arguments(__doc__ or "")
    sizes = [10_000, 100_000] if options.quick else [100_000, 1_000_000]
    table = Table("images", "seconds", "MiB", "copies found", "cameras mistaken", "comparisons left out")
    measured = {}
    for size in sizes:
        command = [sys.executable, "-m", "benchmarks.duplicates", "--one", str(size)]
        measured[size] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        seconds, peak, recall, mistaken, skipped = measured[size]
        table.add_row(f"{size:,}", f"{seconds:.1f}", f"{peak:,.0f}", f"{recall:.3f}", f"{mistaken:.3f}", f"{skipped:,}")
    (first, *_), (last, peak, recall, mistaken, _) = (measured[size] for size in sizes)
    figures = {
        "copies_found": round(recall, 4),
        "cameras_mistaken": round(mistaken, 4),
        "coarse_speedup": round(measure_coarse_speedup(rounds=3 if options.quick else 7), 3),
        "minutes_per_million": round(last / sizes[1] * 1_000_000 / 60, 3),
        "peak_mib": round(peak, 1),
        "growth_10x": round(last / first / (sizes[1] / sizes[0]), 3),
    }
    write_benchmark("duplicates", figures, options, table)


def measure_coarse_speedup(rounds: int) -> float:
    shots, _ = draw_shots(np.random.default_rng(0), 512)
    first, second = shots[:256], shots[256:]

    def compare_fine() -> int:
        for start in range(0, len(first), PAIRS_AT_ONCE):
            _match_fine(first[start : start + PAIRS_AT_ONCE], second[start : start + PAIRS_AT_ONCE])
        return len(first)

    def compare() -> int:
        match_pictures(first, second)
        return len(first)

    measured = measure_rates({"ours": compare, "fine": compare_fine}, rounds, time.process_time)
    return paired_ratio(measured, "ours", "fine")[0]


def find_in_images(size: int) -> None:
    """Prints seconds, peak MiB, share of copies found, share of the cameras' pictures mistaken, and comparisons left out."""
    rng = np.random.default_rng(size)
    copies, cameras = int(size * COPY_SHARE), max(1, int(size * CAMERA_SHARE / SHOTS))
    shots = SHOTS if cameras > 1 else int(size * CAMERA_SHARE)
    with tempfile.TemporaryFile() as bank, tempfile.TemporaryDirectory() as scratch:
        all_hashes, discs = [], [np.zeros((2 * copies, 2))]

        def keep_pictures(pictures: Pictures) -> None:
            bank.write(pictures.tobytes())
            all_hashes.append(hash_pictures(pictures))

        originals = draw_textures(rng, copies)
        keep_pictures(originals)
        keep_pictures(change_light(rng, originals))
        del originals
        for _ in range(cameras):
            pictures, disc_places = draw_shots(rng, shots)
            keep_pictures(pictures)
            discs.append(disc_places)
        # Pictures that are alone have hashes of their own, and are never compared: chance brings none of them near another.
        hashes = rng.integers(0, 2**64, size, np.uint64)
        locations = rng.permutation(size)[: 2 * copies + cameras * shots]
        hashes[locations] = np.concatenate(all_hashes)
        picture_of = np.full(size, -1)
        picture_of[locations] = np.arange(len(locations))
        bank.flush()

        def read_pictures(images: npt.NDArray[np.int64]) -> Pictures:
            parts = (os.pread(bank.fileno(), SIDE_PX**2, number * SIDE_PX**2) for number in picture_of[images].tolist())
            return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, SIDE_PX, SIDE_PX)

        def compare_pictures(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
            matches = np.empty(len(first), np.bool_)
            for start in range(0, len(first), COARSE_PAIRS_AT_ONCE):
                part = slice(start, start + COARSE_PAIRS_AT_ONCE)
                matches[part] = match_pictures(read_pictures(first[part]), read_pictures(second[part]))
            return matches

        started = time.perf_counter()
        pairs = find_duplicates(list_shards(hashes), Path(scratch), NEAR_BITS, compare_pictures)
        seconds = time.perf_counter() - started
    pairs_told = np.concatenate(
        [np.stack([picture_of[part.later], picture_of[part.earlier]], 1) for part in (pairs.alike, pairs.near)]
    )
    is_copy = (pairs_told.max(1) < 2 * copies) & (pairs_told.min(1) + copies == pairs_told.max(1))
    # Two pictures of a camera whose discs overlap by half are copies.
    all_discs = np.concatenate(discs)
    apart = np.linalg.norm(all_discs[pairs_told[:, 0]] - all_discs[pairs_told[:, 1]], axis=1) > DISC_RADIUS_PX
    mistaken = np.unique(pairs_told[(pairs_told.min(1) >= 2 * copies) & apart])
    # Not resource.getrusage: its maximum includes the parent process.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    shares = [np.unique(pairs_told[is_copy].max(1)).size / copies, mistaken.size / (cameras * shots)]
    print(json.dumps([seconds, peak, *shares, pairs.skipped]))


def list_shards(hashes: npt.NDArray[np.uint64]) -> Iterator[Fingerprints]:
    for start in range(0, len(hashes), SHARD_IMAGES):
        part = hashes[start : start + SHARD_IMAGES]
        numbers = np.arange(start, start + len(part))
        yield Fingerprints(np.char.zfill(numbers.astype("S32"), 32), part, np.ones(len(part), np.bool_))


def draw_textures(rng: np.random.Generator, count: int) -> Pictures:
    """Gray uint8 [N, SIDE_PX, SIDE_PX]: sums of waves, as different as photographs."""
    pixel = np.arange(SIDE_PX) / SIDE_PX
    pictures = np.empty((count, SIDE_PX, SIDE_PX), np.uint8)
    for picture in pictures:
        across, down, phase, height = rng.uniform((-9, -9, 0, 5), (9, 9, 6.3, 40), (12, 4)).T[..., None, None]
        waves = height * np.sin(2 * np.pi * (across * pixel + down * pixel[:, None]) + phase)
        picture[:] = (128 + waves.sum(0)).clip(0, 255)
    return pictures


def change_light(rng: np.random.Generator, pictures: Pictures) -> Pictures:
    """Brightness by up to 15 %, and noise."""
    changed = np.empty_like(pictures)
    for picture, source in zip(changed, pictures, strict=True):
        picture[:] = (source * rng.uniform(0.85, 1.15) + rng.normal(0, 2, source.shape)).clip(0, 255)
    return changed


def draw_shots(rng: np.random.Generator, count: int) -> tuple[Pictures, npt.NDArray[np.float64]]:
    """Pictures of one camera: a disc of a tenth of the width somewhere, 80 gray levels from what it hides, noise, and changing light.
    Also the discs' locations, px [N, 2]."""
    (scene,) = draw_textures(rng, 1)
    shots = np.repeat(scene[None], count, 0)
    rows, columns = np.mgrid[:SIDE_PX, :SIDE_PX]
    locations = rng.uniform(4, SIDE_PX - 4, (count, 2))
    for shot, (y, x) in zip(shots, locations, strict=True):
        disc = (rows - y) ** 2 + (columns - x) ** 2 < DISC_RADIUS_PX**2
        hidden = scene[disc].mean()
        shot[disc] = hidden + 80 if hidden < 128 else hidden - 80
    return change_light(rng, shots), locations


def hash_pictures(pictures: Pictures) -> npt.NDArray[np.uint64]:
    half = SIDE_PX // HASH_SIDE_PX
    hashes = [
        compute_phashes(part.reshape(-1, HASH_SIDE_PX, half, HASH_SIDE_PX, half).mean((2, 4)).round().astype(np.uint8))
        for part in np.array_split(pictures, max(1, len(pictures) // 1000))
    ]
    return np.concatenate(hashes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        find_in_images(int(sys.argv[2]))
    else:
        main()
