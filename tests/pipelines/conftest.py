"""What tests of the pipeline share."""

import functools

import pytest

from pipelines import PACKAGE, kfp_client, upload
from pipelines.placement import Placement, render_package
from tests.pipelines.kfp_api import KfpApi


@pytest.fixture
def kfp(monkeypatch):
    """KFP's API server, to which NS_KFP_URL points and which is polled without a pause."""
    for variable in ("NS_KFP_TOKEN", "NS_KFP_NAMESPACE", "NS_KFP_UI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(kfp_client, "POLL_SECONDS", 0.001)
    api = KfpApi()
    monkeypatch.setenv("NS_KFP_URL", api.url)
    yield api
    api.close()


PLATFORM = Placement(worker_image="r.example/worker@sha256:1", tools_image="r.example/tools@sha256:1", train_cpu="1")


@functools.cache
def render_platform():
    return render_package(PACKAGE.read_text(), PLATFORM)


@pytest.fixture
def platform(kfp):
    """The version of the pipeline that the platform uploaded, with its own images."""
    return upload.upload_package(kfp_client.KfpClient(), render_platform())
