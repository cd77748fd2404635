"""The dashboards: the committed files are those of the code and of Grafana's schemas, and panels read metrics that exist."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from k8s.components.monitoring import dashboards
from tests.k8s.promql import find_metrics
from tests.k8s.test_rules import MONITORING, known_metrics

COMMITTED = {path.stem: path.read_text() for path in sorted((MONITORING / "dashboards").glob("*.json"))}
SCHEMAS = MONITORING.parents[1] / "schemas" / "grafana"
DRAWN_PANELS = [
    (name, panel) for name, text in COMMITTED.items() for panel in json.loads(text)["panels"] if panel["type"] != "row"
]
PANELS = [
    pytest.param(name, panel["title"], target["expr"], id=f"{name}-{panel['title']}-{target['refId']}".replace(" ", "_"))
    for name, panel in DRAWN_PANELS
    for target in panel["targets"]
]


def find_grafana_errors(dashboard: dict[str, Any]) -> Iterator[str]:
    """What Grafana's schemas refuse. That of a dashboard leaves options, fields and queries to the plugins' own."""

    def check(place: str, schema: str, definition: str, value: Any) -> Iterator[str]:
        definitions = json.loads((SCHEMAS / f"{schema}.json").read_text())["definitions"]
        validator = jsonschema.Draft7Validator({"$ref": f"#/definitions/{definition}", "definitions": definitions})
        yield from (f"{place} {error.json_path}: {error.message}" for error in validator.iter_errors(value))

    yield from check("dashboard", "dashboard", "Dashboard", {**dashboard, "panels": []})
    for panel in dashboard["panels"]:
        title, plugin, is_row = panel["title"], panel["type"].replace("-", ""), panel["type"] == "row"
        yield from check(title, "dashboard", "RowPanel" if is_row else "Panel", panel)
        if not is_row:
            yield from check(title, plugin, "Options", panel["options"])
            if "custom" in panel["fieldConfig"]["defaults"]:
                yield from check(title, plugin, "FieldConfig", panel["fieldConfig"]["defaults"]["custom"])
            for target in panel["targets"]:
                yield from check(title, "prometheus", "Dataquery", target)


@pytest.mark.parametrize("name", COMMITTED)
def test_dashboards_are_what_grafana_defines(name):
    assert list(find_grafana_errors(json.loads(COMMITTED[name]))) == []


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (["refresh"], 30, "dashboard $.refresh: 30 is not of type 'string'"),
        (["templating", "list", 0, "type"], "source", "dashboard $.templating.list[0].type: 'source' is not one of"),
        (["panels", 1, "gridPos", "w"], 25, "Active runs $.gridPos.w: 25 is greater than the maximum of 24"),
        (["panels", 1, "options", "hue"], "value", "Active runs $: Additional properties are not allowed ('hue'"),
        (["panels", -1, "targets", 0, "legend"], "run", "('legend' was unexpected)"),
        (["panels", 9, "fieldConfig", "defaults", "custom", "fillOpacity"], "full", "$.fillOpacity: 'full' is not of type"),
    ],
)
def test_schemas_refuse_what_grafana_does_not_define(path, value, expected):
    dashboard = copy.deepcopy(json.loads(COMMITTED["runs"]))
    part = dashboard
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    errors = list(find_grafana_errors(dashboard))
    assert any(expected in error for error in errors), errors


def test_committed_dashboards_are_those_of_the_code():
    assert {name: dashboards.render_dashboard(name) for name in dashboards.DASHBOARDS} == COMMITTED


def test_kustomization_includes_each_dashboard():
    kustomization = (MONITORING / "kustomization.yaml").read_text()
    assert [name for name in COMMITTED if f"dashboards/{name}.json" not in kustomization] == []


@pytest.mark.parametrize(("dashboard", "title", "expression"), PANELS)
def test_panels_read_metrics_that_exist(dashboard, title, expression):
    read = find_metrics(expression)
    assert read
    assert read - known_metrics() == set()


def test_dashboards_have_own_ids_and_variables():
    documents = [json.loads(text) for text in COMMITTED.values()]
    assert (
        len({document["uid"] for document in documents}) == len({document["title"] for document in documents}) == len(documents)
    )
    for document in documents:
        variables = {variable["name"] for variable in document["templating"]["list"]}
        assert {"datasource", "namespace", "run"} <= variables
        panels = document["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        assert all(panel.get("datasource", {}).get("uid", "${datasource}") == "${datasource}" for panel in panels)


def test_panels_do_not_overlap():
    for text in COMMITTED.values():
        taken = set()
        for panel in json.loads(text)["panels"]:
            x, y, width, height = (panel["gridPos"][side] for side in "xywh")
            cells = {(column, row) for column in range(x, x + width) for row in range(y, y + height)}
            assert not cells & taken, panel["title"]
            assert x + width <= 24
            taken |= cells
