"""Chaos: runs whose processes are killed, stopped and told to end, at least 200 times, must end as one that was left alone.

    python -m benchmarks.soak [--blows 200] [--seed 0] [--quick] [--keep]

A loop of three generations on handwritten digits, with real trainings, runs once undisturbed. Then rounds of it begin, in turns
in a folder and on S3 (OpenStack Swift, on this machine): two clients at once work at it, and a blow falls whenever one of them has
done a few more things, drawn from a seed. A blow is one of

    SIGKILL    of a client, or of a process that it has started
    SIGTERM    of a client
    SIGSTOP    of one of these processes, and SIGCONT after up to two seconds
    damage     both clients are killed, and a blob of finished work is cut off
    server     the S3 server is killed and started again

Clients that end are started again until they are done. The first round is the command `ns run`, twice at once, with the stages as
processes of Kubeflow's local runner; a blow there hits any process of either. What is measured, over all rounds:

    blows           how many there were
    equal           share of the clients whose result is that of the undisturbed run
    trained_twice   trainings that were finished more than once, but for those whose model was damaged
    garbage_files   files that are left, and that an undisturbed run does not have
    bare_errors     failures that do not name their stage and what to do, or are not told in one line

The clients of a round are forks of this process, which has loaded what they need: a start costs no seconds of imports.
Needs the Debian packages that .ci/packages installs, for the server; --quick goes without, and without the command, in a minute.
"""

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import psutil
from minio import Minio
from rich.table import Table

from benchmarks.measure import make_parser, write_benchmark
from ns.config.loader import dump_experiment, load_with_overrides
from ns.core.errors import Interrupted
from ns.data.importing.digits import write_digits
from ns.runs.summary import summarize_run
from ns.stages.context import RunRef
from ns.stages.report import report_run
from ns.stages.start import start_run
from ns.storage import LocalStore, Store, open_store
from pipelines.runners.local import COMPUTING_MODULES, STAGE_MODULES
from tests.integration.outcome import results
from tests.loop import run_loop
from tests.storage.swift import Swift, reason_against

CLIENTS = ("soak-a", "soak-b")
"""Names of the runs of the two clients, which need the same work."""
BLOWS_PER_ROUND = 34
COMMAND_SHARE = 0.05
"""Share of the blows that fall on the command: it is as slow as a run on a laptop is."""
EVENTS_BETWEEN = (1, 6)
"""Least and greatest number of things that are done between two blows."""
KINDS = {"SIGKILL": 6, "SIGTERM": 2, "SIGSTOP": 3, "damage": 1, "server": 1}
"""Kind of blow → times in so many blows as these are together; their order is drawn."""
PATIENCE_SECONDS = 300
"""A client that says nothing for so long hangs."""
STARTS = 2000
DAMAGED = ("store/datasets/", "store/models/", "store/labels/", "store/evaluations/")
CURES = re.compile(
    r"the same command|run .* again|again|made again|lower|raise|set |choose|wait|look at|repair|check|start the"
)


def write_pool(folder: Path) -> None:
    """Writes the digits of the pool as files, so that processes import them."""
    write_digits("digits:pool", LocalStore(folder / "dataset"))
    for tar in sorted((folder / "dataset").glob("*.tar")):
        with tarfile.open(tar) as archive:
            archive.extractall(folder / "images", filter="data")


def make_soak_config(pool: Path, generations: int, teacher_epochs: int) -> str:
    """The quickstart at a small size, with frequent checkpoints and seven shards, as YAML."""
    overrides = [
        "name=soak",
        f"generations={generations}",
        f"data.pool={pool}",
        "data.shard_samples=200",
        f"teacher.train.epochs={teacher_epochs}",
        "students.0.train.epochs=8",
        "students.0.train.unlabeled_ratio=1",
        "teacher.train.checkpoint_seconds=0.2",
        "students.0.train.checkpoint_seconds=0.2",
        "selection.min_confidence=0.12",
        # Every student is accepted: the loop is tested, not the method.
        "gate.min_gain=-1",
    ]
    return dump_experiment(load_with_overrides("quickstart", overrides))


@dataclass
class Client:
    """One of the two, over all its starts."""

    run: str
    log: Path
    stage_log: Path | None = None
    """Where its stages log, if not there too."""
    pid: int = 0
    process: subprocess.Popen[bytes] | None = None
    """Kept, because Python waits for what is let go, and the end would be lost."""
    starts: int = 0
    is_done: bool = False
    ends: Counter[int] = field(default_factory=Counter)
    """Exit code → times; -9 is SIGKILL."""
    _read_bytes: dict[Path, int] = field(default_factory=dict)

    def read_events(self) -> Iterator[dict[str, Any]]:
        """The lines that its logs have got since the last call; what is no JSON has the text as `line`."""
        for log in filter(None, (self.log, self.stage_log)):
            if log.exists():
                with log.open("rb") as file:
                    file.seek(self._read_bytes.get(log, 0))
                    whole, end, _ = file.read().rpartition(b"\n")
                self._read_bytes[log] = self._read_bytes.get(log, 0) + len(whole) + len(end)
                yield from map(_parse_line, whole.decode(errors="replace").splitlines())


def _parse_line(line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"event": "", "line": line}


Launch = Callable[[Client], int]
"""Starts a client; returns its process."""


@dataclass
class Findings:
    """What the rounds have shown."""

    blows: Counter[str] = field(default_factory=Counter)
    equal: list[bool] = field(default_factory=list)
    trained_twice: list[str] = field(default_factory=list)
    garbage: list[str] = field(default_factory=list)
    bare_errors: list[str] = field(default_factory=list)


class Calm(NamedTuple):
    """What an undisturbed run leaves."""

    keys: frozenset[str]
    result: Mapping[str, Any]


@dataclass
class Round:
    """Two clients at work in one root."""

    name: str
    root: str
    folder: Path
    chance: random.Random
    blows: int
    launch: Launch
    calm: Calm
    findings: Findings
    restart_server: Callable[[], None] | None = None
    is_command: bool = False
    _deck: list[str] = field(default_factory=list)

    def run(self) -> str:
        """Returns how often the clients ended, by exit code."""
        self.folder.mkdir()
        stage_logs = [Path(self.root) / run / "pipeline.log" if self.is_command else None for run in CLIENTS]
        clients = [Client(run, self.folder / f"{run}.log", log) for run, log in zip(CLIENTS, stage_logs, strict=True)]
        seen: set[tuple[Any, ...]] = set()
        finished_trainings: Counter[str] = Counter()
        damaged_models = 0
        dealt, until_blow, heard_at = 0, self.chance.randint(*EVENTS_BETWEEN), time.monotonic()
        while not all(client.is_done for client in clients):
            for client in clients:
                if client.pid == 0 and not client.is_done:
                    if client.starts == STARTS:
                        raise SystemExit(f"{self.name}: {client.run} is not done after {STARTS} starts; see {client.log}")
                    client.starts += 1
                    client.pid = self.launch(client)
                self._reap(client)
                for event in client.read_events():
                    heard_at = time.monotonic()
                    if event.get("event") == "finished" and event.get("stage") == "train" and event.get("reused") is False:
                        finished_trainings[str(event.get("generation"))] += 1
                    event_name = tuple(event.get(name) for name in ("event", "stage", "generation", "shards"))
                    # What is reused after a new start is no progress.
                    if event.get("event") == "progress" or event_name not in seen:
                        seen.add(event_name)
                        until_blow -= 1
                    self._check_error(client, event)
            if until_blow <= 0 and dealt < self.blows and any(client.pid for client in clients):
                kind = self._deal_blow(clients)
                if kind:
                    dealt += 1
                    self.findings.blows[kind] += 1
                    damaged_models += kind == "damage"
                    until_blow = self.chance.randint(*EVENTS_BETWEEN)
            if time.monotonic() - heard_at > PATIENCE_SECONDS:
                raise SystemExit(f"{self.name}: hangs: nothing was said for {PATIENCE_SECONDS} s; see {self.folder}")
            time.sleep(0.01)
        self._judge(clients, finished_trainings, damaged_models)
        ends = sum((client.ends for client in clients), Counter[int]())
        return ", ".join(f"{count} × {code}" for code, count in sorted(ends.items()))

    def _reap(self, client: Client) -> None:
        if client.pid == 0:
            return
        pid, status = os.waitpid(client.pid, os.WNOHANG)
        if pid == 0:
            return
        client.pid = 0
        code = os.waitstatus_to_exitcode(status)
        client.ends[code] += 1
        client.is_done = code == 0

    def _deal_blow(self, clients: list[Client]) -> str | None:
        """Returns the kind of the blow, None if nothing could be hit."""
        if not self._deck:
            self._deck += [
                kind for kind, times in KINDS.items() for _ in range(times) if kind != "server" or self.restart_server
            ]
            self.chance.shuffle(self._deck)
        kind = self._deck.pop()
        client = self.chance.choice([client for client in clients if client.pid])
        # Between two events too.
        time.sleep(self.chance.uniform(0, 0.05))
        if kind == "server":
            assert self.restart_server is not None
            self.restart_server()
        elif kind == "damage":
            for other in clients:
                if other.pid:
                    _kill_tree(other.pid)
            return kind if self._damage_blob() else "SIGKILL"
        else:
            return self._send_signal(kind, client)
        return kind

    def _send_signal(self, kind: str, client: Client) -> str | None:
        with suppress(psutil.Error):
            parent = psutil.Process(client.pid)
            children = parent.children(recursive=True)
            victim = self.chance.choice(children) if children and self.chance.random() < 0.5 else parent
            if kind == "SIGTERM" and not self.is_command:
                victim = parent
            victim.send_signal(signal.Signals[kind])
            if kind == "SIGSTOP":
                time.sleep(self.chance.uniform(0.05, 2))
                victim.send_signal(signal.SIGCONT)
            return kind
        return None

    def _damage_blob(self) -> bool:
        store = open_store(self.root)
        blobs = [
            blob for folder in DAMAGED for blob in store.entries(folder) if blob.size > 16 and not blob.key.endswith(".json")
        ]
        if not blobs:
            return False
        blob = self.chance.choice(blobs)
        store.put(blob.key, store.get_range(blob.key, 0, blob.size // 2))
        return True

    def _check_error(self, client: Client, event: Mapping[str, Any]) -> None:
        line = event.get("line", "")
        if "Traceback" in line:
            self.findings.bare_errors.append(f"{self.name}: {client.run}: a traceback; see {client.log}")
        if event.get("event") == "failed":
            error = str(event.get("error"))
            if not event.get("stage") or "\n" in error or not CURES.search(error):
                self.findings.bare_errors.append(f"{self.name}: {event.get('stage')}: {error}")
        elif line.startswith("error: ") and not CURES.search(line):
            self.findings.bare_errors.append(f"{self.name}: {line}")

    def _judge(self, clients: list[Client], finished_trainings: Counter[str], damaged: int) -> None:
        store = open_store(self.root)
        for client in clients:
            self.findings.equal.append(read_result(store, client.run) == self.calm.result)
        extra = sum(max(0, count - 1) for count in finished_trainings.values())
        if extra > damaged:
            self.findings.trained_twice.append(f"{self.name}: {dict(finished_trainings)}, {damaged} damaged")
        keys = list_keys(store)
        self.findings.garbage += [f"{self.name}: {key}" for key in sorted(keys - self.calm.keys)]
        lost = sorted(self.calm.keys - keys)
        if lost:
            self.findings.equal.append(False)
            sys.stderr.write(f"{self.name}: lacks {lost[:5]}\n")


def list_keys(store: Store) -> frozenset[str]:
    """All files below a root, also those that are no keys; those of the two runs under one name."""
    if isinstance(store, LocalStore):
        names = {path.relative_to(store.root).as_posix() for path in store.root.rglob("*") if path.is_file()}
    else:
        names = set(store.list())
    left_by_clients = re.compile(r"/\.lock$|/\.client$|/pipeline\.log$")
    clients = "|".join(CLIENTS)
    # Which of the two begins first is chance, but each has one number.
    numbers = Counter(match[1] for name in names if (match := re.fullmatch(rf"store/order/runs/\d+-({clients})", name)))
    names = {
        re.sub(rf"(?<=store/order/runs/)\d+-({clients})$", lambda match: f"{match[1]}-{numbers[match[1]]}", name)
        for name in names
    }
    return frozenset(
        re.sub(rf"^({clients})/|(?<=store/runs/)({clients})(?=\.json)", "RUN/", name)
        for name in names
        if not left_by_clients.search(name)
    )


def _kill_tree(pid: int) -> None:
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with suppress(psutil.Error):
                process.kill()


def run_stages(config: Path, root: str, run: str) -> None:
    """All stages of a run, one after the other, in this process."""
    ref = RunRef.from_uri(start_run(str(config), run, root=root))
    run_loop(ref)
    report_run(ref)


def fork_client(config: Path, root: str, client: Client) -> int:
    """Starts a client as a fork of this process."""
    pid = os.fork()
    if pid == 0:
        _be_client(config, root, client)
    return pid


def _be_client(config: Path, root: str, client: Client) -> NoReturn:
    code = 1
    # Processes that it starts would import this module, as their main one.
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        with client.log.open("ab", buffering=0) as log:
            os.dup2(log.fileno(), 2)
            os.dup2(log.fileno(), 1)
        try:
            run_stages(config, root, client.run)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Interrupted as end:
            code = end.exit_code
        except BaseException as error:
            code = getattr(error, "exit_code", 70)
            if code == 70:
                traceback.print_exc()
    finally:
        os._exit(code)


def start_command(config: Path, root: str, client: Client) -> int:
    command = [sys.executable, "-m", "ns", "run", str(config), "--root", root, "--run", client.run, "--json"]
    with client.log.open("ab") as log:
        # Its stages log into the run's folder.
        client.process = subprocess.Popen(command, stdout=log, stderr=log)
        return client.process.pid


@contextmanager
def run_server(folder: Path) -> Iterator[Swift]:
    """An S3 server with a bucket `soak`, which the environment names."""
    folder.mkdir()
    server = Swift(folder)
    server.start()
    endpoint = server.url.removeprefix("http://")
    client = Minio(endpoint=endpoint, access_key="test:tester", secret_key="testing", secure=False, region="us-east-1")
    client.make_bucket(bucket_name="soak")
    os.environ |= {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "test:tester",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }
    try:
        yield server
    finally:
        server.kill()


def run_calm(config: Path, root: Path) -> Calm:
    """Runs both clients undisturbed, one after the other."""
    for run in CLIENTS:
        client = Client(run, root.with_suffix(".log"))
        _, status = os.waitpid(fork_client(config, str(root), client), 0)
        if status:
            raise SystemExit(f"the undisturbed run failed: {client.log.read_text()[-2000:]}")
    store = LocalStore(root)
    return Calm(list_keys(store), read_result(store, CLIENTS[0]))


def read_result(store: Store, run: str) -> dict[str, Any]:
    return results(json.loads(summarize_run(store, run).model_dump_json()))


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="one round in a folder with few blows: a minute")
    parser.add_argument("--blows", type=int, help="number of blows (200; 12 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the blows")
    options = parser.parse_args()
    blows = options.blows or (12 if options.quick else 200)
    if not options.quick and reason_against():
        raise SystemExit(reason_against())
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for name in (*STAGE_MODULES, *COMPUTING_MODULES, "timm.optim"):
        import_module(name)
    findings = Findings()
    table = Table("round", "blows", "starts of the clients", "seconds")
    with tempfile.TemporaryDirectory(prefix="ns-soak-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        os.environ |= {"TMPDIR": str(folder / "tmp"), "NS_CACHE_DIR": str(folder / "cache")}
        tempfile.tempdir = None
        (folder / "tmp").mkdir()
        write_pool(folder / "pool")
        config, command_config = folder / "soak.yaml", folder / "command.yaml"
        config.write_text(make_soak_config(folder / "pool" / "images", 1 if options.quick else 3, 30 if options.quick else 60))
        chance = random.Random(options.seed)

        def run_round(name: str, root: str, count: int, launch: Launch, **more: Any) -> None:
            started, dealt_before = time.monotonic(), findings.blows.total()
            ends = Round(name, root, folder / f"round-{name}", chance, count, launch, calm, findings, **more).run()
            dealt = findings.blows.total() - dealt_before
            table.add_row(name, str(dealt), ends, f"{time.monotonic() - started:.0f}")
            sys.stderr.write(f"{name}: {dealt} blows, {ends}, {time.monotonic() - started:.0f} s\n")

        if options.quick:
            root = str(folder / "root")
            calm = run_calm(config, folder / "calm")
            run_round("folder", root, blows, partial(fork_client, config, root))
        else:
            command_config.write_text(make_soak_config(folder / "pool" / "images", 1, 60))
            calm = run_calm(command_config, folder / "calm-command")
            root = str(folder / "root-command")
            command_blows = math.ceil(blows * COMMAND_SHARE)
            run_round("command", root, command_blows, partial(start_command, command_config, root), is_command=True)
            calm = run_calm(config, folder / "calm")
            with run_server(folder / "swift") as server:

                def restart_server() -> None:
                    server.kill()
                    time.sleep(chance.uniform(0.5, 2))
                    server.start()

                # A round may end before all of its blows have fallen.
                for number in itertools.count():
                    missing = blows - findings.blows.total()
                    if missing <= 0:
                        break
                    count = min(BLOWS_PER_ROUND, missing)
                    if number % 2:
                        root = f"s3://soak/{number}"
                        run_round(
                            f"s3-{number}", root, count, partial(fork_client, config, root), restart_server=restart_server
                        )
                    else:
                        root = str(folder / f"root-{number}")
                        run_round(f"folder-{number}", root, count, partial(fork_client, config, root))
    figures = {
        "blows": findings.blows.total(),
        "equal": sum(findings.equal) / len(findings.equal),
        "trained_twice": len(findings.trained_twice),
        "garbage_files": len(findings.garbage),
        "bare_errors": len(findings.bare_errors),
    }
    kinds = Table("blow", "times")
    for kind, times in sorted(findings.blows.items()):
        kinds.add_row(kind, str(times))
    write_benchmark("soak", figures, options, table, kinds)
    faults = [*findings.trained_twice, *findings.garbage, *findings.bare_errors]
    if faults or not all(findings.equal):
        raise SystemExit("\n".join([f"equal: {figures['equal']:.0%}", *faults]))


if __name__ == "__main__":
    main()
