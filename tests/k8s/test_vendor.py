"""The manifests of other projects: rendered from releases in git, and what of Kubeflow is left in them."""

import json
import subprocess

import pytest
import yaml

from k8s.vendor import __main__ as vendor
from k8s.vendor.__main__ import BUNDLES, HERE, SOURCES, Bundle, Source
from ns.core.errors import ConfigError
from tests.k8s.test_validate import K8S

KUBEFLOW = list(yaml.load_all((HERE / "kubeflow-pipelines" / "objects.yaml").read_text(), yaml.CSafeLoader))


def names_of(kind: str) -> set[str]:
    return {resource["metadata"]["name"] for resource in KUBEFLOW if resource["kind"] == kind}


def test_kubeflow_has_only_the_deployments_of_version_2():
    assert names_of("Deployment") == {
        *("ml-pipeline", "ml-pipeline-persistenceagent", "ml-pipeline-scheduledworkflow", "ml-pipeline-ui"),
        *("metadata-envoy-deployment", "metadata-grpc-deployment", "mysql", "workflow-controller"),
    }


def test_kubeflow_has_nothing_of_version_1_and_of_the_overlay():
    assert not [resource["kind"] for resource in KUBEFLOW if resource["kind"].endswith("WebhookConfiguration")]
    assert not {"viewers.kubeflow.org", "applications.app.k8s.io"} & names_of("CustomResourceDefinition")
    assert names_of("Secret") == {"mysql-secret"}
    assert names_of("PersistentVolumeClaim") == {"mysql-pv-claim"}
    # Each account is that of a Deployment, or of runs.
    used = {item["spec"]["template"]["spec"].get("serviceAccountName") for item in KUBEFLOW if item["kind"] == "Deployment"}
    assert names_of("ServiceAccount") <= used | {"pipeline-runner"}


def test_api_server_knows_where_the_omitted_server_would_be():
    # backend/src/apiserver/main.go ends the process without these, which Kubernetes would derive from the omitted Service.
    patch = yaml.safe_load((K8S / "components" / "kubeflow" / "ml-pipeline.yaml").read_text())
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    (patched,) = [
        inner
        for item in KUBEFLOW
        if item["kind"] == "Deployment" and item["metadata"]["name"] == "ml-pipeline"
        for inner in item["spec"]["template"]["spec"]["containers"]
    ]
    assert container["name"] == patched["name"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert variables["ML_PIPELINE_VISUALIZATIONSERVER_SERVICE_HOST"]
    assert int(variables["ML_PIPELINE_VISUALIZATIONSERVER_SERVICE_PORT"])


def test_every_source_has_its_license_and_every_bundle_its_row():
    readme = (HERE / "README.md").read_text()
    for repository, source in SOURCES.items():
        assert "Apache License" in (HERE / "licenses" / f"{repository.replace('/', '-')}.txt").read_text()
        assert f"github.com/{repository}" in readme
        assert source.tag.removeprefix("v") in readme
    for name in BUNDLES:
        assert f"| `{name}` |" in readme


REMOTE = "https://github.com/argoproj/argo-workflows/manifests/base?ref={tag}&timeout=60s"


@pytest.fixture
def make_repository(tmp_path):
    def make(name, files):
        folder = tmp_path / name
        for path, text in {"LICENSE": "Apache License", **files}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.com"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "release"], ["tag", "v4.0.5"]):
            subprocess.run([*git, *command], check=True)
        return folder

    return make


def config_map(name):
    return json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"text": "one\ntwo\n"}})


@pytest.mark.integration
@pytest.mark.parametrize("tag", ["v4.0.5", "v4.0.6"])
def test_main_renders_a_bundle_from_its_sources(make_repository, tmp_path, monkeypatch, capsys, tag):
    kustomization = json.dumps({"resources": ["mine.yaml", REMOTE.format(tag=tag)]})
    mine = make_repository("mine", {"manifests/kustomization.yaml": kustomization, "manifests/mine.yaml": config_map("mine")})
    argo = make_repository(
        "argo",
        {
            "manifests/base/kustomization.yaml": "resources: [argo.yaml, left-out.yaml]",
            "manifests/base/argo.yaml": config_map("argo"),
            "manifests/base/left-out.yaml": config_map("left-out"),
        },
    )
    sources = {
        "kubeflow/pipelines": Source("v4.0.5", ("manifests",)),
        "argoproj/argo-workflows": Source("v4.0.5", ("manifests",)),
    }
    monkeypatch.setattr(vendor, "SOURCES", sources)
    monkeypatch.setattr(vendor, "BUNDLES", {"one": Bundle((("kubeflow/pipelines", "manifests"),), ("left-.*",))})
    repositories = [f"--repository=kubeflow/pipelines={mine}", f"--repository=argoproj/argo-workflows={argo}"]
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("sys.argv", ["vendor", f"--output={tmp_path / 'out'}", *repositories])
    code = vendor.main()
    if tag != "v4.0.5":
        assert code == ConfigError.exit_code
        assert "is not the pinned v4.0.5; change SOURCES" in capsys.readouterr().err
        return
    assert code == 0
    text = (tmp_path / "out" / "one" / "objects.yaml").read_text()
    assert [item["metadata"]["name"] for item in yaml.safe_load_all(text)] == ["argo", "mine"]
    assert "    one\n" in text


def test_export_of_a_repository_without_the_tag_fails(make_repository, tmp_path):
    argo = make_repository("argo", {"manifests/base/kustomization.yaml": "resources: []"})
    with pytest.raises(ConfigError, match=r"kubeflow/pipelines: \S+ does not have its 2\.17\.0: .*; name a clone that has it"):
        vendor.export_source("kubeflow/pipelines", argo, tmp_path / "out")


def test_strip_descriptions_keeps_fields_of_that_name():
    schema = {"description": "text", "properties": {"description": {"type": "string", "description": "text"}}}
    assert vendor.strip_descriptions(schema) == {"properties": {"description": {"type": "string"}}}
