"""Starts a run if labels, pool, settings or image differ from those of the run that was started last.

    ROOT/store/triggers/NAME/DIGEST.json    a run and its inputs; written as a claim by the one client that starts it

DIGEST covers the contents of the data, the experiment and the image, and the run is named by it, so that every client that sees the
same inputs, at the same time or later, finds the same run. A client that is killed between its claim and the run leaves a claim without
a run, which the next client takes over.
"""

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from functools import partial
from itertools import count
from typing import Literal, NamedTuple

from components import WORKER_IMAGE
from ns.config.schema import Experiment
from ns.core.digest import digest_json, sha256_bytes
from ns.core.errors import DataError, prefix_errors
from ns.core.process import handle_signals
from ns.data.importing.listing import Listing
from ns.data.locate import open_data
from ns.data.prepared import PART_ROLES, DataPart
from ns.runs.records import utc_timestamp
from ns.storage import LocalStore, Store, read_uri
from ns.storage.documents import JsonDocument, dump_hashed_fields, encode_json
from pipelines.kfp_client import ENDED_STATES, KfpClient, SubmittedRun
from pipelines.remote_run import RunRequest, submit_run

SETTLE_SECONDS = 2.0
"""On S3 two clients can both write within the same instant; this long after writing, both read the later bytes."""
CLAIM_SECONDS = 60.0
"""An older claim without a run belongs to a client that was killed."""
WAIT_SECONDS = 1.0


class DataSnapshot(JsonDocument):
    """The contents of one part of the data."""

    digest: str
    images: int
    shards: dict[str, int]
    """sha256 of each shard → images. Empty for data that is not imported yet."""

    def count_new_images(self, before: "DataSnapshot") -> int:
        """Counts the images in shards that `before` lacks, or in shards that are gone, whichever is more.

        Without shards the number is the difference of the image counts; if these are equal, all images count as new.
        """
        if not (self.shards and before.shards):
            return abs(self.images - before.images) or self.images
        added = sum(images for shard, images in self.shards.items() if shard not in before.shards)
        removed = sum(images for shard, images in before.shards.items() if shard not in self.shards)
        return max(added, removed)


class Trigger(JsonDocument):
    """A run that was started, and its inputs."""

    digest: str
    run: str
    settings_digest: str
    """Digest of the experiment without the URIs of data and registry."""
    image: str
    data: dict[DataPart, DataSnapshot]
    claimed_by: str
    claimed_at: str


class TriggerDecision(NamedTuple):
    """Whether to start a run, and the reason."""

    action: Literal["start", "known", "nothing"]
    """`known`: a run with exactly these inputs was started, or is being started."""
    reason: str
    trigger: Trigger


def propose_trigger(experiment: Experiment, image: str | None = None) -> Trigger:
    """The run that the current data, experiment and image lead to. `image`: of the stages; this version's if not given.

    Raises DataError or StoreError naming the field whose data cannot be read.
    """
    uris: dict[DataPart, str | None] = {part: getattr(experiment.data, part) for part in PART_ROLES}
    data = {part: _snapshot_data(part, uri) for part, uri in uris.items() if uri is not None}
    fields = dump_hashed_fields(experiment, exclude={"registry": True, "data": set(uris) | {"exclude"}})
    if experiment.data.exclude:
        fields["excluded_keys"] = sha256_bytes(read_uri(experiment.data.exclude))
    settings = digest_json(fields)
    image = image or WORKER_IMAGE
    whole = digest_json(
        {"data": {part: snapshot.digest for part, snapshot in data.items()}, "experiment": settings, "image": image}
    )
    return Trigger(
        digest=whole,
        run=f"{experiment.name}-{whole[:8]}",
        settings_digest=settings,
        image=image,
        data=data,
        claimed_by=f"{platform.node()}:{os.getpid()}:{uuid.uuid4()}",
        claimed_at=utc_timestamp(),
    )


def decide_trigger(
    root: Store, name: str, current: Trigger, *, min_change: float = 0.0, again: bool = False
) -> TriggerDecision:
    """Compares the current inputs with those of the run that was started last. `name`: of the experiment.

    `min_change`: share (0-1) of the labeled images, or of the pool, that must be new if nothing else has changed. `again`: start a run
    even if one with exactly these inputs was started before.
    """
    triggers = [Trigger.load_file(root, key) for key in root.list(f"store/triggers/{name}/")]
    earlier = sorted(triggers, key=lambda trigger: trigger.claimed_at)
    same = next((trigger for trigger in earlier if trigger.digest == current.digest), None)
    if same is not None:
        if again:
            return TriggerDecision("start", "started again on request", current)
        return TriggerDecision("known", f"data, settings and image are those of run {same.run}", current)
    if not earlier:
        return TriggerDecision("start", f"no run of {name} was started before", current)
    last = earlier[-1]
    reasons = []
    if current.settings_digest != last.settings_digest:
        reasons.append("the settings have changed")
    if current.image != last.image:
        reasons.append(f"the image is {current.image}, was {last.image}")
    enough = bool(reasons)
    for part, data in current.data.items():
        before = last.data.get(part)
        if before is None or data.digest != before.digest:
            new = data.count_new_images(before) if before else data.images
            share = new / max(1, data.images)
            # Models that are evaluated on different images cannot be compared, so any change there is enough.
            enough = enough or share >= min_change or part in ("heldout", "test")
            reasons.append(f"{part}: {new:,} of {data.images:,} images are new ({share:.1%})")
    enough = enough or not reasons
    reason = "; ".join(reasons) or "a part of the data is gone"
    if not enough:
        return TriggerDecision("nothing", f"{reason}: less than {min_change:.1%}, since run {last.run}", current)
    return TriggerDecision("start", f"{reason}, since run {last.run}", current)


def start_triggered_run(
    client: KfpClient,
    root: Store,
    experiment: Experiment,
    decision: TriggerDecision,
    make_request: Callable[[str], RunRequest],
    *,
    again: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> SubmittedRun:
    """Starts the run of a decision, or finds it. `make_request` makes the request from the run's name (`build_request`); `say` is that
    of `submit_run`.

    However many clients call this at once, they start one run. Raises RunError if KFP cannot be reached; the same call by any client
    then does the rest.
    """
    name = decision.trigger.run
    find_run = partial(client.find_run, name, experiment.name, excluded_states=ENDED_STATES if again else ())
    if existing := find_run():
        return existing
    # Before the claim, so that an unreachable server or a wrong input leaves nothing behind.
    request = make_request(name)
    for attempt in count():
        # A claim without a run is not removed but followed by another, so that only one is valid at a time.
        suffix = f"-{attempt}" if attempt else ""
        key = f"store/triggers/{experiment.name}/{decision.trigger.digest}{suffix}.json"
        if _claim_run(root, key, decision.trigger):
            return submit_run(client, root, name, experiment, request, say)
        claim = Trigger.load_file(root, key)
        until = datetime.fromisoformat(claim.claimed_at).timestamp() + CLAIM_SECONDS
        while time.time() <= until:
            time.sleep(WAIT_SECONDS)
            if existing := find_run():
                return existing
    raise AssertionError


def _claim_run(root: Store, key: str, trigger: Trigger) -> bool:
    """Claims the run. Returns whether this client has to start it."""
    data = encode_json(trigger.model_copy(update={"claimed_at": utc_timestamp()}).model_dump(mode="json"))
    if not root.create(key, data):
        return False
    if not isinstance(root, LocalStore):
        time.sleep(SETTLE_SECONDS)
    return root.get(key) == data


def poll_until_stopped(check_once: Callable[[], None], seconds: float) -> None:
    """Calls `check_once` every `seconds` until SIGTERM or SIGINT; a check that has begun is finished first."""
    stopped = threading.Event()
    with handle_signals(lambda *_: stopped.set()):
        while not stopped.is_set():
            check_once()
            stopped.wait(seconds)


def _snapshot_data(part: DataPart, uri: str) -> DataSnapshot:
    with prefix_errors(f"data.{part}"), open_data(uri, PART_ROLES[part]) as data:
        if isinstance(data, Listing):
            if len(data) == 0:
                raise DataError(f"{uri}: there are no images; add some, or change the URI")
            return DataSnapshot(digest=data.compute_digest(), images=len(data), shards={})
        _, dataset = data
        shards = {shard.sha256: shard.samples for shard in dataset.shards}
        return DataSnapshot(digest=dataset.digest, images=dataset.samples, shards=shards)
