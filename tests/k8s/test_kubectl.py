"""The program itself, as a process."""

import json
import re
import subprocess

import pytest

from k8s import kubectl
from k8s.kubectl import (
    ClusterUnreachableError,
    ForbiddenError,
    Kubectl,
    LoginError,
    NotFoundError,
    classify_failure,
    list_contexts,
)
from ns.cli.app import run_command_line
from ns.core.errors import ClusterError
from tests.k8s.fake_kubectl import Fake


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        (
            'Error from server (Forbidden): nodes is forbidden: User "eve" cannot list resource "nodes"',
            ForbiddenError,
            "ask for that right, or use a context that has it",
        ),
        ('Error from server (NotFound): configmaps "x" not found', NotFoundError, "not found"),
        ('error: the server doesn\'t have a resource type "podmonitors"', NotFoundError, "resource type"),
        ("error: You must be logged in to the server (Unauthorized)", LoginError, "log in to the cluster again"),
        (
            "E1125 21:00:00.1 1 memcache.go:265] couldn't get current server API group list\n"
            "The connection to the server localhost:8080 was refused - did you specify the right host or port?",
            ClusterUnreachableError,
            "The connection to the server localhost:8080 was refused",
        ),
        ('error: context "prod" does not exist', ClusterError, "kubectl config get-contexts"),
        ("", ClusterError, "ended with code 3"),
    ],
)
def test_classify_failure_gives_one_line_with_its_fix(said, kind, message):
    error = classify_failure("kubectl get nodes", said, 3)
    assert type(error) is kind
    assert message in str(error)
    assert str(error).startswith("kubectl get nodes: ")
    assert "\n" not in str(error)


def test_kubectl_that_is_not_installed_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ClusterError, match="kubectl: is not installed; install it"):
        Kubectl().run_command("version")


def test_run_command_ends_kubectl_that_hangs(monkeypatch, tmp_path):
    program = tmp_path / "kubectl"
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ClusterUnreachableError, match=r"no answer in 0\.2 s"):
        Kubectl().run_command("version", seconds=0.2)


REFUSED = "The connection to the server was refused - did you specify the right host or port?"


def test_patient_kubectl_outlives_a_restart_of_the_api_server(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kubectl, "RETRY_SECONDS", 0.01)
    cluster = Fake(tmp_path, monkeypatch)
    cluster.rule("get pods", stderr=REFUSED, times=2)
    assert Kubectl("kind-test", patience_seconds=60).list_objects("pods") == []
    assert capsys.readouterr().err.count("asking again for up to 60 s") == 1
    cluster.rule("get pods", stderr=REFUSED, times=1)
    with pytest.raises(ClusterUnreachableError):
        Kubectl("kind-test").list_objects("pods")


def test_patient_kubectl_does_not_repeat_refused_calls(tmp_path, monkeypatch):
    cluster = Fake(tmp_path, monkeypatch)
    cluster.rule("get pods", stderr="error: You must be logged in to the server (Unauthorized)")
    with pytest.raises(LoginError):
        Kubectl("kind-test", patience_seconds=60).list_objects("pods")
    assert len(cluster.calls("get pods")) == 1


def test_other_program_called_kubectl_is_an_error(monkeypatch, tmp_path):
    program = tmp_path / "kubectl"
    program.write_text("#!/bin/sh\necho hello\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ClusterError, match="printed no JSON"):
        list_contexts()


def test_server_url_is_empty_in_a_pod(monkeypatch, tmp_path):
    program = tmp_path / "kubectl"
    program.write_text("#!/bin/sh\necho 'error: current-context must exist in order to minify' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert Kubectl().server_url() == ""


@pytest.mark.integration
def test_doctor_cluster_uses_the_named_context_and_writes_nothing(objects, monkeypatch, tmp_path, capsys):
    fake = Fake(tmp_path, monkeypatch, objects, contexts=["one", "two"], current="one")
    needs = [f"--need={part}" for part in ("trainer", "kueue", "prometheus-operator", "dcgm", "gpu")]
    assert run_command_line(["doctor", "cluster", "--context", "two", *needs, "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings[0] == {"name": "cluster", "ok": True, "detail": "two, https://two.example", "fix": "", "is_warning": False}
    assert all(finding["ok"] for finding in findings)
    calls = fake.calls()
    assert all(call.startswith("--context=two ") for call in calls)
    assert {call.split()[1] for call in calls} == {"version", "config", "get", "create"}
    assert all("--raw=/apis/authorization.k8s.io/v1/" in call for call in calls if call.split()[1] == "create")
    assert fake.load() == objects


@pytest.mark.integration
def test_doctor_cluster_prints_a_line_and_a_fix_per_fault(objects, monkeypatch, tmp_path, capsys):
    objects[:] = [item for item in objects if item["kind"] != "StorageClass"]
    fake = Fake(tmp_path, monkeypatch, objects)
    fake.rule("get nodes", stderr="Error from server (Forbidden): nodes is forbidden")
    assert run_command_line(["doctor", "cluster"]) == ClusterError.exit_code
    out = re.sub(" +", " ", capsys.readouterr().out)
    assert "NO storage-class no default among 0\n fix: kubectl annotate storageclass NAME" in out
    assert "?? nodes may not be listed\n fix: ask a user who may list nodes" in out
    assert "ok kfp 2.17.0" in out


@pytest.mark.integration
def test_doctor_cluster_probes_store_and_registry(objects, monkeypatch, tmp_path, capsys):
    Fake(tmp_path / "cluster", monkeypatch, objects)
    subprocess.run(["git", "init", "--quiet", "--bare", str(tmp_path / "registry")], check=True)
    (tmp_path / "store").mkdir()
    data, registry = ["--store", str(tmp_path / "store")], ["--registry", str(tmp_path / "registry")]
    assert run_command_line(["doctor", "cluster", *data, *registry, "--remote", str(tmp_path / "data")]) == 0
    out = capsys.readouterr().out
    assert "ok  store-write" in out
    assert "ok  git-push" in out
    assert "ok  dvc-write" in out
    # Nothing was pushed, not even the set-up of an empty registry.
    assert (
        subprocess.run(["git", "-C", str(tmp_path / "registry"), "for-each-ref"], capture_output=True, check=True).stdout == b""
    )

    assert run_command_line(["doctor", "cluster", *registry]) == ClusterError.exit_code
    out = re.sub(" +", " ", capsys.readouterr().out)
    assert f"NO git-push registry {tmp_path / 'registry'}: is empty\n fix: say where its data shall lie" in out

    assert run_command_line(["doctor", "cluster", "--registry", str(tmp_path / "nothing")]) == ClusterError.exit_code
    assert "NO  git-push" in capsys.readouterr().out
