"""Which version of the pipeline a run takes: the platform's if its code is this one's, else one under a name of its own.

A version's description holds the digest of its code, without the placement, and the placement as JSON. So a client that reaches only
Kubeflow finds the images and the node pools of the cluster, and never becomes the newest version of the platform's pipeline.
"""

import getpass
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from ns.core.digest import sha256_bytes
from ns.core.errors import ConfigError
from pipelines import PACKAGE
from pipelines.kfp_client import KfpClient, UploadedPipeline, pipeline_name
from pipelines.placement import Placement, render_package

_DESCRIPTION = re.compile(r"code ([0-9a-f]{12}); placement (\{.*\})", re.DOTALL)
SEARCHED_VERSIONS = 50
"""Older versions are not looked at."""

Say = Callable[[str], object]


class PlatformVersion(NamedTuple):
    """A version that the platform uploaded."""

    pipeline: UploadedPipeline
    code: str
    placement: Placement


@lru_cache(maxsize=8)
def digest_wiring(package: str) -> str:
    """12 hex digits of the digest of a compiled pipeline (YAML), whatever placement was filled in."""
    return sha256_bytes(render_package(package, Placement()).encode())[:12]


def describe_version(package: str, placement: Placement) -> str:
    """The description under which a compiled pipeline (YAML) is uploaded."""
    return f"code {digest_wiring(package)}; placement {json.dumps(asdict(placement), sort_keys=True)}"


def find_platform_version(client: KfpClient, package: str) -> PlatformVersion | None:
    """The newest version of the same code, or else the newest of all; None if the platform has uploaded none."""
    code = digest_wiring(package)
    versions = islice(client.list_versions(pipeline_name(package)), SEARCHED_VERSIONS)
    taken = None
    for version, match in ((version, match) for version in versions if (match := _DESCRIPTION.search(version.description))):
        taken = taken or (version, match)
        if match[1] == code:
            taken = version, match
            break
    if taken is None:
        return None
    # Only now: of another release, a placement may have fields that this one does not know.
    version, match = taken
    placement = Placement.from_json(match[2], f"the description of version {version.version}")
    return PlatformVersion(version, match[1], placement)


def require_platform_version(client: KfpClient, package: str) -> PlatformVersion:
    """Like `find_platform_version`. Raises ConfigError if there is none."""
    platform = find_platform_version(client, package)
    if platform is None:
        raise ConfigError(
            f"--image: must be given: {client.url} has no pipeline {pipeline_name(package)} with the images of its platform; "
            "give --image, or let `make deploy` or `ns pipelines upload` upload the pipeline"
        )
    return platform


def provide_pipeline(client: KfpClient, placed: Mapping[str, Any], say: Say) -> UploadedPipeline:
    """Finds the platform's version for a run, or uploads one under a name of its own if code or placement are not the platform's.

    `placed`: fields of the placement that are the run's own, valid ones. `say`: is told why the platform's version does not serve. Raises
    ConfigError if neither the platform nor `placed` names an image.
    """
    package = PACKAGE.read_text()
    has_images = "worker_image" in placed
    platform = find_platform_version(client, package) if has_images else require_platform_version(client, package)
    placement = replace(platform.placement if platform else Placement(), **placed)
    is_same_code = platform is not None and platform.code == digest_wiring(package)
    if platform and is_same_code and placement == platform.placement:
        return platform.pipeline
    own_name = _make_own_name(pipeline_name(package), digest_wiring(package))
    if platform and not is_same_code:
        images = "the given image" if has_images else "the platform's images"
        say(f"the pipeline here is not that of {platform.pipeline.version}; it runs as {own_name}, in {images}")
    rendered = render_package(package, placement, name=own_name)
    return client.upload_pipeline(rendered, describe_version(package, placement))


def _make_own_name(name: str, code: str) -> str:
    """The user's own pipeline; that of the code where nobody has a name, as in containers."""
    try:
        user = re.sub(r"[^a-z0-9]+", "-", getpass.getuser().lower()).strip("-")[:40]
    except (KeyError, OSError):
        user = ""
    return f"{name}-{user or code}"
