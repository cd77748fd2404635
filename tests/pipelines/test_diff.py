"""What changed in the compiled pipelines, in words."""

import copy
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import diff

PACKAGES = Path(diff.__file__).parent


def spec():
    return {
        "pipelineInfo": {"name": "p"},
        "sdkVersion": "kfp-2.17.0",
        "root": {
            "inputDefinitions": {"parameters": {"gpus": {"parameterType": "STRING", "defaultValue": "0"}}},
            "dag": {
                "tasks": {
                    "train": {
                        "componentRef": {"name": "comp-train"},
                        "dependentTasks": ["b", "a"],
                        "inputs": {"parameters": {"pipelinechannel--gpus": {"componentInputParameter": "gpus"}}},
                    }
                }
            },
        },
        "components": {"comp-train": {"executorLabel": "exec-train"}},
        "deploymentSpec": {
            "executors": {
                "exec-train": {"container": {"image": "worker:1", "args": ["a"], "command": ["sh", "def train():\n  1"]}}
            }
        },
    }


PLATFORM = {"exec-train": {"activeDeadlineSeconds": "60", "nodeSelector": {"pool": "gpu"}}}


def changed(change, platform=None):
    after = copy.deepcopy(spec())
    change(after)
    return diff.differences(spec(), after, PLATFORM, platform or PLATFORM)


def test_no_change_says_nothing():
    def reorder(after):
        after["root"]["dag"]["tasks"]["train"]["dependentTasks"] = ["a", "b"]

    assert changed(reorder) == ([], [])


def test_inputs_are_named_with_what_changed_in_them():
    def change(after):
        parameters = after["root"]["inputDefinitions"]["parameters"]
        parameters["gpus"]["defaultValue"] = "1"
        parameters["memory"] = {"parameterType": "STRING", "defaultValue": "8Gi"}
        parameters["config"] = {"parameterType": "STRING"}

    assert changed(change)[0] == [
        "input `gpus`: `defaultValue` `'0'` → `'1'`",
        "new input `memory` (string, default `8Gi`)",
        "new input `config` (string, must be given)",
    ]
    lines, _ = changed(lambda after: after["root"].pop("inputDefinitions"))
    assert lines == ["input `gpus` is gone: clones of earlier runs that give it will be refused"]


def test_steps_and_where_their_values_come_from():
    def change(after):
        tasks = after["root"]["dag"]["tasks"]
        source = {"taskOutputParameter": {"outputParameterKey": "Output", "producerTask": "plan"}}
        tasks["train"]["inputs"]["parameters"]["pipelinechannel--gpus"] = source
        tasks["train"]["dependentTasks"] = ["a"]
        tasks["plan"] = {"componentRef": {"name": "comp-plan"}, "dependentTasks": ["train"]}

    assert changed(change)[0] == [
        "new step `plan`, after `train`",
        "step `train`: `dependentTasks` − `b`",
        "step `train`: `gets.parameter gpus` `gpus` → `Output of plan`",
    ]
    lines, _ = changed(lambda after: after["root"]["dag"]["tasks"].clear_checkpoints())
    assert lines == ["step `train` is gone"]


def test_images_settings_and_programs():
    def change(after):
        container = after["deploymentSpec"]["executors"]["exec-train"]["container"]
        container["image"] = "worker:2"
        container["command"][1] = "def train():\n  2"

    platform = {"exec-train": {"activeDeadlineSeconds": "90", "nodeSelector": {"pool": "gpu"}}}
    lines, code = changed(change, platform)
    assert lines == ["`train`: `image` `worker:1` → `worker:2`", "`train`: `activeDeadlineSeconds` `'60'` → `'90'`"]
    assert code[:2] == ["--- before/train", "+++ after/train"]
    assert code[-2:] == ["-  1", "+  2"]


def test_what_changed_alike_in_several_steps_is_said_once():
    before, after = spec(), spec()
    for each, gpus in ((before, "a"), (after, "b")):
        tasks = each["root"]["dag"]["tasks"]
        tasks["train"]["inputs"]["parameters"] = {"gpus": {"runtimeValue": {"constant": gpus}}}
        tasks["train-2"] = copy.deepcopy(tasks["train"])
    lines, _ = diff.differences(before, after, {}, {})
    assert lines == ["step `train`, step `train-2`: `gets.parameter gpus` `a` → `b`"]


def test_lists_say_what_came_and_what_went():
    platforms = [{"exec-train": {"env": [{"keys": keys}]}} for keys in (["A", "B"], ["B", "C", "D"])]
    lines, _ = diff.differences(spec(), spec(), *platforms)
    assert lines == ["`train`: `env.0.keys` − `A`, + `C`, + `D`"]


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / "before", tmp_path / "after"]
    for folder in made:
        folder.mkdir()
        for file in PACKAGES.glob("*.yaml"):
            (folder / file.name).write_bytes(file.read_bytes())
    return made


@pytest.mark.integration
def test_our_own_pipelines_with_a_new_default_and_a_new_one(folders, capsys, monkeypatch):
    before, after = folders
    documents = [spec(), {"platforms": {"kubernetes": {"deploymentSpec": {"executors": PLATFORM}}}}]
    (before / "tiny.yaml").write_text(yaml.safe_dump_all(documents))
    documents[0]["root"]["inputDefinitions"]["parameters"]["gpus"]["defaultValue"] = "`a`\nb"
    documents[0]["deploymentSpec"]["executors"]["exec-train"]["container"]["command"] = ["```"]
    (after / "tiny.yaml").write_text(yaml.safe_dump_all(documents))
    (after / "new.yaml").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["diff", str(before), str(after)])
    assert diff.main() == 0
    text = capsys.readouterr().out
    assert "**noisy_student.yaml**: no change." in text
    assert "**new.yaml** is new." in text
    (line,) = [line for line in text.splitlines() if line.startswith("- input `gpus`")]
    assert line.count("`") == 8, "no tick of a value may end the code"
    assert "\n````diff\n" in text


def test_what_are_no_folders_is_said_so(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["diff", "nowhere", "here"])
    assert diff.main() == 2
    assert "usage: " in capsys.readouterr().err
