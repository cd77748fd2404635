"""A password in a URL, in every place that takes one: it is neither printed, logged nor kept."""

import re
from pathlib import Path

import pytest

from ns.cli.app import run_command_line
from ns.config.loader import load_experiment, resolve_preset
from ns.core import log, telemetry
from ns.core.errors import NsError
from ns.runs.records import list_stage_failures, write_stage_failure
from ns.storage import LocalStore
from pipelines import remote_run
from pipelines.kfp_client import KfpClient
from tests.pipelines.conftest import kfp, platform  # noqa: F401

pytestmark = pytest.mark.integration

SECRET = "hunter2"
ROOT = Path(__file__).parents[2]

FIELDS = (
    *(f"data.{part}" for part in ("labeled", "pool", "heldout", "calibration", "test", "exclude")),
    *("registry.git", "registry.remote", "students.0.model.pretrained", "teacher.model.pretrained", "teacher.train.init"),
    *("labeling.ensemble", "labeling.label_set", "evaluation.sets.more.uri", "evaluation.sets.more.multi_label"),
)
VARIABLES = {
    "NS_KFP_URL": ["pipelines upload", "run quickstart --runner kfp --root s3://bucket/runs"],
    "NS_KFP_UI": ["pipelines upload --kfp http://127.0.0.1:1"],
    "NS_LABEL_REGISTRY": ["labels list", "labels version labels/a/b/gen-1", "labels gc", "labels promote labels/a/b/gen-1"],
    "NS_LABEL_REMOTE": ["labels list --registry {folder}/registry", "labels commit {folder} --tag labels/a/b/gen-1"],
    "NS_PUSHGATEWAY_URL": ["runs list"],
    "AWS_ENDPOINT_URL": ["doctor store s3://bucket/a", "runs list --root s3://bucket/a"],
    "AWS_ENDPOINT_URL_S3": ["doctor store s3://bucket/a", "run quickstart --root s3://bucket/a"],
}
"""Variables that take a URL, and commands that read them."""
ARGUMENTS = [
    "run quickstart --runner kfp --root s3://bucket/runs --kfp {url}",
    "run quickstart --root {url}",
    "run {url}",
    "config check {url}",
    "runs list --root {url}",
    "runs show {url} --root {folder}",
    "data import {url} {folder}/data --role labeled",
    "data import {folder} {url} --role labeled",
    "data show {url}",
    "data check {url} --out {url}",
    "doctor store {url}",
    "labels list --registry {url}",
    "labels show {url} --root {folder}",
    "labels commit {url} --registry {url} --remote {url} --tag labels/a/b/gen-1 --root {folder}",
    "labels import {folder}/a.csv {url} {folder}/labels --classes {folder}/classes",
    "label {url} {url} {url}",
    "evaluate {url} {url} --out {url}",
    "report run --root {url}",
    "promote run --root {url} --to {folder}/production.yaml",
    "pipelines upload --kfp {url}",
    "trigger quickstart --root s3://bucket/runs --kfp {url}",
]
URLS = (f"https://me:{SECRET}@127.0.0.1:1/path", f"s3://{SECRET}@127.0.0.1:1/path")


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    """The folder in which commands work. At the end nothing that they wrote or printed has the secret."""
    monkeypatch.chdir(tmp_path)
    for variable in ("NS_KFP_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    monkeypatch.setenv(log.EVENTS_VARIABLE, str(tmp_path / "events"))
    (tmp_path / "classes").write_text("a\nb\n")
    yield tmp_path
    shown = "".join(capsys.readouterr())
    assert SECRET not in shown, shown[max(0, shown.index(SECRET) - 300) :][:600]
    for path in tmp_path.rglob("*"):
        assert SECRET not in path.name
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_the_variables_are_all_that_take_a_url():
    sources = [path.read_text() for part in ("ns", "pipelines", "components", "k8s") for path in (ROOT / part).rglob("*.py")]
    names = {name for text in sources for name in re.findall(r'"((?:NS|AWS)_[A-Z0-9_]+)"', text)}
    assert {name for name in names if re.search("URL|URI|ENDPOINT|REGISTRY|REMOTE$|_UI$", name)} == set(VARIABLES)


def test_the_fields_are_all_that_take_a_uri():
    experiment = load_experiment(resolve_preset("quickstart"))
    given = {part: part for part in ("labeled", "pool", "heldout", "calibration", "test", "exclude")}
    fields = experiment.model_dump() | {"data": experiment.data.model_dump() | given}
    fields["labeling"] |= {"ensemble": ["a"], "label_set": "a"}
    fields["evaluation"] |= {"sets": {"more": {"uri": "a", "multi_label": "b"}}}
    for role in (fields["teacher"], *fields["students"]):
        role["model"]["pretrained"] = "a/model"
        role["train"]["init"] = "scratch"
    uris = type(experiment).model_validate(fields).map_uris()
    assert {field.removesuffix(".0") for field in uris} | {"registry.git", "registry.remote"} == set(FIELDS) - {
        "teacher.train.init"
    }


def test_an_experiment_with_a_password_is_refused(folder):
    for field in FIELDS:
        for url in URLS if field == "registry.git" else URLS[:1]:
            override = f"{field}={f'[{url}]' if field == 'labeling.ensemble' else url}"
            more = ["--set", "registry.git=registry"] if field == "registry.remote" else []
            more += ["--set", "evaluation.sets.more.uri=a"] if field.endswith("multi_label") else []
            assert run_command_line(["config", "check", "quickstart", *more, "--set", override]) == 2
    assert run_command_line(["run", "quickstart", "--root", str(folder / "runs"), "--set", f"data.pool={URLS[0]}"]) == 2


@pytest.mark.parametrize("variable", VARIABLES)
def test_no_command_tells_the_password_in_a_variable(variable, folder, monkeypatch):
    for url in URLS:
        monkeypatch.setenv(variable, url)
        for line in VARIABLES[variable]:
            run_command_line(line.format(folder=folder).split())
        if variable == telemetry.GATEWAY_VARIABLE:
            log.configure_logging()
            telemetry.push_run_metrics("pipeline")


@pytest.mark.parametrize("url", URLS)
def test_no_command_tells_the_password_in_an_argument(url, folder):
    for line in ARGUMENTS:
        assert run_command_line(line.format(url=url, folder=folder).split()) != 0, line


def test_a_run_on_kubeflow_keeps_no_password(kfp, platform, folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("NS_KFP_URL", kfp.url.replace("//", f"//me:{SECRET}@"))
    root, experiment = LocalStore(folder / "root"), load_experiment(resolve_preset("quickstart"))
    submitted = remote_run.submit_run(KfpClient(), root, "run", experiment, remote_run.build_request(root, "run"))
    assert SECRET not in str(submitted)
    assert SECRET not in str([kfp.shown(run) for run in kfp.all("runs")])
    write_stage_failure(root, "run", 0, "train", NsError(f"{URLS[0]}: cannot be reached"), note_name="train")
    assert list_stage_failures(root, "run")
    remote_run.finish_run(root, "run", "failed", f"{URLS[0]}: cannot be reached")
    (folder / "submitted").write_text(str(submitted))
