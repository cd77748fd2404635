"""Tries names from inside the cluster, in a pod that the network policies of runs hold for."""

import json
import secrets
import time
from collections.abc import Sequence

from k8s.kubectl import K8sObject, Kubectl
from ns.core.errors import ClusterError

PROBE_SECONDS = 60
POLL_SECONDS = 1.0
# Network plugins let a new pod through for a few seconds, before they know it. The names side by side, since a resolver that gets no
# answer tries each for ten seconds and more.
SCRIPT = 'sleep 5; for name in "$@"; do (getent hosts "$name" >/dev/null || echo "unresolved $name") & done; wait; echo done'


def find_unresolved_names(kubectl: Kubectl, namespace: str, image: str, names: Sequence[str]) -> list[str]:
    """Returns the names that pods of runs cannot look up.

    A pod with the labels of a stage does it, and is deleted. `image`: one with a shell and getent, that nodes have. Raises ClusterError if
    the pod cannot be created or does not run in a minute.
    """
    pod = _make_pod(f"ns-doctor-{secrets.token_hex(4)}", namespace, image, names)
    name = pod["metadata"]["name"]
    kubectl.run_command("create", "--filename=-", stdin=json.dumps(pod))
    try:
        started = time.monotonic()
        status: K8sObject = {}
        while time.monotonic() - started < PROBE_SECONDS + 10:
            status = (kubectl.get_object("pod", name, namespace) or {}).get("status") or {}
            if status.get("phase") in ("Succeeded", "Failed"):
                break
            time.sleep(POLL_SECONDS)
        lines = kubectl.run_command("logs", name, f"--namespace={namespace}").splitlines() if status.get("phase") else []
        if status.get("phase") == "Succeeded" or "done" in lines:
            return [line.removeprefix("unresolved ") for line in lines if line.startswith("unresolved ")]
        if status.get("reason") == "DeadlineExceeded" and status.get("startTime") and status.get("containerStatuses"):
            return list(names)
        raise ClusterError(
            f"pod {namespace}/{name}: did not run in {PROBE_SECONDS} s; kubectl -n {namespace} get events says why"
        )
    finally:
        kubectl.run_command("delete", "pod", name, f"--namespace={namespace}", "--ignore-not-found", "--wait=false")


def _make_pod(name: str, namespace: str, image: str, names: Sequence[str]) -> K8sObject:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/part-of": "noisy-student", "workflows.argoproj.io/workflow": name},
        },
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": PROBE_SECONDS,
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "command": ["/bin/sh", "-c", SCRIPT, "sh", *names],
                    "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ],
        },
    }
