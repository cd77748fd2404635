"""Names looked up by a pod in a real cluster, with and without a policy that lets it."""

from k8s.dns import allow_dns_peers, find_dns_peers
from k8s.name_probe import find_unresolved_names
from tests.cluster.conftest import IMAGE, apply
from tests.k8s.test_dns import POLICY

NAMES = ("kubernetes.default", "nobody.invalid")


def make_policy(namespace, name, **spec):
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"], **spec},
    }


def test_find_unresolved_names_tells_a_policy_that_closes_dns(kubectl, make_namespace):
    namespace = make_namespace({"pod-security.kubernetes.io/enforce": "restricted"})
    assert find_unresolved_names(kubectl, namespace, IMAGE, NAMES) == ["nobody.invalid"]
    apply(kubectl, make_policy(namespace, "closed"))
    assert set(find_unresolved_names(kubectl, namespace, IMAGE, NAMES)) == set(NAMES)
    apply(kubectl, make_policy(namespace, "dns", egress=allow_dns_peers(POLICY, find_dns_peers(kubectl))["spec"]["egress"]))
    assert find_unresolved_names(kubectl, namespace, IMAGE, NAMES) == ["nobody.invalid"]
    assert kubectl.list_objects("pods", namespace) == [] or all(
        "deletionTimestamp" in pod["metadata"] for pod in kubectl.list_objects("pods", namespace)
    )
