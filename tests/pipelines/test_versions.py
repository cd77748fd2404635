"""Which version of the pipeline a run takes."""

import getpass
from dataclasses import replace

import pytest

from ns.cli.app import run_command_line
from ns.core.errors import ConfigError
from pipelines import PACKAGE, upload, versions
from pipelines.kfp_client import KfpClient
from pipelines.placement import Placement, read_placement, render_package
from pipelines.versions import describe_version, digest_wiring, find_platform_version, provide_pipeline
from tests.k8s.conftest import thing
from tests.k8s.fake_kubectl import Fake
from tests.pipelines.conftest import PLATFORM, render_platform

pytestmark = pytest.mark.integration


@pytest.fixture
def said():
    return []


@pytest.fixture(autouse=True)
def user(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "Jo.Ann")


@pytest.fixture
def other_code(monkeypatch, tmp_path):
    """Another wiring in this checkout than in the platform's."""
    file = tmp_path / "noisy_student.yaml"
    file.write_text(PACKAGE.read_text().replace("print(", "print( ").replace("arXiv:1911.04252", "arXiv"))
    monkeypatch.setattr(versions, "PACKAGE", file)
    return file.read_text()


def names(kfp):
    return sorted(pipeline.name for pipeline in kfp.all("pipelines"))


def test_digest_code_is_that_of_the_wiring_alone():
    assert digest_wiring(render_platform()) == digest_wiring(PACKAGE.read_text())
    assert digest_wiring(PACKAGE.read_text().replace("arXiv:1911.04252", "arXiv")) != digest_wiring(PACKAGE.read_text())


def test_provide_pipeline_takes_the_platforms_version(kfp, platform, said):
    for placed in ({}, {"worker_image": PLATFORM.worker_image}):
        assert provide_pipeline(KfpClient(), placed, said.append).version_id == platform.version_id
    assert (len(kfp.all("pipeline_versions")), said) == (1, [])


def test_provide_pipeline_of_the_same_code_however_new_others_are(kfp, platform, said):
    newer = render_package(PACKAGE.read_text().replace("arXiv:1911.04252", "arXiv"), PLATFORM)
    upload.upload_package(KfpClient(), newer)
    assert provide_pipeline(KfpClient(), {}, said.append).version_id == platform.version_id


def test_find_platform_version_beside_versions_of_another_release(kfp, platform):
    """Their placements have fields that are unknown here, which matters only if one of them is to be taken."""
    other = render_package(PACKAGE.read_text().replace("arXiv:1911.04252", "arXiv"), PLATFORM)
    KfpClient().upload_pipeline(other, 'code 0123456789ab; placement {"gone": 1}')
    assert find_platform_version(KfpClient(), PACKAGE.read_text()).pipeline.version_id == platform.version_id


def test_provide_pipeline_with_a_placement_of_its_own_has_its_own_name(kfp, platform, said):
    own = provide_pipeline(KfpClient(), {"train_memory": "32Gi"}, said.append)
    assert names(kfp) == ["noisy-student", "noisy-student-jo-ann"]
    assert [entry.version_id for entry in KfpClient().list_versions("noisy-student")] == [platform.version_id]
    # All else is the platform's.
    assert own.description == describe_version(PACKAGE.read_text(), replace(PLATFORM, train_memory="32Gi"))
    spec = next(entry for entry in kfp.all("pipeline_versions") if entry.pipeline_version_id == own.version_id).pipeline_spec
    images = {executor["container"]["image"] for executor in spec["pipeline_spec"]["deploymentSpec"]["executors"].values()}
    assert images == {PLATFORM.worker_image, PLATFORM.tools_image}
    assert provide_pipeline(KfpClient(), {"train_memory": "32Gi"}, said.append) == own
    assert said == []


def test_provide_pipeline_of_other_code_is_told_and_has_its_own_name(kfp, platform, said, other_code):
    own = provide_pipeline(KfpClient(), {}, said.append)
    assert own.name == "noisy-student-jo-ann"
    assert said == [
        f"the pipeline here is not that of {platform.version}; it runs as noisy-student-jo-ann, in the platform's images"
    ]
    assert find_platform_version(KfpClient(), other_code).pipeline.version_id == platform.version_id


def test_provide_pipeline_of_a_nameless_user_is_named_by_its_code(kfp, platform, said, monkeypatch):
    def nobody():
        raise KeyError("uid not found: 10001")

    monkeypatch.setattr(getpass, "getuser", nobody)
    own = provide_pipeline(KfpClient(), {"label_cpu": "8"}, said.append)
    assert own.name == f"noisy-student-{digest_wiring(PACKAGE.read_text())}"


def test_provide_pipeline_without_a_platform_needs_an_image(kfp, said):
    with pytest.raises(
        ConfigError, match=r"--image: must be given: http://\S+ has no pipeline noisy-student with the images of its platform"
    ):
        provide_pipeline(KfpClient(), {"label_cpu": "8"}, said.append)
    # A version that says nothing of itself is not the platform's.
    KfpClient().upload_pipeline(PACKAGE.read_text())
    with pytest.raises(ConfigError, match="--image: must be given"):
        provide_pipeline(KfpClient(), {}, said.append)
    images = {"worker_image": "w@sha256:1", "tools_image": "w@sha256:1"}
    own = provide_pipeline(KfpClient(), images, said.append)
    assert own.name == "noisy-student-jo-ann"
    assert own.description == describe_version(PACKAGE.read_text(), replace(Placement(), **images))


def test_pipelines_upload_takes_the_clusters_config_map(kfp, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://nowhere")
    pools = thing("ConfigMap", "noisy-student-pools", "kubeflow", data={"inputs.json": '{"worker_image": "r.example/w:1"}'})
    cluster = Fake(tmp_path, monkeypatch, [pools])
    cluster.state["port"] = int(kfp.url.rpartition(":")[2])
    cluster.save()
    for _ in range(2):
        assert run_command_line(["pipelines", "upload", "--context", "kind-test", "--input", "label_cpu=8"]) == 0
        printed = capsys.readouterr().out.split()
    assert printed == [entry.name for entry in kfp.all("pipeline_versions")]
    platform = find_platform_version(KfpClient(), PACKAGE.read_text())
    assert platform.placement == Placement(worker_image="r.example/w:1", label_cpu="8")
    assert read_placement(render_platform()) == PLATFORM
