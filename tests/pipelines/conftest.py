"""What tests of the pipeline share."""

import pytest

from tests.pipelines.kfp_api import KfpApi


@pytest.fixture
def kfp(monkeypatch):
    """KFP's API server, to which NS_KFP_URL points."""
    for variable in ("NS_KFP_TOKEN", "NS_KFP_NAMESPACE", "NS_KFP_UI"):
        monkeypatch.delenv(variable, raising=False)
    api = KfpApi()
    monkeypatch.setenv("NS_KFP_URL", api.url)
    yield api
    api.close()
