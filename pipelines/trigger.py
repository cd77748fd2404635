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
from ns.core.digest import digest, sha256_bytes
from ns.core.errors import DataError, named
from ns.core.process import signalled
from ns.data.dataset import MANIFEST, Dataset, Shard
from ns.data.digits import DIGITS, write_digits
from ns.data.importing.ingest import listed
from ns.data.prepared import ROLES, Part
from ns.data.scratch import scratch
from ns.runs.records import now
from ns.stages import steps
from ns.storage import LocalStore, Store, open_store, read_uri
from ns.storage.documents import Document, pretty
from pipelines import remote_run as cluster
from pipelines.kfp_client import ENDED, Server, Submitted

if TYPE_CHECKING:
    from ns.planning.prices import Cost, Price

NAME_LETTERS = 8
TERA = 1e12
SETTLE_SECONDS = 2.0
"""On S3 two clients that look within the same instant both write; so long after writing, the later bytes are there for both."""
CLAIM_SECONDS = 60.0
"""A claim without a run that is older belongs to a client that was killed."""
WAIT_SECONDS = 1.0


class Data(Document):
    """What one part of the data holds."""

    digest: str
    images: int
    shards: dict[str, int]
    """sha256 of each shard → images. Empty for what is not imported yet."""

    def new_images(self, before: "Data") -> int:
        """Images in shards that are not among those of `before`, or as many as are gone. Without shards the numbers have to do, and
        where they are equal all images count as new."""
        if not (self.shards and before.shards):
            return abs(self.images - before.images) or self.images
        here = sum(images for shard, images in self.shards.items() if shard not in before.shards)
        gone = sum(images for shard, images in before.shards.items() if shard not in self.shards)
        return max(here, gone)


class Trigger(Document):
    """A run that was started, and what it was started with."""

    digest: str
    run: str
    experiment: str
    """Digest of the settings, without the places of the data and of the registry."""
    image: str
    data: dict[Part, Data]
    claimed_by: str
    claimed_at: str


class Decision(NamedTuple):
    """Whether to start a run, and why."""

    action: Literal["start", "known", "nothing"]
    """`known`: a run of these very things was started, or was about to be."""
    why: str
    trigger: Trigger


def look(experiment: Experiment, image: str | None = None) -> Trigger:
    """What a run would be started with, from what is there now. `image`: of the steps; the version's if not given.

    Raises DataError or StoreError naming the field for data that cannot be looked at.
    """
    places: dict[Part, str] = {
        "labelled": experiment.data.labelled,
        "pool": experiment.data.pool,
        "heldout": experiment.data.heldout,
    }
    if experiment.data.test is not None:
        places["test"] = experiment.data.test
    data = {part: _data(part, place) for part, place in places.items()}
    fields = experiment.model_dump(mode="json", exclude={"registry"})
    for part in places:
        del fields["data"][part]
    if experiment.data.exclude:
        fields["data"]["exclude"] = sha256_bytes(read_uri(experiment.data.exclude))
    settings = digest(fields)
    image = image or WORKER_IMAGE
    whole = digest({"data": {part: one.digest for part, one in data.items()}, "experiment": settings, "image": image})
    return Trigger(
        digest=whole,
        run=f"{experiment.name}-{whole[:NAME_LETTERS]}",
        experiment=settings,
        image=image,
        data=data,
        claimed_by=f"{platform.node()}:{os.getpid()}:{uuid.uuid4()}",
        claimed_at=now(),
    )


def decide(root: Store, name: str, seen: Trigger, *, min_change: float = 0.0, again: bool = False) -> Decision:
    """Compares what is there with the run that was started last. `name`: of the experiment.

    `min_change`: share of the labelled images, or of the pool, that must be new if nothing else is. `again`: start it although a run of
    these very things was started.
    """
    known = _known(root, name)
    same = next((one for one in known if one.digest == seen.digest), None)
    if same is not None:
        if again:
            return Decision("start", "asked for again", seen)
        return Decision("known", f"data, settings and image are those of run {same.run}", seen)
    if not known:
        return Decision("start", f"no run of {name} was started before", seen)
    last = known[-1]
    reasons = []
    if seen.experiment != last.experiment:
        reasons.append("the settings are others")
    if seen.image != last.image:
        reasons.append(f"the image is {seen.image}, was {last.image}")
    enough = bool(reasons)
    for part, data in seen.data.items():
        before = last.data.get(part)
        if before is None or data.digest != before.digest:
            new = data.new_images(before) if before else data.images
            share = new / max(1, data.images)
            # Who is measured by other images cannot be compared: that is never too little.
            enough = enough or share >= min_change or part in ("heldout", "test")
            reasons.append(f"{part}: {new:,} of {data.images:,} images are new ({share:.1%})")
    enough = enough or not reasons
    why = "; ".join(reasons) or "a part of the data is no longer there"
    if not enough:
        return Decision("nothing", f"{why}: less than {min_change:.1%}, since run {last.run}", seen)
    return Decision("start", f"{why}, since run {last.run}", seen)


def start(
    server: Server,
    root: Store,
    experiment: Experiment,
    decision: Decision,
    given: Callable[[str], Mapping[str, Any]],
    *,
    again: bool = False,
) -> Submitted:
    """Starts the run that was decided on, or finds it. `given`: the pipeline's inputs by the run's name (`cluster.arguments`).

    However many clients call this at once, one run comes of it. Raises RunError if KFP cannot be reached; then the same call, by
    anybody, does what is left to do.
    """
    name, besides = decision.trigger.run, ENDED if again else ()
    there = server.find(name, experiment.name, besides=besides)
    if there is not None:
        return there
    # Before the claim, so that a server that is down, or an input that is wrong, leaves nothing behind.
    inputs = given(name)
    for attempt in count():
        key = _key(experiment.name, decision.trigger.digest, attempt)
        if _claim(root, key, decision.trigger):
            return cluster.submit(server, root, name, experiment, inputs)
        claim = Trigger.read(root, key)
        until = datetime.fromisoformat(claim.claimed_at).timestamp() + CLAIM_SECONDS
        while there is None and time.time() <= until:
            time.sleep(WAIT_SECONDS)
            there = server.find(name, experiment.name, besides=besides)
        if there is not None:
            return there
    raise AssertionError


def _claim(root: Store, key: str, trigger: Trigger) -> bool:
    """Whether it is ours to start the run."""
    data = pretty(trigger.model_copy(update={"claimed_at": now()}).model_dump(mode="json"))
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
    """Of the pool, that are to be labelled in the first generation; 0 if it is not known."""
    storage_bytes: int
    """Of label sets, models and checkpoints, at most."""
    costs: "list[Cost]"


def foresee(root: Store, experiment: Experiment, seen: Trigger, prices: "dict[str, Price]") -> Outlook:
    """What a run would find done, and what the rest would cost if every generation is run, without measuring anything.

    Raises ConfigError for networks that cannot be.
    """
    # Here, since it loads torch.
    from ns import planning as plans
    from ns.planning.prices import costs

    labelled, pool = seen.data["labelled"], seen.data["pool"]
    shards = [Shard(name="shard.tar", samples=images, bytes=0, sha256=sha256) for sha256, images in pool.shards.items()]
    done = steps.foresee(root, experiment, labelled.digest, shards)
    known = sum(pool.shards[sha256] for sha256 in done.shards)
    counts = plans.Counts({part: one.images for part, one in seen.data.items()})
    made = plans.plan(experiment, plans.Asked(counts, multiply_adds_per_second=TERA))
    left = []
    for work in made.work:
        if work.generation == 0 and done.teacher:
            continue
        if work.generation == 1 and work.task == "label":
            share = 1 - known / max(1, pool.images)
            work = work.model_copy(update={"images": round(work.images * share), "seconds": work.seconds * share})
        left.append(work)
    unlabelled = len(pool.shards) - len(done.shards)
    rows = [("train teacher", "reuse" if done.teacher else "run", "")]
    for generation in range(1, experiment.generations + 1):
        name = f"generation {generation}: "
        if generation == 1 and pool.shards:
            about = f"{unlabelled:,} of {len(pool.shards):,} shards, {pool.images - known:,} of {pool.images:,} images"
            rows.append((f"{name}label", "run" if unlabelled else "reuse", about))
        else:
            rows.append((f"{name}label", "run", f"{pool.images:,} images"))
        rows.append((f"{name}train, evaluate, decide", "run", ""))
    storage = made.label_set_bytes * experiment.generations + made.model_bytes + made.checkpoint_bytes
    return Outlook(rows, unlabelled, storage, costs(tuple(left), prices, TERA))


def watch(look_once: Callable[[], None], seconds: float) -> None:
    """Calls `look_once` every so many seconds, until SIGTERM or SIGINT; a look under way is ended first."""
    stopped = threading.Event()
    with signalled(lambda *_: stopped.set()):
        while not stopped.is_set():
            look_once()
            stopped.wait(seconds)


def _known(root: Store, name: str) -> list[Trigger]:
    """All that was started, the latest last."""
    found = [Trigger.read(root, key) for key in root.list(f"store/triggers/{name}/")]
    return sorted(found, key=lambda trigger: trigger.claimed_at)


def _data(part: Part, place: str) -> Data:
    with named(f"data.{part}"):
        if place.startswith(DIGITS):
            with scratch("trigger") as here:
                return _of_dataset(write_digits(place.removeprefix(DIGITS), open_store(str(here))))
        folder = open_store(place)
        if folder.exists(MANIFEST):
            return _of_dataset(Dataset.load(folder))
        with listed(place, ROLES[part]) as listing:
            if len(listing) == 0:
                raise DataError(f"{place}: there are no images")
            return Data(digest=listing.digest(), images=len(listing), shards={})


def _of_dataset(dataset: Dataset) -> Data:
    return Data(digest=dataset.digest, images=dataset.samples, shards={shard.sha256: shard.samples for shard in dataset.shards})


def _key(name: str, whole: str, attempt: int) -> str:
    """Of a claim. One that came to nothing is not removed but followed by another: only so is there one at a time."""
    return f"store/triggers/{name}/{whole}{f'-{attempt}' if attempt else ''}.json"
