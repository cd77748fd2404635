"""Fingerprints of images: the SHA-256 of the bytes, and a perceptual hash of the picture.

FOLDER/SHA256-OF-THE-TAR.parquet    one per shard, in the tar's order; written once
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from ns.core import log
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.data.loading.decode import EncodedJpeg, decode_image
from ns.data.loading.shard_reader import ImageSource
from ns.storage import Store
from ns.storage.parquet import parse_table, write_table

FINGERPRINTS = "store/fingerprints"
"""Where they are kept below a root."""
HASH_SIDE_PX = 32
"""Side, in px, of the gray picture that a perceptual hash is made of."""
LOW_FREQUENCIES = 8
"""Low frequencies in each direction: 64 bits together."""
FLAT_STD = 6.0
"""Standard deviation of gray levels (0–255) below which an image is too flat to be recognized."""
SCHEMA = pa.schema([("sha256", pa.binary(32)), ("phash", pa.uint64()), ("comparable", pa.bool_())])
CHUNK_IMAGES = 256
THREADS = 4


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of the images of one shard, in the tar's order."""

    sha256: npt.NDArray[np.bytes_]
    """S32 [N]"""
    phash: npt.NDArray[np.uint64]
    """[N]"""
    comparable: npt.NDArray[np.bool_]
    """[N]: whether the perceptual hash tells pictures apart. False for unreadable and flat images, and for those with a side below
    32 px: enlarged digits and icons of one kind get similar hashes."""


def compute_fingerprints(store: Store, dataset: Dataset, fingerprint_store: Store) -> None:
    """Writes the fingerprints of all shards that have none in `fingerprint_store` yet. Unreadable images are not comparable."""
    source = ImageSource(store, dataset, max_open_shards=2)
    shards = dataset.shards
    waiting = [index for index in range(len(shards)) if not fingerprint_store.exists(_build_key(dataset, index))]
    progress = log.Progress(sum(shards[index].samples for index in waiting), "images")
    with ThreadPoolExecutor(THREADS) as threads:
        for position, shard_index in enumerate(waiting):
            source.fetch_ahead(waiting[position + 1 : position + 2])
            count = shards[shard_index].samples
            chunks: list[pa.Table] = []
            for start in range(0, count, CHUNK_IMAGES * THREADS):
                images = list(source.read_encoded(shard_index, start, min(start + CHUNK_IMAGES * THREADS, count)))
                chunks += threads.map(
                    _fingerprint_images, [images[at : at + CHUNK_IMAGES] for at in range(0, len(images), CHUNK_IMAGES)]
                )
                progress.update(len(images))
            table = pa.concat_tables(chunks) if chunks else SCHEMA.empty_table()
            write_table(fingerprint_store, _build_key(dataset, shard_index), table)


def read_fingerprints(fingerprint_store: Store, dataset: Dataset, shard_index: int) -> Fingerprints:
    """The fingerprints of one shard that `compute_fingerprints` wrote. Raises DataError when they are damaged."""
    key = _build_key(dataset, shard_index)
    schema = pa.schema([field.with_nullable(False) for field in SCHEMA])
    cure = "delete it, and it will be made again"
    table = parse_table(fingerprint_store.get(key), f"{fingerprint_store.uri}/{key}", schema, cure)
    if len(table) != dataset.shards[shard_index].samples:
        raise DataError(f"{fingerprint_store.uri}/{key}: not the fingerprints of {dataset.shards[shard_index].name}; {cure}")
    return Fingerprints(
        np.array(table["sha256"].to_pylist(), "S32"),
        table["phash"].to_numpy(),
        table["comparable"].to_numpy(zero_copy_only=False),
    )


def read_contents(store: Store, dataset: Dataset, fingerprint_store: Store) -> dict[str, bytes]:
    """Key → SHA-256 of the image's bytes, for all images of a dataset. Fingerprints that are missing are made, which reads all images.

    Raises DataError for damaged data.
    """
    compute_fingerprints(store, dataset, fingerprint_store)
    contents: dict[str, bytes] = {}
    for shard_index, shard in enumerate(dataset.shards):
        hashes = read_fingerprints(fingerprint_store, dataset, shard_index).sha256.tolist()
        contents.update(zip(ShardIndex.load(store, shard).keys, hashes, strict=True))
    return contents


def compute_phashes(gray: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """uint8 [N, 32, 32] → uint64 [N]: which of the 8 × 8 lowest frequencies of the cosine transform are above their median.

    The same as `imagehash.phash`. The first frequency is in the upper left; its bit is the highest.
    """
    low = _build_cosine_basis() @ gray.astype(np.float32) @ _build_cosine_basis().T
    flat = low.reshape(len(gray), LOW_FREQUENCIES * LOW_FREQUENCIES)
    bits = flat > np.median(flat, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


@cache
def _build_cosine_basis() -> npt.NDArray[np.float32]:
    frequency, pixel = np.arange(LOW_FREQUENCIES)[:, None], np.arange(HASH_SIDE_PX)[None, :]
    return (2 * np.cos(np.pi * frequency * (2 * pixel + 1) / (2 * HASH_SIDE_PX))).astype(np.float32)


def _fingerprint_images(images: list[EncodedJpeg | bytes]) -> pa.Table:
    gray = np.zeros((len(images), HASH_SIDE_PX, HASH_SIDE_PX), np.uint8)
    large = np.zeros(len(images), np.bool_)
    for row, image in enumerate(images):
        try:
            if isinstance(image, EncodedJpeg):
                pixels, _ = image.decode_box((0, 0, image.width, image.height), HASH_SIDE_PX)
            else:
                pixels = decode_image(image)
        except DataError:
            continue
        picture = Image.fromarray(pixels).convert("L")
        large[row] = min(picture.size) >= HASH_SIDE_PX
        gray[row] = np.asarray(picture.resize((HASH_SIDE_PX, HASH_SIDE_PX), Image.Resampling.LANCZOS))
    comparable = large & (gray.reshape(len(images), -1).std(axis=1) >= FLAT_STD)
    sha256 = [hashlib.sha256(image.data if isinstance(image, EncodedJpeg) else image).digest() for image in images]
    return pa.table([pa.array(sha256, pa.binary(32)), pa.array(compute_phashes(gray)), pa.array(comparable)], schema=SCHEMA)


def _build_key(dataset: Dataset, shard_index: int) -> str:
    return f"{dataset.shards[shard_index].sha256}.parquet"
