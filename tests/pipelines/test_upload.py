"""Upload of the compiled pipelines."""

from ns.core.errors import RunError
from pipelines import upload
from pipelines.kfp_client import KfpClient
from pipelines.placement import Placement, read_placement, render_package


def test_upload_once_per_package(kfp, capsys):
    assert upload.main([]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == len(upload.PACKAGES) >= 1
    assert names[0].startswith("noisy-student-")
    assert upload.main(["--kfp", kfp.url]) == 0
    assert capsys.readouterr().out.split() == names
    assert sorted(one.name for one in kfp.all("pipeline_versions")) == sorted(names)


def test_upload_error_is_one_line(kfp, monkeypatch, capsys):
    def away(self, package, description):
        raise RunError("http://kfp: does not answer")

    monkeypatch.setattr(KfpClient, "upload_pipeline", away)
    assert upload.main([]) == RunError.exit_code
    assert capsys.readouterr().err == "error: http://kfp: does not answer\n"
    monkeypatch.delenv("NS_KFP_URL")
    assert upload.main([]) == 2
    assert "NS_KFP_URL" in capsys.readouterr().err


def test_load_packages_fills_in_the_placement():
    inputs = '{"worker_image": "r.example/worker:1", "label_node_selector": {"pool": "spot"}}'
    for package in upload.load_packages(inputs, ""):
        assert read_placement(package) == Placement(worker_image="r.example/worker:1", label_node_selector={"pool": "spot"})
    assert upload.load_packages("", "") == [render_package(file.read_text(), Placement()) for file in upload.PACKAGES]
