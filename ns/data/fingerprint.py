"""What an image is recognised by: the SHA-256 of its bytes, and a perceptual hash of what it shows.

FOLDER/SHA256-OF-THE-TAR.parquet    one for each shard, in the tar's order; written once
"""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ns.core import log
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.loading.decode import Encoded, decode
from ns.data.loading.shard_reader import ImageSource
from ns.storage import Store
from ns.storage.parquet import read_table

SIDE = 32
"""px of the grey picture that a perceptual hash is made of."""
LOW = 8
"""So many low frequencies each way: 64 bits."""
FLAT = 6.0
"""Standard deviation of grey levels (0–255) below which an image has nothing to be recognised by."""
SCHEMA = pa.schema([("sha256", pa.binary(32)), ("phash", pa.uint64()), ("comparable", pa.bool_())])
CHUNK = 256
THREADS = 4


@dataclass(frozen=True)
class Fingerprints:
    """Of the images of one shard, in the tar's order."""

    sha256: npt.NDArray[np.bytes_]
    """S32 [N]"""
    phash: npt.NDArray[np.uint64]
    """[N]"""
    comparable: npt.NDArray[np.bool_]
    """[N]: whether the perceptual hash says something. Not of unreadable or flat images, nor of those with a side below 32 px:
    enlarged, digits and icons of one kind come out alike."""


def take(folder: Store, dataset: Dataset, kept: Store) -> None:
    """Takes the fingerprints of all shards that have none in `kept` yet. Unreadable images are not comparable."""
    source = ImageSource(folder, dataset, held=2)
    waiting = [number for number, shard in enumerate(dataset.shards) if not kept.exists(_name(dataset, number))]
    progress = log.Progress(sum(dataset.shards[number].samples for number in waiting), "images")
    with ThreadPoolExecutor(THREADS) as threads:
        for place, number in enumerate(waiting):
            source.fetch_ahead(waiting[place + 1 : place + 2])
            count = dataset.shards[number].samples
            chunks: list[pa.Table] = []
            for start in range(0, count, CHUNK * THREADS):
                images = list(source.encoded(number, start, min(start + CHUNK * THREADS, count)))
                chunks += threads.map(_fingerprints, [images[at : at + CHUNK] for at in range(0, len(images), CHUNK)])
                progress.advance(len(images))
            sink = io.BytesIO()
            pq.write_table(pa.concat_tables(chunks) if chunks else SCHEMA.empty_table(), sink)
            kept.put(_name(dataset, number), sink.getvalue())


def read(kept: Store, dataset: Dataset, number: int) -> Fingerprints:
    """The fingerprints of one shard, which `take` has taken. Raises DataError when they are damaged."""
    name = _name(dataset, number)
    try:
        table = read_table(kept.get(name))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{kept.uri}/{name}: damaged: {error}; delete it: it is made again") from error
    if len(table) != dataset.shards[number].samples or not table.schema.equals(SCHEMA):
        raise DataError(
            f"{kept.uri}/{name}: not the fingerprints of {dataset.shards[number].name}; delete it: it is made again"
        )
    return Fingerprints(
        np.array(table["sha256"].to_pylist(), "S32"),
        table["phash"].to_numpy(),
        table["comparable"].to_numpy(zero_copy_only=False),
    )


def phashes(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """uint8 [N, 32, 32] → uint64 [N]: which of the 8 × 8 lowest frequencies of the cosine transform are above their median.

    As `imagehash.phash`; the first frequency is in the upper left, the first bit is the highest.
    """
    low = _cosines() @ grey.astype(np.float32) @ _cosines().T
    flat = low.reshape(len(grey), LOW * LOW)
    bits = flat > np.median(flat, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


@cache
def _cosines() -> npt.NDArray[np.float32]:
    frequency, place = np.arange(LOW)[:, None], np.arange(SIDE)[None, :]
    return (2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))).astype(np.float32)


def _fingerprints(images: list[Encoded | bytes]) -> pa.Table:
    grey = np.zeros((len(images), SIDE, SIDE), np.uint8)
    large = np.zeros(len(images), np.bool_)
    for row, image in enumerate(images):
        try:
            pixels, _ = (
                image.part((0, 0, image.width, image.height), SIDE) if isinstance(image, Encoded) else (decode(image), None)
            )
        except DataError:
            continue
        picture = Image.fromarray(pixels).convert("L")
        large[row] = min(picture.size) >= SIDE
        grey[row] = np.asarray(
            picture if picture.size == (SIDE, SIDE) else picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        )
    comparable = large & (grey.reshape(len(images), -1).std(axis=1) >= FLAT)
    sha256 = [hashlib.sha256(image.data if isinstance(image, Encoded) else image).digest() for image in images]
    return pa.table([pa.array(sha256, pa.binary(32)), pa.array(phashes(grey)), pa.array(comparable)], schema=SCHEMA)


def _name(dataset: Dataset, number: int) -> str:
    return f"{dataset.shards[number].sha256}.parquet"
