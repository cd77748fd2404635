"""Upload of the compiled pipelines."""

import re

import pytest
import yaml

from ns.core.errors import ConfigError, RunError
from pipelines import upload
from pipelines.kfp_client import KfpClient


def test_upload_once_per_package(kfp, capsys):
    assert upload.main([]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == len(upload.PACKAGES) >= 1
    assert names[0].startswith("noisy-student-")
    assert upload.main(["--kfp", kfp.url]) == 0
    assert capsys.readouterr().out.split() == names
    assert sorted(one.name for one in kfp.all("pipeline_versions")) == sorted(names)


def test_upload_error_is_one_line(kfp, monkeypatch, capsys):
    def away(self, package):
        raise RunError("http://kfp: does not answer")

    monkeypatch.setattr(KfpClient, "upload_pipeline", away)
    assert upload.main([]) == RunError.exit_code
    assert capsys.readouterr().err == "error: http://kfp: does not answer\n"
    monkeypatch.delenv("NS_KFP_URL")
    assert upload.main([]) == 2
    assert "NS_KFP_URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ('{"lable_gpus": "1"}', "lable_gpus: is not an input of pipeline noisy-student; its inputs are config_uri, "),
        ('{"label_gpus": "3"}', "label_gpus: invalid value '3': must be one of 0, 1, 2, 4, 8"),
        ('{"label_tolerations": {}}', "label_tolerations: invalid value {}: must be list"),
    ],
)
def test_load_packages_refuses_wrong_defaults(inputs, message):
    with pytest.raises(ConfigError, match="^HERE: " + re.escape(message)):
        upload.load_packages(inputs, "HERE")


def test_load_packages_sets_defaults_deterministically():
    inputs = '{"worker_image": "r.example/worker:1", "label_node_selector": {"pool": "spot"}}'
    filled = upload.load_packages(inputs, "")
    assert filled == upload.load_packages(inputs, "")
    for package in filled:
        parameters = next(yaml.safe_load_all(package))["root"]["inputDefinitions"]["parameters"]
        assert parameters["worker_image"]["defaultValue"] == "r.example/worker:1"
        assert parameters["label_node_selector"]["defaultValue"] == {"pool": "spot"}
    assert upload.load_packages("", "") == [file.read_text() for file in upload.PACKAGES]
