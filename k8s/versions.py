"""Versions of the components of a cluster: which are supported, and which do not work together."""

import re
from collections.abc import Mapping
from typing import NamedTuple

Version = tuple[int, int, int]

DISPLAY_NAMES = {
    "kubernetes": "Kubernetes",
    "kfp": "Kubeflow Pipelines",
    "argo": "Argo Workflows",
    "trainer": "Kubeflow Trainer",
    "kueue": "Kueue",
    "prometheus-operator": "Prometheus operator",
    "dcgm": "DCGM exporter",
}


OLDEST, NEWEST = (0, 0, 0), (9999, 0, 0)


class SupportedRange(NamedTuple):
    """The supported versions of one component."""

    minimum: Version
    """Older ones cannot be used."""
    reason: str
    """Why older ones cannot be used."""
    since: Version
    until: Version
    """End of the tested versions, exclusive. Versions outside [since, until) are not tested."""


SUPPORTED = {
    # KFP's authors test 2.17 on 1.33 to 1.36, and our manifests are checked against their schemas.
    "kubernetes": SupportedRange((1, 31, 0), "Kubeflow Trainer 2 needs 1.31", (1, 33, 0), (1, 37, 0)),
    "kfp": SupportedRange((2, 17, 0), "the pipeline takes GPUs and tolerations as inputs, as of 2.17", (2, 17, 0), (2, 18, 0)),
    "argo": SupportedRange(OLDEST, "", (3, 7, 0), (4, 1, 0)),
    "trainer": SupportedRange((2, 2, 0), "TrainJobs have no spec.runtimePatches before 2.2", (2, 2, 0), (3, 0, 0)),
    "kueue": SupportedRange((0, 14, 0), "TrainJobs are not queued before 0.14 (kueue #6597)", (0, 14, 0), (1, 0, 0)),
    "prometheus-operator": SupportedRange(OLDEST, "", OLDEST, NEWEST),
    "dcgm": SupportedRange(OLDEST, "", OLDEST, NEWEST),
}


class VersionConflict(NamedTuple):
    """Two components that do not work together: `component` in [since, until) with `other_component` in [other_since, other_until)."""

    component: str
    since: Version
    until: Version
    other_component: str
    other_since: Version
    other_until: Version
    problem: str
    fix: str
    fatal: bool = True


VERSION_CONFLICTS = (
    VersionConflict(
        *("kueue", (0, 17, 0), NEWEST, "trainer", OLDEST, (2, 2, 0)),
        "TrainJobs are admitted and never start (kueue #11931, #14722)",
        "update Kubeflow Trainer to 2.3",
    ),
    VersionConflict(
        *("kueue", (0, 14, 0), (0, 17, 0), "trainer", (2, 2, 0), NEWEST),
        "Kueue writes podTemplateOverrides, which this Trainer does not have (trainer #3309)",
        "update Kueue to 0.17 or newer",
    ),
    VersionConflict(
        *("kfp", (2, 17, 0), NEWEST, "argo", OLDEST, (3, 7, 0)),
        "KFP 2.17 compiles for Argo Workflows 3.7 and 4.0",
        "update Argo Workflows to the version in KFP's manifests, 4.0.5",
    ),
    VersionConflict(
        *("trainer", (2, 0, 0), NEWEST, "kubernetes", OLDEST, (1, 31, 0)),
        "Kubeflow Trainer 2 needs Kubernetes 1.31",
        "update Kubernetes, or leave the component trainer out of the overlay",
    ),
    VersionConflict(
        *("dcgm", OLDEST, (4, 2, 3), "kubernetes", (1, 29, 0), NEWEST),
        "GPU series lack the pod's name where pods have native sidecars (dcgm-exporter #497)",
        "update the DCGM exporter to 4.2.3 or newer",
        fatal=False,
    ),
)


def parse_version(text: str) -> Version | None:
    """The first version in a text, as an image's tag, a label, or `v1.33.1-gke.100`. None if there is none."""
    match = re.search(r"(?<![\d.])v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def parse_image_version(image: str) -> Version | None:
    """The version in an image's tag; None for digests and tags without one."""
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    return parse_version(tag)


def format_version(version: Version) -> str:
    return ".".join(map(str, version))


def find_version_conflicts(versions: Mapping[str, Version]) -> list[VersionConflict]:
    """Returns the conflicts among the versions of a cluster."""
    return [
        conflict
        for conflict in VERSION_CONFLICTS
        if conflict.component in versions
        and conflict.other_component in versions
        and conflict.since <= versions[conflict.component] < conflict.until
        and conflict.other_since <= versions[conflict.other_component] < conflict.other_until
    ]
