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
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
CHOSEN = '{namespace=~"$namespace", run_id=~"$run"}'
"""Which series are shown, of those that a rule has joined with runs."""

Json = dict[str, Any]


class Query(NamedTuple):
    expr: str
    legend: str


class Panel(NamedTuple):
    title: str
    kind: str
    queries: Sequence[Query]
    unit: str
    about: str = ""
    width: int = 8
    stacked: bool = False
    points: bool = False
    """For facts that are shown for a minute only."""
    maximum: float | None = None


class Row(NamedTuple):
    title: str
    panels: Sequence[Panel]


def graph(title: str, *queries: Query, unit: str = "short", **options: Any) -> Panel:
    return Panel(title, "timeseries", queries, unit, **options)


def stat(title: str, *queries: Query, unit: str = "short", width: int = 4, **options: Any) -> Panel:
    return Panel(title, "stat", queries, unit, width=width, **options)


def of_run(metric: str) -> str:
    """A metric of chosen runs, with the run's name."""
    return f"{metric} * on (namespace, pod) group_left (run_id) nst:pod:run{CHOSEN}"


def last_of_run(metric: str, by: str) -> str:
    """The last value in the time that is shown; whoever showed it may be gone."""
    return f"last_over_time((max by ({by}) ({of_run(metric)}))[$__range:30s])"


# --- What is on them

OVERVIEW = [
    Row(
        "Now",
        [
            stat("Runs at work", Query(f"count(count by (namespace, run_id) (nst:pod:run{CHOSEN}))", "runs")),
            stat("Pods at work", Query(f"count(nst:pod:run{CHOSEN})", "pods")),
            stat("Generation", Query(last_of_run("nst_iteration", "run_id"), "{{run_id}}")),
            stat("Alerts", Query('count(ALERTS{alertname=~"Nst.*", alertstate="firing"})', "firing")),
            stat(
                "Held-out accuracy",
                Query(last_of_run('nst_eval_accuracy_ratio{split="heldout"}', "run_id"), "{{run_id}}"),
                unit="percentunit",
            ),
            stat(
                "Gate",
                Query(last_of_run("nst_gate_passed", "run_id"), "{{run_id}}"),
                about="1: the student became the teacher.",
            ),
            Panel(
                "Steps",
                "state-timeline",
                [Query(f"max by (run_id, stage) ({of_run('nst_stage_running')})", "{{run_id}} {{stage}}")],
                "short",
                about="1 at work, 0 done and waiting to be scraped.",
                width=WIDTH,
            ),
        ],
    ),
    Row(
        "Progress",
        [
            graph("Images a second", Query(f"nst:images:rate5m{CHOSEN}", "{{run_id}} {{stage}}"), unit="ops"),
            graph(
                "Training done", Query(f"nst:training:done_ratio{CHOSEN}", "{{run_id}} {{pod}}"), unit="percentunit", maximum=1
            ),
            graph(
                "Shards labelled",
                Query(f"nst:shards:done_ratio{CHOSEN}", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
                about="Of the tasks under way.",
            ),
        ],
    ),
    Row(
        "What came of it",
        [
            graph(
                "Accuracy",
                Query(f"max by (run_id, split) ({of_run('nst_eval_accuracy_ratio')})", "{{run_id}} {{split}}"),
                unit="percentunit",
                points=True,
            ),
            graph(
                "Gain of the student",
                Query(f"max by (run_id, bound) ({of_run('nst_loop_gain_ratio')})", "{{run_id}} {{bound}}"),
                unit="percentunit",
                points=True,
                about="Held-out top-1 less the teacher's, and the gate's bounds on it.",
            ),
            graph(
                "Conditions of the gate",
                Query(f"max by (run_id, guard) ({of_run('nst_gate_guard_passed')})", "{{run_id}} {{guard}}"),
                points=True,
                about="1 holds, 0 does not.",
            ),
            graph(
                "Corruptions and perturbations",
                Query(f"max by (run_id) ({of_run('nst_eval_mce')})", "{{run_id}} mCE"),
                Query(f"max by (run_id) ({of_run('nst_eval_mfr')})", "{{run_id}} mFR"),
                unit="percent",
                points=True,
            ),
            graph(
                "Accuracy under attack",
                Query(f"max by (run_id, attack) ({of_run('nst_eval_attacked_accuracy_ratio')})", "{{run_id}} {{attack}}"),
                unit="percentunit",
                points=True,
            ),
        ],
    ),
    Row(
        "Last run of each pipeline that ended well",
        [
            stat("Since", Query("time() - max by (pipeline) (nst_last_success_timestamp_seconds)", "{{pipeline}}"), unit="s"),
            stat("Took", Query("max by (pipeline) (nst_last_run_duration_seconds)", "{{pipeline}}"), unit="s"),
            stat("Accuracy", Query("max by (pipeline) (nst_last_run_accuracy_ratio)", "{{pipeline}}"), unit="percentunit"),
            stat("Gain", Query("max by (pipeline) (nst_last_run_gain_ratio)", "{{pipeline}}"), unit="percentunit"),
            stat("Promotions", Query("max by (pipeline) (nst_last_run_promotions)", "{{pipeline}}")),
        ],
    ),
]

LABELLED_A_SECOND = f'nst:images:rate5m{CHOSEN[:-1]}, stage="label-shards"}}'
LABELLING_TASKS = ', component="label-shards"'

LABELLING = [
    Row(
        "Labelling",
        [
            graph("Images a second", Query(LABELLED_A_SECOND, "{{run_id}}"), unit="ops"),
            graph(
                "Images a second, by task",
                Query(of_run('rate(nst_images_processed_total{stage="label-shards"}[$__rate_interval])'), "{{pod}}"),
                unit="ops",
                stacked=True,
            ),
            graph(
                "Shards",
                Query(f"sum by (run_id) ({of_run('nst_shards_done')})", "{{run_id}} done"),
                Query(f"sum by (run_id) ({of_run('nst_shards')})", "{{run_id}} of"),
                about="Of the tasks under way.",
            ),
            graph("Waiting for images", Query(f"nst:data_wait:ratio5m{CHOSEN}", "{{pod}}"), unit="percentunit", maximum=1),
            graph(
                "Memory",
                Query(
                    f'sum by (run_id, pod) (container_memory_working_set_bytes{{container="main"}} '
                    f"* on (namespace, pod) group_left (run_id) nst:pod:run{CHOSEN})",
                    "{{pod}}",
                ),
                unit="bytes",
            ),
        ],
    ),
    Row(
        "Confidence",
        [
            Panel(
                "Confidence of the teacher",
                "heatmap",
                [Query(f"sum by (le) ({of_run('increase(nst_pseudo_label_confidence_bucket[$__rate_interval])')})", "{{le}}")],
                "short",
                width=12,
            ),
            graph(
                "Confidence of the teacher, quartiles",
                *(
                    Query(
                        f"histogram_quantile({share}, sum by (run_id, le) ({of_run('nst_pseudo_label_confidence_bucket')}))",
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
    Row(
        "Selection",
        [
            graph(
                "What became of the pool",
                Query(f"max by (run_id, outcome) ({of_run('nst_pseudo_labels_total')})", "{{run_id}} {{outcome}}"),
                points=True,
            ),
            graph(
                "Share kept",
                Query(f"nst:pseudo_labels:kept_ratio{CHOSEN}", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
                points=True,
            ),
            graph(
                "Classes covered",
                Query(f"max by (run_id) ({of_run('nst_class_coverage_ratio')})", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
                points=True,
            ),
            graph(
                "Images kept of a class",
                Query(f"max by (run_id, statistic) ({of_run('nst_class_kept_images')})", "{{run_id}} {{statistic}}"),
                points=True,
            ),
            graph(
                "Labels that changed",
                Query(f"max by (run_id) ({of_run('nst_label_churn_ratio')})", "{{run_id}}"),
                Query(f"max by (run_id) ({of_run('nst_label_churn_limit_ratio')})", "{{run_id}} limit"),
                unit="percentunit",
                points=True,
                about="Since the generation before.",
            ),
        ],
    ),
]

TRAINING = [
    Row(
        "Progress",
        [
            stat("Done", Query(f"max by (run_id) (nst:training:done_ratio{CHOSEN})", "{{run_id}}"), unit="percentunit"),
            stat(
                "Time left",
                Query(
                    f"max by (run_id) (({of_run('(nst_training_steps - nst_training_steps_done)')}) "
                    "/ on (namespace, pod) group_left () (deriv(nst_training_steps_done[5m]) > 0))",
                    "{{run_id}}",
                ),
                unit="s",
                about="At the pace of the last five minutes.",
            ),
            stat("Steps", Query(f"max by (run_id) ({of_run('nst_training_steps_done')})", "{{run_id}}")),
            stat(
                "Checkpoint",
                Query(f"max by (run_id) ({of_run('nst_checkpoint_age_seconds')})", "{{run_id}} age"),
                Query(f"max by (run_id) ({of_run('nst_checkpoint_interval_seconds')})", "{{run_id}} wanted"),
                unit="s",
                about="What a kill would cost.",
            ),
            graph("Images a second", Query(f'nst:images:rate5m{CHOSEN[:-1]}, stage="train"}}', "{{run_id}}"), unit="ops"),
        ],
    ),
    Row(
        "Learning",
        [
            graph("Loss", Query(f"max by (run_id, part) ({of_run('nst_loss')})", "{{run_id}} {{part}}")),
            graph(
                "Accuracy on noised labelled images",
                Query(f"max by (run_id) ({of_run('nst_labelled_accuracy_ratio')})", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
            ),
            graph(
                "Student agrees with teacher",
                Query(f"max by (run_id) ({of_run('nst_teacher_student_agreement_ratio')})", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
                about="On noised pseudo-labelled images.",
            ),
            graph("Learning rate", Query(f"max by (run_id) ({of_run('nst_learning_rate')})", "{{run_id}}")),
        ],
    ),
    Row(
        "Speed",
        [
            graph(
                "Step",
                *(
                    Query(
                        f"histogram_quantile({share}, sum by (run_id, le) "
                        f"({of_run('rate(nst_step_duration_seconds_bucket[$__rate_interval])')}))",
                        "{{run_id}} " + name,
                    )
                    for share, name in ((0.5, "median"), (0.99, "slowest 1%"))
                ),
                unit="s",
            ),
            graph("Waiting for images", Query(f"nst:data_wait:ratio5m{CHOSEN}", "{{pod}}"), unit="percentunit", maximum=1),
            graph(
                "GPUs at work",
                Query(f"avg by (run_id, pod) (nst:run_gpu:active_ratio{CHOSEN})", "{{pod}}"),
                unit="percentunit",
                maximum=1,
            ),
        ],
    ),
]

GPUS = [
    Row(
        "Pools",
        [
            graph(
                "GPUs of each pool",
                Query(
                    'sum by (pool) (kube_node_status_allocatable{resource=~"nvidia_com_(gpu|mig_.*)|amd_com_gpu"} '
                    "* on (node) group_left (pool) nst:node:pool)",
                    "{{pool}}",
                ),
                stacked=True,
            ),
            graph("Held by runs", Query(f"sum by (pool) (nst:run_gpus:count{CHOSEN})", "{{pool}}"), stacked=True),
            graph(
                "Pods that wait for a node",
                Query(
                    'count by (component) ((kube_pod_status_phase{namespace=~"$namespace", phase="Pending"} == 1) '
                    "* on (namespace, pod) group_left (component) nst:pod:component)",
                    "{{component}}",
                ),
                stacked=True,
            ),
        ],
    ),
    Row(
        "Use by runs",
        [
            graph(
                "At work",
                Query(f"avg by (run_id) (nst:run_gpu:active_ratio{CHOSEN})", "{{run_id}}"),
                unit="percentunit",
                maximum=1,
                about="Share of time in which the GPU did anything.",
            ),
            graph(
                "At work, by GPU",
                Query(f"nst:run_gpu:active_ratio{CHOSEN}", "{{Hostname}} {{gpu}} {{modelName}}"),
                unit="percentunit",
                maximum=1,
            ),
            graph(
                "GPUs that do nothing",
                Query(f"count by (run_id) (nst:run_gpu:active_ratio{CHOSEN} < 0.1)", "{{run_id}}"),
                about="Held, and less than a tenth at work.",
            ),
        ],
    ),
    Row(
        "Cards",
        [
            graph(
                "Tensor cores at work",
                Query("avg by (Hostname, gpu) (DCGM_FI_PROF_PIPE_TENSOR_ACTIVE)", "{{Hostname}} {{gpu}}"),
                unit="percentunit",
                maximum=1,
            ),
            graph(
                "Memory",
                Query("max by (Hostname, gpu) (DCGM_FI_DEV_FB_USED) * 1024 * 1024", "{{Hostname}} {{gpu}}"),
                unit="bytes",
            ),
            graph("Power", Query("max by (Hostname, gpu) (DCGM_FI_DEV_POWER_USAGE)", "{{Hostname}} {{gpu}}"), unit="watt"),
        ],
    ),
]

HELD = f"nst:run_gpus:count{CHOSEN}"


def price_an_hour(more: str = "") -> str:
    """Of the GPUs held at an instant, by namespace, run, pool and step. `more`: conditions on these."""
    spot, steady = (f'{HELD[:-1]}, pool{sign}"$spot_pools"{more}}}' for sign in ("=~", "!~"))
    return f"({spot} * $spot_price or {steady} * $price)"


def in_range(an_hour: str, by: str = "") -> str:
    """Adds up what is said by the hour, over the time that is shown: minute by minute, since pods come and go."""
    return f"sum by ({by}) (sum_over_time({an_hour}[$__range:1m])) / 60"


COST = [
    Row(
        "In the time that is shown",
        [
            stat("GPU-hours", Query(in_range(HELD), "all"), width=6),
            stat("Cost", Query(in_range(price_an_hour()), "all"), unit="currencyUSD", width=6),
            stat(
                "Cost of GPUs that did nothing",
                Query(
                    f"sum ({in_range(price_an_hour(), 'run_id')} * on (run_id) "
                    f"(1 - avg by (run_id) (avg_over_time(nst:run_gpu:active_ratio{CHOSEN}[$__range]))))",
                    "all",
                ),
                unit="currencyUSD",
                width=6,
            ),
            stat(
                "Cost of a million labels",
                Query(
                    f"1e6 * {in_range(price_an_hour(LABELLING_TASKS))} "
                    f"/ (sum (sum_over_time({LABELLED_A_SECOND}[$__range:1m])) * 60)",
                    "labelling",
                ),
                unit="currencyUSD",
                width=6,
            ),
        ],
    ),
    Row(
        "Cost by",
        [
            Panel(title, "bargauge", [Query(in_range(price_an_hour(), by), f"{{{{{by}}}}}")], "currencyUSD")
            for title, by in (("Run", "run_id"), ("Pool", "pool"), ("Step", "component"))
        ],
    ),
    Row(
        "Over time",
        [
            graph(
                "Cost an hour",
                Query(f"sum by (run_id) ({price_an_hour()})", "{{run_id}}"),
                unit="currencyUSD",
                stacked=True,
                width=12,
            ),
            graph("GPUs held", Query(f"sum by (run_id) ({HELD})", "{{run_id}}"), stacked=True, width=12),
        ],
    ),
]

DASHBOARDS = {
    "runs": ("Noisy Student: runs", OVERVIEW),
    "labelling": ("Noisy Student: labelling", LABELLING),
    "training": ("Noisy Student: training", TRAINING),
    "gpu-pools": ("Noisy Student: GPU pools", GPUS),
    "cost": ("Noisy Student: cost", COST),
}
TEXTS = {
    "cost": (
        ("price", "Price of a GPU-hour", "2.5"),
        ("spot_price", "Price of a spot GPU-hour", "1"),
        ("spot_pools", "Spot pools (regular expression)", ".*spot.*"),
    )
}
"""Variables of a dashboard that are typed in: name, label, default."""


# --- How Grafana wants it


def variables(name: str) -> list[Json]:
    def chosen(variable: str, label: str, query: str) -> Json:
        return {
            "type": "query",
            "name": variable,
            "label": label,
            "datasource": SOURCE,
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
        chosen("namespace", "Namespace", "label_values(nst:pod:run, namespace)"),
        chosen("run", "Run", 'label_values(nst:pod:run{namespace=~"$namespace"}, run_id)'),
        *(
            {"type": "textbox", "name": variable, "label": label, "query": value, "current": {"text": value, "value": value}}
            for variable, label, value in TEXTS.get(name, ())
        ),
    ]


def panel(number: int, one: Panel, x: int, y: int) -> Json:
    custom: Json = {}
    options: Json = {}
    if one.kind == "timeseries":
        custom = {
            "fillOpacity": 10 if one.stacked else 0,
            "showPoints": "always" if one.points else "never",
            "spanNulls": False,
        }
        custom["stacking"] = {"mode": "normal" if one.stacked else "none"}
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    if one.kind in ("stat", "bargauge"):
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}}
    if one.kind == "heatmap":
        options = {"calculate": False, "yAxis": {"unit": "percentunit"}}
    defaults: Json = {"unit": one.unit, "custom": custom}
    if one.kind == "timeseries":
        defaults["min"] = None if one.title.startswith(("Gain", "Loss")) else 0
    if one.maximum is not None:
        defaults["max"] = one.maximum
    return {
        "id": number,
        "type": one.kind,
        "title": one.title,
        "description": one.about,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": one.width, "h": HEIGHT},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                **({"format": "heatmap"} if one.kind == "heatmap" else {}),
                **({"instant": True, "range": False} if one.kind == "bargauge" else {}),
            }
            for place, query in enumerate(one.queries)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def panels(rows: Sequence[Row]) -> list[Json]:
    """Rows from top to bottom, panels from left to right as far as they fit."""
    placed: list[Json] = []
    y = 0
    for row in rows:
        placed.append(
            {
                "id": len(placed) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        x, y = 0, y + 1
        for one in row.panels:
            if x + one.width > WIDTH:
                x, y = 0, y + HEIGHT
            placed.append(panel(len(placed) + 1, one, x, y))
            x += one.width
        y += HEIGHT
    return placed


def dashboard(name: str) -> Json:
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
        "templating": {"list": variables(name)},
        "annotations": {"list": []},
        "panels": panels(rows),
    }


def render(name: str) -> str:
    return json.dumps(dashboard(name), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(render(name), encoding="utf-8")


if __name__ == "__main__":
    main()
