"""Writes the Grafana dashboards beside it, as JSON that kustomize puts into ConfigMaps: make dashboards

A panel is a title, queries and a unit; where it stands follows from the order. Every dashboard has the same variables: the data source,
namespaces and runs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "dashboards"
SCHEMA_VERSION = 39
WIDTH = 24
HEIGHT = 8
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN_SELECTOR = '{namespace=~"$namespace", run_id=~"$run"}'
"""Which series are shown, of those that a rule has joined with runs."""

Json = dict[str, Any]


class PromQuery(NamedTuple):
    expr: str
    legend: str


class Panel(NamedTuple):
    title: str
    kind: str
    queries: Sequence[PromQuery]
    unit: str
    description: str = ""
    width: int = 8
    stacked: bool = False
    points: bool = False
    """For facts that are shown for a minute only."""
    maximum: float | None = None


class PanelRow(NamedTuple):
    title: str
    panels: Sequence[Panel]


def make_graph(title: str, *queries: PromQuery, unit: str = "short", **options: Any) -> Panel:
    return Panel(title, "timeseries", queries, unit, **options)


def make_stat(title: str, *queries: PromQuery, unit: str = "short", width: int = 4, **options: Any) -> Panel:
    return Panel(title, "stat", queries, unit, width=width, **options)


def join_run(metric: str) -> str:
    """A metric of chosen runs, with the run's name."""
    return f"{metric} * on (namespace, pod) group_left (run_id) nst:pod:run{RUN_SELECTOR}"


def join_last_value(metric: str, by: str) -> str:
    """The last value in the time that is shown; whoever showed it may be gone."""
    return f"last_over_time((max by ({by}) ({join_run(metric)}))[$__range:30s])"


# --- What is on them

OVERVIEW = [
    PanelRow(
        "Now",
        [
            make_stat("Runs at work", PromQuery(f"count(count by (namespace, run_id) (nst:pod:run{RUN_SELECTOR}))", "runs")),
            make_stat("Pods at work", PromQuery(f"count(nst:pod:run{RUN_SELECTOR})", "pods")),
            make_stat("Generation", PromQuery(join_last_value("nst_iteration", "run_id"), "{{run_id}}")),
            make_stat("Alerts", PromQuery('count(ALERTS{alertname=~"Nst.*", alertstate="firing"})', "firing")),
            make_stat(
                "Held-out accuracy",
                PromQuery(join_last_value('nst_eval_accuracy_ratio{split="heldout"}', "run_id"), "{{run_id}}"),
                unit="percentunit",
            ),
            make_stat(
                "Gate",
                PromQuery(join_last_value("nst_gate_passed", "run_id"), "{{run_id}}"),
                about="1: the student became the teacher.",
            ),
            Panel(
                "Steps",
                "state-timeline",
                [PromQuery(f"max by (run_id, stage) ({join_run('nst_stage_running')})", "{{run_id}} {{stage}}")],
                "short",
                description="1 at work, 0 done and waiting to be scraped.",
                width=WIDTH,
            ),
        ],
    ),
    PanelRow(
        "Progress",
        [
            make_graph("Images a second", PromQuery(f"nst:images:rate5m{RUN_SELECTOR}", "{{run_id}} {{stage}}"), unit="ops"),
            make_graph(
                "Training done",
                PromQuery(f"nst:training:done_ratio{RUN_SELECTOR}", "{{run_id}} {{pod}}"),
                unit="percentunit",
                maximum=1,
            ),
            make_graph(
                "Shards labeled",
                PromQuery(f"nst:shards:done_ratio{RUN_SELECTOR}", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
                about="Of the tasks under way.",
            ),
        ],
    ),
    PanelRow(
        "What came of it",
        [
            make_graph(
                "Accuracy",
                PromQuery(f"max by (run_id, split) ({join_run('nst_eval_accuracy_ratio')})", "{{run_id}} {{split}}"),
                unit="percentunit",
                points=True,
            ),
            make_graph(
                "Gain of the student",
                PromQuery(f"max by (run_id, bound) ({join_run('nst_loop_gain_ratio')})", "{{run_id}} {{bound}}"),
                unit="percentunit",
                points=True,
                about="Held-out top-1 less the teacher's, and the gate's bounds on it.",
            ),
            make_graph(
                "Conditions of the gate",
                PromQuery(f"max by (run_id, guard) ({join_run('nst_gate_guard_passed')})", "{{run_id}} {{guard}}"),
                points=True,
                about="1 holds, 0 does not.",
            ),
            make_graph(
                "Corruptions and perturbations",
                PromQuery(f"max by (run_id) ({join_run('nst_eval_mce')})", "{{run_id}} mCE"),
                PromQuery(f"max by (run_id) ({join_run('nst_eval_mfr')})", "{{run_id}} mFR"),
                unit="percent",
                points=True,
            ),
            make_graph(
                "Accuracy under attack",
                PromQuery(f"max by (run_id, attack) ({join_run('nst_eval_attacked_accuracy_ratio')})", "{{run_id}} {{attack}}"),
                unit="percentunit",
                points=True,
            ),
        ],
    ),
    PanelRow(
        "Last run of each pipeline that ended well",
        [
            make_stat(
                "Since", PromQuery("time() - max by (pipeline) (nst_last_success_timestamp_seconds)", "{{pipeline}}"), unit="s"
            ),
            make_stat("Took", PromQuery("max by (pipeline) (nst_last_run_duration_seconds)", "{{pipeline}}"), unit="s"),
            make_stat(
                "Accuracy", PromQuery("max by (pipeline) (nst_last_run_accuracy_ratio)", "{{pipeline}}"), unit="percentunit"
            ),
            make_stat("Gain", PromQuery("max by (pipeline) (nst_last_run_gain_ratio)", "{{pipeline}}"), unit="percentunit"),
            make_stat("Promotions", PromQuery("max by (pipeline) (nst_last_run_promotions)", "{{pipeline}}")),
        ],
    ),
]

LABELED_PER_SECOND = f'nst:images:rate5m{RUN_SELECTOR[:-1]}, stage="label-shards"}}'
LABELING_TASKS = ', component="label-shards"'

LABELING = [
    PanelRow(
        "Labeling",
        [
            make_graph("Images a second", PromQuery(LABELED_PER_SECOND, "{{run_id}}"), unit="ops"),
            make_graph(
                "Images a second, by task",
                PromQuery(join_run('rate(nst_images_processed_total{stage="label-shards"}[$__rate_interval])'), "{{pod}}"),
                unit="ops",
                stacked=True,
            ),
            make_graph(
                "Shards",
                PromQuery(f"sum by (run_id) ({join_run('nst_shards_done')})", "{{run_id}} done"),
                PromQuery(f"sum by (run_id) ({join_run('nst_shards')})", "{{run_id}} of"),
                about="Of the tasks under way.",
            ),
            make_graph(
                "Waiting for images",
                PromQuery(f"nst:data_wait:ratio5m{RUN_SELECTOR}", "{{pod}}"),
                unit="percentunit",
                maximum=1,
            ),
            make_graph(
                "Memory",
                PromQuery(
                    f'sum by (run_id, pod) (container_memory_working_set_bytes{{container="main"}} '
                    f"* on (namespace, pod) group_left (run_id) nst:pod:run{RUN_SELECTOR})",
                    "{{pod}}",
                ),
                unit="bytes",
            ),
        ],
    ),
    PanelRow(
        "Confidence",
        [
            Panel(
                "Confidence of the teacher",
                "heatmap",
                [
                    PromQuery(
                        f"sum by (le) ({join_run('increase(nst_pseudo_label_confidence_bucket[$__rate_interval])')})", "{{le}}"
                    )
                ],
                "short",
                width=12,
            ),
            make_graph(
                "Confidence of the teacher, quartiles",
                *(
                    PromQuery(
                        f"histogram_quantile({share}, sum by (run_id, le) ({join_run('nst_pseudo_label_confidence_bucket')}))",
                        "{{run_id}} " + name,
                    )
                    for share, name in ((0.25, "lower quartile"), (0.5, "median"), (0.75, "upper quartile"))
                ),
                unit="percentunit",
                maximum=1,
                width=12,
            ),
        ],
    ),
    PanelRow(
        "Selection",
        [
            make_graph(
                "What became of the pool",
                PromQuery(f"max by (run_id, outcome) ({join_run('nst_pseudo_labels_total')})", "{{run_id}} {{outcome}}"),
                points=True,
            ),
            make_graph(
                "Share kept",
                PromQuery(f"nst:pseudo_labels:kept_ratio{RUN_SELECTOR}", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
                points=True,
            ),
            make_graph(
                "Classes covered",
                PromQuery(f"max by (run_id) ({join_run('nst_class_coverage_ratio')})", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
                points=True,
            ),
            make_graph(
                "Images kept of a class",
                PromQuery(f"max by (run_id, statistic) ({join_run('nst_class_kept_images')})", "{{run_id}} {{statistic}}"),
                points=True,
            ),
            make_graph(
                "Labels that changed",
                PromQuery(f"max by (run_id) ({join_run('nst_label_churn_ratio')})", "{{run_id}}"),
                PromQuery(f"max by (run_id) ({join_run('nst_label_churn_limit_ratio')})", "{{run_id}} limit"),
                unit="percentunit",
                points=True,
                about="Since the generation before.",
            ),
        ],
    ),
]

TRAINING = [
    PanelRow(
        "Progress",
        [
            make_stat(
                "Done", PromQuery(f"max by (run_id) (nst:training:done_ratio{RUN_SELECTOR})", "{{run_id}}"), unit="percentunit"
            ),
            make_stat(
                "Time left",
                PromQuery(
                    f"max by (run_id) (({join_run('(nst_training_steps - nst_training_steps_done)')}) "
                    "/ on (namespace, pod) group_left () (deriv(nst_training_steps_done[5m]) > 0))",
                    "{{run_id}}",
                ),
                unit="s",
                about="At the pace of the last five minutes.",
            ),
            make_stat("Steps", PromQuery(f"max by (run_id) ({join_run('nst_training_steps_done')})", "{{run_id}}")),
            make_stat(
                "Checkpoint",
                PromQuery(f"max by (run_id) ({join_run('nst_checkpoint_age_seconds')})", "{{run_id}} age"),
                PromQuery(f"max by (run_id) ({join_run('nst_checkpoint_interval_seconds')})", "{{run_id}} wanted"),
                unit="s",
                about="What a kill would cost.",
            ),
            make_graph(
                "Images a second", PromQuery(f'nst:images:rate5m{RUN_SELECTOR[:-1]}, stage="train"}}', "{{run_id}}"), unit="ops"
            ),
        ],
    ),
    PanelRow(
        "Learning",
        [
            make_graph("Loss", PromQuery(f"max by (run_id, part) ({join_run('nst_loss')})", "{{run_id}} {{part}}")),
            make_graph(
                "Accuracy on noised labeled images",
                PromQuery(f"max by (run_id) ({join_run('nst_labeled_accuracy_ratio')})", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
            ),
            make_graph(
                "Student agrees with teacher",
                PromQuery(f"max by (run_id) ({join_run('nst_teacher_student_agreement_ratio')})", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
                about="On noised pseudo-labeled images.",
            ),
            make_graph("Learning rate", PromQuery(f"max by (run_id) ({join_run('nst_learning_rate')})", "{{run_id}}")),
        ],
    ),
    PanelRow(
        "Speed",
        [
            make_graph(
                "Step",
                *(
                    PromQuery(
                        f"histogram_quantile({share}, sum by (run_id, le) "
                        f"({join_run('rate(nst_step_duration_seconds_bucket[$__rate_interval])')}))",
                        "{{run_id}} " + name,
                    )
                    for share, name in ((0.5, "median"), (0.99, "slowest 1%"))
                ),
                unit="s",
            ),
            make_graph(
                "Waiting for images",
                PromQuery(f"nst:data_wait:ratio5m{RUN_SELECTOR}", "{{pod}}"),
                unit="percentunit",
                maximum=1,
            ),
            make_graph(
                "GPUs at work",
                PromQuery(f"avg by (run_id, pod) (nst:run_gpu:active_ratio{RUN_SELECTOR})", "{{pod}}"),
                unit="percentunit",
                maximum=1,
            ),
        ],
    ),
]

GPUS = [
    PanelRow(
        "Pools",
        [
            make_graph(
                "GPUs of each pool",
                PromQuery(
                    'sum by (pool) (kube_node_status_allocatable{resource=~"nvidia_com_(gpu|mig_.*)|amd_com_gpu"} '
                    "* on (node) group_left (pool) nst:node:pool)",
                    "{{pool}}",
                ),
                stacked=True,
            ),
            make_graph(
                "Held by runs", PromQuery(f"sum by (pool) (nst:run_gpus:count{RUN_SELECTOR})", "{{pool}}"), stacked=True
            ),
            make_graph(
                "Pods that wait for a node",
                PromQuery(
                    'count by (component) ((kube_pod_status_phase{namespace=~"$namespace", phase="Pending"} == 1) '
                    "* on (namespace, pod) group_left (component) nst:pod:component)",
                    "{{component}}",
                ),
                stacked=True,
            ),
        ],
    ),
    PanelRow(
        "Use by runs",
        [
            make_graph(
                "At work",
                PromQuery(f"avg by (run_id) (nst:run_gpu:active_ratio{RUN_SELECTOR})", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
                about="Share of time in which the GPU did anything.",
            ),
            make_graph(
                "At work, by GPU",
                PromQuery(f"nst:run_gpu:active_ratio{RUN_SELECTOR}", "{{Hostname}} {{gpu}} {{modelName}}"),
                unit="percentunit",
                maximum=1,
            ),
            make_graph(
                "GPUs that do nothing",
                PromQuery(f"count by (run_id) (nst:run_gpu:active_ratio{RUN_SELECTOR} < 0.1)", "{{run_id}}"),
                about="Held, and less than a tenth at work.",
            ),
        ],
    ),
    PanelRow(
        "Cards",
        [
            make_graph(
                "Tensor cores at work",
                PromQuery("avg by (Hostname, gpu) (DCGM_FI_PROF_PIPE_TENSOR_ACTIVE)", "{{Hostname}} {{gpu}}"),
                unit="percentunit",
                maximum=1,
            ),
            make_graph(
                "Memory",
                PromQuery("max by (Hostname, gpu) (DCGM_FI_DEV_FB_USED) * 1024 * 1024", "{{Hostname}} {{gpu}}"),
                unit="bytes",
            ),
            make_graph(
                "Power", PromQuery("max by (Hostname, gpu) (DCGM_FI_DEV_POWER_USAGE)", "{{Hostname}} {{gpu}}"), unit="watt"
            ),
        ],
    ),
]

HELD = f"nst:run_gpus:count{RUN_SELECTOR}"


def hourly_price(conditions: str = "") -> str:
    """Of the GPUs held at an instant, by namespace, run, pool and step. `more`: conditions on these."""
    spot, steady = (f'{HELD[:-1]}, pool{sign}"$spot_pools"{conditions}}}' for sign in ("=~", "!~"))
    return f"({spot} * $spot_price or {steady} * $price)"


def sum_over_range(hourly: str, by: str = "") -> str:
    """Adds up what is said by the hour, over the time that is shown: minute by minute, since pods come and go."""
    return f"sum by ({by}) (sum_over_time({hourly}[$__range:1m])) / 60"


COST = [
    PanelRow(
        "In the time that is shown",
        [
            make_stat("GPU-hours", PromQuery(sum_over_range(HELD), "all"), width=6),
            make_stat("Cost", PromQuery(sum_over_range(hourly_price()), "all"), unit="currencyUSD", width=6),
            make_stat(
                "Cost of GPUs that did nothing",
                PromQuery(
                    f"sum ({sum_over_range(hourly_price(), 'run_id')} * on (run_id) "
                    f"(1 - avg by (run_id) (avg_over_time(nst:run_gpu:active_ratio{RUN_SELECTOR}[$__range]))))",
                    "all",
                ),
                unit="currencyUSD",
                width=6,
            ),
            make_stat(
                "Cost of a million labels",
                PromQuery(
                    f"1e6 * {sum_over_range(hourly_price(LABELING_TASKS))} "
                    f"/ (sum (sum_over_time({LABELED_PER_SECOND}[$__range:1m])) * 60)",
                    "labeling",
                ),
                unit="currencyUSD",
                width=6,
            ),
        ],
    ),
    PanelRow(
        "Cost by",
        [
            Panel(title, "bargauge", [PromQuery(sum_over_range(hourly_price(), by), f"{{{{{by}}}}}")], "currencyUSD")
            for title, by in (("Run", "run_id"), ("Pool", "pool"), ("Step", "component"))
        ],
    ),
    PanelRow(
        "Over time",
        [
            make_graph(
                "Cost an hour",
                PromQuery(f"sum by (run_id) ({hourly_price()})", "{{run_id}}"),
                unit="currencyUSD",
                stacked=True,
                width=12,
            ),
            make_graph("GPUs held", PromQuery(f"sum by (run_id) ({HELD})", "{{run_id}}"), stacked=True, width=12),
        ],
    ),
]

DASHBOARDS = {
    "runs": ("Noisy Student: runs", OVERVIEW),
    "labeling": ("Noisy Student: labeling", LABELING),
    "training": ("Noisy Student: training", TRAINING),
    "gpu-pools": ("Noisy Student: GPU pools", GPUS),
    "cost": ("Noisy Student: cost", COST),
}
TEXT_VARIABLES = {
    "cost": (
        ("price", "Price of a GPU-hour", "2.5"),
        ("spot_price", "Price of a spot GPU-hour", "1"),
        ("spot_pools", "Spot pools (regular expression)", ".*spot.*"),
    )
}
"""Variables of a dashboard that are typed in: name, label, default."""


# --- How Grafana wants it


def make_variables(name: str) -> list[Json]:
    def make_query_variable(variable: str, label: str, query: str) -> Json:
        return {
            "type": "query",
            "name": variable,
            "label": label,
            "datasource": DATA_SOURCE,
            "query": {"query": query, "refId": variable},
            "definition": query,
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        }

    return [
        {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "current": {}},
        make_query_variable("namespace", "Namespace", "label_values(nst:pod:run, namespace)"),
        make_query_variable("run", "Run", 'label_values(nst:pod:run{namespace=~"$namespace"}, run_id)'),
        *(
            {"type": "textbox", "name": variable, "label": label, "query": value, "current": {"text": value, "value": value}}
            for variable, label, value in TEXT_VARIABLES.get(name, ())
        ),
    ]


def render_panel(number: int, spec: Panel, x: int, y: int) -> Json:
    custom: Json = {}
    options: Json = {}
    if spec.kind == "timeseries":
        custom = {
            "fillOpacity": 10 if spec.stacked else 0,
            "showPoints": "always" if spec.points else "never",
            "spanNulls": False,
        }
        custom["stacking"] = {"mode": "normal" if spec.stacked else "none"}
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    if spec.kind in ("stat", "bargauge"):
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}}
    if spec.kind == "heatmap":
        options = {"calculate": False, "yAxis": {"unit": "percentunit"}}
    defaults: Json = {"unit": spec.unit, "custom": custom}
    if spec.kind == "timeseries":
        defaults["min"] = None if spec.title.startswith(("Gain", "Loss")) else 0
    if spec.maximum is not None:
        defaults["max"] = spec.maximum
    return {
        "id": number,
        "type": spec.kind,
        "title": spec.title,
        "description": spec.description,
        "datasource": DATA_SOURCE,
        "gridPos": {"x": x, "y": y, "w": spec.width, "h": HEIGHT},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATA_SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                **({"format": "heatmap"} if spec.kind == "heatmap" else {}),
                **({"instant": True, "range": False} if spec.kind == "bargauge" else {}),
            }
            for index, query in enumerate(spec.queries)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def layout_panels(rows: Sequence[PanelRow]) -> list[Json]:
    """Rows from top to bottom, panels from left to right as far as they fit."""
    rendered: list[Json] = []
    y = 0
    for row in rows:
        rendered.append(
            {
                "id": len(rendered) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        x, y = 0, y + 1
        for spec in row.panels:
            if x + spec.width > WIDTH:
                x, y = 0, y + HEIGHT
            rendered.append(render_panel(len(rendered) + 1, spec, x, y))
            x += spec.width
        y += HEIGHT
    return rendered


def make_dashboard(name: str) -> Json:
    title, rows = DASHBOARDS[name]
    return {
        "uid": f"noisy-student-{name}",
        "title": title,
        "tags": ["noisy-student"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": False,
        "graphTooltip": 1,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "timezone": "browser",
        "links": [
            {"type": "dashboards", "tags": ["noisy-student"], "title": "Noisy Student", "asDropdown": True, "keepTime": True}
        ],
        "templating": {"list": make_variables(name)},
        "annotations": {"list": []},
        "panels": layout_panels(rows),
    }


def render_dashboard(name: str) -> str:
    return json.dumps(make_dashboard(name), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(render_dashboard(name), encoding="utf-8")


if __name__ == "__main__":
    main()
