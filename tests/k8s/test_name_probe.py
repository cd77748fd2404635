"""The pod that looks up names, against a kubectl of canned answers; tests/cluster has the real one."""

import json

import pytest

from k8s import name_probe
from k8s.kubectl import Kubectl
from k8s.name_probe import find_unresolved_names
from k8s.validate import find_restricted_violations
from ns.core.errors import ClusterError

NAMES = ["kubernetes.default", "seaweedfs.kubeflow"]
RAN = {"containerStatuses": [{}], "startTime": "2026-01-01T00:00:00Z"}


class Answers(Kubectl):
    def __init__(self, status, log=""):
        super().__init__("test")
        self.status, self.log, self.calls, self.pod = status, log, [], None

    def run_command(self, *arguments, stdin=None, seconds=0, accepted_codes=(0,)):
        self.calls.append(arguments[0])
        if arguments[0] == "create":
            self.pod = json.loads(stdin)
        return {"get": json.dumps({"status": self.status}), "logs": self.log}.get(arguments[0], "")


@pytest.mark.parametrize(
    ("status", "log", "unresolved"),
    [
        ({"phase": "Succeeded"}, "done\n", []),
        ({"phase": "Succeeded"}, "unresolved seaweedfs.kubeflow\ndone\n", ["seaweedfs.kubeflow"]),
        # A resolver that hangs until the end.
        ({"phase": "Failed", "reason": "DeadlineExceeded", **RAN}, "", NAMES),
    ],
    ids=["all", "one", "none"],
)
def test_find_unresolved_names_reads_the_log_of_its_pod(status, log, unresolved):
    kubectl = Answers(status, log)
    assert find_unresolved_names(kubectl, "kubeflow", "alpine:3.23", NAMES) == unresolved
    assert kubectl.calls[-1] == "delete"
    assert kubectl.pod["spec"]["containers"][0]["command"][-2:] == NAMES
    # Argo's label, by which the policy `runs` selects it; and what `restricted` asks for.
    assert "workflows.argoproj.io/workflow" in kubectl.pod["metadata"]["labels"]
    assert list(find_restricted_violations(kubectl.pod["spec"])) == []


def test_pod_that_does_not_run_is_deleted_and_told(monkeypatch):
    monkeypatch.setattr(name_probe, "PROBE_SECONDS", -10)
    kubectl = Answers({"phase": "Pending"})
    with pytest.raises(ClusterError, match=r"pod kubeflow/ns-doctor-\w+: did not run"):
        find_unresolved_names(kubectl, "kubeflow", "alpine:3.23", NAMES)
    assert kubectl.calls[-1] == "delete"
