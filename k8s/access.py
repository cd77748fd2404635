"""Reaches Kubeflow and the store of a cluster from this machine, through port-forwards."""

import base64
import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from k8s.doctor import SETTINGS_CONFIG_MAP, STORAGE_SECRET
from k8s.kubectl import Kubectl
from k8s.port_forward import PortForward
from ns.core.errors import NsError
from ns.core.process import handle_signals, set_environment
from ns.storage.endpoint import SECRETS_VARIABLE
from pipelines.kfp_client import NAMESPACE_VARIABLE, UI_VARIABLE

KUBEFLOW_NAMESPACE = "kubeflow"
API_SERVICE, API_PORT = "ml-pipeline", 8888
UI_SERVICE, UI_PORT = "ml-pipeline-ui", 80
LOCAL_UI_PORT, LOCAL_STORE_PORT = 8080, 9000
"""Ports of `make ui` on this machine."""
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
KEY_VARIABLES = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
OTHER_KEY_VARIABLES = {"AWS_SESSION_TOKEN": "", SECRETS_VARIABLE: ""}
"""What this person's own keys may have, and would be taken for a part of the cluster's, or in their place."""

Say = Callable[[str], None]


class StoreService(NamedTuple):
    """The Service of a store in the cluster."""

    namespace: str
    name: str
    port: int


def read_run_namespace() -> str:
    """The namespace of runs: the profile's on a Kubeflow with several users, which NS_KFP_NAMESPACE names."""
    return os.environ.get(NAMESPACE_VARIABLE) or KUBEFLOW_NAMESPACE


def read_store_settings(kubectl: Kubectl, namespace: str) -> dict[str, str]:
    """`AWS_…` of the stages of runs, as the platform's ConfigMap has them; empty if there is none."""
    config_map = kubectl.get_object("configmap", SETTINGS_CONFIG_MAP, namespace) or {}
    settings = config_map.get("data") or {}
    return {name: str(value) for name, value in settings.items() if name.startswith("AWS_")}


def find_store_service(kubectl: Kubectl, settings: Mapping[str, str], namespace: str) -> StoreService | None:
    """The Service that the store's endpoint names; None for a store outside the cluster."""
    parts = urlsplit(settings.get("AWS_ENDPOINT_URL", ""))
    match = re.fullmatch(r"([a-z0-9-]+)(?:\.([a-z0-9-]+)(?:\.svc(?:\.[a-z0-9.-]+)?)?)?", parts.hostname or "")
    # Over https a certificate would have to name this machine.
    if parts.scheme != "http" or match is None:
        return None
    service = StoreService(match[2] or namespace, match[1], parts.port or 80)
    return service if kubectl.get_object("service", service.name, service.namespace) else None


@contextlib.contextmanager
def open_store_access(kubectl: Kubectl, namespace: str, say: Say, local_port: int = 0) -> Iterator[dict[str, str]]:
    """Gives the endpoint and the region of the cluster's store, as this machine reaches it; empty if the platform names no store."""
    settings = read_store_settings(kubectl, namespace)
    service = find_store_service(kubectl, settings, namespace)
    if service is None:
        yield settings
        return
    forward = PortForward(kubectl, service.namespace, service.name, service.port, local_port=local_port, say=say)
    with forward:
        yield settings | {"AWS_ENDPOINT_URL": forward.url}


@contextlib.contextmanager
def open_cluster_access(kubectl: Kubectl, namespace: str, say: Say) -> Iterator[str]:
    """Gives a local URL of Kubeflow's API. Inside the context this process's environment names the cluster's store and its keys.

    An environment that names an endpoint is left as it is, with its keys. SIGTERM ends the port-forwards too. Raises ClusterError if
    Kubeflow or the store cannot be forwarded.
    """
    # Else kubectl, in a group of its own, would outlive this process.
    with handle_signals(signal.default_int_handler, [signal.SIGTERM]), contextlib.ExitStack() as stack:
        forward = stack.enter_context(PortForward(kubectl, KUBEFLOW_NAMESPACE, API_SERVICE, API_PORT, say=say))
        # Links must work when the forward of this process is gone: `make ui` opens them.
        variables = {UI_VARIABLE: os.environ.get(UI_VARIABLE) or f"http://localhost:{LOCAL_UI_PORT}"}
        if not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
            variables |= stack.enter_context(open_store_access(kubectl, namespace, say))
            variables |= _read_store_keys(kubectl, namespace)
        stack.enter_context(set_environment(variables))
        yield forward.url


def _read_store_keys(kubectl: Kubectl, namespace: str) -> dict[str, str]:
    """The store's keys; empty if this person may not read them: then those of the environment serve."""
    with contextlib.suppress(NsError):
        secret = (kubectl.get_object("secret", STORAGE_SECRET, namespace) or {}).get("data") or {}
        keys = {name: base64.b64decode(secret[key]).decode() for key, name in KEY_VARIABLES.items() if key in secret}
        return keys and OTHER_KEY_VARIABLES | keys
    return {}
