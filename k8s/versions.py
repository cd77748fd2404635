"""Versions of what a cluster runs: which of them we know, and which are known not to get on with each other."""

import re
from collections.abc import Mapping
from typing import NamedTuple

Version = tuple[int, int, int]

NAMES = {
    "kubernetes": "Kubernetes",
    "kfp": "Kubeflow Pipelines",
    "argo": "Argo Workflows",
    "trainer": "Kubeflow Trainer",
    "kueue": "Kueue",
    "prometheus-operator": "Prometheus operator",
    "dcgm": "DCGM exporter",
}


FIRST, LAST = (0, 0, 0), (9999, 0, 0)


class Known(NamedTuple):
    """What is known of one component."""

    least: Version
    """Older ones lack something that is needed."""
    why: str
    """What older ones lack."""
    since: Version
    until: Version
    """Those that this project is made for; before and from there on, nothing is known."""


KNOWN = {
    # KFP's authors test 2.17 on 1.33 to 1.36, and our manifests are checked against their schemas.
    "kubernetes": Known((1, 31, 0), "Kubeflow Trainer 2 needs 1.31", (1, 33, 0), (1, 37, 0)),
    "kfp": Known((2, 17, 0), "the pipeline takes GPUs and tolerations as inputs, as of 2.17", (2, 17, 0), (2, 18, 0)),
    "argo": Known(FIRST, "", (3, 7, 0), (4, 1, 0)),
    "trainer": Known((2, 2, 0), "TrainJobs have no spec.runtimePatches before 2.2", (2, 2, 0), (3, 0, 0)),
    "kueue": Known((0, 14, 0), "TrainJobs are not queued before 0.14 (kueue #6597)", (0, 14, 0), (1, 0, 0)),
    "prometheus-operator": Known(FIRST, "", FIRST, LAST),
    "dcgm": Known(FIRST, "", FIRST, LAST),
}


class Pair(NamedTuple):
    """Two components that do not get on: `one` from `since` and before `until`, `other` likewise."""

    one: str
    since: Version
    until: Version
    other: str
    other_since: Version
    other_until: Version
    what: str
    fix: str
    fatal: bool = True


BAD_PAIRS = (
    Pair(
        *("kueue", (0, 17, 0), LAST, "trainer", FIRST, (2, 2, 0)),
        "TrainJobs are admitted and never start (kueue #11931, #14722)",
        "update Kubeflow Trainer to 2.3",
    ),
    Pair(
        *("kueue", (0, 14, 0), (0, 17, 0), "trainer", (2, 2, 0), LAST),
        "Kueue writes podTemplateOverrides, which this Trainer does not have (trainer #3309)",
        "update Kueue to 0.17 or newer",
    ),
    Pair(
        *("kfp", (2, 17, 0), LAST, "argo", FIRST, (3, 7, 0)),
        "KFP 2.17 compiles for Argo Workflows 3.7 and 4.0",
        "update Argo Workflows to the version in KFP's manifests, 4.0.5",
    ),
    Pair(
        *("trainer", (2, 0, 0), LAST, "kubernetes", FIRST, (1, 31, 0)),
        "Kubeflow Trainer 2 needs Kubernetes 1.31",
        "update Kubernetes, or leave the component trainer out of the overlay",
    ),
    Pair(
        *("dcgm", FIRST, (4, 2, 3), "kubernetes", (1, 29, 0), LAST),
        "GPU series lack the pod's name where pods have native sidecars (dcgm-exporter #497)",
        "update the DCGM exporter to 4.2.3 or newer",
        fatal=False,
    ),
)


def parse(text: str) -> Version | None:
    """The first version in a text: an image's tag, a label, `v1.33.1-gke.100`. None if there is none."""
    found = re.search(r"(?<![\d.])v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def of_image(image: str) -> Version | None:
    """The version in an image's tag; None for digests and tags without one."""
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    return parse(tag)


def said(version: Version) -> str:
    return ".".join(map(str, version))


def bad_pairs(found: Mapping[str, Version]) -> list[Pair]:
    """Those of BAD_PAIRS that a cluster with these versions has."""
    return [
        pair
        for pair in BAD_PAIRS
        if pair.one in found
        and pair.other in found
        and pair.since <= found[pair.one] < pair.until
        and pair.other_since <= found[pair.other] < pair.other_until
    ]
