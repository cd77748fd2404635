"""The workflows of both hosts: what they run exists, with the options they give it; they are well formed, pinned, and may do little."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.command_line import parse

CHECKOUT = Path(__file__).parents[2]
WORKFLOWS = sorted((CHECKOUT / ".github" / "workflows").glob("*.yaml"))
ACTIONS = sorted((CHECKOUT / ".github" / "actions").glob("*/action.yaml"))
GITLAB = CHECKOUT / ".gitlab-ci.yml"
BIN = Path(sys.executable).parent

BEFORE = {"if", "then", "else", "elif", "do", "!", "sudo", "env", "(", "{", "eval", "$(", "time"}
"""What a command may stand behind."""


def load(file):
    # YAML 1.1 takes the word `on` for true.
    return yaml.load(file.read_text(), yaml.BaseLoader)


def scripts(document) -> Iterator[str]:
    """All shell in a workflow, an action or GitLab's file."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key in ("script", "before_script", "after_script", "run") and isinstance(value, list | str):
                lines = value if isinstance(value, list) else [value]
                # GitLab takes lists in lists, as aliases make them.
                yield "\n".join(line for part in lines for line in (part if isinstance(part, list) else [part]))
            else:
                yield from scripts(value)
    elif isinstance(document, list):
        for value in document:
            yield from scripts(value)


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command. `${X:+words}` stands for its words, `$(command)` is a command of its own."""
    script = re.sub(r"\\\n", " ", script)
    script = re.sub(r"\$\{\w+:\+([^}]*)\}", r"\1", script)
    for inner in re.findall(r"\$\(([^()]*)\)", script):
        yield from commands(inner)
    script = re.sub(r"\$\([^()]*\)", "SUBSTITUTED", script)
    lexer = shlex.shlex(script.replace("\n", " ;\n"), posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if re.fullmatch(r"[();|&]+", word):
            while words and (words[0] in BEFORE or re.fullmatch(r"\w+=.*", words[0])):
                words = words[1:]
            if words:
                yield words
            words = []
        else:
            words.append(word)


def without_redirections(words: list[str]) -> list[str]:
    end = next((index for index, word in enumerate(words) if re.fullmatch(r"[<>]+&?", word)), len(words))
    # `2` of `2>`.
    return words[:end]


def check_ns(words: list[str]) -> None:
    """Variables are numbers, which texts may be too."""
    parse([re.sub(r"\$\{\w+(:-[^}]*)?\}|\$\w+", "1", word) for word in words])


def check_make(words: list[str]) -> None:
    text = (CHECKOUT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert f"$({name})" in text if is_variable else name in targets, f"make {word}"


def check_script(words: list[str]) -> None:
    path = CHECKOUT / words[0]
    assert path.is_file(), words[0]
    for option in (word for word in words[1:] if word.startswith("--")):
        assert f'"{option}"' in path.read_text(), f"{words[0]} {option}"


def extras() -> set[str]:
    return set(tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def check(words: list[str]) -> str | None:
    """Raises for a command of ours that is not as it is called here. Returns its name, None for what is not ours."""
    words = without_redirections(words)
    while words[0] in ("env", "sudo") or "=" in words[0]:
        words = words[1:]
    program = Path(words[0]).name
    if program == "ns":
        check_ns(words[1:])
    elif program == "make":
        check_make(words[1:])
    elif program in ("python", "python3") and words[1] == "-m":
        assert find_spec(words[2]), words[2]
    elif program in ("python", "python3"):
        check_script(words[1:])
    elif words[0].startswith((".ci/", "images/")):
        check_script(words)
        assert (CHECKOUT / words[0]).stat().st_mode & 0o111, f"{words[0]}: cannot be executed"
    elif words[:2] == ["sh", "install.sh"]:
        assert words[3] == "$EXTRAS" or set(words[3].split(",")) <= extras(), words[3]
    else:
        return None
    return program


@pytest.mark.parametrize("file", [*WORKFLOWS, *ACTIONS, GITLAB], ids=lambda file: str(file.relative_to(CHECKOUT)))
def test_workflow_commands_exist_with_their_options(file):
    found = [check(words) for script in scripts(load(file)) for words in commands(script)]
    assert any(found) or file.parent.name == "store"


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("x=1 ns promot latest", "No such command"),
        ("set -e; ns promote latest --too much | tee x", "No such option"),
        ("ns promote check", "Missing parameter: files"),
        ('echo "$(ns plan)"', "Missing parameter: config"),
        ("if true; then ns runs list ${X:+--nope}; fi", "No such option"),
        ("make tests", "make tests"),
        ("sudo env A=b make images NOPE=1", "make NOPE=1"),
        ("python3 images/build.py --nope", "build.py --nope"),
        ("python3 .ci/gone.py", "gone.py"),
        ("python -m pipelines.gone", "pipelines.gone"),
        ("sh install.sh .venv pipelines,gone", "gone"),
    ],
)
def test_check_finds_unknown_commands(script, error):
    found = list(commands(script))
    with pytest.raises(Exception, match=error) as caught:
        [check(words) for words in found]
    assert caught.type.__name__ in ("AssertionError", "UsageError", "NoSuchOption", "MissingParameter", "NoSuchCommand")


def steps(document):
    jobs = document.get("jobs", {"action": document.get("runs", {})})
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("file", [*WORKFLOWS, *ACTIONS], ids=lambda file: str(file.relative_to(CHECKOUT)))
def test_actions_are_pinned_to_commits(file):
    for line in re.findall(r"uses: (.*)", file.read_text()):
        if line.startswith("./"):
            assert (CHECKOUT / line / "action.yaml").is_file()
        else:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)
    for step in steps(load(file)):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"
        if step.get("uses") == "./.github/actions/setup":
            assert set(filter(None, step.get("with", {}).get("extras", "").split(","))) <= extras()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_have_few_permissions_and_a_timeout(file):
    document = load(file)
    assert document["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in document["on"]
    for job in document["jobs"].values():
        assert int(job["timeout-minutes"]) <= 90
    submits = "ns trigger" in file.read_text()
    if submits:
        assert document["concurrency"]["cancel-in-progress"] == "false", "a run that was submitted would go on"


def test_names_from_outside_are_no_options():
    """A run's name comes from the one who reports that it ended: it stands behind `--`, or is checked by the one who sets it."""
    scripted = [
        words
        for file in (*WORKFLOWS, GITLAB)
        for script in scripts(load(file))
        for words in commands(script)
        if words[0] == "ns" and words[1] in ("promote", "trigger") and words[2] != "check"
    ]
    assert len(scripted) == 4
    for words in map(without_redirections, scripted):
        assert words.index("--") == len(words) - 2, words


def test_pointers_of_requests_are_checked_by_the_code_of_the_default_branch():
    """Who may open a request may change its code; what runs with an identity takes only the pointers from it."""
    job = load(GITLAB)["check-pointers"]
    order = "\n".join(scripts(job))
    positions = [
        order.index(text)
        for text in (
            'fetch --depth=1 origin "$CI_DEFAULT_BRANCH"',
            "checkout --quiet --detach FETCH_HEAD",
            "install.sh",
            "role.py",
            'core.symlinks=false restore --source="$CI_COMMIT_SHA" -- models',
            "ns promote check",
        )
    ]
    assert positions == sorted(positions)
    check = load(CHECKOUT / ".github" / "workflows" / "promote.yaml")["jobs"]["check"]["steps"]
    assert check[0]["with"]["ref"] == "${{ github.event.repository.default_branch }}"
    assert "core.symlinks=false restore --source=FETCH_HEAD -- models" in check[-1]["run"]
    for file in WORKFLOWS:
        assert "download-artifact" not in file.read_text(), "what a request's job made is never unpacked over a checkout"


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{BIN}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"needs {name}; make venv installs it")
    return found


@pytest.mark.integration
def test_actionlint_finds_nothing(tmp_path):
    command = [tool("actionlint"), "-no-color", "-shellcheck", tool("shellcheck")]
    done = subprocess.run([*command, *map(str, WORKFLOWS)], cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")

    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "on: pull_request\njobs:\n  one:\n    runs-on: ubuntu-latest\n    needs: two\n    steps:\n"
        "      - run: echo ${{ github.event.pull_request.title }}; cp $a $b\n"
    )
    done = subprocess.run([*command, str(bad)], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 1
    for what in ('job "one" needs job "two"', "potentially untrusted", "SC2086"):
        assert what in done.stdout


@pytest.mark.integration
@pytest.mark.parametrize(
    ("schema", "files", "before", "after"),
    [
        ("vendor.gitlab-ci", [GITLAB], "stage: promote", "stages: promote"),
        ("vendor.github-workflows", WORKFLOWS, "timeout-minutes:", "timeout_minutes:"),
        ("vendor.github-actions", ACTIONS, "using: composite", "using: compound"),
        ("vendor.dependabot", [CHECKOUT / ".github" / "dependabot.yaml"], "interval: weekly", "interval: never"),
    ],
)
def test_workflow_files_match_their_schemas(schema, files, before, after, tmp_path):
    command = [tool("check-jsonschema"), "--builtin-schema", schema]
    good = subprocess.run([*command, *map(str, files)], capture_output=True, text=True)
    assert good.returncode == 0, good.stdout
    bad = tmp_path / files[-1].name
    assert before in files[-1].read_text()
    bad.write_text(files[-1].read_text().replace(before, after))
    assert subprocess.run([*command, str(bad)], capture_output=True).returncode == 1


@pytest.mark.integration
def test_gitlab_scripts_pass_shellcheck(tmp_path):
    document = load(GITLAB)
    jobs = {name: job for name, job in document.items() if isinstance(job, dict)}
    assert {job["stage"] for job in jobs.values() if "stage" in job} == set(document["stages"])
    assert all(job["extends"] in jobs for job in jobs.values() if "extends" in job)
    for number, script in enumerate(scripts(document)):
        (tmp_path / f"{number}.sh").write_text(script)
    # Variables come from the host.
    command = [tool("shellcheck"), "--shell=sh", "--exclude=SC2154,SC2153,SC2034", *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
