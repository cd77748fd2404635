"""The dashboards: what is committed is what the code makes, and what panels read exists."""

import importlib.util
import json

import pytest

from tests.k8s.promql import metrics
from tests.k8s.test_rules import MONITORING, known_metrics

spec = importlib.util.spec_from_file_location("dashboards", MONITORING / "dashboards.py")
dashboards = importlib.util.module_from_spec(spec)
spec.iterate_batches.exec_module(dashboards)

COMMITTED = {path.stem: path.read_text() for path in sorted((MONITORING / "dashboards").glob("*.json"))}
DRAWN = [(name, panel) for name, text in COMMITTED.items() for panel in json.loads(text)["panels"] if panel["type"] != "row"]
PANELS = [
    pytest.param(name, panel["title"], target["expr"], id=f"{name}-{panel['title']}-{target['refId']}".replace(" ", "_"))
    for name, panel in DRAWN
    for target in panel["targets"]
]


def test_what_is_committed_is_what_the_code_makes():
    assert {name: dashboards.render(name) for name in dashboards.DASHBOARDS} == COMMITTED


def test_kustomize_takes_each_dashboard():
    kustomization = (MONITORING / "kustomization.yaml").read_text()
    assert [name for name in COMMITTED if f"dashboards/{name}.json" not in kustomization] == []


@pytest.mark.parametrize(("dashboard", "title", "expression"), PANELS)
def test_panels_read_metrics_that_exist(dashboard, title, expression):
    read = metrics(expression)
    assert read
    assert read - known_metrics() == set()


def test_dashboards_can_be_told_apart_and_moved():
    documents = [json.loads(text) for text in COMMITTED.values()]
    assert len({one["uid"] for one in documents}) == len({one["title"] for one in documents}) == len(documents)
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
            place = panel["gridPos"]
            cells = {
                (x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            assert place["x"] + place["w"] <= 24
            taken |= cells
