"""Ingest: any collection of images becomes a dataset. Each image is decoded once; what cannot be read is listed and left out.

The source is listed, the listing is cut into tasks, and each task becomes a shard in a process of its own. What comes out
depends on names and bytes alone, not on the number of processes; a task that is done is not done again after a kill.
"""

import io
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ns.core import log
from ns.core.digest import digest
from ns.core.errors import DataError, RunError
from ns.core.process import begin_helper
from ns.data.dataset import MANIFEST, Dataset, Role, Shard
from ns.data.importing import sources
from ns.data.importing.listing import Entry, Label, Listing, Task
from ns.data.importing.sources import spelled
from ns.data.importing.writer import ShardWriter
from ns.data.index import file_name as index_name
from ns.data.loading.decode import JPEG, decode
from ns.data.scratch import scratch
from ns.data.shards import MEMBER_BYTES
from ns.storage import Store
from ns.storage.documents import Document
from ns.storage.parquet import read_table

REJECTED = "rejected.parquet"
PARTS = "parts/"
"""Notes of finished tasks, from which a killed import goes on; gone when the dataset is whole."""
SHOWN_REJECTS = 10
"""So many are logged one by one; `rejected.parquet` has them all."""
REJECT_COLUMNS = pa.schema([("path", pa.string()), ("reason", pa.string())])
READS_AHEAD = 16
"""Images fetched at a time from a server, whose answers take their time."""
POOLS = 3
"""So often is a pool of processes begun anew after one of them was killed."""
JPEG_QUALITY = 92
"""Of images made smaller."""


@dataclass(frozen=True)
class Limits:
    """What an import takes, and what it makes."""

    max_rejected_share: float = 0.1
    """Share of unreadable images above which the import fails."""
    shard_samples: int = 10_000
    shard_mib: int = 256
    max_side: int | None = None
    """Images with a longer side than this, px, are made smaller and encoded anew; else bytes are kept as they are."""

    def identity(self) -> dict[str, int | None]:
        """What the dataset's bytes depend on."""
        return {"shard_samples": self.shard_samples, "shard_mib": self.shard_mib, "max_side": self.max_side}


class Part(Document):
    """What one task made."""

    task: str
    """Digest of what went in."""
    shards: tuple[Shard, ...]
    rejected: int
    reasons: dict[str, int]
    first: tuple[tuple[str, str], ...]
    """Path and reason of the first rejects."""
    unreadable: dict[int, tuple[str, str]]
    """Class without a readable image in this task → path and reason of its first reject."""
    readable: tuple[int, ...]
    """Classes with a readable image."""


@contextmanager
def listed(source: str, role: Role, split: str | None = None) -> Iterator[Listing]:
    """Lists a source (`sources.entries` says what that may be). The listing lives as long as the context."""
    with (
        scratch("import") as place,
        closing(Listing.write(place / "listing", sources.entries(source, role, split=split, scratch=place), role)) as listing,
    ):
        yield listing


def import_images(
    source: str,
    folder: Store,
    *,
    name: str,
    role: Role,
    limits: Limits,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    workers: int | None = None,
) -> Dataset:
    """Lists a source and imports it; see `listed` and `import_listing`."""
    with listed(source, role, split) as listing:
        return import_listing(listing, source, folder, name=name, role=role, limits=limits, classes=classes, workers=workers)


def import_listing(
    listing: Listing,
    source: str,
    folder: Store,
    *,
    name: str,
    role: Role,
    limits: Limits,
    classes: Sequence[str] | None = None,
    workers: int | None = None,
) -> Dataset:
    """Imports what was listed of `source` into `folder`, with as many processes as there are cores unless `workers` says.

    `classes` fixes the class list, as an evaluation set must have that of the labelled data. A dataset that was in `folder` is
    replaced; an import that was stopped leaves no manifest, and goes on with the shard under way. Raises DataError for a
    source without images, an empty or unknown class, or a larger share of unreadable images than allowed, RunError when
    processes are killed again and again.
    """
    total = len(listing)
    labels = listing.labels()
    class_names: tuple[str, ...] = () if role == "unlabelled" else _classes(source, labels, classes, total)
    if not total:
        raise DataError(f"{source}: has no files to import")
    index: dict[Label, int] = {label: number for number, label in enumerate(class_names)}
    job = _Job(
        source, listing.file, folder, None if role == "unlabelled" else index | {n: n for n in range(len(class_names))}, limits
    )
    # Shards of one import under the manifest of another would be a damaged dataset.
    folder.delete(MANIFEST)
    tasks = list(
        listing.tasks(shard_samples=limits.shard_samples, shard_bytes=limits.shard_mib << 20, overhead=2 * MEMBER_BYTES)
    )
    parts: dict[int, Part] = {}
    rejected = 0
    for number, part in _parts(job, tasks, total, workers):
        parts[number] = part
        rejected += part.rejected
        if rejected > limits.max_rejected_share * total:
            _refuse_rejects(
                source, list(parts.values()), rejected, total, limits.max_rejected_share, whole=len(parts) == len(tasks)
            )
    ordered = [parts[task.number] for task in tasks]
    shards = tuple(shard for part in ordered for shard in part.shards)
    if not shards:
        path, reason = ordered[0].first[0]
        raise DataError(f"{source}: no readable image among {total} files; first: {path}: {reason}")
    if role == "labelled":
        _check_labels(source, class_names, ordered)
    _list_rejects(folder, tasks, ordered, rejected)
    dataset = Dataset(name=name, role=role, classes=class_names, shards=shards, rejected=rejected)
    dataset.save(folder)
    _tidy(folder, dataset)
    return dataset


def source_name(source: str) -> str:
    """A name for a dataset: the last part of where it comes from, without endings and braces."""
    name = PurePosixPath(urlsplit(source).path if "://" in source else Path(source).absolute()).name
    for suffix in (*sources.TABLES, *sources.ARCHIVES):
        name = name.removesuffix(suffix)
    return re.sub(r"[-_]*\{.*\}", "", name) or "images"


def _classes(source: str, labels: dict[Label, int], known: Sequence[str] | None, total: int) -> tuple[str, ...]:
    names = [label for label in labels if isinstance(label, str)]
    numbers = [label for label in labels if isinstance(label, int)]
    if total and not labels:
        raise DataError(f"{source}: none of its {total} images has a label; import it with the role unlabelled, or add labels")
    if numbers and names:
        raise DataError(
            f"{source}: some labels are class indices ({numbers[0]}) and some are names ({names[0]!r}); use one kind"
        )
    if unnamed := [spelled(label) for label in names if spelled(label) != label]:
        raise DataError(f"{source}: class '{unnamed[0]}': its name is not UTF-8; rename it")
    if known is not None:
        shown = f"({', '.join(known[:10])}{', …' if len(known) > 10 else ''})"
        if unknown := sorted(set(names) - set(known)):
            raise DataError(f"{source}: class {unknown[0]!r} is none of the labelled classes {shown}; rename or remove it")
        if numbers and max(numbers) >= len(known):
            raise DataError(f"{source}: class index {max(numbers)}: there are {len(known)} labelled classes {shown}")
        return tuple(known)
    found = tuple(str(n) for n in range(max(numbers) + 1)) if numbers else tuple(names)
    if len(found) < 2:
        raise DataError(f"{source}: has {len(found)} classes; at least 2 are needed to learn anything")
    return found


# Tasks


@dataclass(frozen=True)
class _Job:
    """What all tasks of an import have in common."""

    source: str
    listing: Path
    folder: Store
    index: dict[Label, int] | None
    """Class name or index → index; None for a pool."""
    limits: Limits

    def identity(self, task: Task) -> str:
        index = None if self.index is None else sorted((str(label), number) for label, number in self.index.items())
        return digest([task.digest, task.number, self.limits.identity(), index])


def _parts(job: _Job, tasks: list[Task], total: int, workers: int | None) -> Iterator[tuple[int, Part]]:
    """What each task made, in the order in which they end."""
    waiting = {task.number: task for task in tasks}
    for task in tasks:
        if part := _done(job, task):
            del waiting[task.number]
            yield task.number, part
    progress = log.Progress(total, "images", done=total - sum(task.stop - task.start for task in waiting.values()))
    count = min(workers or os.cpu_count() or 1, len(waiting))
    if count <= 1:
        for number, task in waiting.items():
            yield number, _make(job, task, progress.advance)
        return
    for attempt in range(1, POOLS + 1):
        try:
            for number, part in _pooled(job, list(waiting.values()), count, progress):
                del waiting[number]
                yield number, part
        except BrokenProcessPool as error:
            if attempt == POOLS:
                raise RunError(
                    "a process of the import was killed again and again, most often for want of memory; "
                    "run the same command with fewer --workers: it goes on where it stopped"
                ) from error
            log.get().warning("a process of the import was killed; its shards are made again", attempt=attempt)
        else:
            return


def _pooled(job: _Job, tasks: list[Task], count: int, progress: log.Progress) -> Iterator[tuple[int, Part]]:
    # Not forked: the caller may have threads.
    context = multiprocessing.get_context("forkserver")
    counter = context.Value("q", 0)
    counted = 0
    ahead = iter(tasks)
    running: dict[Future[Part], int] = {}
    pool = ProcessPoolExecutor(count, context, _start, (os.getpid(), counter))
    try:
        while True:
            # A few at a time: a million tasks need no million futures.
            for task in ahead:
                running[pool.submit(_make_in_process, job, task)] = task.number
                if len(running) >= 2 * count:
                    break
            if not running:
                return
            ended, _ = wait(running, timeout=log.PROGRESS_SECONDS, return_when=FIRST_COMPLETED)
            if fresh := counter.value - counted:
                counted += fresh
                progress.advance(fresh)
            for future in ended:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_counter: Any = None


def _start(parent: int, counter: Any) -> None:
    global _counter
    _counter = counter
    begin_helper(parent)


def _make_in_process(job: _Job, task: Task) -> Part:
    def count(images: int) -> None:
        with _counter.get_lock():
            _counter.value += images

    return _make(job, task, count)


def _done(job: _Job, task: Task) -> Part | None:
    key = _note(task)
    # A note that cannot be read is that of a task that is not done.
    with suppress(DataError):
        if job.folder.exists(key):
            part = Part.read(job.folder, key)
            if part.task == job.identity(task) and all(job.folder.exists(shard.name) for shard in part.shards):
                return part
    return None


def _note(task: Task, kind: str = "json") -> str:
    return f"{PARTS}{task.number:05d}.{kind}"


def _make(job: _Job, task: Task, progress: Callable[[int], None]) -> Part:
    """Reads, checks and writes the images of one task."""
    rejects: list[tuple[str, str]] = []
    readable: set[int] = set()
    unreadable: dict[int, tuple[str, str]] = {}
    limits = job.limits
    with (
        closing(Listing(job.listing)) as listing,
        closing(sources.Reader(job.source)) as reader,
        ShardWriter(
            job.folder, max_samples=limits.shard_samples, max_bytes=limits.shard_mib << 20, first=f"shard-{task.number:05d}"
        ) as writer,
    ):
        for entry, data in _fetched(reader, listing.entries(task.start, task.stop)):
            label = None if job.index is None or entry.label is None else job.index[entry.label]
            try:
                if isinstance(data, DataError):
                    raise data
                if job.index is not None and label is None:
                    raise DataError("no label")
                image, extension = _checked(data, limits.max_side)
                writer.add(entry.key, extension, image, label)
            except DataError as error:
                rejects.append((spelled(entry.path), str(error)))
                if label is not None:
                    unreadable.setdefault(label, rejects[-1])
            else:
                if label is not None:
                    readable.add(label)
            progress(1)
    part = Part(
        task=job.identity(task),
        shards=writer.shards,
        rejected=len(rejects),
        reasons=dict(Counter(reason for _, reason in rejects).most_common(20)),
        first=tuple(rejects[:SHOWN_REJECTS]),
        unreadable={label: first for label, first in unreadable.items() if label not in readable},
        readable=tuple(sorted(readable)),
    )
    if rejects:
        sink = io.BytesIO()
        pq.write_table(pa.table(list(zip(*rejects, strict=True)), schema=REJECT_COLUMNS), sink)
        job.folder.put(_note(task, "parquet"), sink.getvalue())
    part.write(job.folder, _note(task))
    return part


def _fetched(reader: sources.Reader, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | DataError]]:
    def fetch(entry: Entry) -> bytes | DataError:
        try:
            return reader.read(entry)
        except DataError as error:
            return error

    if not reader.is_remote:
        for entry in entries:
            yield entry, fetch(entry)
        return
    with ThreadPoolExecutor(READS_AHEAD) as threads:
        ahead: list[tuple[Entry, Future[bytes | DataError]]] = []
        for entry in entries:
            ahead.append((entry, threads.submit(fetch, entry)))
            if len(ahead) >= READS_AHEAD:
                first, future = ahead.pop(0)
                yield first, future.result()
        for entry, future in ahead:
            yield entry, future.result()


def _checked(data: bytes, max_side: int | None) -> tuple[bytes, str]:
    """The bytes that go into the shard, and their extension. Raises DataError with the reason for a reject."""
    pixels = decode(data)
    kept = _kept(data)
    if max_side is not None and max(pixels.shape[:2]) > max_side:
        picture = Image.fromarray(pixels)
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        return _encoded(picture, "jpg" if kept == "jpg" else "png")
    if kept is not None:
        return data, kept
    return _encoded(Image.fromarray(pixels), "png")


def _encoded(picture: Image.Image, extension: str) -> tuple[bytes, str]:
    sink = io.BytesIO()
    if extension == "jpg":
        picture.save(sink, "JPEG", quality=JPEG_QUALITY)
    else:
        picture.save(sink, "PNG")
    return sink.getvalue(), extension


def _kept(data: bytes) -> str | None:
    """The extension of what goes into shards byte for byte, by its first bytes; other formats become PNG."""
    if data.startswith(JPEG):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return None


# The end


def _refuse_rejects(source: str, parts: list[Part], rejected: int, total: int, limit: float, *, whole: bool) -> None:
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.reasons)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common(3))
    first = "; ".join(f"{path}: {reason}" for path, reason in [reject for part in parts for reject in part.first][:3])
    raise DataError(
        f"{source}: {'' if whole else 'at least '}{rejected} of {total} files cannot be read ({reasons}), more than "
        f"data.max_rejected_share = {limit:.1%}; first: {first}; mend or remove them, or raise the limit"
    )


def _check_labels(source: str, classes: tuple[str, ...], parts: list[Part]) -> None:
    readable = {label for part in parts for label in part.readable}
    for label, name in enumerate(classes):
        if label not in readable:
            path, reason = next((part.unreadable[label] for part in parts if label in part.unreadable), ("", ""))
            found = f"; first: {path}: {reason}" if path else ""
            raise DataError(f"{source}: class {name!r} has no readable image{found}; mend its images, or remove the class")


def _list_rejects(folder: Store, tasks: list[Task], parts: list[Part], rejected: int) -> None:
    shown = 0
    with scratch("import") as place:
        with pq.ParquetWriter(place / REJECTED, REJECT_COLUMNS) as writer:
            for task, part in zip(tasks, parts, strict=True):
                if part.rejected:
                    writer.write_table(read_table(folder.get(_note(task, "parquet"))))
                for path, reason in part.first[: SHOWN_REJECTS - shown]:
                    log.get().warning("image left out", path=path, reason=reason)
                    shown += 1
        folder.put_file(REJECTED, place / REJECTED)
    if rejected > SHOWN_REJECTS:
        log.get().warning("more images left out", images=rejected - SHOWN_REJECTS, list=f"{folder.uri}/{REJECTED}")


def _tidy(folder: Store, dataset: Dataset) -> None:
    """Removes notes, and shards that a larger dataset left here."""
    folder.delete_prefix(PARTS)
    kept = {name for shard in dataset.shards for name in (shard.name, index_name(shard))}
    for key in list(folder.list("shard-")):
        if key not in kept:
            folder.delete(key)
