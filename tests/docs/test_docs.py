"""What the pages promise exists: links lead somewhere, and commands are ones that `ns` and `make` know."""

import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest

from ns.cli.app import UsageError
from ns.config.loader import load_experiment
from ns.training.plan import plan_training
from tests.command_line import commands as list_commands
from tests.command_line import parse

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def list_groups() -> set[str]:
    """The words after `ns` that name a group of commands."""
    names = [name.split() for name, _ in list_commands()]
    return {" ".join(words[:count]) for words in names for count in range(1, len(words))}


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def anchor(heading: str) -> str:
    """As forges make them: lower case, no punctuation, hyphens for spaces."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(path.read_text()), re.MULTILINE):
        name = anchor(heading)
        count = found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def broken_links(path: Path) -> list[str]:
    broken = []
    for groups in LINK.findall(prose(path.read_text())):
        target = "".join(groups)
        if re.match(r"[a-z]+:", target):
            continue
        place, _, fragment = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        # Listing the folder tells upper case from lower where the disk does not.
        if not file.exists() or (file != file.parent and file.name not in {one.name for one in file.parent.iterdir()}):
            broken.append(f"{target}: no such file")
        elif fragment and file.suffix == ".md" and fragment not in anchors(file):
            broken.append(f"{target}: no such heading")
    return broken


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path):
    other = tmp_path / "other.md"
    other.write_text("# A heading: `code`, and more\n\n## Twice\n\n## Twice\n")
    path = tmp_path / "page.md"
    path.write_text(
        "# Here\n[a](other.md#a-heading-code-and-more) [b](#here) [c](other.md#twice-1) ![d](gone.png) [e](other.md#none) [f](Other.md)\n"
    )
    assert broken_links(path) == ["gone.png: no such file", "other.md#none: no such heading", "Other.md: no such file"]


def commands(text: str) -> list[list[str]]:
    """The commands of a page's shell blocks, as words; lines that go on after a backslash are one."""
    found = []
    for language, body in BLOCK.findall(text):
        if language != "sh":
            continue
        for line in body.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                words = shlex.split(line, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if words:
                    found.append(words)
    return found


def complaint(words: list[str]) -> str | None:
    """What `ns` says of a command line's form, which it parses but does not run; None if nothing."""
    arguments = [one for one in words[1:] if one != "…"]
    for end in ("|", ">", "&&"):
        if end in arguments:
            arguments = arguments[: arguments.index(end)]
    try:
        parse(arguments)
    except UsageError as error:
        return f"{' '.join(words)}: {error.format_message()}"
    return None


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_commands_are_known(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(path.read_text()):
        if words[0] == "ns":
            assert complaint(words) is None
        elif words[0] == "make":
            assert {one for one in words[1:] if "=" not in one and not one.startswith("-")} <= targets


def inline_complaints(text: str) -> list[str]:
    """What `ns` says of the commands that are named within sentences, which may leave out arguments; `make` targets that do not exist."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    complaints = []
    for span in re.findall(r"`((?:ns|make) [a-z][^`]*)`", prose(text)):
        program, *words = shlex.split(span)
        if program == "make":
            complaints += [f"{span}: no target {words[0]}"] if words[0] not in targets else []
        elif " ".join(words) not in list_groups():
            problem = complaint([program, *words])
            complaints += [problem] if problem and "Missing" not in problem else []
    return complaints


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_commands_in_sentences_are_known(path):
    assert inline_complaints(path.read_text()) == []


def test_commands_in_sentences_that_are_not_known_are_found():
    text = "`ns plan`, `ns labels`, `ns labels purge --keys FILE`, `make run`; `ns runs compare`, `ns plan a --no`, `ns no`, `make no`"
    assert [one.partition(":")[0] for one in inline_complaints(text)] == [
        "ns runs compare",
        "ns plan a --no",
        "ns no",
        "make no",
    ]


@pytest.mark.parametrize(
    "line",
    ["ns nosuch", "ns run a.yaml --nosuch", "ns labels nosuch x", "ns labels diff one", "ns run a.yaml --runner nowhere"],
)
def test_a_command_that_is_not_known_is_found(line):
    assert complaint(line.split())


def test_the_layers_are_those_that_are_held():
    text = (ROOT / "docs/architecture.md").read_text()
    said = re.findall(r"`(\w+)`", text[text.index("Ten floors, from the top:") : text.index("A package imports")])
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract.get("containers") == ["ns"]]
    assert said == re.findall(r"\w+", " ".join(layers))
    there = {path.stem for path in (ROOT / "ns").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(said) == there - {"__init__", "__main__"}


def test_the_messages_that_are_explained_are_ones_that_are_printed():
    source = re.sub(
        r'"\s*\n?\s*f?"',
        "",
        "".join(path.read_text() for part in ("ns", "pipelines", "k8s") for path in sorted(ROOT.glob(f"{part}/**/*.py"))),
    )
    page = (ROOT / "docs/troubleshooting.md").read_text()
    pieces = [
        piece for message in re.findall(r"\*\*`([^`]+)`\*\*", page) for piece in re.split(r"\s*…\s*", message) if len(piece) > 5
    ]
    assert len(pieces) > 20
    assert [piece for piece in pieces if piece not in source] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.yaml")), ids=page)
def test_examples_are_experiments(path, tmp_path, monkeypatch):
    # What they start from lies where the reader's is.
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "efficientnet_b0.safetensors").touch()
    (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.chdir(tmp_path)
    assert load_experiment(path.name).name == path.stem


def test_paper_example_has_the_numbers_of_the_paper():
    """arXiv:1911.04252, tables 7 and 8, §3, appendix A; what it does not say is that of github.com/google-research/noisystudent."""
    paper = load_experiment(str(ROOT / "examples/paper.yaml"))
    roles = [paper.teacher, *paper.students]
    assert [role.model.arch.removeprefix("tf_efficientnet_") for role in roles] == ["b7", "l2", "l2", "l2"]
    assert [role.model.resolution for role in roles] == [600, 475, 475, 475]
    assert [role.train.unlabeled_ratio for role in paper.students] == [14, 14, 28]
    for role in roles:
        assert role.model.args == {"bn_momentum": 0.01, "bn_eps": 1e-3}
        assert (role.model.crop, role.model.test_margin_px, role.model.inference_resolution) == (
            "resized",
            32,
            role.model.resolution,
        )
        noise, train, optimizer = role.noise, role.train, role.train.optimizer
        assert (noise.dropout, noise.stochastic_depth, noise.flip, noise.cutout_px) == (0.5, 0.2, True, 0)
        assert (noise.randaugment, noise.randaugment_layers, noise.randaugment_magnitude) == ("paper", 2, 27)
        assert (noise.pool, noise.mixup, noise.cutmix, noise.erasing, noise.policy) == ("same", 0, 0, 0, None)
        assert (noise.crop_area, noise.crop_aspect) == ((0.08, 1), (3 / 4, 4 / 3))
        assert (train.labeled_batch, train.epochs, train.label_smoothing, train.ema_decay) == (2048, 350, 0.1, 0.9999)
        assert (train.init, train.pseudo_labels, train.temperature, train.loss_weighting) == ("scratch", "soft", 1, "sum")
        assert (optimizer.name, optimizer.momentum, optimizer.rms_decay, optimizer.rms_epsilon) == ("rmsprop", 0.9, 0.9, 1e-3)
        assert (optimizer.weight_decay, optimizer.warmup_epochs, optimizer.clip_norm) == (1e-5, 5, None)
        plan = plan_training(role, samples=1_281_167)
        assert plan.steps == 218_950
        assert max(map(plan.lr_at, range(0, plan.steps, 100))) == pytest.approx(0.128, rel=0.1)
        # By 3 % every 2.4 epochs, from the first step on.
        assert plan.lr_at(100_000) == pytest.approx(0.128 * 0.97 ** (100_000 * 2048 / 1_281_167 // 2.4))
    assert [role.train.finetune for role in roles[:3]] == [None] * 3
    finetune = roles[3].train.finetune
    assert (finetune.resolution, finetune.epochs, finetune.lr, finetune.dropout) == (800, 1.5, None, 0)
    assert finetune.frozen_share > 0
    assert (paper.labeling.views, paper.labeling.ensemble, paper.labeling.temperature) == ("one", (), 1)
    assert paper.labeling.top_k == 1000
    selection = paper.selection
    assert (selection.policy, selection.min_confidence, selection.per_class) == ("paper", 0.3, 130_000)
    assert (selection.images_from, selection.weights) == ("first", "none")
    assert (selection.repeat, selection.classes_per_image, selection.precision) == (True, 1, None)
    assert selection.max_repeat >= selection.per_class
    assert paper.gate.min_gain == -1
    assert paper.evaluation.fgsm_epsilons == (2, 4, 8, 16)
    assert (paper.evaluation.pgd_steps[0], paper.evaluation.pgd_epsilon) == (10, 16)


@pytest.mark.parametrize("name", ["security.md", "runs.md"])
def test_tests_that_a_promise_names_exist(name):
    named = re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", (ROOT / "docs" / name).read_text())
    assert named
    for file, function in named:
        assert (ROOT / file).is_file(), file
        assert f"def {function or 'test_'}" in (ROOT / file).read_text(), f"{file}::{function}"
