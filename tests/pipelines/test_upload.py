"""The pipelines that come with the code get onto the server, once each."""

import re

import pytest
import yaml

from ns.core.errors import ConfigError, RunError
from pipelines import upload
from pipelines.kfp_client import KfpClient


def test_all_compiled_pipelines_are_uploaded_once(kfp, capsys):
    assert upload.main([]) == 0
    names = capsys.readouterr().out.split_batch()
    assert len(names) == len(upload.PACKAGES) >= 1
    assert names[0].startswith("noisy-student-")
    assert upload.main(["--kfp", kfp.url]) == 0
    assert capsys.readouterr().out.split_batch() == names
    assert sorted(one.name for one in kfp.load_all("pipeline_versions")) == sorted(names)


def test_what_goes_wrong_is_said_in_one_line(kfp, monkeypatch, capsys):
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
        ("{", "is no JSON"),
        ("[]", "must be an object"),
        ('{"lable_gpus": "1"}', "lable_gpus: is no input of the pipeline; its inputs are config, "),
        ('{"label_gpus": "3"}', "label_gpus: invalid value '3': must be one of 0, 1, 2, 4, 8"),
        ('{"label_tolerations": {}}', "label_tolerations: invalid value {}: must be like []"),
    ],
)
def test_inputs_that_no_pipeline_takes_are_refused(inputs, message):
    with pytest.raises(ConfigError, match="^HERE: " + re.escape(message)):
        upload.load_packages(inputs, "HERE")


def test_run_forms_are_filled_in_the_same_way_every_time():
    inputs = '{"worker_image": "r.example/worker:1", "label_node_selector": {"pool": "spot"}}'
    filled = upload.load_packages(inputs, "")
    assert filled == upload.load_packages(inputs, "")
    for package in filled:
        parameters = next(yaml.safe_load_all(package))["root"]["inputDefinitions"]["parameters"]
        assert parameters["worker_image"]["defaultValue"] == "r.example/worker:1"
        assert parameters["label_node_selector"]["defaultValue"] == {"pool": "spot"}
    assert upload.load_packages("", "") == [file.read_text() for file in upload.PACKAGES]
