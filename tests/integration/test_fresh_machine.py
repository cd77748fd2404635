"""A bare machine: a container with Python and make, the checkout, an ordinary user, and `make run`."""

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.containers, pytest.mark.slow, pytest.mark.timeout(1800)]

CHECKOUT = Path(__file__).parents[2]
IMAGE = "docker.io/library/python:3.11-slim-bookworm"

SCRIPT = """
set -e
export PATH=$PATH:/usr/sbin:/sbin
apt-get update -qq >/dev/null
# What a bare Debian lacks, and what make is to bring itself: its Python cannot make virtual environments.
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends make sudo >/dev/null
DEBIAN_FRONTEND=noninteractive apt-get remove -y -qq python3-venv python3.11-venv >/dev/null 2>&1
useradd --create-home user
echo 'user ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/user
mkdir /home/user/checkout
tar -x -C /home/user/checkout -f /checkout.tar
chown -R user /home/user
cd /home/user/checkout
sudo -u user -E HOME=/home/user make run
sudo -u user -E HOME=/home/user .venv/bin/ns runs show latest --json >/tmp/shown.json
test -s runs/quickstart-*/report.html
echo SHOWN; cat /tmp/shown.json
"""


def test_make_run_does_it_all_on_a_bare_machine(engine, package_folders, tmp_path):
    archive = tmp_path / "checkout.tar"
    subprocess.run(["git", "-C", str(CHECKOUT), "archive", "--output", str(archive), "HEAD"], check=True)
    mounts = [f"--volume={folder}:{folder}:ro" for folder in package_folders]
    command = ["podman", "run", "--rm", "--network=host", *mounts, f"--volume={archive}:/checkout.tar:ro", IMAGE]
    done = subprocess.run([*command, "bash", "-c", SCRIPT], capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = json.loads(done.stdout.partition("SHOWN")[2])
    assert shown["state"] == "succeeded"
    assert len(shown["generations"]) == 2
    assert shown["best_top1"] > shown["teacher_top1"]
