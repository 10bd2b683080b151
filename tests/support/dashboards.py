"""Writes Grafana's dashboards of the chart from the list of their panels: titles, units and queries.

Grafana's own typed builders make the JSON, and `make lint` holds this file to their types: a field that Grafana does
not have, or a value of another type, is an error here.
"""

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, SortOrder, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableRefresh,
    VariableSort,
)

from tests.support.chart import CHART

FOLDER = CHART / "monitoring" / "dashboards"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT = 8, 7
"""Of a panel: three in a row, as Grafana's grid has 24 columns."""
NS = 'namespace="$namespace"'
TASK = 'namespace="$namespace",task="$task"'


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """One of Grafana's `units`."""
    queries: dict[str, str]
    """By legend."""


def _quantiles(metric: str, by: str = "", of: str = NS) -> dict[str, str]:
    groups, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return {
        f"p{quantile}{legend}": f"histogram_quantile(0.{quantile}, sum by ({groups})"
        f" (rate({metric}_bucket{{{of}}}[$__rate_interval])))"
        for quantile in ("50", "95")
    }


def _rate(metric: str, by: str, of: str = NS) -> dict[str, str]:
    return {f"{{{{{by}}}}}": f"sum by ({by}) (rate({metric}{{{of}}}[$__rate_interval]))"}


def _by(metric: str, by: str, of: str = NS, function: str = "sum") -> dict[str, str]:
    return {" ".join(f"{{{{{each}}}}}" for each in by.split(", ")): f"{function} by ({by}) ({metric}{{{of}}})"}


_OVERVIEW = [
    Panel(
        "Runs in and out",
        units.RequestsPerSecond,
        {
            "submitted": f"sum(rate(backcast_runs_submitted_total{{{NS}}}[$__rate_interval]))",
            "completed": f'sum(rate(backcast_attempts_total{{{NS},outcome="succeeded"}}[$__rate_interval]))',
            "failed": f'sum(rate(backcast_attempts_total{{{NS},outcome=~"failed|timed_out"}}[$__rate_interval]))',
            "expired": f"sum(rate(backcast_runs_expired_total{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel("Backlog by pool", units.Short, _by("backcast_backlog_ready", "pool", function="max")),
    Panel("Oldest ready run", units.Seconds, _by("backcast_backlog_oldest_age_seconds", "pool", function="max")),
    Panel(
        "Slots in use",
        units.PercentUnit,
        {"{{pool}}": f"sum by (pool) (backcast_pool_busy{{{NS}}}) / (sum by (pool) (backcast_pool_slots{{{NS}}}) > 0)"},
    ),
    Panel("Workers", units.Short, _by("backcast_pool_workers", "pool", function="max")),
    Panel("Claims settled, by outcome", units.RequestsPerSecond, _rate("backcast_attempts_total", "outcome")),
    Panel("Retries, by kind", units.RequestsPerSecond, _rate("backcast_retries_total", "kind")),
    Panel(
        "Executors that have ended",
        units.Short,
        {
            "{{cause}}": f"sum by (cause) (increase(backcast_executors_ended_total{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel(
        "Workers lost, runs recovered",
        units.Short,
        {
            "workers": f"sum(increase(backcast_workers_lost_total{{{NS}}}[$__rate_interval]))",
            "runs {{state}}": f"sum by (state) (increase(backcast_runs_recovered_total{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel("Requests, by status", units.RequestsPerSecond, _rate("backcast_api_requests_total", "status")),
    Panel(
        "Slowest routes",
        units.Seconds,
        {
            "{{method}} {{route}}": "topk(5, histogram_quantile(0.95, sum by (le, method, route)"
            f" (rate(backcast_api_request_seconds_bucket{{{NS}}}[$__rate_interval]))))",
        },
    ),
    Panel(
        "Waits and streams",
        units.Short,
        {
            "waits": f"sum(backcast_api_waits{{{NS}}})",
            "streams": f"sum(backcast_api_streams{{{NS}}})",
        },
    ),
    Panel("Runs of lanes", units.Short, _by("backcast_lane_runs", "lane, state", function="max")),
    Panel("Oldest held run, by lane", units.Seconds, _by("backcast_lane_oldest_age_seconds", "lane", function="max")),
    Panel("Store, by operation", units.Seconds, _quantiles("backcast_store_seconds", "operation")),
    Panel("Store away", units.RequestsPerSecond, _rate("backcast_store_errors_total", "operation")),
    Panel("Answers of the model", units.Seconds, _quantiles("backcast_model_seconds", "model")),
    Panel(
        "Tokens",
        units.Short,
        {
            "{{model}} {{kind}}": f"sum by (model, kind) (rate(backcast_model_tokens_total{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel("Casts that failed, by cause", units.RequestsPerSecond, _rate("backcast_model_failures_total", "cause")),
    Panel(
        "Cost of an hour, by list prices",
        units.Dollars,
        {"{{model}}": f"3600 * sum by (model) (rate(backcast_model_cost_dollars_total{{{NS}}}[$__rate_interval]))"},
    ),
    Panel("History behind Prefect", units.Seconds, _by("backcast_history_lag_seconds", "pod", function="max")),
    Panel(
        "History waiting and dropped",
        units.Short,
        {
            "waiting": f"sum(backcast_history_waiting{{{NS}}})",
            "dropped {{why}}": f"sum by (why) (increase(backcast_history_dropped_total{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel(
        "Builds",
        units.Short,
        {
            "{{process}} {{version}}": f"count by (process, version) (backcast_build_info{{{NS}}})",
        },
    ),
]
_TASK = [
    Panel("Runs that are not over", units.Short, _by("backcast_task_runs", "state", TASK, "max")),
    Panel("Oldest run that waits", units.Seconds, {"age": f"max(backcast_task_oldest_age_seconds{{{TASK}}})"}),
    Panel("Workers that serve it", units.Short, {"workers": f"max(backcast_task_workers{{{TASK}}})"}),
    Panel("Claims settled, by outcome", units.RequestsPerSecond, _rate("backcast_attempts_total", "outcome", TASK)),
    Panel(
        "Failures",
        units.PercentUnit,
        {
            "failed": f'sum(rate(backcast_attempts_total{{{TASK},outcome=~"failed|timed_out"}}[$__rate_interval]))'
            f' / sum(rate(backcast_attempts_total{{{TASK},outcome=~"failed|timed_out|succeeded"}}[$__rate_interval]))',
        },
    ),
    Panel(
        "Attempts retried",
        units.RequestsPerSecond,
        {
            "retried": f'sum(rate(backcast_attempts_total{{{TASK},outcome="retrying"}}[$__rate_interval]))',
        },
    ),
    Panel("Wait for the first claim", units.Seconds, _quantiles("backcast_wait_seconds", of=TASK)),
    Panel("Time in a slot", units.Seconds, _quantiles("backcast_run_seconds", of=TASK)),
    Panel(
        "Slots taken, on average",
        units.Short,
        {
            "slots": f"sum(rate(backcast_run_seconds_sum{{{TASK}}}[$__rate_interval]))",
        },
    ),
]
_DATABASE = [
    Panel("Submit", units.Seconds, _quantiles("backcast_submit_seconds")),
    Panel("Claim", units.Seconds, _quantiles("backcast_claim_seconds")),
    Panel("Settle", units.Seconds, _quantiles("backcast_settle_seconds")),
    Panel("Heartbeat of the leading steward", units.Seconds, _quantiles("backcast_steward_beat_seconds")),
    Panel(
        "Runs claimed per claim",
        units.Short,
        {
            "runs": f"sum(rate(backcast_runs_claimed_total{{{NS}}}[$__rate_interval]))"
            f" / sum(rate(backcast_claim_seconds_count{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel("Claimed and not settled", units.Short, _by("backcast_worker_unsettled", "pod")),
    Panel(
        "Age of the last heartbeat", units.Seconds, _by("backcast_worker_heartbeat_age_seconds", "pod", function="max")
    ),
    Panel("Dead rows", units.Short, {"rows": f"max(backcast_database_dead_rows{{{NS}}})"}),
    Panel(
        "Oldest snapshot",
        units.Short,
        {
            "transactions": f"max(backcast_database_oldest_xmin_age_transactions{{{NS}}})",
        },
    ),
    Panel("Size", units.BytesIEC, {"size": f"max(backcast_database_size_bytes{{{NS}}})"}),
    Panel("Partitions of ended runs", units.Short, {"partitions": f"max(backcast_database_partitions{{{NS}}})"}),
    Panel("Stewards that lead", units.Short, {"leading": f"sum(backcast_steward_leading{{{NS}}})"}),
]
DASHBOARDS: dict[str, tuple[str, list[Panel], list[str]]] = {
    "overview": ("backcast overview", _OVERVIEW, []),
    "task": ("backcast task", _TASK, ["task"]),
    "database": ("backcast database", _DATABASE, []),
}
"""By name: the title, the panels, and the labels that a reader chooses a value of."""
VARIABLES = {
    "namespace": "label_values(backcast_build_info, namespace)",
    "task": 'label_values(backcast_task_workers{namespace="$namespace"}, task)',
}


def files() -> dict[Path, str]:
    """The generated files by path, each with the text that it should hold."""
    return {
        FOLDER / f"{name}.json": JSONEncoder(indent=1, sort_keys=True).encode(_dashboard(name).build()) + "\n"
        for name in DASHBOARDS
    }


def _dashboard(name: str) -> dashboard.Dashboard:
    title, panels, labels = DASHBOARDS[name]
    others = dashboard.DashboardLink("backcast").type(DashboardLinkType.DASHBOARDS).tags(["backcast"])
    board = (
        dashboard.Dashboard(title)
        .uid(f"backcast-{name}")
        .tags(["backcast"])
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .link(others.include_vars(True).keep_time(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for label in ("namespace", *labels):
        board.with_variable(
            dashboard.QueryVariable(label)
            .datasource(_SOURCE)
            .query({"query": VARIABLES[label], "refId": label})
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
        )
    for number, panel in enumerate(panels, 1):
        board.with_panel(_panel(panel).id(number))
    return board


def _panel(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .title(panel.title)
        .datasource(_SOURCE)
        .span(_WIDTH)
        .height(_HEIGHT)
        .unit(panel.unit)
        .min(0)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    for index, (legend, query) in enumerate(panel.queries.items()):
        target = prometheus.Dataquery().ref_id(chr(ord("A") + index)).datasource(_SOURCE)
        made.with_target(target.expr(query).legend_format(legend))
    return made
