"""Write the Grafana dashboards in dashboards/, which kustomize puts into ConfigMaps: `make dashboards`.

A panel is a title, queries and options; its position follows from the order. Every dashboard has the variables data source, namespace
and run.
"""

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as c
from grafana_foundation_sdk.models import dashboard as d
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER = Path(__file__).parent / "dashboards"
HEIGHT = 8
DATA_SOURCE = d.DataSourceRef("prometheus", "${datasource}")
RUN_SELECTOR = '{namespace=~"$namespace", run_id=~"$run"}'
"""Which series are shown, of those that a rule has joined with runs."""

Panel = Any
"""A panel's builder: the SDK's have their methods in common, and no base class."""
Query = tuple[str, str]
"""PromQL and the legend of its series."""


def join_run(metric: str) -> str:
    """A metric of the selected runs, with the run's name."""
    return f"{metric} * on (namespace, pod) group_left (run_id) nst:pod:run{RUN_SELECTOR}"


def max_by_run(metric: str, *labels: str, legend: str = "") -> Query:
    """The maximum of a metric per selected run and labels, which are the legend; `legend` replaces those beside the run."""
    by = ("run_id", *labels)
    names = ("{{run_id}}", legend) if legend else tuple(f"{{{{{label}}}}}" for label in by)
    return f"max by ({', '.join(by)}) ({join_run(metric)})", " ".join(names)


def last_by_run(metric: str) -> Query:
    """The last value of a metric in the time range: the pod that exposed it may be gone."""
    return f"last_over_time((max by (run_id) ({join_run(metric)}))[$__range:30s])", "{{run_id}}"


def quantiles_by_run(buckets: str, **quantiles: float) -> list[Query]:
    """Quantiles of a histogram per selected run; each keyword is a legend, with _ for a space."""
    return [
        (f"histogram_quantile({share}, sum by (run_id, le) ({join_run(buckets)}))", f"{{{{run_id}}}} {name.replace('_', ' ')}")
        for name, share in quantiles.items()
    ]


def select_runs(record: str, *labels: str, extra: str = "") -> Query:
    """A recorded series of the selected runs, which has their names; the labels are its legend."""
    return f"{record}{RUN_SELECTOR[:-1]}{extra}}}", " ".join(f"{{{{{label}}}}}" for label in labels)


# --- panels


def finish_panel(panel: Panel, title: str, queries: tuple[Query, ...], unit: str, width: int, about: str) -> Panel:
    """A panel with what all kinds have."""
    panel.title(title).description(about).datasource(DATA_SOURCE).span(width).height(HEIGHT).unit(unit)
    for index, (expr, legend) in enumerate(queries):
        query = prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + index)).datasource(DATA_SOURCE)
        if isinstance(panel, bargauge.Panel):
            query.instant()
        if isinstance(panel, heatmap.Panel):
            query.format(PromQueryFormat.HEATMAP)
        panel.with_target(query)
    return panel


def make_legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions().display_mode(c.LegendDisplayMode.LIST).placement(c.LegendPlacement.BOTTOM).show_legend(True)
    )


def make_tooltip() -> common.VizTooltipOptions:
    return common.VizTooltipOptions().mode(c.TooltipDisplayMode.MULTI).sort(c.SortOrder.DESCENDING)


def make_graph(
    title: str,
    *queries: Query,
    unit: str = "short",
    width: int = 8,
    about: str = "",
    stacked: bool = False,
    points: bool = False,
    signed: bool = False,
) -> Panel:
    """Curves. `points`: for values that are exposed for a minute only. `signed`: the axis need not begin at 0."""
    panel = (
        timeseries.Panel()
        .fill_opacity(10 if stacked else 0)
        .show_points(c.VisibilityMode.ALWAYS if points else c.VisibilityMode.NEVER)
        .span_nulls(False)
        .stacking(common.StackingConfig().mode(c.StackingMode.NORMAL if stacked else c.StackingMode.NONE))
        .legend(make_legend())
        .tooltip(make_tooltip())
    )
    if not signed:
        panel.min(0)
    return finish_panel(panel, title, queries, unit, width, about)


def make_ratio(title: str, *queries: Query, **options: Any) -> Panel:
    """Curves between 0 and 1."""
    return make_graph(title, *queries, unit="percentunit", **options).max(1)


def make_stat(title: str, *queries: Query, unit: str = "short", width: int = 4, about: str = "") -> Panel:
    """The latest value as a number."""
    panel = stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return finish_panel(panel, title, queries, unit, width, about)


def make_wait_ratio() -> Panel:
    return make_ratio("Waiting for images", select_runs("nst:data_wait:ratio5m", "pod"))


# --- dashboards: title → rows, each a title and its panels

RUNS = {
    "Now": [
        make_stat("Active runs", (f"count(count by (namespace, run_id) (nst:pod:run{RUN_SELECTOR}))", "runs")),
        make_stat("Active pods", (f"count(nst:pod:run{RUN_SELECTOR})", "pods")),
        make_stat("Generation", last_by_run("nst_generation")),
        make_stat("Alerts", ('count(ALERTS{alertname=~"Nst.*", alertstate="firing"})', "firing")),
        make_stat("Held-out accuracy", last_by_run('nst_eval_accuracy_ratio{split="heldout"}'), unit="percentunit"),
        make_stat("Gate", last_by_run("nst_gate_passed"), about="1: the student became the teacher."),
        finish_panel(
            statetimeline.Panel()
            .show_value(c.VisibilityMode.AUTO)
            .row_height(0.9)
            .legend(make_legend())
            .tooltip(make_tooltip()),
            "Stages",
            (max_by_run("nst_stage_running", "stage"),),
            "short",
            24,
            "1: running. 0: finished, and waiting to be scraped.",
        ),
    ],
    "Progress": [
        make_graph("Images per second", select_runs("nst:images:rate5m", "run_id", "stage"), unit="ops"),
        make_ratio("Training done", select_runs("nst:training:done_ratio", "run_id", "pod")),
        make_ratio("Shards labeled", select_runs("nst:shards:done_ratio", "run_id"), about="Of the running tasks."),
    ],
    "Results": [
        make_graph("Accuracy", max_by_run("nst_eval_accuracy_ratio", "split"), unit="percentunit", points=True),
        make_graph(
            "Gain of the student",
            max_by_run("nst_loop_gain_ratio", "bound"),
            unit="percentunit",
            points=True,
            signed=True,
            about="Held-out top-1 accuracy less the teacher's, and the gate's bounds on it.",
        ),
        make_graph(
            "Conditions of the gate",
            max_by_run("nst_gate_condition_passed", "condition"),
            points=True,
            about="1: the condition holds. 0: it does not.",
        ),
        make_graph(
            "Tries on the same held-out images",
            max_by_run("nst_gate_tries", legend="tries"),
            points=True,
            about="Students that were compared with a teacher on them, in all runs of the root.",
        ),
        make_graph(
            "Corruptions and perturbations",
            max_by_run("nst_eval_mce", legend="mCE"),
            max_by_run("nst_eval_mfr", legend="mFR"),
            unit="percent",
            points=True,
        ),
        make_graph(
            "Accuracy under attack", max_by_run("nst_eval_attacked_accuracy_ratio", "attack"), unit="percentunit", points=True
        ),
    ],
    "Last successful run of each pipeline": [
        make_stat(title, (f"{expr} (nst_last_{metric})", "{{pipeline}}"), unit=unit)
        for title, expr, metric, unit in (
            ("Since", "time() - max by (pipeline)", "success_timestamp_seconds", "s"),
            ("Took", "max by (pipeline)", "run_duration_seconds", "s"),
            ("Accuracy", "max by (pipeline)", "run_accuracy_ratio", "percentunit"),
            ("Gain", "max by (pipeline)", "run_gain_ratio", "percentunit"),
            ("Promotions", "max by (pipeline)", "run_promotions", "short"),
        )
    ],
}

LABELED_PER_SECOND = select_runs("nst:images:rate5m", "run_id", extra=', stage="label"')
LABELING_TASKS = ', component="label"'
WORKING_SET = 'container_memory_working_set_bytes{container="main"}'

LABELING = {
    "Labeling": [
        make_graph("Images per second", LABELED_PER_SECOND, unit="ops"),
        make_graph(
            "Images per second and task",
            (join_run('rate(nst_images_processed_total{stage="label"}[$__rate_interval])'), "{{pod}}"),
            unit="ops",
            stacked=True,
        ),
        make_graph(
            "Shards",
            (f"sum by (run_id) ({join_run('nst_shards_done')})", "{{run_id}} done"),
            (f"sum by (run_id) ({join_run('nst_shards')})", "{{run_id}} of"),
            about="Of the running tasks.",
        ),
        make_wait_ratio(),
        make_graph(
            "Memory",
            (f"sum by (run_id, pod) ({join_run(WORKING_SET)})", "{{pod}}"),
            unit="bytes",
        ),
    ],
    "Confidence": [
        finish_panel(
            heatmap.Panel()
            .calculate(False)
            .y_axis(heatmap.YAxisConfig().unit("percentunit"))
            .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)),
            "Confidence of the teacher",
            ((f"sum by (le) ({join_run('increase(nst_pseudo_label_confidence_bucket[$__rate_interval])')})", "{{le}}"),),
            "short",
            12,
            "",
        ),
        make_ratio(
            "Confidence of the teacher, quartiles",
            *quantiles_by_run("nst_pseudo_label_confidence_bucket", lower_quartile=0.25, median=0.5, upper_quartile=0.75),
            width=12,
        ),
    ],
    "Selection": [
        make_graph("Outcomes in the pool", max_by_run("nst_pseudo_labels_total", "outcome"), points=True),
        make_ratio("Share kept", select_runs("nst:pseudo_labels:kept_ratio", "run_id"), points=True),
        make_ratio("Classes covered", max_by_run("nst_class_coverage_ratio"), points=True),
        make_graph("Images kept per class", max_by_run("nst_class_kept_images", "statistic"), points=True),
        make_graph(
            "Labels that changed",
            max_by_run("nst_label_churn_ratio"),
            max_by_run("nst_label_churn_limit_ratio", legend="limit"),
            unit="percentunit",
            points=True,
            about="Since the generation before.",
        ),
    ],
}

TRAINING = {
    "Progress": [
        make_stat("Done", (f"max by (run_id) (nst:training:done_ratio{RUN_SELECTOR})", "{{run_id}}"), unit="percentunit"),
        make_stat(
            "Time left",
            (
                f"max by (run_id) (({join_run('(nst_training_steps - nst_training_steps_done)')}) "
                "/ on (namespace, pod) group_left () (deriv(nst_training_steps_done[5m]) > 0))",
                "{{run_id}}",
            ),
            unit="s",
            about="At the pace of the last five minutes.",
        ),
        make_stat("Steps", max_by_run("nst_training_steps_done")),
        make_stat(
            "Checkpoint",
            max_by_run("nst_checkpoint_age_seconds", legend="age"),
            max_by_run("nst_checkpoint_interval_seconds", legend="interval"),
            unit="s",
            about="The age is what a kill would cost.",
        ),
        make_graph("Images per second", select_runs("nst:images:rate5m", "run_id", extra=', stage="train"'), unit="ops"),
    ],
    "Learning": [
        make_graph("Loss", max_by_run("nst_loss", "part"), signed=True),
        make_ratio("Accuracy on noised labeled images", max_by_run("nst_labeled_accuracy_ratio")),
        make_ratio(
            "Student agrees with teacher",
            max_by_run("nst_teacher_student_agreement_ratio"),
            about="On noised pseudo-labeled images.",
        ),
        make_graph("Learning rate", max_by_run("nst_learning_rate")),
    ],
    "Speed": [
        make_graph(
            "Step",
            *quantiles_by_run("rate(nst_step_duration_seconds_bucket[$__rate_interval])", median=0.5, p99=0.99),
            unit="s",
        ),
        make_wait_ratio(),
        make_ratio("GPU utilization", (f"avg by (run_id, pod) (nst:run_gpu:active_ratio{RUN_SELECTOR})", "{{pod}}")),
    ],
}

GPUS = {
    "Pools": [
        make_graph(
            "GPUs per pool",
            (
                'sum by (pool) (kube_node_status_allocatable{resource=~"nvidia_com_(gpu|mig_.*)|amd_com_gpu"} '
                "* on (node) group_left (pool) nst:node:pool)",
                "{{pool}}",
            ),
            stacked=True,
        ),
        make_graph("Held by runs", (f"sum by (pool) (nst:run_gpus:count{RUN_SELECTOR})", "{{pool}}"), stacked=True),
        make_graph(
            "Pods that wait for a node",
            (
                'count by (component) ((kube_pod_status_phase{namespace=~"$namespace", phase="Pending"} == 1) '
                "* on (namespace, pod) group_left (component) nst:pod:component)",
                "{{component}}",
            ),
            stacked=True,
        ),
    ],
    "Use by runs": [
        make_ratio(
            "Utilization per run",
            (f"avg by (run_id) (nst:run_gpu:active_ratio{RUN_SELECTOR})", "{{run_id}}"),
            about="Share of time in which the GPU did anything.",
        ),
        make_ratio("Utilization per GPU", select_runs("nst:run_gpu:active_ratio", "Hostname", "gpu", "modelName")),
        make_graph(
            "Idle GPUs",
            (f"count by (run_id) (nst:run_gpu:active_ratio{RUN_SELECTOR} < 0.1)", "{{run_id}}"),
            about="Held by a run, and active less than a tenth of the time.",
        ),
    ],
    "Cards": [
        make_ratio(
            "Tensor core utilization",
            ("avg by (Hostname, gpu) (DCGM_FI_PROF_PIPE_TENSOR_ACTIVE)", "{{Hostname}} {{gpu}}"),
        ),
        make_graph(
            "Memory", ("max by (Hostname, gpu) (DCGM_FI_DEV_FB_USED) * 1024 * 1024", "{{Hostname}} {{gpu}}"), unit="bytes"
        ),
        make_graph("Power", ("max by (Hostname, gpu) (DCGM_FI_DEV_POWER_USAGE)", "{{Hostname}} {{gpu}}"), unit="watt"),
    ],
}

HELD = f"nst:run_gpus:count{RUN_SELECTOR}"


def price_per_hour(matchers: str = "") -> str:
    """Price of the GPUs held at an instant, per namespace, run, pool and stage. `matchers`: further ones of these series."""
    spot, steady = (f'{HELD[:-1]}, pool{sign}"$spot_pools"{matchers}}}' for sign in ("=~", "!~"))
    return f"({spot} * $spot_price or {steady} * $price)"


def sum_over_range(hourly: str, by: str = "") -> str:
    """The total of an amount per hour over the time range: minute by minute, since pods come and go."""
    return f"sum by ({by}) (sum_over_time({hourly}[$__range:1m])) / 60"


IDLE_PRICE = (
    f"sum ({sum_over_range(price_per_hour(), 'run_id')} * on (run_id) "
    f"(1 - avg by (run_id) (avg_over_time(nst:run_gpu:active_ratio{RUN_SELECTOR}[$__range]))))"
)
LABELS_PRICE = (
    f"1e6 * {sum_over_range(price_per_hour(LABELING_TASKS))} / (sum (sum_over_time({LABELED_PER_SECOND[0]}[$__range:1m])) * 60)"
)

COST = {
    "In this time range": [
        make_stat("GPU-hours", (sum_over_range(HELD), "all"), width=6),
        make_stat("Cost", (sum_over_range(price_per_hour()), "all"), unit="currencyUSD", width=6),
        make_stat("Cost of idle GPUs", (IDLE_PRICE, "all"), unit="currencyUSD", width=6),
        make_stat("Cost per million labels", (LABELS_PRICE, "labeling"), unit="currencyUSD", width=6),
    ],
    "Cost by": [
        finish_panel(
            bargauge.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])),
            title,
            ((sum_over_range(price_per_hour(), by), f"{{{{{by}}}}}"),),
            "currencyUSD",
            8,
            "",
        )
        for title, by in (("Run", "run_id"), ("Pool", "pool"), ("Stage", "component"))
    ],
    "Over time": [
        make_graph(
            "Cost per hour",
            (f"sum by (run_id) ({price_per_hour()})", "{{run_id}}"),
            unit="currencyUSD",
            stacked=True,
            width=12,
        ),
        make_graph("GPUs held", (f"sum by (run_id) ({HELD})", "{{run_id}}"), stacked=True, width=12),
    ],
}

DASHBOARDS = {
    "runs": ("Noisy Student: runs", RUNS),
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
"""Variables of a dashboard that users type in: name, label, default."""


def make_query_variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATA_SOURCE)
        .query(query)
        .refresh(d.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(d.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(d.VariableOption(text=["All"], value=["$__all"]))
    )


def render_dashboard(name: str) -> str:
    title, rows = DASHBOARDS[name]
    board = (
        dashboard.Dashboard(title)
        .uid(f"noisy-student-{name}")
        .tags(["noisy-student"])
        .readonly()
        .tooltip(d.DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .refresh("30s")
        .link(
            dashboard.DashboardLink("Noisy Student")
            .type(d.DashboardLinkType.DASHBOARDS)
            .tags(["noisy-student"])
            .as_dropdown(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(make_query_variable("namespace", "Namespace", "label_values(nst:pod:run, namespace)"))
        .with_variable(make_query_variable("run", "Run", 'label_values(nst:pod:run{namespace=~"$namespace"}, run_id)'))
    )
    for variable, label, value in TEXT_VARIABLES.get(name, ()):
        board.with_variable(
            dashboard.TextBoxVariable(variable)
            .label(label)
            .default_value(value)
            .current(d.VariableOption(text=value, value=value))
        )
    for row, panels in rows.items():
        board.with_row(dashboard.Row(row))
        for panel in panels:
            board.with_panel(panel)
    built = board.build()
    for number, panel in enumerate(built.panels or (), 1):
        panel.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(render_dashboard(name), encoding="utf-8")


if __name__ == "__main__":
    main()
