"""This checkout's images, where the nodes of a cluster find them."""

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
"""What manifests and pipelines call them."""


def plan_images(
    registry: str, existing: Sequence[str], worker: str, *, local: bool, options: Sequence[str] = ()
) -> dict[str, str]:
    """Name in manifests → the image's own name. Nothing is built.

    `registry`: goes before the names; none is needed where the cluster is `local`. `given`: images that are there already, by their
    whole names, instead. `worker`: the target that steps run in, worker or worker-cuda. `options`: for images/build.py. Raises
    ConfigError for names that cannot be meant.
    """
    if existing:
        by_name = {}
        for name in existing:
            match = re.search(r"/(worker(?:-cuda)?|tools)(:[\w.-]+|@sha256:[0-9a-f]{64})$", name)
            if match is None:
                raise ConfigError(f"--image {name}: must end in /worker:TAG, /worker-cuda:TAG or /tools:TAG (or @sha256:…)")
            by_name[TOOLS_IMAGE_NAME if match[1] == "tools" else WORKER_IMAGE_NAME] = name
        if lacking := {WORKER_IMAGE_NAME, TOOLS_IMAGE_NAME} - by_name.keys():
            raise ConfigError(f"--image: {' and '.join(sorted(lacking))} is missing; give each image, or none")
        return by_name
    if not registry and not local:
        raise ConfigError(
            "REGISTRY is not given, and the cluster's nodes must pull the images from somewhere; give REGISTRY=registry.example/team, "
            'or with ARGS="--image …" images that are there already'
        )
    script = str(build.CHECKOUT / "images" / "build.py")
    command = [sys.executable, script, "--print", f"--registry={registry}", *options, worker, "tools"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return dict(zip((WORKER_IMAGE_NAME, TOOLS_IMAGE_NAME), names, strict=True))


def provide_images(
    names: Mapping[str, str], say: Callable[[str], None], *, cluster: str | None, options: Sequence[str] = ()
) -> None:
    """Builds images, and brings them to a registry, or into the local cluster of that name (kind). What is there is left alone.

    Raises ClusterError with the command that failed; what it said is on standard error.
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
            say(f"image {name}: being built")
            target = name.rpartition("/")[2].partition(":")[0]
            registry = (
                name.removesuffix(f"/{build.IMAGE_PREFIX}/{name.rpartition('/')[2]}")
                if not name.startswith(build.IMAGE_PREFIX)
                else ""
            )
            script = str(build.CHECKOUT / "images" / "build.py")
            _run_or_fail(sys.executable, script, f"--registry={registry}", *options, target)
        if cluster is None:
            say(f"image {name}: being pushed")
            _run_or_fail(engine, "push", name)
        elif engine == "docker":
            _run_or_fail("kind", "load", "docker-image", name, f"--name={cluster}")
        else:
            # kind takes images from Docker alone by their names.
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
        raise ClusterError(f"{' '.join(command)}: ended with code {code}; its reasons stand above; then deploy again")
