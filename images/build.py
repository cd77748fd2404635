"""Builds the images: `python3 images/build.py [TARGET…]`. Prints their names, which end in the digest of their files.

Equal files give equal names, and a changed file another name. So a node never runs an old image under a new name, and Kubeflow, whose
cache compares names of images, never takes old results for new ones.
"""

import argparse
import hashlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
IMAGE_PREFIX = "noisy-student"
TARGETS = ("worker", "worker-cuda", "tools")


def list_context_files(checkout: Path) -> Iterator[Path]:
    """Yields the files that .dockerignore lets in, in order."""
    lines = (checkout / ".dockerignore").read_text().splitlines()
    for path in sorted(checkout / line[1:] for line in lines if line.startswith("!")):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc":
                yield file


def compute_tag(checkout: Path, target: str, arguments: dict[str, str]) -> str:
    """Returns 16 hex digits of the SHA-256 of an image's files, target and build arguments."""
    hasher = hashlib.sha256(repr((target, sorted(arguments.items()))).encode())
    for file in list_context_files(checkout):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        hasher.update(f"{file.relative_to(checkout).as_posix()} {content}\n".encode())
    return hasher.hexdigest()[:16]


def read_version(checkout: Path) -> str:
    text = (checkout / "ns" / "__init__.py").read_text()
    return text.partition('__version__ = "')[2].partition('"')[0]


def read_revision(checkout: Path) -> str:
    process = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return process.stdout.strip()


def find_builder() -> str:
    """Returns the command that builds: of docker if it answers, or else podman."""
    for engine in ("docker", "podman"):
        if shutil.which(engine) and subprocess.run([engine, "version"], capture_output=True).returncode == 0:
            return f"{engine} build"
    sys.exit("error: neither docker nor podman answers; install one, or give another builder with --builder (make: BUILDER=)")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the images of the pipeline's stages, and print their names.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--registry", default="", help="prefix of the names, as registry.example/team")
    parser.add_argument("--tag", default="", help="tag to use instead of the digest")
    parser.add_argument("--builder", default="", help="`docker build`, `podman build`, or a command with the same arguments")
    parser.add_argument("--python", default="", help="base image, best with its @sha256 digest")
    parser.add_argument("--cpu-index", default="", help="URL of an index with CPU builds of torch")
    parser.add_argument("--pip-config", default="", help="pip.conf for the installation; it does not enter the image")
    parser.add_argument("--print", action="store_true", help="print the names only")
    parsed = parser.parse_args()
    targets = parsed.targets or TARGETS
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    arguments = {name: value for name, value in (("PYTHON", parsed.python), ("CPU_INDEX", parsed.cpu_index)) if value}
    command = shlex.split(parsed.builder) if parsed.builder or parsed.print else shlex.split(find_builder())
    for target in targets:
        names = [f"{IMAGE_PREFIX}/{target}:{parsed.tag or compute_tag(CHECKOUT, target, arguments)}"]
        if parsed.registry:
            names = [f"{parsed.registry.rstrip('/')}/{names[0]}"]
        else:
            # The default image of runs on this machine.
            names.append(f"{IMAGE_PREFIX}/{target}:{read_version(CHECKOUT)}")
        if not parsed.print:
            build_arguments = {"VERSION": read_version(CHECKOUT), "REVISION": read_revision(CHECKOUT), **arguments}
            options = [f"--build-arg={name}={value}" for name, value in build_arguments.items()]
            options += [f"--secret=id=pip,src={parsed.pip_config}"] if parsed.pip_config else []
            options += [word for name in names for word in ("--tag", name)]
            file = str(CHECKOUT / "images" / "Dockerfile")
            process = subprocess.run([*command, "--file", file, "--target", target, *options, str(CHECKOUT)], stdout=sys.stderr)
            if process.returncode:
                return process.returncode
        sys.stdout.write(f"{names[0]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
