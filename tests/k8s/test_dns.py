"""Where pods ask for names, and the network policy that lets them."""

import pytest
import yaml

from k8s.dns import allow_dns_peers, find_dns_peers
from k8s.kubectl import Kubectl
from tests.k8s.conftest import node, thing
from tests.k8s.fake_kubectl import Fake
from tests.k8s.test_validate import K8S

POLICY = yaml.safe_load((K8S / "components" / "network-policies" / "networkpolicy-dns.yaml").read_text())
KUBE_SYSTEM = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("10.96.0.10", KUBE_SYSTEM),
        ("10.99.0.1", {"ipBlock": {"cidr": "10.99.0.1/32"}}),
        ("169.254.20.10", {"ipBlock": {"cidr": "169.254.20.10/32"}}),
        ("fd00::a", {"ipBlock": {"cidr": "fd00::a/128"}}),
    ],
    ids=["service", "node", "node-local", "IPv6"],
)
def test_find_dns_peers_reads_where_kubelets_send_pods(tmp_path, monkeypatch, address, peer):
    service = thing("Service", "kube-dns", "kube-system", spec={"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"]})
    cluster = Fake(tmp_path, monkeypatch, [node("one"), service])
    cluster.state["raw"] = {"/api/v1/nodes/one/proxy/configz": {"kubeletconfig": {"clusterDNS": [address]}}}
    cluster.save()
    assert find_dns_peers(Kubectl("kind-test")) == [peer]


def test_find_dns_peers_without_that_right_is_empty(tmp_path, monkeypatch):
    Fake(tmp_path, monkeypatch, [node("one")]).rule("get --raw", stderr="Error from server (Forbidden): nodes is forbidden")
    assert find_dns_peers(Kubectl("kind-test")) == []


def test_allow_dns_peers_adds_to_the_policy_what_it_lacks():
    peers = [KUBE_SYSTEM, {"ipBlock": {"cidr": "10.99.0.1/32"}}]
    allowed = allow_dns_peers(POLICY, peers)["spec"]["egress"][0]
    assert allowed["to"] == [*POLICY["spec"]["egress"][0]["to"], peers[1]]
    assert allowed["ports"] == POLICY["spec"]["egress"][0]["ports"]
