"""What tests of the pipeline share."""

import pytest

from pipelines import kfp_client
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
