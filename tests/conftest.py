"""What all tests share."""

import gc
import io
import os
import shutil
import socketserver
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import structlog
from hypothesis import Phase, settings
from PIL import Image

from ns.core.digest import digest_json, sha256_bytes
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.labeling.label_set import LabelSet, LabelShard, build_histogram_table, build_row_schema, compute_histogram
from ns.storage import LocalStore

# One thread: tests run beside each other, and sums come out in one order on any machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The unit tests' folders are in memory if there is room: what is written there is flushed to disk, and they write some ten thousand files.
MEMORY = Path("/dev/shm")
ROOM_BYTES = 4 << 30

# Servers of tests answer with headers and a body: the second would wait 40 ms for the acknowledgement of the first.
socketserver.StreamRequestHandler.disable_nagle_algorithm = True

# Tests share their cores: how long an example takes says more of the neighbors than of the code.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
# For `make mutation`: the same examples for each mutant, and no search for the smallest that shows it, which takes longer than all else.
settings.register_profile("mutation", deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])

# What modules make while they are loaded stays: looking for garbage among it would take a fifth of the time.
gc.disable()

DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


def pytest_configure(config: pytest.Config) -> None:
    is_unit_suite = "not integration" in config.option.markexpr
    if is_unit_suite and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= ROOM_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: begun last, they would leave all processes but one without work. Long ones are left out."""
    if "NS_LONG_TESTS" not in os.environ:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: set NS_LONG_TESTS=1, or run make test-all"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """No collection of garbage goes through what was loaded until now, half a million objects, again. And there are few of them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder of real images beside the checkout."""
    if not DATA.is_dir():
        pytest.skip("needs the images in ../shared/data/cifar10")
    return DATA


@pytest.fixture(autouse=True)
def log_of_its_own():
    """A test that configures the log leaves it writing to a stream that is closed afterwards."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def picture():
    """Function: an encoded picture of `size` px, a different one for each seed."""

    def make(seed: int, kind: str = "PNG", size: int = 8) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(sink, kind)
        return sink.getvalue()

    return make


@pytest.fixture(scope="session")
def make_label_set():
    """Function: a label set in `folder`, of shards of rows (key, class index, confidence). A row without confidence was unreadable.

    `pool`: the dataset that is labeled; made up if not given. Returns the store and the label set.
    """

    def make(folder, shards, classes, pool=None, teacher="0"):
        store = LocalStore(folder)
        written, all_labels, all_sure = [], [], []
        for number, rows in enumerate(shards):
            unreadable = sum(row[2] is None for row in rows)
            table = pa.table(
                [
                    [key for key, _, _ in rows],
                    pa.array([sure for _, _, sure in rows], pa.float32()),
                    pa.array([None if sure is None else [label] for _, label, sure in rows], pa.list_(pa.uint16(), 1)),
                    pa.array([None if sure is None else [np.float16(sure)] for _, _, sure in rows], pa.list_(pa.float16(), 1)),
                    pa.array(["truncated" if sure is None else None for _, _, sure in rows], pa.string()),
                ],
                schema=build_row_schema(1),
            )
            sink = io.BytesIO()
            pq.write_table(table, sink)
            data, name = sink.getvalue(), f"shard-{number:05d}.parquet"
            store.put(name, data)
            source = pool.shards[number].sha256 if pool else digest_json([key for key, _, _ in rows])
            facts = {"source": source, "rows": len(rows), "unreadable": unreadable}
            written.append(LabelShard(name=name, **facts, bytes=len(data), sha256=sha256_bytes(data)))
            all_labels += [label for _, label, sure in rows if sure is not None]
            all_sure += [sure for _, _, sure in rows if sure is not None]
        counts = compute_histogram(np.array(all_labels, np.uint16), np.array(all_sure, np.float32), len(classes))
        sink = io.BytesIO()
        pq.write_table(build_histogram_table(counts), sink)
        store.put("histogram.parquet", sink.getvalue())
        dataset = pool.digest if pool else digest_json([shard.source for shard in written])
        made = LabelSet(dataset=dataset, teacher=teacher, code="0", classes=tuple(classes), top_k=1, shards=tuple(written))
        made.save_file(store, "labelset.json")
        return store, made

    return make


@pytest.fixture
def make_pool(picture):
    """Function: an unlabeled dataset in `folder` whose images have these keys. Returns the store and the dataset."""

    def make(folder, shards, size=16):
        store = LocalStore(folder)
        keys = [key for shard in shards for key in shard]
        with ShardWriter(store, max_samples=len(shards[0]), max_bytes=1 << 30) as writer:
            for number, key in enumerate(keys):
                writer.add_image(key, "png", picture(number, size=size), None)
        made = Dataset(name="pool", role="unlabeled", classes=(), shards=writer.shards)
        made.save(store)
        return store, made

    return make


@pytest.fixture(scope="session")
def prepared_digits(tmp_path_factory):
    """The folder of a root in which the quickstart's data is prepared, and nothing else. No test may change it."""
    from ns.runs.records import record_key
    from ns.stages.prepare import prepare_data
    from tests.loop import open_tiny_run

    store = LocalStore(tmp_path_factory.mktemp("prepared"))
    ref = open_tiny_run(store)
    prepare_data(ref)
    for prefix in (f"{ref.run}/", record_key(ref.run), "store/order/"):
        store.delete_prefix(prefix)
    return store.root


@pytest.fixture
def digits_store(prepared_digits, tmp_path):
    """A store of its own in which the quickstart's data is prepared: what is done with it is under test, not how it is made."""
    shutil.copytree(prepared_digits, tmp_path / "digits", copy_function=os.link)
    return LocalStore(tmp_path / "digits")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The store and the RunRef of a finished run of one generation, whose student was promoted. Tests open further runs beside it."""
    from ns.runs.lifecycle import finish_run
    from tests.loop import open_tiny_run, run_loop

    store = LocalStore(tmp_path_factory.mktemp("root"))
    ref = open_tiny_run(store)
    run_loop(ref)
    finish_run(store, ref.run, "succeeded")
    return store, ref
