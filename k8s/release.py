"""The record of a deployment: a ConfigMap in the cluster with the overlay, its version, and every object that was applied.

It is written before anything is applied, with the new objects added to the old ones, and again at the end. So a deployment that was
stopped can be continued, or removed completely.
"""

import json
from collections.abc import Iterable
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from k8s.kubectl import Kubectl
from k8s.manifests import ObjectKey, make_list_object
from ns.core.errors import ClusterError

CONFIG_MAP_NAME = "noisy-student-deployment"
SERVER_SIDE = ("--server-side", "--field-manager=noisy-student", "--filename=-")
"""Options of kubectl: apply on the server, as the owner of the fields, what comes on standard input."""


class Release(BaseModel):
    """A deployment."""

    model_config = ConfigDict(frozen=True)

    overlay: str
    state: Literal["under way", "complete", "removed"]
    version: str
    """Version of this package."""
    revision: str
    """Git revision of the checkout; empty outside git."""
    changed_at: str
    """Start or end of the deployment, ISO 8601."""
    worker_image: str
    objects: tuple[ObjectKey, ...]
    """All objects that were applied and not deleted; after a removal, the data."""
    preexisting: tuple[ObjectKey, ...] = ()
    """Namespaces and kinds that existed before the first deployment: they are never deleted."""
    pipelines: dict[str, str] = {}
    """Name → version."""

    @classmethod
    def load_all(cls, kubectl: Kubectl) -> dict[str, Self]:
        """Returns namespace → release of all deployments. Raises ClusterError for a damaged one."""
        releases = {}
        for config_map in kubectl.list_objects("configmaps", selector=f"app.kubernetes.io/component={CONFIG_MAP_NAME}"):
            namespace, data = config_map["metadata"]["namespace"], config_map.get("data") or {}
            try:
                fields = {**json.loads(data.get("record", "")), "objects": json.loads(data.get("objects", ""))}
                releases[namespace] = cls.model_validate(fields)
            except (ValueError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise ClusterError(
                    f"ConfigMap {namespace}/{CONFIG_MAP_NAME}: is damaged ({reason}); delete it, and deploy again"
                ) from error
        return releases

    def save(self, kubectl: Kubectl, namespace: str) -> None:
        fields = self.model_dump(mode="json", exclude={"objects"})
        config_map = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": CONFIG_MAP_NAME,
                "namespace": namespace,
                "labels": {"app.kubernetes.io/part-of": "noisy-student", "app.kubernetes.io/component": CONFIG_MAP_NAME},
            },
            "data": {"record": json.dumps(fields, indent=1), "objects": json.dumps(self.objects)},
        }
        kubectl.run_command("apply", *SERVER_SIDE, stdin=json.dumps(make_list_object([config_map])))


def merge_keys(old: Iterable[ObjectKey], new: Iterable[ObjectKey]) -> tuple[ObjectKey, ...]:
    """Returns the union, each object once, under the API version of `new`."""
    return tuple({key.without_version(): key for key in (*old, *new)}.values())
