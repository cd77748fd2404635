"""Builds this checkout's images and brings them to where the nodes of a cluster find them."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from images import build
from ns.core.errors import ClusterError, ConfigError

WORKER_IMAGE_NAME, TOOLS_IMAGE_NAME = f"{build.IMAGE_PREFIX}/worker", f"{build.IMAGE_PREFIX}/tools"
"""Names of the images in manifests and pipelines."""


def plan_images(
    registry: str, existing: Sequence[str], worker: str, *, local: bool, options: Sequence[str] = ()
) -> dict[str, str]:
    """Returns name in manifests → full name of the image. Builds nothing.

    `registry`: prefix of the names; a `local` cluster needs none. `existing`: full names of existing images to use instead. `worker`:
    the target that stages run in, worker or worker-cuda. `options`: for images/build.py. Raises ConfigError for unusable names.
    """
    if existing:
        by_name = {}
        for name in existing:
            match = re.search(r"/(worker(?:-cuda)?|tools)(:[\w.-]+|@sha256:[0-9a-f]{64})$", name)
            if match is None:
                raise ConfigError(f"--image {name}: must end in /worker:TAG, /worker-cuda:TAG or /tools:TAG (or @sha256:…)")
            by_name[TOOLS_IMAGE_NAME if match[1] == "tools" else WORKER_IMAGE_NAME] = name
        if lacking := {WORKER_IMAGE_NAME, TOOLS_IMAGE_NAME} - by_name.keys():
            raise ConfigError(f"--image: {' and '.join(sorted(lacking))} is missing; give both images, or none")
        return by_name
    if not registry and not local:
        raise ConfigError(
            "REGISTRY is not given, and the cluster's nodes must pull the images from a registry; give REGISTRY=registry.example/team, "
            'or existing images with ARGS="--image …"'
        )
    command = [sys.executable, build.__file__, "--print", f"--registry={registry}", *options, worker, "tools"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return dict(zip((WORKER_IMAGE_NAME, TOOLS_IMAGE_NAME), names, strict=True))


def provide_images(
    names: Mapping[str, str], say: Callable[[str], None], *, cluster: str | None, options: Sequence[str] = ()
) -> None:
    """Builds images, and pushes them to their registry or loads them into the local cluster (kind). Existing images are kept.

    Raises ClusterError with the command that failed; its output is on standard error.
    """
    builder = (
        next((option.partition("=")[2] for option in options if option.startswith("--builder=")), "") or build.find_builder()
    )
    engine = builder.split()[0]
    for name in names.values():
        if cluster is None and _command_succeeds(engine, "manifest", "inspect", name):
            say(f"image {name}: is in the registry")
            continue
        if not _command_succeeds(engine, "image", "inspect", name):
            say(f"image {name}: building")
            target = name.rpartition("/")[2].partition(":")[0]
            registry = name.rpartition(f"{build.IMAGE_PREFIX}/")[0].rstrip("/")
            _run_or_fail(sys.executable, build.__file__, f"--registry={registry}", *options, target)
        if cluster is None:
            say(f"image {name}: pushing")
            _run_or_fail(engine, "push", name)
        elif engine == "docker":
            _run_or_fail("kind", "load", "docker-image", name, f"--name={cluster}")
        else:
            # kind loads images by name from Docker only.
            with tempfile.TemporaryDirectory() as folder:
                archive = str(Path(folder) / "image.tar")
                _run_or_fail(engine, "save", "--output", archive, name)
                _run_or_fail("kind", "load", "image-archive", archive, f"--name={cluster}")


def _command_succeeds(*command: str) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True).returncode == 0


def _run_or_fail(*command: str) -> None:
    try:
        # Standard output is for results.
        code = subprocess.run(command, stdout=sys.stderr).returncode
    except OSError as error:
        raise ClusterError(f"{command[0]}: cannot be started: {error.strerror or error}; install it") from error
    if code:
        raise ClusterError(f"{' '.join(command)}: ended with code {code}; fix what it prints above, then deploy again")
