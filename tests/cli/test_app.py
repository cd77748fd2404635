"""The command line as its user meets it. Runs have their own tests in tests/integration."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ns import __version__
from ns.cli import app as cli
from ns.cli import options
from ns.config.loader import load_experiment, resolve_preset, with_uris
from ns.config.schema import GateConfig
from ns.data.dataset import Dataset
from ns.evaluation.gate import evaluate_gate
from ns.runs.lifecycle import lock_run, open_run
from ns.runs.records import write_stage_note
from ns.runs.summary import summarize_run
from ns.storage import LocalStore
from tests.command_line import commands, parse

NS = [sys.executable, "-m", "ns"]


def ns(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.run_command_line(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(("name", "command"), [*commands()])
def test_help_examples_are_commands(capsys, name, command):
    code, out, _ = ns(capsys, *name.split(), "--help")
    assert code == 0
    assert "Example: ns" in " ".join(out.replace("│", " ").split())
    for example in re.findall(r"\[cyan\]ns (.*?)\[/\]", command.help):
        parse(shlex.split(example.partition(">")[0]))


def test_help_loads_no_heavy_library():
    program = (
        "import sys; sys.argv = ['ns', '--help']\n"
        "from ns.cli.app import run_command_line; run_command_line(['--help'])\n"
        "heavy = {'torch', 'timm', 'kfp', 'pyarrow', 'matplotlib', 'numpy', 'pipelines', 'sklearn'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_in_errors_do_not_steer_the_terminal(capsys, tmp_path):
    name = "\x1b[2Jcat\nerror: all is lost\x07"
    (tmp_path / name).write_text("{")
    code, _, err = ns(capsys, "data", "show", str(tmp_path / name))
    assert code != 0
    assert len(err.splitlines()) == 1
    assert err.rstrip("\n").isprintable()


def test_version(capsys):
    assert ns(capsys, "--version") == (0, f"ns {__version__}\n", "")


def test_config_show_prints_every_field_and_reads_back(capsys, tmp_path):
    code, out, _ = ns(capsys, "config", "show", "quickstart", "--set", "seed=5")
    assert code == 0
    path = tmp_path / "shown.yaml"
    path.write_text(out)
    assert load_experiment(str(path)).seed == 5


def test_config_schema_is_json(capsys):
    _, out, _ = ns(capsys, "config", "schema")
    assert json.loads(out)["properties"]["seed"]["description"]


def test_config_check_builds_the_networks(capsys):
    code, out, _ = ns(capsys, "config", "check", "quickstart")
    assert (code, out.splitlines()[0]) == (0, "quickstart: good")
    large = ("teacher.model.resolution=224", "students.0.model.resolution=224", "students.0.train.labeled_batch=2048")
    code, out, _ = ns(capsys, "config", "check", "quickstart", *(word for field in large for word in ("--set", field)))
    assert code == 0
    assert re.search(r"students\.0: data loaders take \d\.\d GB of memory in /dev/shm", out)
    for override, reason in (
        ("teacher.model.arch=efficientnet_b0", "must be equal or larger; for distillation"),
        ("teacher.model.arch=efficientnet_b00", "did you mean efficientnet_b0"),
        (
            "teacher.model.arch=efficientnet_b0.ra_in1k",
            ".ra_in1k names trained weights; give efficientnet_b0, and the weights in model.pretrained",
        ),
        ("students.0.model.resolution=16", "below the total stride of test_efficientnet, 32 px"),
        ("students.0.model.reduce_stride=8", ""),
    ):
        code, _, err = ns(capsys, "config", "check", "quickstart", "--set", override)
        assert code == (2 if reason else 0), err
        assert reason in err
        assert len(err.splitlines()) == bool(reason)


def test_config_check_names_data_that_are_not_there(capsys, tmp_path):
    (tmp_path / "pool").mkdir()
    uris = {"pool": tmp_path / "pool", "labeled": tmp_path / "nowhere", "heldout": "s3://bucket/x"}
    fields = [word for part, uri in uris.items() for word in ("--set", f"data.{part}={uri}")]
    code, out, _ = ns(capsys, "config", "check", "quickstart", *fields)
    warning = f"warning: data.labeled: {tmp_path}/nowhere: there is no such file or folder on this machine"
    assert (code, [line for line in out.splitlines() if line.startswith("warning: data")]) == (0, [warning])


@pytest.mark.parametrize("command", ["show", "verify", "check"])
def test_data_commands_say_how_to_make_a_dataset(capsys, tmp_path, command):
    code, _, err = ns(capsys, "data", command, str(tmp_path))
    said = f"error: {tmp_path}: no dataset.json here; name a dataset, or make one with `ns data import`"
    assert (code, err.splitlines()) == (3, [said])


def test_import_refuses_class_names_of_a_dataset_without_classes(capsys, tmp_path):
    manifest = tmp_path / "dataset.json"
    Dataset(name="pool", role="unlabeled", classes=(), shards=()).save(LocalStore(tmp_path))
    code, _, err = ns(
        capsys, "data", "import", str(tmp_path), str(tmp_path / "out"), "--role", "evaluation", "--classes", str(manifest)
    )
    assert (code, err) == (3, f"error: {manifest}: is a dataset without classes; name that of the labeled images\n")


def test_config_check_says_how_many_heldout_images_the_gate_needs(capsys, tmp_path):
    _, out, _ = ns(capsys, "config", "check", "quickstart")
    assert "min_gain -0.02: -1 points: 6,237; +0 points: 1,578; +3 points: 260" in out
    assert "with 500 images of 10 classes, from: min_gain +1.6 points" in out
    assert "fewer than" not in out
    # Half of them are set apart for the thresholds.
    _, out, _ = ns(capsys, "config", "check", "quickstart", "--set", "selection.precision=0.9")
    assert "with 250 images of 10" in out
    assert "selection.precision 0.9: a threshold of its own takes 29 calibration images" in out
    conditions = (
        "gate.max_class_drop=0.1",
        "gate.max_mce_rise=2",
        "evaluation.suites=[corruptions]",
        f"data.heldout={tmp_path}",
    )
    code, out, _ = ns(capsys, "config", "check", "quickstart", *(word for field in conditions for word in ("--set", field)))
    lines = out.splitlines()
    assert code == 0
    # Without images, a table for several numbers of classes.
    assert [line.split(":")[0].strip() for line in lines[2:7]] == [
        "min_gain -0.02",
        "max_class_drop 0.1, 10 classes",
        "max_class_drop 0.1, 100 classes",
        "max_class_drop 0.1, 1,000 classes",
        "max_mce_rise 2",
    ]
    assert "+20 points: 265 per class" in lines[5]
    assert "from:" not in out
    _, out, _ = ns(capsys, "config", "check", "quickstart", "--heldout", "60", "--classes", "3")
    assert "with 60 images of 3 classes" in out
    assert "fewer than 100 images" in out


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["run"], 2, "give a CONFIG, or --resume"),
        (["run", "nowhere.yaml"], 2, "nowhere.yaml: cannot read: no such file"),
        (["run", "quickstrat"], 2, "no such file; name a YAML file, or the preset quickstart"),
        (["run", "quickstart", "--run", "../other"], 2, "--run: invalid value '../other': must be"),
        (["run", "quickstart", "--run", "store"], 2, "--run: invalid value 'store': must be"),
        (["data", "import", "notes.txt", "out"], 3, "notes.txt: is a file of another kind; name a folder of images"),
        (["run", "quickstart", "--set", "sead=1"], 2, "sead: unknown field; did you mean 'seed'?"),
        (["runs", "show", "latest"], 6, "no runs here; start one with `ns run`"),
        (["predict", "x.png"], 6, "no runs here"),
        (["run", "--resume"], 6, "no unfinished run to resume"),
        (["run", "--resume", "--set", "seed=1"], 2, "--set: has no effect with --resume"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(capsys, tmp_path, monkeypatch, arguments, code, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    got, out, err = ns(capsys, *arguments)
    assert (got, out) == (code, "")
    assert err.startswith("error: ")
    assert reason in err
    assert len(err.splitlines()) == 1


def test_debug_prints_the_stack_trace(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, err = ns(capsys, "--debug", "runs", "show")
    assert "Traceback" in err


@pytest.mark.parametrize(("runner", "libraries"), [("local", "kfp"), ("docker", "kfp and docker")])
def test_run_names_libraries_that_are_not_installed(capsys, monkeypatch, tmp_path, runner, libraries):
    monkeypatch.setattr("ns.cli.run.find_spec", lambda _: None)
    code, _, err = ns(capsys, "run", "quickstart", "--runner", runner, "--root", str(tmp_path))
    assert code == 2
    assert err == f"error: --runner {runner}: {libraries} not installed; pip install 'noisy-student[pipelines]'\n"
    assert list(tmp_path.iterdir()) == []


def test_run_name_keeps_its_configuration(capsys, tmp_path):
    store = LocalStore(tmp_path)
    experiment = load_experiment(resolve_preset("quickstart"))
    open_run(store, "mine", experiment, "0")
    code, _, err = ns(capsys, "run", "quickstart", "--set", "seed=1", "--run", "mine", "--root", str(tmp_path))
    assert code == 6
    assert "was started with another configuration" in err


def test_runs_show_finds_a_run_by_its_beginning(capsys, tmp_path):
    store = LocalStore(tmp_path)
    experiment = load_experiment(resolve_preset("quickstart"))
    for name in ("alpha-1", "alpha-2", "beta"):
        open_run(store, name, experiment, "0")
        time.sleep(0.002)
    root = ["--root", str(tmp_path)]
    shown = json.loads(ns(capsys, "runs", "show", "be", "--json", *root)[1])
    assert shown["run"] == "beta"
    # No process works on it any more.
    assert shown["state"] == "interrupted"
    with lock_run(store, "beta"):
        assert summarize_run(store, "beta").state == "running"
    assert shown["generations"] == []
    assert json.loads(ns(capsys, "runs", "show", "--json", *root)[1])["run"] == "beta"
    code, _, err = ns(capsys, "runs", "show", "alpha", *root)
    assert code == 6
    assert "is one of alpha-1, alpha-2" in err
    listed = json.loads(ns(capsys, "runs", "list", "--json", *root)[1])
    assert [run["run"] for run in listed] == ["alpha-1", "alpha-2", "beta"]


def make_verdict(generation: int, lost: int, won: int, **limits):
    teacher, student = np.arange(400) >= won, np.arange(400) < 400 - lost
    return evaluate_gate(
        GateConfig(**limits),
        generation=generation,
        teacher=f"store/models/{generation - 1}",
        student=f"store/models/{generation}",
        class_ids=(np.arange(400) % 2).astype(np.uint16),
        teacher_correct=teacher,
        student_correct=student,
        classes=("cat", "[dog]"),
        seed=0,
        try_number=6 * generation,
    )


def test_gate_explain_shows_numbers_and_what_was_needed(capsys, tmp_path):
    store = LocalStore(tmp_path)
    open_run(store, "one", load_experiment(resolve_preset("quickstart")), "0")
    root = ["--root", str(tmp_path)]
    assert ns(capsys, "gate", "explain", *root)[::2] == (
        6,
        "error: run one: no student has come to the gate yet; `ns run --resume` continues it\n",
    )
    for number, (lost, won, limits) in enumerate([(5, 40, {}), (20, 24, {"max_class_drop": 0.001})], 1):
        make_verdict(number, lost, won, **limits).save_file(store, f"v{number}.json")
        write_stage_note(store, "one", number, "gate", {"verdict": f"v{number}.json"}, 0.0, reused=False)
    _, out, _ = ns(capsys, "gate", "explain", "on/gen-1", *root)
    assert "generation 1: promoted" in out
    assert "would have been enough" not in out
    _, out, _ = ns(capsys, "gate", "explain", *root)
    shown = " ".join(out.split())
    assert "generation 2: refused" in shown
    assert "teacher right 356 20" in shown
    assert "teacher wrong 24 0" in shown
    assert "gain +1.00 points" in shown
    assert "McNemar's exact test: p = 0.652" in shown
    assert "try 12 on these held-out images" in shown
    assert "is at most 0.6" in shown
    assert "warning: this is try 12" in shown
    assert "would be enough on about" in shown
    explained = json.loads(ns(capsys, "gate", "explain", "--json", *root)[1])
    assert (explained["run"], explained["generation"], explained["promoted"]) == ("one", 2, False)
    assert explained["paired"] == {"both": 356, "only_teacher": 20, "only_student": 24, "neither": 0}
    assert explained["required_gain"]["images"] > 400
    code, _, err = ns(capsys, "gate", "explain", "one/gen-7", *root)
    assert (code, err) == (6, "error: run one: there is no verdict on generation 7; there are gen-1, gen-2\n")


def test_config_show_makes_paths_absolute(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, out, _ = ns(capsys, "config", "show", "quickstart", "--set", "data.pool=photos")
    assert f"pool: {tmp_path / 'photos'}" in out
    assert "labeled: digits:labeled" in out


def test_load_experiment_argument_makes_every_path_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = [
        "data.exclude=keys.txt",
        "labeling.ensemble=[one, s3://bucket/two]",
        "evaluation.sets={real: {uri: val, multi_label: ~/real.json}}",
        "students.0.model.pretrained=weights.safetensors",
    ]
    plain, loaded = (
        load_experiment(resolve_preset("quickstart"), overrides),
        options.load_experiment_argument("quickstart", overrides),
    )
    assert loaded.map_uris() == {
        "data.exclude": str(tmp_path / "keys.txt"),
        "labeling.ensemble.0": str(tmp_path / "one"),
        "labeling.ensemble.1": "s3://bucket/two",
        "evaluation.sets.real.uri": str(tmp_path / "val"),
        "evaluation.sets.real.multi_label": str(Path.home() / "real.json"),
        "students.0.model.pretrained": str(tmp_path / "weights.safetensors"),
    }
    assert with_uris(loaded, plain.map_uris()) == plain


@pytest.mark.integration
def test_plan_prints_json_and_nothing_else(capsys):
    code, out, _ = ns(capsys, "plan", "quickstart", "--seconds", "1", "--json")
    assert code == 0
    run_plan = json.loads(out)
    assert (run_plan["labeled"], run_plan["pool"], run_plan["heldout"], run_plan["classes"]) == (50, 847, 500, 10)
    assert run_plan["hours"] > 0


def test_plan_without_data_names_the_options(capsys, tmp_path):
    config = tmp_path / "later.yaml"
    config.write_text("name: later\ndata: {labeled: ./a, pool: ./b, heldout: ./c}\ngenerations: 1\n")
    code, _, err = ns(capsys, "plan", str(config), "--labeled", "1000")
    assert code == 3
    assert "data.pool: " in err
    assert "--pool N" in err
    counts = ["--labeled", "1000", "--pool", "9000", "--heldout", "100", "--classes", "20", "--image-kb", "50"]
    code, out, _ = ns(capsys, "plan", str(config), *counts, "--speed", "5", "--devices", "4", "--price", "2")
    assert code == 0
    assert "later on 4 × assumed: 5 · 10¹² multiply-adds per second" in out
    assert "device-hours in" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "list", "extra"], "unexpected extra argument"),
        (["evaluate", "model"], "Missing argument 'DATASET'"),
        (["plan", "--price", "much"], "Invalid value for '--price'"),
        (["nothing"], "No such command"),
    ],
)
def test_usage_errors_are_explained(capsys, arguments, message):
    code, _, err = ns(capsys, *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "should not happen" not in err


@pytest.mark.parametrize(
    "arguments", [["report", "no-such-run"], ["report", "show", "no-such-run"], ["report", "compare", "no-such-run"]]
)
def test_report_takes_a_run_for_its_command(capsys, tmp_path, arguments):
    store = LocalStore(tmp_path)
    open_run(store, "only", load_experiment(resolve_preset("quickstart")), __version__)
    code, out, err = ns(capsys, *arguments, "--root", str(tmp_path))
    assert (code, out) == (6, "")
    assert err.startswith("error: run no-such-run: does not exist; runs in ")
