"""The alerts: promtool fires and clears each, each has its page, and the chart installs the same rules."""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import MONITORING, Values, render, scenario
from tests.support.prometheus import RULES, needs_prometheus

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
ALERTS: dict[str, Any] = {
    rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
}


@dataclass(frozen=True)
class Case:
    """What a Prometheus sees, a sample a minute, when the alert has to fire and when it must be over."""

    series: dict[str, str]
    """In promtool's notation: `0+6x30` grows by 6 for 30 minutes, `5x30` stays."""
    fires: str
    clears: str
    labels: dict[str, str] = field(default_factory=dict[str, str])


def bad(name: str, **labels: str) -> str:
    """A series of one pod."""
    given = {"namespace": "team", "pod": "p-0", **labels}
    return name + "{" + ",".join(f'{label}="{value}"' for label, value in given.items()) + "}"


POOL, TASK = {"pool": "default"}, {"task": "cast"}
CASES: dict[str, list[Case]] = {
    "BackcastNothingServesTask": [
        Case(
            {
                bad("backcast_task_runs", state="ready", **TASK): "5x60",
                bad("backcast_task_workers", **TASK): "0x20 1x40",
                bad("backcast_task_runs", state="ready", task="other"): "5x60",
                bad("backcast_task_workers", task="other"): "1x60",
            },
            "15m",
            "25m",
            TASK,
        ),
        Case(
            {
                bad("backcast_task_runs", state="parked", **TASK): "2x20 0x40",
                bad("backcast_task_workers", **TASK): "1x60",
            },
            "15m",
            "25m",
            TASK,
        ),
    ],
    "BackcastRunsWaitLong": [
        Case({bad("backcast_backlog_oldest_age_seconds", **POOL): "0+60x25 0x30"}, "22m", "30m", POOL)
    ],
    "BackcastRunsFail": [
        Case(
            {
                bad("backcast_attempts_total", outcome="failed", **TASK): "0+5x20 100x40",
                bad("backcast_attempts_total", outcome="succeeded", **TASK): "0+5x60",
                bad("backcast_attempts_total", outcome="failed", task="rare"): "0x9 1x50",
                bad("backcast_attempts_total", outcome="succeeded", task="rare"): "1x60",
            },
            "18m",
            "40m",
            TASK,
        )
    ],
    "BackcastRequestsFail": [
        Case(
            {
                bad("backcast_api_requests_total", status="503"): "0+10x20 200x40",
                bad("backcast_api_requests_total", status="202"): "0+60x60",
            },
            "15m",
            "30m",
        )
    ],
    "BackcastExecutorsEnd": [
        Case(
            {
                bad("backcast_executors_ended_total", cause="stall"): "0+1x15 15x60",
                bad("backcast_executors_ended_total", cause="replaced"): "0+1x60",
            },
            "12m",
            "45m",
            {"cause": "stall"},
        )
    ],
    "BackcastWorkersLost": [Case({bad("backcast_workers_lost_total"): "0x5 1x5 3x90"}, "15m", "50m")],
    "BackcastHistoryBehind": [
        Case({bad("backcast_history_lag_seconds"): "0+60x20 0x30"}, "18m", "25m"),
        Case({bad("backcast_history_dropped_total", why="no_room"): "0x5 5+1x10 15x60"}, "15m", "50m"),
    ],
    "BackcastStoreFails": [
        Case(
            {
                bad("backcast_store_errors_total", operation="write"): "0+3x20 60x40",
                bad("backcast_store_seconds_count", operation="write"): "0+10x60",
            },
            "15m",
            "30m",
        )
    ],
    "BackcastDatabaseSlow": [
        Case(
            {
                bad("backcast_steward_beat_seconds_bucket", le="0.5"): "0x30 0+60x60",
                bad("backcast_steward_beat_seconds_bucket", le="1.0"): "0+60x90",
                bad("backcast_steward_beat_seconds_bucket", le="+Inf"): "0+60x90",
            },
            "20m",
            "60m",
        ),
        Case(
            {
                bad("backcast_settle_seconds_bucket", le="1.0"): "0x30 0+60x60",
                bad("backcast_settle_seconds_bucket", le="2.5"): "0+60x90",
                bad("backcast_settle_seconds_bucket", le="+Inf"): "0+60x90",
            },
            "20m",
            "60m",
        ),
    ],
    "BackcastDatabaseFills": [
        Case({bad("backcast_database_dead_rows"): "2000000x50 0x30"}, "40m", "60m"),
        Case({bad("backcast_database_oldest_xmin_age_transactions"): "60000000x50 0x30"}, "40m", "60m"),
        Case({bad("backcast_database_size_bytes"): "3000000000+50000000x60 6000000000x600"}, "50m", "600m"),
    ],
    "BackcastStewardAbsent": [
        Case(
            {
                bad("backcast_build_info", process="api"): "1x60",
                bad("backcast_steward_leading", pod="s-0"): "1x5 0x15 1x40",
                bad("backcast_steward_leading", pod="s-1"): "0x60",
            },
            "15m",
            "25m",
        ),
        Case(
            {
                bad("backcast_build_info", process="worker"): "1x60",
                bad("backcast_steward_leading", pod="s-0"): "_x20 1x40",
            },
            "15m",
            "25m",
        ),
    ],
}


@needs_prometheus
@pytest.mark.parametrize("name", ALERTS)
def test_it_fires_and_clears(name: str, tmp_path: Path) -> None:
    for case in CASES[name]:
        labels = {"namespace": "team", **case.labels, **ALERTS[name]["labels"]}
        given = {
            "rule_files": [str(RULES)],
            "evaluation_interval": "1m",
            "tests": [
                {
                    "interval": "1m",
                    "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
                    # By the series that an alert makes: `alert_rule_test` compares the annotations too.
                    "promql_expr_test": [
                        {"expr": _firing(name), "eval_time": at, "exp_samples": seen}
                        for at, seen in (("0m", []), (case.fires, [_sample(name, labels)]), (case.clears, []))
                    ],
                }
            ],
        }
        file = tmp_path / "alerts.yaml"
        file.write_text(yaml.safe_dump(given))
        done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def _firing(name: str) -> str:
    return f'ALERTS{{alertname="{name}",alertstate="firing"}}'


def _sample(name: str, labels: dict[str, str]) -> dict[str, Any]:
    given = {"alertname": name, "alertstate": "firing", **labels}
    text = ",".join(f'{label}="{value}"' for label, value in sorted(given.items()))
    return {"labels": f"ALERTS{{{text}}}", "value": 1}


@needs_prometheus
def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_and_a_page() -> None:
    assert CASES.keys() == ALERTS.keys()
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == ALERTS.keys()
    for name, rule in ALERTS.items():
        text = (RUNBOOKS / f"{name}.md").read_text()
        assert text.startswith(f"# {name}\n")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["What it means", "How to see it", "What to do"]
        assert rule["annotations"]["runbook_url"].endswith(f"/docs/runbooks/{name}.md")
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["labels"]["severity"] in ("warning", "critical")


# The objects in the cluster


def test_the_chart_installs_these_rules() -> None:
    installed = scenario("everything").the("PrometheusRule")
    assert installed["spec"] == yaml.safe_load(RULES.read_text())
    assert installed["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_the_monitors_find_every_process() -> None:
    release = scenario("everything")
    [by_service] = release.the("ServiceMonitor")["spec"]["endpoints"]
    [by_pod] = release.the("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert by_service["interval"] == by_pod["interval"] == "15s"
    chosen = release.the("ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
    named = [
        service["metadata"]["name"]
        for service in release.of("Service")
        if chosen <= service["metadata"]["labels"].items()
        and by_service["port"] in [port["name"] for port in service["spec"]["ports"]]
    ]
    assert named == ["demo-casting-api-metrics"], "the Service for callers has no such port"
    selector = release.the("PodMonitor")["spec"]["selector"]
    [rule] = selector["matchExpressions"]
    found = {
        pod.component
        for pod in release.pods
        if selector["matchLabels"].items() <= pod.metadata["labels"].items()
        and pod.metadata["labels"][rule["key"]] in rule["values"]
        and by_pod["port"] in [port["name"] for port in pod.main["ports"]]
    }
    assert found == {"worker", "steward"}


@pytest.mark.parametrize("values", [{}, {"monitoring": {"monitors": "off", "rules": "off"}}])
def test_nothing_is_made_where_the_kinds_are_missing(values: Values) -> None:
    release = render(values)
    assert not [each for each in release.objects if each["apiVersion"] == MONITORING]
    assert [each["metadata"]["name"] for each in release.of("Service", "api")] == ["demo-backcast-api"]


@pytest.mark.parametrize(
    ("mode", "kind", "used"),
    [("auto", "apps/v1", "true"), ("auto", "none/v1", ""), ("on", "none/v1", "true"), ("off", "apps/v1", "")],
)
def test_auto_means_where_the_cluster_has_the_kind(mode: str, kind: str, used: str) -> None:
    """By those that Helm knows without a cluster."""
    asked = f'{{{{ include "backcast.uses.api" (dict "root" . "api" "{kind}" "mode" "{mode}") | quote }}}}'
    text = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: asked}}\ndata: {{used: {asked}}}\n"
    [found] = [each for each in render({"extraObjects": [text]}).objects if each["metadata"]["name"] == "asked"]
    assert found["data"] == {"used": used}
