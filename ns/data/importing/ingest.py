"""Makes a dataset of any collection of images. Each image is decoded once; unreadable ones are listed and left out.

The source is listed, the listing is cut into tasks, and each task becomes a shard in a process of its own. The dataset
depends on names and bytes only, not on the number of processes. After a kill, finished tasks are not repeated.
"""

import io
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ns.config.schema import ImportConfig
from ns.core import log
from ns.core.digest import digest_json
from ns.core.errors import DataError, RunError
from ns.core.iteration import iter_ahead
from ns.core.process import count_cores
from ns.core.process_pool import ProcessPool
from ns.data.class_names import (
    SPLIT_NAMES,
    ClassLabel,
    find_case_variants,
    match_indices,
    match_names,
    shorten_names,
    sort_class_names,
)
from ns.data.dataset import MAX_CLASSES, Dataset, DatasetRole, Shard
from ns.data.importing import sources, tables
from ns.data.importing.file_kinds import escape_path
from ns.data.importing.listing import ImportTask, Listing, SourceEntry
from ns.data.importing.writer import ShardWriter
from ns.data.index import build_index_key, is_shard_whole
from ns.data.loading.decode import JPEG_MAGIC, decode_image
from ns.data.shards import MEMBER_BYTES
from ns.storage import Store, open_store
from ns.storage.documents import JsonDocument
from ns.storage.scratch import make_scratch_dir, place_sockets

REJECTED = "rejected.parquet"
PARTS_PREFIX = "parts/"
"""Results of finished tasks, from which a killed import continues; removed when the dataset is complete."""
BEGUN_KEY = f"{PARTS_PREFIX}begun"
"""Written first: says that all shards and parts in the folder are those of an import."""
SHOWN_REJECTS = 10
"""Maximum number of rejects that are logged one by one; `rejected.parquet` lists all."""
REJECT_COLUMNS = pa.schema([("path", pa.string()), ("reason", pa.string())])
READS_AHEAD = 16
"""Images fetched at the same time from a server, to hide its latency."""
MAX_ATTEMPTS = 3
"""Attempts at a task whose process is killed."""
JPEG_QUALITY = 92
"""JPEG quality of images that are shrunk."""


class ImportTaskResult(JsonDocument):
    """The shards and rejects of one task."""

    task_digest: str
    """Digest of the task's entries, configuration and classes."""
    shards: tuple[Shard, ...]
    rejects: tuple[tuple[str, str, int | None], ...]
    """Path, reason and, if the image has one, class index of each reject."""
    readable: tuple[int, ...]
    """Indices of classes with a readable image."""


@contextmanager
def open_listing(source: str, role: DatasetRole, split: str | None = None) -> Iterator[Listing]:
    """Lists a source; `sources.list_entries` says which kinds there are. The listing is removed at the end of the context."""
    with make_scratch_dir("import") as scratch_dir:
        passed_over: Counter[str] = Counter()
        entries = sources.list_entries(source, role, split=split, scratch_dir=scratch_dir, passed_over=passed_over)
        with closing(Listing.from_entries(scratch_dir / "listing", entries, role)) as listing:
            listing.passed_over.update(passed_over)
            yield listing


def import_images(
    source: str,
    store: Store,
    *,
    name: str,
    role: DatasetRole,
    config: ImportConfig,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    workers: int | None = None,
) -> Dataset:
    """Lists a source and imports it; see `open_listing` and `import_listing`."""
    with open_listing(source, role, split) as listing:
        return import_listing(listing, source, store, name=name, role=role, config=config, classes=classes, workers=workers)


def import_listing(
    listing: Listing,
    source: str,
    store: Store,
    *,
    name: str,
    role: DatasetRole,
    config: ImportConfig,
    classes: Sequence[str] | None = None,
    workers: int | None = None,
    is_own_folder: bool = False,
) -> Dataset:
    """Imports the listing of `source` into `store` with `workers` processes, by default one per core.

    `classes` fixes the class list: an evaluation set must have that of the labeled data. A dataset in `store` is replaced: it is gone
    while the import is under way. `is_own_folder`: the store is of this very import, by its name; what is there is a part of it, and a
    manifest stays for who reads it.
    An import that was stopped leaves no manifest, and the next one continues with the shard under way. Raises DataError for
    a source without images, an empty or unknown class, or too large a share of unreadable images, and RunError when
    processes are killed repeatedly.
    """
    total = len(listing)
    if not total:
        raise DataError(f"{source}: has no files to import{_describe_passed_over(listing)}")
    if listing.passed_over:
        log.get_logger().info("passed over beside the images", files=listing.passed_over.total(), kinds=_list_kinds(listing))
    class_names: tuple[str, ...] | None = None
    class_ids: dict[ClassLabel, int] = {}
    if role != "unlabeled":
        class_names, class_ids = resolve_classes(
            source, listing.count_class_labels(), classes, total, listing.find_first_problem()
        )
    job = _ImportJob(source, listing.path, store, class_names, class_ids, config)
    _check_destination(source, store, is_own_folder)
    store.put(BEGUN_KEY, b"")
    if not is_own_folder:
        # Shards of one import below the manifest of another would be a damaged dataset.
        store.delete(Dataset.filename)
    tasks = list(
        listing.cut_tasks(shard_samples=config.shard_samples, shard_bytes=config.shard_mib << 20, overhead=2 * MEMBER_BYTES)
    )
    # Rejects stay in the results of their tasks: there may be too many for the memory.
    shards: dict[int, tuple[Shard, ...]] = {}
    rejected: dict[int, int] = {}
    readable: set[int] = set()
    for number, result in _run_tasks(job, tasks, total, workers):
        shards[number] = result.shards
        readable.update(result.readable)
        if result.rejects:
            rejected[number] = len(result.rejects)
        if sum(rejected.values()) > config.max_rejected_share * total:
            _refuse_rejects(job, rejected, total, whole=len(shards) == len(tasks))
    if not any(shards.values()):
        path, reason, _ = next(_load_rejects(job, rejected))
        raise DataError(f"{source}: no readable image among {total} files; first: {path}: {reason}")
    if role == "labeled":
        _check_classes(job, rejected, readable)
    _list_rejects(job, rejected)
    dataset = Dataset(
        name=name,
        role=role,
        classes=class_names or (),
        shards=tuple(shard for task in tasks for shard in shards[task.number]),
        rejected=sum(rejected.values()),
    )
    dataset.save(store)
    remove_leftovers(store, dataset)
    return dataset


def digest_config(config: ImportConfig) -> str:
    """Digest of the fields that decide the dataset's bytes."""
    return digest_json([config.shard_samples, config.shard_mib, config.max_side, config.max_megapixels])


def derive_dataset_name(source: str) -> str:
    """The last part of a source's path or URI, without suffixes and braces."""
    name = PurePosixPath(urlsplit(source).path if "://" in source else Path(source).absolute()).name
    for suffix in (*tables.TABLES, *sources.ARCHIVES):
        name = name.removesuffix(suffix)
    return re.sub(r"[-_]*\{.*\}", "", name) or "images"


def resolve_classes(
    source: str, label_counts: dict[ClassLabel, int], expected: Sequence[str] | None, total: int, problem: str = ""
) -> tuple[tuple[str, ...], dict[ClassLabel, int]]:
    """The class names, in the order of class indices, and the class index of each label. `problem`: an image left out, and why.

    `expected`: the labeled images' classes, for images that are evaluated. Raises DataError for labels that no dataset can have.
    """
    names = [class_label for class_label in label_counts if isinstance(class_label, str)]
    numbers = [class_label for class_label in label_counts if isinstance(class_label, int)]
    if total and not label_counts:
        first = f"; first: {problem}" if problem else "; import it with the role unlabeled, or add labels"
        raise DataError(f"{source}: none of its {total} images has a label{first}")
    if numbers and names:
        raise DataError(
            f"{source}: some labels are class indices ({numbers[0]}) and some are names ({names[0]!r}); use one kind"
        )
    if unnamed := [escape_path(class_label) for class_label in names if escape_path(class_label) != class_label]:
        raise DataError(f"{source}: class '{unnamed[0]}': its name is not UTF-8, or has control characters; rename it")
    if "" in names:
        raise DataError(f"{source}: has a class folder whose name is blank; rename it")
    if expected is not None:
        if numbers:
            return tuple(expected), match_indices(source, numbers, expected)
        matched, unknown = match_names(names, expected)
        if unknown:
            raise DataError(
                f"{source}: class {unknown[0]!r} is none of the labeled classes {shorten_names(expected)}; rename or remove it"
            )
        return tuple(expected), matched
    count = max(numbers) + 1 if numbers else len(names)
    if count > MAX_CLASSES:
        about = f"class index {max(numbers):,}" if numbers else f"{count:,} classes"
        raise DataError(f"{source}: has {about}; at most {MAX_CLASSES:,} classes are possible")
    classes = tuple(str(n) for n in range(count)) if numbers else tuple(sort_class_names(names))
    if len(classes) < 2:
        raise DataError(f"{source}: has {len(classes) or 'no'} class, and at least 2 are needed")
    if all(class_name.casefold() in SPLIT_NAMES for class_name in classes):
        raise DataError(
            f"{source}: its folders {shorten_names(classes)} are splits, not classes; "
            f"{'unpack it, and ' if source.lower().endswith(sources.ARCHIVES) else ''}name one of them as the source"
        )
    if variants := find_case_variants(classes):
        log.get_logger().warning("names of classes differ in upper and lower case alone", first=variants[0], other=variants[1])
    class_ids: dict[ClassLabel, int] = {number: number for number in numbers}
    return classes, class_ids or {class_name: class_id for class_id, class_name in enumerate(classes)}


def _list_kinds(listing: Listing) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(listing.passed_over.items()))


def _describe_passed_over(listing: Listing) -> str:
    return f", only {_list_kinds(listing)}, which are no images" if listing.passed_over else ""


# Tasks


@dataclass(frozen=True)
class _ImportJob:
    """What all tasks of an import share."""

    source: str
    listing: Path
    store: Store
    classes: tuple[str, ...] | None
    """Class names; None for a pool."""
    class_ids: dict[ClassLabel, int]
    """Class index of each label of the source."""
    config: ImportConfig

    def digest_task(self, task: ImportTask) -> str:
        labels = sorted((str(label), class_id) for label, class_id in self.class_ids.items())
        return digest_json([task.digest, task.number, digest_config(self.config), self.classes, labels])


def _run_tasks(
    job: _ImportJob, tasks: list[ImportTask], total: int, workers: int | None
) -> Iterator[tuple[int, ImportTaskResult]]:
    """Number and result of each task, in the order in which they end."""
    waiting = {task.number: task for task in tasks}
    for task in tasks:
        if result := _load_finished(job, task):
            del waiting[task.number]
            yield task.number, result
    progress = log.Progress(total, "images", done=total - sum(task.stop - task.start for task in waiting.values()))
    count = min(workers or count_cores(), len(waiting))
    if count <= 1:
        for number, task in waiting.items():
            yield number, _import_task(job, task, progress.update)
        return
    yield from _run_in_processes(job, list(waiting.values()), count, progress)


def _run_in_processes(
    job: _ImportJob, tasks: list[ImportTask], count: int, progress: log.Progress
) -> Iterator[tuple[int, ImportTaskResult]]:
    place_sockets()
    # A cell per task, written by one process only: a lock would stay with a process that was killed while it held it.
    done = multiprocessing.get_context("forkserver").RawArray("q", len(tasks))
    counted = 0
    attempts = Counter[int]()
    ahead = iter(range(len(tasks)))
    running: dict[Future[None], int] = {}
    pool = ProcessPool(count, _start_worker, (job, done))

    def submit_task(cell: int) -> None:
        attempts[cell] += 1
        running[pool.submit(_import_in_process, tasks[cell], cell)] = cell

    try:
        while True:
            # Only a few are submitted ahead: a million tasks would need a million futures.
            for cell in islice(ahead, 2 * count - len(running)):
                submit_task(cell)
            if not running:
                return
            ended, _ = wait(running, timeout=log.PROGRESS_SECONDS, return_when=FIRST_COMPLETED)
            # Less than before after a process was killed.
            if (fresh := sum(done) - counted) > 0:
                counted += fresh
                progress.update(fresh)
            for future in ended:
                cell = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool as error:
                    if attempts[cell] == MAX_ATTEMPTS:
                        raise RunError(
                            f"a process of the import {error} repeatedly, most often because memory ran out; "
                            "run the same command with fewer --workers: it continues where it stopped"
                        ) from error
                    log.get_logger().warning(
                        "a process of the import was killed; its shards are written again", attempt=attempts[cell]
                    )
                    submit_task(cell)
                else:
                    number = tasks[cell].number
                    yield number, ImportTaskResult.load_file(job.store, _build_result_key(number))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_job: _ImportJob
_done: Any


def _start_worker(job: _ImportJob, done: Any) -> None:
    global _job, _done
    _job, _done = job, done


def _import_in_process(task: ImportTask, cell: int) -> None:
    """Leaves the result in the store: with the reasons of its rejects it may be large."""
    _done[cell] = 0

    def count_images(images: int) -> None:
        _done[cell] += images

    _import_task(_job, task, count_images)


def _load_finished(job: _ImportJob, task: ImportTask) -> ImportTaskResult | None:
    key = _build_result_key(task.number)
    # A result that cannot be read was not written to its end.
    with suppress(DataError):
        if job.store.exists(key):
            result = ImportTaskResult.load_file(job.store, key)
            if result.task_digest == job.digest_task(task) and all(is_shard_whole(job.store, shard) for shard in result.shards):
                return result
    return None


def _build_result_key(number: int) -> str:
    return f"{PARTS_PREFIX}{number:05d}.json"


def _load_rejects(job: _ImportJob, tasks: Iterable[int]) -> Iterator[tuple[str, str, int | None]]:
    for number in sorted(tasks):
        yield from ImportTaskResult.load_file(job.store, _build_result_key(number)).rejects


def _import_task(job: _ImportJob, task: ImportTask, report_progress: Callable[[int], None]) -> ImportTaskResult:
    """Reads, checks and writes the images of one task."""
    rejects: list[tuple[str, str, int | None]] = []
    readable: set[int] = set()
    config = job.config
    with (
        closing(Listing(job.listing)) as listing,
        closing(sources.SourceReader(job.source)) as reader,
        ShardWriter(
            job.store, max_samples=config.shard_samples, max_bytes=config.shard_mib << 20, stem=f"shard-{task.number:05d}"
        ) as writer,
    ):
        for entry, data in _fetch_entries(reader, listing.read_entries(task.start, task.stop)):
            class_id = None if entry.class_label is None else job.class_ids.get(entry.class_label)
            try:
                if isinstance(data, DataError):
                    raise data
                if job.classes is not None and class_id is None:
                    raise DataError("no label")
                image, extension = _check_image(data, config)
                writer.add_image(entry.key, extension, image, class_id)
            except DataError as error:
                rejects.append((escape_path(entry.path), str(error), class_id))
            else:
                if class_id is not None:
                    readable.add(class_id)
            report_progress(1)
    result = ImportTaskResult(
        task_digest=job.digest_task(task),
        shards=writer.shards,
        rejects=tuple(rejects),
        readable=tuple(sorted(readable)),
    )
    result.save_file(job.store, _build_result_key(task.number))
    return result


def _fetch_entries(
    reader: sources.SourceReader, entries: Iterable[SourceEntry]
) -> Iterator[tuple[SourceEntry, bytes | DataError]]:
    def fetch_entry(entry: SourceEntry) -> bytes | DataError:
        try:
            return reader.read_entry(entry)
        except DataError as error:
            return error

    if not reader.is_remote:
        for entry in entries:
            yield entry, fetch_entry(entry)
        return
    with ThreadPoolExecutor(READS_AHEAD) as threads:
        for entry, future in iter_ahead(((entry, threads.submit(fetch_entry, entry)) for entry in entries), READS_AHEAD):
            yield entry, future.result()


def _check_image(data: bytes, config: ImportConfig) -> tuple[bytes, str]:
    """The bytes that go into the shard, and their extension. Raises DataError with the reason for a reject."""
    max_side = config.max_side
    pixels = decode_image(data, config.max_megapixels * 1_000_000)
    extension = _detect_extension(data)
    fits = max_side is None or max(pixels.shape[:2]) <= max_side
    if extension is not None and fits:
        return data, extension
    picture, sink = Image.fromarray(pixels), io.BytesIO()
    if max_side is not None and not fits:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    if extension == "jpg":
        picture.save(sink, "JPEG", quality=JPEG_QUALITY)
        return sink.getvalue(), "jpg"
    picture.save(sink, "PNG")
    return sink.getvalue(), "png"


def _detect_extension(data: bytes) -> str | None:
    """The extension of a format that is kept byte for byte, by its first bytes; None for all others, which become PNG."""
    if data.startswith(JPEG_MAGIC):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return None


# The end


def _refuse_rejects(job: _ImportJob, rejected: dict[int, int], total: int, *, whole: bool) -> None:
    counts = Counter(reason for _, reason, _ in _load_rejects(job, rejected))
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common(3))
    first = "; ".join(f"{path}: {reason}" for path, reason, _ in islice(_load_rejects(job, rejected), 3))
    raise DataError(
        f"{job.source}: {'' if whole else 'at least '}{counts.total()} of {total} files cannot be read ({reasons}), more than "
        f"data.max_rejected_share = {job.config.max_rejected_share:.1%}; first: {first}; repair or remove them, or raise the limit"
    )


def _check_classes(job: _ImportJob, rejected: dict[int, int], readable: set[int]) -> None:
    for class_id, name in enumerate(job.classes or ()):
        if class_id not in readable:
            first_reject = next(
                (f"; first: {path}: {reason}" for path, reason, other in _load_rejects(job, rejected) if other == class_id), ""
            )
            raise DataError(
                f"{job.source}: class {name!r} has no readable image{first_reject}; repair its images, or remove the class"
            )


def _list_rejects(job: _ImportJob, rejected: dict[int, int]) -> None:
    for path, reason, _ in islice(_load_rejects(job, rejected), SHOWN_REJECTS):
        log.get_logger().warning("image left out", path=path, reason=reason)
    if sum(rejected.values()) > SHOWN_REJECTS:
        more = sum(rejected.values()) - SHOWN_REJECTS
        log.get_logger().warning("more images left out", images=more, list=f"{job.store.uri}/{REJECTED}")
    with make_scratch_dir("import") as scratch_dir:
        with pq.ParquetWriter(scratch_dir / REJECTED, REJECT_COLUMNS) as writer:
            for number in sorted(rejected):
                paths, reasons, _ = zip(*_load_rejects(job, [number]), strict=True)
                writer.write_table(pa.table([paths, reasons], schema=REJECT_COLUMNS))
        job.store.put_file(REJECTED, scratch_dir / REJECTED)


def _check_destination(source: str, store: Store, is_own_folder: bool) -> None:
    """Raises DataError for a folder whose files an import would replace or delete, or read as images the next time."""
    target = f"{store.uri.rstrip('/')}/"
    # A pattern such as pool-{000..127}.tar, a table or an archive has images elsewhere, or beside it.
    if "{" not in source and target.startswith(f"{open_store(source).uri.rstrip('/')}/"):
        raise DataError(f"{source}: the dataset {store.uri} would lie in its own source; name a folder outside it")
    if not is_own_folder and not store.exists(Dataset.filename) and not store.exists(BEGUN_KEY):
        for prefix in ("shard-", PARTS_PREFIX):
            for key in store.list(prefix):
                raise DataError(
                    f"{store.uri}: has {escape_path(key)}, which no import wrote; name an empty folder for the dataset"
                )


def remove_leftovers(store: Store, dataset: Dataset) -> None:
    """Removes the results of tasks, and shards that a larger dataset left here."""
    store.delete_prefix(PARTS_PREFIX)
    kept_keys = {name for shard in dataset.shards for name in (shard.name, build_index_key(shard))}
    for key in list(store.list("shard-")):
        if key not in kept_keys:
            store.delete(key)
