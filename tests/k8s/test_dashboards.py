"""The dashboards: the committed files are those of the code, and panels read metrics that exist."""

import json

import pytest

from k8s.components.monitoring import dashboards
from tests.k8s.promql import find_metrics
from tests.k8s.test_rules import MONITORING, known_metrics

COMMITTED = {path.stem: path.read_text() for path in sorted((MONITORING / "dashboards").glob("*.json"))}
DRAWN_PANELS = [
    (name, panel) for name, text in COMMITTED.items() for panel in json.loads(text)["panels"] if panel["type"] != "row"
]
PANELS = [
    pytest.param(name, panel["title"], target["expr"], id=f"{name}-{panel['title']}-{target['refId']}".replace(" ", "_"))
    for name, panel in DRAWN_PANELS
    for target in panel["targets"]
]


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
