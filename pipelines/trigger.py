"""Starts a run when there is a reason: labels, pool, settings or image are not those of the run that was started last.

    ROOT/store/triggers/NAME/DIGEST.json    a run that was started, and of what; written first, by the one client that starts it

DIGEST covers what the data hold, the experiment and the image, and the run is named by it: whoever looks at the same things, at the
same time or later, finds the same run. A client that was killed between its claim and the run leaves a claim without a run, which the
next one takes over.
"""

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from components import WORKER_IMAGE
from ns.config.schema import Experiment
from ns.core.digest import digest_json, sha256_bytes
from ns.core.errors import DataError, prefix_errors
from ns.core.process import handle_signals
from ns.data.dataset import MANIFEST, Dataset, Shard
from ns.data.digits import DIGITS_SCHEME, write_digits
from ns.data.importing.ingest import open_listing
from ns.data.prepared import PART_ROLES, DataPart
from ns.data.scratch import make_scratch_dir
from ns.runs.records import utc_timestamp
from ns.stages import steps
from ns.storage import LocalStore, Store, open_store, read_uri
from ns.storage.documents import JsonDocument, encode_json
from pipelines import remote_run as cluster
from pipelines.kfp_client import ENDED_STATES, KfpClient, SubmittedRun

if TYPE_CHECKING:
    from ns.planning.prices import GpuCost, GpuPrice

NAME_LETTERS = 8
TERA = 1e12
SETTLE_SECONDS = 2.0
"""On S3 two clients that look within the same instant both write; so long after writing, the later bytes are there for both."""
CLAIM_SECONDS = 60.0
"""A claim without a run that is older belongs to a client that was killed."""
WAIT_SECONDS = 1.0


class DataSnapshot(JsonDocument):
    """What one part of the data holds."""

    digest: str
    images: int
    shards: dict[str, int]
    """sha256 of each shard → images. Empty for what is not imported yet."""

    def count_new_images(self, before: "DataSnapshot") -> int:
        """Images in shards that are not among those of `before`, or as many as are gone. Without shards the numbers have to do, and
        where they are equal all images count as new."""
        if not (self.shards and before.shards):
            return abs(self.images - before.images) or self.images
        added = sum(images for shard, images in self.shards.items() if shard not in before.shards)
        removed = sum(images for shard, images in before.shards.items() if shard not in self.shards)
        return max(added, removed)


class Trigger(JsonDocument):
    """A run that was started, and what it was started with."""

    digest: str
    run: str
    settings_digest: str
    """Digest of the settings, without the places of the data and of the registry."""
    image: str
    data: dict[DataPart, DataSnapshot]
    claimed_by: str
    claimed_at: str


class TriggerDecision(NamedTuple):
    """Whether to start a run, and why."""

    action: Literal["start", "known", "nothing"]
    """`known`: a run of these very things was started, or was about to be."""
    reason: str
    trigger: Trigger


def propose_trigger(experiment: Experiment, image: str | None = None) -> Trigger:
    """What a run would be started with, from what is there now. `image`: of the steps; the version's if not given.

    Raises DataError or StoreError naming the field for data that cannot be looked at.
    """
    uris: dict[DataPart, str] = {
        "labeled": experiment.data.labeled,
        "pool": experiment.data.pool,
        "heldout": experiment.data.heldout,
    }
    if experiment.data.test is not None:
        uris["test"] = experiment.data.test
    data = {part: _snapshot_data(part, uri) for part, uri in uris.items()}
    fields = experiment.model_dump(mode="json", exclude={"registry"})
    for part in uris:
        del fields["data"][part]
    if experiment.data.exclude:
        fields["data"]["exclude"] = sha256_bytes(read_uri(experiment.data.exclude))
    settings = digest_json(fields)
    image = image or WORKER_IMAGE
    whole = digest_json(
        {"data": {part: snapshot.digest for part, snapshot in data.items()}, "experiment": settings, "image": image}
    )
    return Trigger(
        digest=whole,
        run=f"{experiment.name}-{whole[:NAME_LETTERS]}",
        settings_digest=settings,
        image=image,
        data=data,
        claimed_by=f"{platform.node()}:{os.getpid()}:{uuid.uuid4()}",
        claimed_at=utc_timestamp(),
    )


def decide_trigger(
    root: Store, name: str, current: Trigger, *, min_change: float = 0.0, again: bool = False
) -> TriggerDecision:
    """Compares what is there with the run that was started last. `name`: of the experiment.

    `min_change`: share of the labeled images, or of the pool, that must be new if nothing else is. `again`: start it although a run of
    these very things was started.
    """
    earlier = _list_triggers(root, name)
    same = next((trigger for trigger in earlier if trigger.digest == current.digest), None)
    if same is not None:
        if again:
            return TriggerDecision("start", "asked for again", current)
        return TriggerDecision("known", f"data, settings and image are those of run {same.run}", current)
    if not earlier:
        return TriggerDecision("start", f"no run of {name} was started before", current)
    last = earlier[-1]
    reasons = []
    if current.settings_digest != last.settings_digest:
        reasons.append("the settings are others")
    if current.image != last.image:
        reasons.append(f"the image is {current.image}, was {last.image}")
    enough = bool(reasons)
    for part, data in current.data.items():
        before = last.data.get(part)
        if before is None or data.digest != before.digest:
            new = data.count_new_images(before) if before else data.images
            share = new / max(1, data.images)
            # Who is measured by other images cannot be compared: that is never too little.
            enough = enough or share >= min_change or part in ("heldout", "test")
            reasons.append(f"{part}: {new:,} of {data.images:,} images are new ({share:.1%})")
    enough = enough or not reasons
    reason = "; ".join(reasons) or "a part of the data is no longer there"
    if not enough:
        return TriggerDecision("nothing", f"{reason}: less than {min_change:.1%}, since run {last.run}", current)
    return TriggerDecision("start", f"{reason}, since run {last.run}", current)


def start_triggered_run(
    client: KfpClient,
    root: Store,
    experiment: Experiment,
    decision: TriggerDecision,
    make_inputs: Callable[[str], Mapping[str, Any]],
    *,
    again: bool = False,
) -> SubmittedRun:
    """Starts the run that was decided on, or finds it. `given`: the pipeline's inputs by the run's name (`cluster.arguments`).

    However many clients call this at once, one run comes of it. Raises RunError if KFP cannot be reached; then the same call, by
    anybody, does what is left to do.
    """
    name, excluded_states = decision.trigger.run, ENDED_STATES if again else ()
    existing = client.find_run(name, experiment.name, excluded_states=excluded_states)
    if existing is not None:
        return existing
    # Before the claim, so that a server that is down, or an input that is wrong, leaves nothing behind.
    inputs = make_inputs(name)
    for attempt in count():
        key = _claim_key(experiment.name, decision.trigger.digest, attempt)
        if _claim_run(root, key, decision.trigger):
            return cluster.submit_run(client, root, name, experiment, inputs)
        claim = Trigger.load_file(root, key)
        until = datetime.fromisoformat(claim.claimed_at).timestamp() + CLAIM_SECONDS
        while existing is None and time.time() <= until:
            time.sleep(WAIT_SECONDS)
            existing = client.find_run(name, experiment.name, excluded_states=excluded_states)
        if existing is not None:
            return existing
    raise AssertionError


def _claim_run(root: Store, key: str, trigger: Trigger) -> bool:
    """Whether it is ours to start the run."""
    data = encode_json(trigger.model_copy(update={"claimed_at": utc_timestamp()}).model_dump(mode="json"))
    if not root.create(key, data):
        return False
    if not isinstance(root, LocalStore):
        time.sleep(SETTLE_SECONDS)
    return root.get(key) == data


class Outlook(NamedTuple):
    """What a run would do, and cost."""

    steps: list[tuple[str, str, str]]
    """Step, `run` or `reuse`, how much of it."""
    shards: int
    """Of the pool, that are to be labeled in the first generation; 0 if it is not known."""
    storage_bytes: int
    """Of label sets, models and checkpoints, at most."""
    costs: "list[GpuCost]"


def foresee(root: Store, experiment: Experiment, seen: Trigger, prices: "dict[str, GpuPrice]") -> Outlook:
    """What a run would find done, and what the rest would cost if every generation is run, without measuring anything.

    Raises ConfigError for networks that cannot be.
    """
    # Here, since it loads torch.
    from ns import planning as plans
    from ns.planning.prices import estimate_gpu_costs

    labeled, pool = seen.data["labeled"], seen.data["pool"]
    shards = [Shard(name="shard.tar", samples=images, bytes=0, sha256=sha256) for sha256, images in pool.shards.items()]
    done = steps.find_finished_work(root, experiment, labeled.digest, shards)
    known = sum(pool.shards[sha256] for sha256 in done.labeled_shards)
    counts = plans.KnownCounts({part: one.images for part, one in seen.data.items()})
    made = plans.estimate_run(experiment, plans.PlanRequest(counts, multiply_adds_per_second=TERA))
    left = []
    for work in made.work:
        if work.generation == 0 and done.teacher:
            continue
        if work.generation == 1 and work.task == "label":
            share = 1 - known / max(1, pool.images)
            work = work.model_copy(update={"images": round(work.images * share), "seconds": work.seconds * share})
        left.append(work)
    unlabeled = len(pool.shards) - len(done.labeled_shards)
    rows = [("train teacher", "reuse" if done.teacher else "run", "")]
    for generation in range(1, experiment.generations + 1):
        name = f"generation {generation}: "
        if generation == 1 and pool.shards:
            about = f"{unlabeled:,} of {len(pool.shards):,} shards, {pool.images - known:,} of {pool.images:,} images"
            rows.append((f"{name}label", "run" if unlabeled else "reuse", about))
        else:
            rows.append((f"{name}label", "run", f"{pool.images:,} images"))
        rows.append((f"{name}train, evaluate, decide", "run", ""))
    storage = made.label_set_bytes * experiment.generations + made.model_bytes + made.checkpoint_bytes
    return Outlook(rows, unlabeled, storage, estimate_gpu_costs(tuple(left), prices, TERA))


def poll_until_stopped(check_once: Callable[[], None], seconds: float) -> None:
    """Calls `look_once` every so many seconds, until SIGTERM or SIGINT; a look under way is ended first."""
    stopped = threading.Event()
    with handle_signals(lambda *_: stopped.set()):
        while not stopped.is_set():
            check_once()
            stopped.wait(seconds)


def _list_triggers(root: Store, name: str) -> list[Trigger]:
    """All that was started, the latest last."""
    triggers = [Trigger.load_file(root, key) for key in root.list(f"store/triggers/{name}/")]
    return sorted(triggers, key=lambda trigger: trigger.claimed_at)


def _snapshot_data(part: DataPart, uri: str) -> DataSnapshot:
    with prefix_errors(f"data.{part}"):
        if uri.startswith(DIGITS_SCHEME):
            with make_scratch_dir("trigger") as path:
                return _snapshot_dataset(write_digits(uri.removeprefix(DIGITS_SCHEME), open_store(str(path))))
        store = open_store(uri)
        if store.exists(MANIFEST):
            return _snapshot_dataset(Dataset.load(store))
        with open_listing(uri, PART_ROLES[part]) as listing:
            if len(listing) == 0:
                raise DataError(f"{uri}: there are no images")
            return DataSnapshot(digest=listing.compute_digest(), images=len(listing), shards={})


def _snapshot_dataset(dataset: Dataset) -> DataSnapshot:
    return DataSnapshot(
        digest=dataset.digest, images=dataset.samples, shards={shard.sha256: shard.samples for shard in dataset.shards}
    )


def _claim_key(name: str, whole: str, attempt: int) -> str:
    """Of a claim. One that came to nothing is not removed but followed by another: only so is there one at a time."""
    return f"store/triggers/{name}/{whole}{f'-{attempt}' if attempt else ''}.json"
