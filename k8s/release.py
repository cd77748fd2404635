"""What is deployed: a ConfigMap in the cluster that says which overlay, of what, and lists every object that was applied.

It is written before anything else, with what is about to be applied added to what was, and once more at the end, with what there is.
So a deployment that was stopped half-way is known, can be gone on with, and can be taken away whole.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from k8s.kubectl import Kubectl, Object
from k8s.manifests import Key, listed
from ns.core.errors import ClusterError

NAME = "noisy-student-deployment"
MANAGER = "noisy-student"
"""Whose fields these are, to server-side apply."""


class Record(BaseModel):
    """A deployment."""

    model_config = ConfigDict(frozen=True)

    overlay: str
    state: Literal["under way", "whole", "taken away"]
    version: str
    """Of this package."""
    revision: str
    """Of the checkout it came from; empty outside git."""
    at: str
    """When it began or was finished, ISO 8601."""
    worker_image: str
    objects: tuple[Key, ...]
    """All that was applied, and is not deleted; of what is taken away, the data."""
    found: tuple[Key, ...] = ()
    """Namespaces and kinds that were there before: they are never deleted."""
    pipelines: dict[str, str] = {}
    """Name → version."""

    @classmethod
    def all(cls, kubectl: Kubectl) -> dict[str, Self]:
        """Namespace → record, of all that is deployed. Raises ClusterError for a damaged one."""
        records = {}
        for one in kubectl.list("configmaps", selector=f"app.kubernetes.io/component={NAME}"):
            place, data = one["metadata"]["namespace"], one.get("data") or {}
            try:
                fields = {**json.loads(data.get("record", "")), "objects": json.loads(data.get("objects", ""))}
                records[place] = cls.model_validate(fields)
            except (ValueError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise ClusterError(f"ConfigMap {place}/{NAME}: is damaged ({reason}); delete it, and deploy again") from error
        return records

    def write(self, kubectl: Kubectl, namespace: str) -> None:
        kubectl.run(
            "apply",
            "--server-side",
            f"--field-manager={MANAGER}",
            "--filename=-",
            data=json.dumps(listed([self._thing(namespace)])),
        )

    def _thing(self, namespace: str) -> Object:
        fields = self.model_dump(mode="json", exclude={"objects"})
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": NAME,
                "namespace": namespace,
                "labels": {"app.kubernetes.io/part-of": "noisy-student", "app.kubernetes.io/component": NAME},
            },
            "data": {"record": json.dumps(fields, indent=1), "objects": json.dumps(self.objects)},
        }


def merged(old: Iterable[Key], new: Iterable[Key]) -> tuple[Key, ...]:
    """Both, each object once, under the API version that is newer to us."""
    keys = {key.same(): key for key in old}
    keys.update({key.same(): key for key in new})
    return tuple(keys.values())


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
