"""Writes Grafana's dashboards of the chart from the list of their panels: titles, units and queries."""

import json
from dataclasses import dataclass
from typing import Any

from tests.support.chart import CHART

FOLDER = CHART / "monitoring" / "dashboards"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 8, 7
"""Of a panel: three in a row, as Grafana's grid has 24 columns."""
NS = 'namespace="$namespace"'
TASK = 'namespace="$namespace",task="$task"'


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """Of Grafana: `short`, `s`, `reqps`, `percentunit`, `bytes`."""
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
        "reqps",
        {
            "submitted": f"sum(rate(backcast_runs_submitted_total{{{NS}}}[$__rate_interval]))",
            "completed": f'sum(rate(backcast_attempts_total{{{NS},outcome="succeeded"}}[$__rate_interval]))',
            "failed": f'sum(rate(backcast_attempts_total{{{NS},outcome=~"failed|timed_out"}}[$__rate_interval]))',
            "expired": f"sum(rate(backcast_runs_expired_total{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel("Backlog by pool", "short", _by("backcast_backlog_ready", "pool", function="max")),
    Panel("Oldest ready run", "s", _by("backcast_backlog_oldest_age_seconds", "pool", function="max")),
    Panel(
        "Slots in use",
        "percentunit",
        {"{{pool}}": f"sum by (pool) (backcast_pool_busy{{{NS}}}) / (sum by (pool) (backcast_pool_slots{{{NS}}}) > 0)"},
    ),
    Panel("Workers", "short", _by("backcast_pool_workers", "pool", function="max")),
    Panel("Claims settled, by outcome", "reqps", _rate("backcast_attempts_total", "outcome")),
    Panel("Retries, by kind", "reqps", _rate("backcast_retries_total", "kind")),
    Panel(
        "Executors that have ended",
        "short",
        {
            "{{cause}}": f"sum by (cause) (increase(backcast_executors_ended_total{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel(
        "Workers lost, runs recovered",
        "short",
        {
            "workers": f"sum(increase(backcast_workers_lost_total{{{NS}}}[$__rate_interval]))",
            "runs {{state}}": f"sum by (state) (increase(backcast_runs_recovered_total{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel("Requests, by status", "reqps", _rate("backcast_api_requests_total", "status")),
    Panel(
        "Slowest routes",
        "s",
        {
            "{{method}} {{route}}": "topk(5, histogram_quantile(0.95, sum by (le, method, route)"
            f" (rate(backcast_api_request_seconds_bucket{{{NS}}}[$__rate_interval]))))",
        },
    ),
    Panel(
        "Waits and streams",
        "short",
        {
            "waits": f"sum(backcast_api_waits{{{NS}}})",
            "streams": f"sum(backcast_api_streams{{{NS}}})",
        },
    ),
    Panel("Runs of lanes", "short", _by("backcast_lane_runs", "lane, state", function="max")),
    Panel("Oldest held run, by lane", "s", _by("backcast_lane_oldest_age_seconds", "lane", function="max")),
    Panel("Store, by operation", "s", _quantiles("backcast_store_seconds", "operation")),
    Panel("Store away", "reqps", _rate("backcast_store_errors_total", "operation")),
    Panel("Answers of the model", "s", _quantiles("backcast_model_seconds", "model")),
    Panel(
        "Tokens",
        "short",
        {
            "{{model}} {{kind}}": f"sum by (model, kind) (rate(backcast_model_tokens_total{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel("History behind Prefect", "s", _by("backcast_history_lag_seconds", "pod", function="max")),
    Panel(
        "History waiting and dropped",
        "short",
        {
            "waiting": f"sum(backcast_history_waiting{{{NS}}})",
            "dropped {{why}}": f"sum by (why) (increase(backcast_history_dropped_total{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel(
        "Builds",
        "short",
        {
            "{{process}} {{version}}": f"count by (process, version) (backcast_build_info{{{NS}}})",
        },
    ),
]
_TASK = [
    Panel("Runs that are not over", "short", _by("backcast_task_runs", "state", TASK, "max")),
    Panel("Oldest run that waits", "s", {"age": f"max(backcast_task_oldest_age_seconds{{{TASK}}})"}),
    Panel("Workers that serve it", "short", {"workers": f"max(backcast_task_workers{{{TASK}}})"}),
    Panel("Claims settled, by outcome", "reqps", _rate("backcast_attempts_total", "outcome", TASK)),
    Panel(
        "Failures",
        "percentunit",
        {
            "failed": f'sum(rate(backcast_attempts_total{{{TASK},outcome=~"failed|timed_out"}}[$__rate_interval]))'
            f' / sum(rate(backcast_attempts_total{{{TASK},outcome=~"failed|timed_out|succeeded"}}[$__rate_interval]))',
        },
    ),
    Panel(
        "Attempts retried",
        "reqps",
        {
            "retried": f'sum(rate(backcast_attempts_total{{{TASK},outcome="retrying"}}[$__rate_interval]))',
        },
    ),
    Panel("Wait for the first claim", "s", _quantiles("backcast_wait_seconds", of=TASK)),
    Panel("Time in a slot", "s", _quantiles("backcast_run_seconds", of=TASK)),
    Panel(
        "Slots taken, on average",
        "short",
        {
            "slots": f"sum(rate(backcast_run_seconds_sum{{{TASK}}}[$__rate_interval]))",
        },
    ),
]
_DATABASE = [
    Panel("Submit", "s", _quantiles("backcast_submit_seconds")),
    Panel("Claim", "s", _quantiles("backcast_claim_seconds")),
    Panel("Settle", "s", _quantiles("backcast_settle_seconds")),
    Panel("Heartbeat of the leading steward", "s", _quantiles("backcast_steward_beat_seconds")),
    Panel(
        "Runs claimed per claim",
        "short",
        {
            "runs": f"sum(rate(backcast_runs_claimed_total{{{NS}}}[$__rate_interval]))"
            f" / sum(rate(backcast_claim_seconds_count{{{NS}}}[$__rate_interval]))",
        },
    ),
    Panel("Claimed and not settled", "short", _by("backcast_worker_unsettled", "pod")),
    Panel("Age of the last heartbeat", "s", _by("backcast_worker_heartbeat_age_seconds", "pod", function="max")),
    Panel("Dead rows", "short", {"rows": f"max(backcast_database_dead_rows{{{NS}}})"}),
    Panel(
        "Oldest snapshot",
        "short",
        {
            "transactions": f"max(backcast_database_oldest_xmin_age_transactions{{{NS}}})",
        },
    ),
    Panel("Size", "bytes", {"size": f"max(backcast_database_size_bytes{{{NS}}})"}),
    Panel("Partitions of ended runs", "short", {"partitions": f"max(backcast_database_partitions{{{NS}}})"}),
    Panel("Stewards that lead", "short", {"leading": f"sum(backcast_steward_leading{{{NS}}})"}),
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


def files() -> dict[Any, str]:
    """The generated files by path, each with the text that it should hold."""
    return {FOLDER / f"{name}.json": json.dumps(_dashboard(name), indent=1) + "\n" for name in DASHBOARDS}


def _dashboard(name: str) -> dict[str, Any]:
    title, panels, labels = DASHBOARDS[name]
    return {
        "uid": f"backcast-{name}",
        "title": title,
        "tags": ["backcast"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "links": [
            {"type": "dashboards", "title": "backcast", "tags": ["backcast"], "includeVars": True, "keepTime": True}
        ],
        "templating": {"list": [_source(), *(_variable(label) for label in ["namespace", *labels])]},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(label: str) -> dict[str, Any]:
    query = VARIABLES[label]
    return {
        "name": label,
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": label},
        "refresh": 2,
        "sort": 1,
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    across = 24 // _WIDTH
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": number % across * _WIDTH, "y": number // across * _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }
