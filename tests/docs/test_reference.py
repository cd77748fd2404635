"""The reference pages name everything that the code has."""

import re

from docs import reference
from ns.cli.app import app
from ns.config.schema import Experiment
from ns.core import telemetry


def list_fields(page: str) -> set[str]:
    """Names of fields, below their section's."""
    names, section = set(), ""
    for line in page.splitlines():
        if title := re.match(r"## (?:`(.+)`|The experiment)", line):
            section = f"{title[1]}." if title[1] else ""
        elif row := re.match(r"\| `(\w+)` \|", line):
            names.add(f"{section}{row[1]}")
    return names


def test_config_page_has_every_field():
    page = reference.render_config_page()
    names = list_fields(page)
    assert {"seed", "students", "data.pool", "teacher.train.optimizer.lr", "evaluation.sets.NAME.uri", "gate.spend"} <= names
    definitions = Experiment.model_json_schema()["$defs"].values()
    fields = {
        name for definition in definitions for name in definition["properties"] if name not in ("model", "noise", "train")
    }
    missing = fields - {name.rpartition(".")[2] for name in names} - {"optimizer"}
    assert missing == set()


def test_config_page_tells_default_range_and_the_papers_value():
    page = reference.render_config_page()
    (dropout,) = [
        line for line in page.split("## `teacher.noise`")[1].split("## ")[0].splitlines() if line.startswith("| `dropout`")
    ]
    assert dropout.startswith(
        "| `dropout` | `0.2` | Dropout rate before the classifier.<br>*number ≥ 0, < 1*; **paper: 0.2 (B0, B1)"
    )
    (labeled,) = [line for line in page.splitlines() if line.startswith("| `labeled` ")]
    assert labeled.startswith("| `labeled` |  | URI of the labeled images")


def test_command_page_has_every_command_with_its_options():
    page = reference.render_command_page(app)
    titles = re.findall(r"^## `ns (.+)`$", page, re.MULTILINE)
    assert {"run", "plan", "config check", "labels select", "promote move", "doctor cluster"} <= set(titles)
    body = page.split("## `ns run`")[1].split("\n## ")[0]
    assert "`ns run quickstart --set seed=1`" in body
    assert "| `--root FOLDER|URI` | Store of runs, models, label sets and datasets. [default: runs] |" in body
    assert "[cyan]" not in page


def test_metric_page_has_every_metric():
    page = reference.render_metric_page()
    for registry in (telemetry.REGISTRY, telemetry.SUMMARY):
        for family in registry.collect():
            assert re.search(rf"^\| `{family.name}(_total)?` \| {family.type} \|", page, re.MULTILINE), family.name


def test_message_page_has_errors_refusals_and_warnings():
    messages = {message.text: message for message in reference.list_messages()}
    refusal = messages["must be the name of a timm architecture; sources such as hf-hub: and local-dir: are never read"]
    assert (refusal.exit_code, refusal.path) == (2, "ns/config/schema.py")
    assert messages["no metrics endpoint; work continues without it"].exit_code is None
    codes = {message.exit_code for message in messages.values()}
    assert {1, 2, 3, 4, 5, 6, 7, None} - codes <= {1}
    assert not any("{" in text and "}" in text and "self" in text for text in messages)


def test_table_keeps_bars_of_code_and_escapes_others():
    assert reference.format_table(["a"], [["x|y `p|q`\nz"]]).splitlines()[-1] == "| x\\|y `p|q` z |"
