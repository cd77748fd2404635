"""The label registry: versions of label sets, as tags of a git repository of its own; their data in a DVC remote.

    labels/PROJECT/RUN/gen-N      annotated tag of a commit with these files
        labels.dvc                DVC's hash of the folder `labels/`: the label set's files, and the selection
        version.json              each file of it with its size, sha256 and md5, and the digests it was made from
        labelset.json             and selection.json, verdict.json, where there are any: the manifests, readable in git
    current/PROJECT               branch: the version in use; its history says who moved it, when and why
    main                          branch: the settings of DVC; the parent of every version

A commit pushes data first and its tag last, so that a tag never names data that is not there; and it moves no branch, so that
committers never wait for each other. Every call works in a clone of its own: DVC's locks do not reach across machines.
"""

from ns.labeling.registry.model import LabelVersion, VersionSummary, VersionTag
from ns.labeling.registry.registry import LabelRegistry

__all__ = ["LabelRegistry", "LabelVersion", "VersionSummary", "VersionTag"]
