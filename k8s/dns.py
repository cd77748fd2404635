"""Where the pods of a cluster ask for names, as peers of a network policy."""

import contextlib
import ipaddress
import json
from collections.abc import Sequence

from k8s.kubectl import K8sObject, Kubectl
from ns.core.errors import ClusterError

DNS_POLICY = "dns"
"""Name of the NetworkPolicy that lets pods ask (components/network-policies)."""


def find_dns_peers(kubectl: Kubectl) -> list[K8sObject]:
    """Returns the peers to which kubelets send pods for names: the namespace of a Service, or an address outside all Services.

    Empty if the cluster does not tell, as when the user may not read the settings of kubelets.
    """
    addresses: list[str] = []
    with contextlib.suppress(ClusterError):
        for node in kubectl.list_objects("nodes")[:1]:
            path = f"/api/v1/nodes/{node['metadata']['name']}/proxy/configz"
            settings = json.loads(kubectl.run_command("get", f"--raw={path}"))
            addresses = settings["kubeletconfig"].get("clusterDNS") or []
        services = kubectl.list_objects("services") if addresses else []
        return [_make_peer(address, services) for address in addresses]
    return []


def _make_peer(address: str, services: Sequence[K8sObject]) -> K8sObject:
    for service in services:
        if address in (service["spec"].get("clusterIPs") or [service["spec"].get("clusterIP")]):
            return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": service["metadata"]["namespace"]}}}
    return {"ipBlock": {"cidr": str(ipaddress.ip_network(address))}}


def allow_dns_peers(policy: K8sObject, peers: Sequence[K8sObject]) -> K8sObject:
    """A NetworkPolicy whose first rule for outgoing connections has these peers, too."""
    first, *others = policy["spec"]["egress"]
    added = [peer for peer in peers if peer not in first["to"]]
    rules = [{**first, "to": [*first["to"], *added]}, *others]
    return {**policy, "spec": {**policy["spec"], "egress": rules}}
