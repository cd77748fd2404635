"""Every message that docs/troubleshooting.md explains is produced by a test, which this file names and which states the message."""

import ast
import re
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MESSAGES = re.findall(r"\*\*`([^`]+)`\*\*", (ROOT / "docs/troubleshooting.md").read_text())
TESTS = {
    "tests/cli/test_app.py::test_config_check_builds_the_networks": (
        "must be equal or larger; for distillation into a smaller network set allow_smaller_student: true",
    ),
    "tests/stages/test_prepare.py::test_prepare_checks_networks_at_the_resolution_of_finetuning": (
        "the network does not take images of … px",
    ),
    "tests/training/test_loop.py::test_float16_is_refused_without_a_gpu": ("float16 needs a GPU",),
    "tests/modeling/test_precision.py::test_emulated_precision_is_used_with_one_warning": (
        "this machine only emulates the precision, which is slow",
    ),
    "tests/modeling/test_precision.py::test_compiling_falls_back_with_one_warning": (
        "torch.compile does not work here: networks run uncompiled, equal up to rounding",
    ),
    "tests/cli/test_app.py::test_run_names_libraries_that_are_not_installed": ("not installed; pip install",),
    "tests/cli/test_app.py::test_run_name_keeps_its_configuration": ("was started with another configuration",),
    "tests/integration/test_kill.py::test_second_client_of_a_run_is_refused": ("is under way already",),
    "tests/data/importing/test_ingest.py::test_too_many_rejects_fail_with_summary": ("files cannot be read",),
    "tests/data/importing/test_sources.py::test_import_rejects_decompression_bomb": ("decompression bomb: more than … px",),
    "tests/stages/test_prepare.py::test_leak_guard_leaves_heldout_images_out_of_the_pool": (
        "images of the pool are also in evaluation sets, and get no label",
    ),
    "tests/stages/test_prepare.py::test_large_overlap_by_looks_stops_and_asks": ("held-out images are also trained on",),
    "tests/stages/test_prepare.py::test_prepare_refuses_heldout_equal_to_labeled": (
        "is the same as data.labeled; hold out images that are not trained on",
    ),
    "tests/stages/test_gate.py::test_check_first_teacher_refuses_one_at_chance": (
        "the first teacher is no better than chance on … held-out images",
    ),
    "tests/training/test_loop.py::test_nonfinite_loss_stops_training": ("the loss was not finite in step",),
    "tests/modeling/test_predictor.py::test_outputs_must_be_finite": ("the model's outputs are not finite in",),
    "tests/training/test_loop.py::test_out_of_memory_names_the_settings_to_lower": (
        "out of memory with … labeled images per step",
    ),
    "tests/pipelines/runners/test_local.py::test_run_locally_names_a_stage_that_died": (
        "exited without an error message (killed? out of memory?)",
    ),
    "tests/modeling/test_distributed.py::test_launched_processes_that_are_killed_or_asked_to_stop_continue": (
        "training processes exited without an error message",
    ),
    "tests/training/test_loop.py::test_loader_killed_while_waited_for_is_explained": ("a data loader's process was killed",),
    "tests/training/test_loop.py::test_training_with_small_shared_memory_goes_on_or_says_so": (
        "little shared memory: fewer images are made ahead",
        "even single images of … px need",
    ),
    "tests/data/loading/test_stream.py::test_loader_without_room_in_shared_memory_says_so": ("has no room for",),
    "tests/training/test_checkpoint.py::test_full_disk_keeps_the_last_good_checkpoint": (
        "checkpoint not written; training goes on",
    ),
    "tests/stages/test_select.py::test_commit_labels_fails_if_nothing_is_selected": (
        "the teacher labeled no image with confidence above",
    ),
    "tests/labeling/test_diff.py::test_compare_label_sets_refuses_other_images_or_classes": (
        "only labels of the same images can be compared",
    ),
    "tests/labeling/test_registry.py::test_commands_name_what_they_lack": (
        "no label registry",
        "dvc: is not installed",
    ),
    "tests/labeling/test_registry.py::test_collect_garbage_refuses_refs_with_other_data": (
        "keeps data that",
        "did not put there",
    ),
    "tests/labeling/test_registry.py::test_concurrent_changes_are_refused": (
        "was moved concurrently; check",
        "and retry",
    ),
    "tests/stages/test_gate.py::test_gate_refuses_models_that_were_evaluated_on_different_images": (
        "teacher and student were evaluated on different images; run the evaluation again",
    ),
    "tests/pipelines/runners/test_docker.py::test_docker_runner_without_an_engine_says_so": ("no container engine answers",),
    "tests/integration/test_docker.py::test_docker_runner_missing_image_message": ("is not on this machine; build it with",),
    "tests/pipelines/test_remote_run.py::test_check_remote_uris_refuses_local_paths": (
        "a cluster cannot read folders of this machine",
    ),
    "tests/pipelines/test_kfp_client.py::test_client_needs_a_url": ("no server is named; give its URL",),
    "tests/pipelines/test_kfp_client.py::test_unreachable_server_message": (
        "is it KFP's URL, and does the port-forward still run?",
    ),
    "tests/k8s/test_access.py::test_ui_on_a_port_that_is_taken_says_so": ("of this machine is taken by another program",),
    "tests/k8s/test_pods.py::test_report_waiting_of_each_reason": ("waits:",),
    "tests/k8s/test_pods.py::test_report_waiting_raises_if_the_workflow_was_deleted": (
        "was deleted, and Kubeflow goes on to show it as it was",
    ),
    "tests/k8s/test_pods.py::test_report_waiting_tells_pods_that_the_quota_refuses": ("its pod is refused",),
    "tests/pipelines/test_kfp_client.py::test_check_inputs_refuses_what_kfp_refuses": ("is not an input of pipeline",),
    "tests/pipelines/test_versions.py::test_provide_pipeline_without_a_platform_needs_an_image": (
        "with the images of its platform",
    ),
    "tests/pipelines/test_versions.py::test_provide_pipeline_of_other_code_is_told_and_has_its_own_name": (
        "the pipeline here is not that of",
    ),
    "tests/pipelines/test_remote_run.py::test_build_request_needs_tools_image_with_a_registry": (
        "must be given beside --image: the experiment has a registry",
    ),
    "tests/k8s/test_deploy.py::test_deploy_without_permission_changes_nothing": ("nothing was changed:",),
    "tests/storage/test_s3_errors.py::test_missing_credentials_are_explained": ("no credentials",),
    "tests/storage/test_endpoint.py::test_uri_with_credentials_is_refused_without_quoting_them": (
        "no credentials belong into a URI",
    ),
    "tests/storage/test_contract.py::test_missing_blob_is_named": (
        "no such object: check the key, and whether the stage that writes it has run",
    ),
    "tests/data/test_dataset.py::test_invalid_dataset_manifest_error_names_field": (
        "the file was edited or damaged; make it again",
    ),
}
"""Test → the messages that it meets."""
SHORTEST = 20
"""Characters of a message that a test must state, unless the message is shorter."""


@cache
def read_tests(path: str) -> dict[str, str]:
    """The texts that each test of a file states, by its name, with its decorators'. Regular expressions are left as what they stand for."""
    tests = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            texts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str))
            tests[node.name] = "\n".join(re.sub(r"\\(\W)", r"\1", text) for text in texts)
    return tests


def find_stated(message: str, texts: str) -> str:
    """The longest part of a message that is in the texts. A test may leave out names and cures."""
    found = SequenceMatcher(None, message, texts, autojunk=False).find_longest_match()
    return message[found.a : found.a + found.size]


def test_every_message_names_its_test():
    assert sorted(message for messages in TESTS.values() for message in messages) == sorted(MESSAGES)


@pytest.mark.parametrize("test", TESTS)
def test_messages_are_met_by_their_test(test):
    path, _, name = test.partition("::")
    tests = read_tests(path)
    assert name in tests, f"{path} has no test {name}"
    for message in TESTS[test]:
        assert len(find_stated(message, tests[name])) >= min(SHORTEST, len(message)), message


def test_tests_of_other_messages_are_not_accepted():
    texts = read_tests("tests/docs/test_docs.py")["test_the_layers_are_those_that_are_held"]
    assert [message for message in MESSAGES if len(find_stated(message, texts)) >= min(SHORTEST, len(message))] == []
