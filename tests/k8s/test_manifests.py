"""What is changed in a rendered overlay for one cluster."""

import pytest

from k8s.manifests import RenderedOverlay
from tests.k8s.conftest import thing

GPU = "nvidia.com/gpu"


def make_overlay():
    flavors = [
        {"name": "spot", "resources": [{"name": "cpu", "nominalQuota": "64"}, {"name": GPU, "nominalQuota": "16"}]},
        {"name": "stays", "resources": [{"name": "cpu", "nominalQuota": "8"}, {"name": GPU, "nominalQuota": "8"}]},
    ]
    groups = [{"coveredResources": ["cpu", GPU], "flavors": flavors}]
    queue = thing("ClusterQueue", "noisy-student", api="kueue.x-k8s.io/v1beta2", spec={"resourceGroups": groups})
    quota = thing("ResourceQuota", "noisy-student", "kubeflow", spec={"hard": {"requests.cpu": "256", f"requests.{GPU}": "32"}})
    return RenderedOverlay("own", (queue, quota))


@pytest.mark.parametrize("gpu_type", ["amd.com/gpu", "nvidia.com/mig-1g.10gb"])
def test_queues_and_quotas_count_the_kind_of_gpu_that_runs_ask_for(gpu_type):
    queue, quota = make_overlay().with_gpu_type(gpu_type).objects
    (group,) = queue["spec"]["resourceGroups"]
    # Kueue wants each flavor of a group to name all of its resources, in this order.
    assert group["coveredResources"] == ["cpu", GPU, gpu_type]
    quotas = [[(item["name"], item["nominalQuota"]) for item in flavor["resources"]] for flavor in group["flavors"]]
    assert quotas == [[("cpu", "64"), (GPU, "16"), (gpu_type, "16")], [("cpu", "8"), (GPU, "8"), (gpu_type, "8")]]
    assert quota["spec"]["hard"][f"requests.{gpu_type}"] == "32"


def test_overlay_with_the_usual_gpus_stays_as_it_is():
    assert make_overlay().with_gpu_type(GPU) == make_overlay()
