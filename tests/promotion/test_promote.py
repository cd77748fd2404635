"""The pointer to the model in use, with real git."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ns.cli import app as cli
from ns.core.digest import sha256_bytes
from ns.core.errors import ConfigError, DataError, RunError, StoreError
from ns.evaluation.gate import Verdict
from ns.modeling.manifest import ModelManifest
from ns.promotion import promote
from ns.runs.lookup import resolve_verdict
from ns.runs.summary import summarize_run
from tests.reporting.conftest import RUN

pytestmark = [pytest.mark.integration, pytest.mark.slow]

POINTER = "models/production.yaml"
MODEL = "store/models/01"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path_factory):
    """No settings of the machine's owner."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def root(made_up):
    """A run whose accepted student has weights."""
    weights = b"weights"
    unweighted = ModelManifest.load(made_up.at(MODEL))
    manifest = unweighted.model_copy(update={"weights_sha256": sha256_bytes(weights)})
    manifest.save(made_up.at(MODEL))
    made_up.put(f"{MODEL}/{manifest.weights_key}", weights)
    made_up.put(f"{MODEL}/{manifest.history_key}", made_up.get(f"{MODEL}/{unweighted.history_key}"))
    return made_up


@pytest.fixture
def repository(tmp_path_factory, monkeypatch):
    """Function: git in a repository with one commit, in which the process stands."""
    folder = tmp_path_factory.mktemp("repository")
    monkeypatch.chdir(folder)

    def git(*arguments):
        identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout

    git("init", "--quiet", "--initial-branch=main")
    (folder / "README.md").write_text("models\n")
    git("add", "--all")
    git("commit", "--quiet", "--message=Begin")
    return git


def ns(capsys, *arguments):
    code = cli.run_command_line(["promote", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refuse_student(root, generation=1):
    """Turns the gate's verdict into a refusal."""
    key = resolve_verdict(root, f"{RUN}/gen-{generation}")[1]
    for path in root.list("store/verdicts/"):
        if Verdict.load_file(root, path) == key:
            key.model_copy(update={"promoted": False, "reason": "no better"}).save_file(root, path)


def test_promote_on_a_branch_touches_nothing_else(root, repository, capsys, tmp_path_factory):
    body = tmp_path_factory.mktemp("out") / "body.md"
    asked = [RUN, "--root", str(root.root), "--branch", "promote/production", "--body", str(body), "--json"]
    code, out, err = ns(capsys, *asked)
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["changed"]
    assert said["commit"] == repository("rev-parse", "promote/production").strip()
    assert (
        said["title"] == repository("log", "-1", "--format=%s", "promote/production").strip() == f"Promote {RUN}, generation 1"
    )
    assert repository("rev-parse", "promote/production^") == repository("rev-parse", "main")
    assert repository("diff", "--name-status", "main", "promote/production") == f"A\t{POINTER}\n"
    assert repository("status", "--porcelain") == ""
    assert repository("symbolic-ref", "HEAD") == "refs/heads/main\n"
    pointer = promote.parse_pointer(repository("show", f"promote/production:{POINTER}").encode(), "here")
    assert pointer.model_dump(mode="json") == said["pointer"]
    assert pointer.model == root.at(MODEL).uri
    assert pointer.digest == ModelManifest.load(root.at(MODEL)).digest
    assert pointer.metrics["heldout_top1"] == round(summarize_run(root, RUN).best_top1, 6)
    assert "train_seconds" not in pointer.metrics
    text = body.read_text()
    assert f"`{POINTER}` moves to the best model of **made-up**" in text
    assert "| gate of generation 1 |" in text

    code, out, _ = ns(capsys, *asked)
    assert json.loads(out) == said, "the same run on the same commit is the same commit"


def test_promote_of_the_model_in_use_makes_no_branch(root, repository, capsys):
    asked = [RUN, "--root", str(root.root)]
    assert ns(capsys, *asked, "--dry-run")[1].startswith(f"{POINTER}: would move to {RUN}, generation 1, all 7 bytes good")
    assert repository("status", "--porcelain") == ""
    assert ns(capsys, *asked)[1].startswith(f"{POINTER}: moved to {RUN}, generation 1, all 7 bytes good (before: none)")
    assert ns(capsys, "check", POINTER)[1] == f"{POINTER}: good: {RUN}, generation 1, 7 bytes\n"
    repository("add", "--all")
    repository("commit", "--quiet", "--message=Use it")
    code, out, _ = ns(capsys, *asked, "--branch", "next")
    assert code == 0
    assert out.startswith(f"{POINTER}: already names this model")
    assert repository("branch", "--format=%(refname:short)") == "main\n"


def test_promote_resets_the_branch_to_head_from_any_folder(root, repository, capsys, monkeypatch):
    asked = [RUN, "--root", str(root.root), "--branch", "next", "--to", "../models/production.yaml"]
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert ns(capsys, *asked)[0] == 0
    repository("commit", "--quiet", "--allow-empty", "--message=Go on")
    assert ns(capsys, *asked)[0] == 0
    assert repository("rev-parse", "next^") == repository("rev-parse", "main")
    assert repository("ls-tree", "-r", "--name-only", "next").split() == ["README.md", POINTER]


def test_evidence_compares_with_the_run_before(root, repository):
    found = promote.read_candidate(root, RUN)
    before = found.pointer.model_copy(update={"run": "other"})
    assert "### other · made-up" in promote.render_evidence(root, found, before, POINTER)
    elsewhere = before.model_copy(update={"heldout": "0"})
    assert "do not compare" in promote.render_evidence(root, found, elsewhere, POINTER)
    gone = before.model_copy(update={"run": "gone"})
    assert "Not compared with the run before: run gone" in promote.render_evidence(root, found, gone, POINTER)


def test_promote_refuses_a_run_without_an_accepted_student(root, repository, capsys):
    refuse_student(root)
    code, out, err = ns(capsys, RUN, "--root", str(root.root), "--branch", "next")
    assert (code, out) == (RunError.exit_code, "")
    assert err.startswith("error: run made-up: its gate has accepted no student (generation 1: no better)")
    assert repository("branch", "--format=%(refname:short)") == "main\n"


@pytest.mark.parametrize("damage", ["weights", "manifest", "lost"])
def test_promote_and_check_refuse_a_damaged_model(root, repository, capsys, damage):
    assert ns(capsys, RUN, "--root", str(root.root))[0] == 0
    before = Path(POINTER).read_text()
    folder = root.at(MODEL)
    weights = ModelManifest.load(folder).weights_key
    if damage == "weights":
        folder.put(weights, b"weightz")
        expected, what = DataError, f"{weights} has '{sha256_bytes(b'weightz')}'"
    elif damage == "manifest":
        manifest = ModelManifest.load(folder)
        manifest.model_copy(update={"steps": 5}).save(folder)
        expected, what = DataError, "another model is there now"
    else:
        folder.delete(weights)
        expected, what = StoreError, weights
    code, _, err = ns(capsys, "check", POINTER)
    assert code == expected.exit_code
    assert what in err
    if damage != "manifest":
        assert ns(capsys, RUN, "--root", str(root.root))[0] == expected.exit_code
        assert Path(POINTER).read_text() == before


def test_parse_pointer_names_what_is_wrong(root, repository, capsys):
    found = promote.read_candidate(root, RUN)
    fields = yaml.safe_load(promote.render_pointer(found.pointer))
    assert promote.parse_pointer(json.dumps(fields).encode(), "here") == found.pointer
    for text, what in (
        ("- a", "here: must be a pointer to a model"),
        (yaml.safe_dump(fields | {"run": "--all"}), "here: run: "),
        (": :", "here: not YAML"),
        (yaml.safe_dump(fields | {"generation": "x"}), "here: generation: "),
        (yaml.safe_dump(fields | {"weight": 1}), "here: weight: "),
    ):
        with pytest.raises(DataError, match=what):
            promote.parse_pointer(text.encode(), "here")


def test_promote_check_quotes_nothing_of_other_files(repository, capsys, tmp_path):
    """The one who opens a request for a promotion chooses the files that are checked; the answer is posted there."""
    secret = tmp_path / "secrets.yaml"
    os.makedirs("models")  # noqa: PTH103
    for text in ("password: hunter2\n", "[default]\naws_secret_access_key = hunter2\n", "hunter2: [\n", "- hunter2", "hunter2"):
        secret.write_text(text)
        shutil.copy(secret, POINTER)
        code, _, err = ns(capsys, "check", POINTER)
        assert (code, err.count("\n")) == (DataError.exit_code, 1)
        assert "hunter2" not in err
    os.remove(POINTER)  # noqa: PTH107
    os.symlink(secret, POINTER)  # noqa: PTH211
    assert "models/production.yaml: is a link; a pointer is a plain file" in ns(capsys, "check", POINTER)[2]
    os.remove(POINTER)  # noqa: PTH107
    shutil.copy(secret, POINTER)
    os.symlink("models", "other")  # noqa: PTH211
    assert "other: is a link" in ns(capsys, "check", "other/production.yaml")[2]


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        (["--branch", "main"], ConfigError, "--branch main: is checked out"),
        (["--branch", "a..b"], ConfigError, "--branch 'a..b': not a name that git takes"),
        (["--branch=--upload-pack=x"], ConfigError, "--branch '--upload-pack=x': not a name that git takes"),
        (["--to", "models/production.json"], ConfigError, "--to models/production.json: must end in .yaml"),
        (
            ["--to", "/proc/pointer.yaml", "--branch", "next"],
            StoreError,
            "pointer.yaml: is in no git repository: git rev-parse: fatal",
        ),
        (["--to", "README.md/pointer.yaml"], StoreError, "README.md/pointer.yaml: cannot"),
    ],
)
def test_promote_names_bad_options_in_one_line(root, repository, capsys, options, error, what):
    code, _, err = ns(capsys, RUN, "--root", str(root.root), *options)
    assert code == error.exit_code
    assert what in err
    assert err.count("\n") == 1


WORKFLOW = Path(__file__).parents[2] / ".github" / "workflows" / "promote.yaml"


class Job:
    """The job `move` of the workflow, with a real remote, and a `gh` that notes what it is asked and knows the open request."""

    def __init__(self, folder, root, git):
        self.folder, self.git, self.asked = folder, git, []
        (folder / "bin").mkdir()
        subprocess.run(["git", "init", "--quiet", "--bare", str(folder / "origin.git")], check=True)
        git("remote", "add", "origin", str(folder / "origin.git"))
        git("push", "--quiet", "origin", "main")
        self._program("ns", f'PYTHONPATH={Path(promote.__file__).parents[1]} exec {sys.executable} -m ns "$@"')
        self._program(
            "gh", f'echo "$*" >>{folder}/asked; case "$*" in "pr list"*) cat {folder}/number 2>/dev/null || true;; esac'
        )
        self.steps = [step for step in yaml.safe_load(WORKFLOW.read_text())["jobs"]["move"]["steps"] if "run" in step]
        self.environment = {
            **os.environ,
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "GITHUB_OUTPUT": str(folder / "output"),
            "GITHUB_STEP_SUMMARY": str(folder / "summary"),
            "GITHUB_REPOSITORY": "me/it",
            "BRANCH": "promote/production",
            "BASE": "main",
            "RUN": "latest",
            "ROOT": str(root.root),
        }
        self.environment |= {name: value for name, value in self.steps[0]["env"].items() if name.startswith("GIT_")}

    def _program(self, name, script):
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def run(self, event="schedule"):
        """Returns the exit code, what is printed, and the outputs of the step that promotes; then lets the next one act on them."""
        (self.folder / "output").write_text("")
        (self.folder / "asked").write_text("")
        environment = self.environment | {"GITHUB_EVENT_NAME": event}
        done = subprocess.run(["bash", "-e", "-c", self.steps[0]["run"]], env=environment, capture_output=True, text=True)
        outputs = dict(line.split("=", 1) for line in (self.folder / "output").read_text().splitlines())
        if outputs.get("commit"):
            environment["TITLE"] = outputs["title"]
            subprocess.run(["bash", "-e", "-c", self.steps[1]["run"]], env=environment, capture_output=True, check=True)
        self.asked = (self.folder / "asked").read_text().splitlines()
        return done.returncode, done.stdout + done.stderr, outputs


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq, as GitHub's runners have it")
def test_workflow_keeps_one_pull_request_until_it_is_merged(root, repository, tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("job"), root, repository)
    title = "Promote made-up, generation 1"
    # The latest run is the other one, which came later.
    job.environment["RUN"] = RUN
    code, said, outputs = job.run()
    assert code == 0, said
    assert outputs["title"] == title
    assert job.asked[-1] == f"pr create --head promote/production --base main --title {title} --body-file body.md"
    assert repository("ls-remote", "origin", "promote/production").split()[0] == outputs["commit"]
    assert "| gate of generation 1 |" in (job.folder / "summary").read_text()

    (job.folder / "number").write_text("12\n")
    assert job.run()[2] == outputs, "the same commit again: nothing moves in the request"
    assert job.asked[-1] == f"api --silent --method PATCH repos/me/it/pulls/12 --field title={title} --field body=@body.md"

    repository("merge", "--quiet", "promote/production")
    assert job.run()[2]["commit"] == ""
    assert job.asked == []


def test_workflow_fails_for_a_refused_run_only_on_dispatch(root, repository, tmp_path_factory):
    refuse_student(root)
    job = Job(tmp_path_factory.mktemp("job"), root, repository)
    job.environment["RUN"] = RUN
    code, said, outputs = job.run("schedule")
    assert (code, outputs) == (0, {})
    assert "::notice::nothing to promote" in said
    assert "made-up: its gate has accepted no student" in said
    assert job.run("workflow_dispatch")[0] == RunError.exit_code


@pytest.fixture
def moved(root, repository, capsys):
    """Two commits: the run's model in use, then another one. Returns the text of the first pointer."""
    ns(capsys, RUN, "--root", str(root.root))
    first = Path(POINTER).read_text()
    repository("add", "--all")
    repository("commit", "--quiet", "--message=Promote")
    shutil.copytree(root.root / MODEL, root.root / "store/models/02")
    manifest = ModelManifest.load(root.at(MODEL)).model_copy(update={"generation": 7})
    manifest.save(root.at("store/models/02"))
    before = promote.read_pointer(Path(POINTER))
    other = before.model_copy(update={"model": root.at("store/models/02").uri, "digest": manifest.digest, "generation": 7})
    Path(POINTER).write_text(promote.render_pointer(other))
    repository("commit", "--quiet", "--all", "--message=Promote another")
    return first


def test_back_names_the_model_before_again(moved, repository, capsys):
    code, out, err = ns(capsys, "back", "--dry-run")
    assert (code, err) == (0, "")
    assert out == f"{POINTER}: would move to {RUN}, generation 1, all 7 bytes good (before: {RUN}, generation 7)\n"
    assert Path(POINTER).read_text() != moved
    assert ns(capsys, "back")[0] == 0
    assert Path(POINTER).read_text() == moved
    repository("commit", "--quiet", "--all", "--message=Go back")
    assert "generation 7" in ns(capsys, "back", "--dry-run")[1], "and forth"


def test_back_passes_over_what_was_no_pointer(moved, repository, capsys):
    """A merge that went wrong, between the model before and the one in use."""
    other = Path(POINTER).read_text()
    for text in ("<<<<<<< HEAD\n", other):
        Path(POINTER).write_text(text)
        repository("commit", "--quiet", "--all", "--message=Go on")
    code, _, err = ns(capsys, "back")
    assert (code, Path(POINTER).read_text()) == (0, moved)
    assert "passed over" in err


def test_back_on_a_branch(moved, repository, capsys):
    code, _, _ = ns(capsys, "back", "--branch", "promote/production")
    assert code == 0
    assert repository("show", f"promote/production:{POINTER}") == moved
    assert repository("log", "-1", "--format=%s", "promote/production") == f"Go back to {RUN}, generation 1\n"
    assert repository("status", "--porcelain") == ""


def test_back_refuses_a_damaged_model(moved, root, capsys):
    weights = next((root.root / MODEL).glob("*.safetensors"))
    weights.write_bytes(b"damaged")
    code, _, err = ns(capsys, "back")
    assert code == DataError.exit_code
    assert "the weights are damaged or those of another model" in err
    assert Path(POINTER).read_text() != moved


def test_back_without_an_earlier_model(root, repository, capsys):
    ns(capsys, RUN, "--root", str(root.root))
    repository("add", "--all")
    repository("commit", "--quiet", "--message=Promote")
    code, _, err = ns(capsys, "back")
    assert code == RunError.exit_code
    assert err == (
        f"error: {POINTER}: git's history has no pointer to another model; `ns promote RUN` moves it to a run's best model\n"
    )
