"""OpenStack Swift with its S3 interface on this machine: a real object store that keeps its data on disk.

One of each of its servers on 127.0.0.1, one replica, one folder as the disk. `.ci/packages` installs its Debian packages.
"""

import functools
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PACKAGES = ("swift-proxy", "swift-account", "swift-container", "swift-object", "memcached")
ROLES = ("account", "container", "object")
SECONDS_TO_START = 60

PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 2
swift_dir = {folder}
user = {user}
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
user_test_guest = guessing
[filter:slo]
use = egg:swift#slo
"""

STORAGE = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
user = {user}
[pipeline:main]
pipeline = {role}-server
[app:{role}-server]
use = egg:swift#{role}
"""


@functools.cache
def reason_against() -> str:
    """Why Swift cannot run here; empty if it can."""
    query = ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *PACKAGES]
    known = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which("dpkg-query") else ""
    # A package that was unpacked but not configured has its programs, and does not run.
    missing = [package for package in PACKAGES if f"{package} installed" not in known.splitlines()]
    return f"needs the Debian packages {' '.join(missing)}: .ci/packages installs them" if missing else ""


class Swift:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(("proxy", "memcached", *ROLES), _free_ports(5), strict=True))
        self.url = f"http://127.0.0.1:{self.ports['proxy']}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._user = user = "root" if os.geteuid() == 0 else os.environ["USER"]
        (folder / "devices" / "disk").mkdir(parents=True)
        (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = a\nswift_hash_path_prefix = b\n")
        (folder / "proxy.conf").write_text(
            PROXY.format(port=self.ports["proxy"], memcached=self.ports["memcached"], folder=folder, user=user)
        )
        for role in ROLES:
            (folder / f"{role}.conf").write_text(STORAGE.format(port=self.ports[role], folder=folder, user=user, role=role))
            device = f"r1z1-127.0.0.1:{self.ports[role]}/disk"
            builder = str(folder / f"{role}.builder")
            for command in (["create", "4", "1", "0"], ["add", device, "1"], ["rebalance"]):
                # Exit status 1 is a warning: one disk is not much.
                done = subprocess.run(["swift-ring-builder", builder, *command], capture_output=True, text=True)
                assert done.returncode < 2, done.stdout + done.stderr

    def start(self) -> None:
        self._begin("memcached", ["memcached", "-l", "127.0.0.1", "-p", str(self.ports["memcached"]), "-u", self._user])
        for role in ROLES:
            self._begin(role, [f"swift-{role}-server", str(self.folder / f"{role}.conf"), "-v"])
        self._wait("object", self._stands)
        # Last: alone, it says of every bucket that there is none.
        self._begin("proxy", ["swift-proxy-server", str(self.folder / "proxy.conf"), "-v"])
        self._wait("proxy", self._answers)

    def _begin(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            # A session of its own: its workers die with it.
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not ready():
            assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """All servers at once, without a word: what is not on disk is gone."""
        for process in reversed(self._processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes.clear()

    def _stands(self) -> bool:
        for port in (self.ports[name] for name in (*ROLES, "memcached")):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)):
                    return False
        return True

    def _answers(self) -> bool:
        with suppress(OSError):
            return urllib.request.urlopen(f"{self.url}/healthcheck", timeout=2).status == 200
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
