"""The pipelines that come with the code get onto the server, once each."""

from ns.errors import RunError
from pipelines import upload
from pipelines.submit import Server


def test_all_compiled_pipelines_are_uploaded_once(kfp, capsys):
    assert upload.main([]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == len(upload.PACKAGES) >= 1
    assert names[0].startswith("noisy-student-")
    assert upload.main(["--kfp", kfp.url]) == 0
    assert capsys.readouterr().out.split() == names
    assert sorted(one.name for one in kfp.all("pipeline_versions")) == sorted(names)


def test_what_goes_wrong_is_said_in_one_line(kfp, monkeypatch, capsys):
    def away(self, package):
        raise RunError("http://kfp: does not answer")

    monkeypatch.setattr(Server, "upload", away)
    assert upload.main([]) == RunError.exit_code
    assert capsys.readouterr().err == "error: http://kfp: does not answer\n"
    monkeypatch.delenv("NS_KFP_URL")
    assert upload.main([]) == 2
    assert "NS_KFP_URL" in capsys.readouterr().err
