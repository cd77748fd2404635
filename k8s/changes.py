"""What a cluster would refuse of a deployment, by a server-side dry run; and StatefulSets that are made again around their volumes."""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from k8s.kubectl import K8sObject, Kubectl, parse_quantity
from k8s.manifests import ObjectKey, make_list_object
from k8s.release import SERVER_SIDE

DRY_RUN_SECONDS = 300
PARALLEL_CALLS = 8
UNKNOWN_KIND = "no matches for kind"
# Temporary: a webhook whose pods are starting.
ABSENT_WEBHOOKS = ("failed calling webhook", "no endpoints available")
IMMUTABLE_MARKS = ("field is immutable", "updates to statefulset spec")


class Refusal(NamedTuple):
    """An object that the cluster would not take."""

    key: ObjectKey
    reason: str
    """In the server's words, in one line."""

    @property
    def is_conflict(self) -> bool:
        """Whether other managers own some of its fields."""
        return "Apply failed with" in self.reason

    @property
    def is_immutable(self) -> bool:
        """Whether it cannot be changed, only made again."""
        return any(mark in self.reason for mark in IMMUTABLE_MARKS)


class DryRun(NamedTuple):
    """The result of a dry run."""

    refusals: tuple[Refusal, ...]
    untried: frozenset[ObjectKey]
    """What cannot be tried yet: its namespace, its kind or its webhook's pods come with this deployment."""


def try_objects(kubectl: Kubectl, objects: Sequence[K8sObject], *, force: bool = False) -> DryRun:
    """Asks the cluster what it would refuse of objects. Changes nothing.

    `force`: conflicts with other managers of fields are no refusals. Raises ClusterError if the cluster does not answer.
    """
    namespaces = {"", *(item["metadata"]["name"] for item in kubectl.list_objects("namespaces"))}
    defined = {item["spec"]["names"]["kind"] for item in objects if item["kind"] == "CustomResourceDefinition"}
    tried = [item for item in objects if ObjectKey.from_object(item).namespace in namespaces]
    untried = {ObjectKey.from_object(item) for item in objects} - set(map(ObjectKey.from_object, tried))
    reason, accepted = _dry_run(kubectl, make_list_object(tried), force)
    if not reason:
        return DryRun((), frozenset(untried))
    # kubectl names the accepted objects, and not those that its errors are about: these are tried one by one.
    names = {line.partition(" ")[0] for line in accepted.splitlines()}
    doubtful = [item for item in tried if _printed_name(item) not in names]
    with ThreadPoolExecutor(PARALLEL_CALLS) as threads:
        reasons = [reason for reason, _ in threads.map(partial(_dry_run, kubectl, force=force), doubtful)]
    refusals = []
    for key, reason in zip(map(ObjectKey.from_object, doubtful), reasons, strict=True):
        if any(mark in reason for mark in ABSENT_WEBHOOKS) or (UNKNOWN_KIND in reason and key.kind in defined):
            untried.add(key)
        elif reason:
            refusals.append(Refusal(key, reason))
    return DryRun(tuple(refusals), frozenset(untried))


def _dry_run(kubectl: Kubectl, value: K8sObject, force: bool) -> tuple[str, str]:
    """Returns why objects are refused, empty if they are not; and kubectl's lines about accepted objects."""
    options = ["--force-conflicts"] if force else []
    code, accepted, errors = kubectl.call_kubectl(
        *("apply", "--dry-run=server", *SERVER_SIDE, *options), stdin=json.dumps(value), seconds=DRY_RUN_SECONDS
    )
    # What follows is kubectl's advice.
    reason = errors.partition("Please review the fields above")[0].removeprefix("error: ")
    return (" ".join(reason.split()) or f"kubectl ended with code {code}") if code else "", accepted


def _printed_name(resource: K8sObject) -> str:
    """As kubectl prints it: deployment.apps/ml-pipeline."""
    key = ObjectKey.from_object(resource)
    return f"{key.kind.lower()}{f'.{key.group}' if key.group else ''}/{key.name}"


class ClaimChange(NamedTuple):
    """A volume claim of a StatefulSet that is made again."""

    key: ObjectKey
    size: str
    """New size; empty if it stays as it is."""
    note: str


def plan_claims(kubectl: Kubectl, stateful_set: K8sObject) -> list[ClaimChange]:
    """Returns what happens to the claims of a StatefulSet that gets other claim templates.

    A claim is enlarged where its class allows that; nothing else of a claim can be changed.
    """
    key = ObjectKey.from_object(stateful_set)
    templates = {
        template["metadata"]["name"]: template["spec"] for template in stateful_set["spec"].get("volumeClaimTemplates") or ()
    }
    classes = {item["metadata"]["name"]: item for item in kubectl.list_objects("storageclasses")}
    changes = []
    for claim in kubectl.list_objects("persistentvolumeclaims", key.namespace):
        match = re.fullmatch(rf"(.+)-{re.escape(key.name)}-\d+", claim["metadata"]["name"])
        if match is None or match[1] not in templates:
            continue
        old, new = (spec["resources"]["requests"]["storage"] for spec in (claim["spec"], templates[match[1]]))
        class_name = claim["spec"].get("storageClassName", "")
        if parse_quantity(new) == parse_quantity(old):
            size, note = "", f"keeps its {old}"
        elif parse_quantity(new) < parse_quantity(old):
            size, note = "", f"keeps its {old}: a volume cannot be made smaller"
        elif not classes.get(class_name, {}).get("allowVolumeExpansion"):
            size, note = "", f"keeps its {old}, not {new}: storage class {class_name or 'none'} does not enlarge volumes"
        else:
            size, note = new, f"is enlarged from {old} to {new}"
        changes.append(ClaimChange(ObjectKey.from_object(claim), size, note))
    return changes


def release_pods(kubectl: Kubectl, key: ObjectKey, claims: Sequence[ClaimChange]) -> None:
    """Deletes a StatefulSet without its pods and claims, which the next one of its name takes over, and enlarges the claims."""
    for claim in claims:
        if claim.size:
            patch = {"spec": {"resources": {"requests": {"storage": claim.size}}}}
            kubectl.run_command(
                *("patch", "persistentvolumeclaim", claim.key.name, f"--namespace={claim.key.namespace}"),
                *("--type=merge", f"--patch={json.dumps(patch)}"),
            )
    kubectl.run_command(
        *("delete", "statefulset.apps", key.name, f"--namespace={key.namespace}", "--cascade=orphan", "--ignore-not-found")
    )
