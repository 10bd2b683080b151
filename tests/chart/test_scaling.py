"""The number of pods, the scaler that decides it, and the effect of a change."""

from typing import Any

import pytest

from tests.chart.rendering import KEDA, Release, Values, render, scenario


def pool(**more: Any) -> Values:
    return {"workers": {"pools": {"default": more}}}


def scaled(mode: str, **more: Any) -> Values:
    return pool(autoscaling={"mode": mode, **more})


def test_the_defaults_are_fixed_numbers() -> None:
    release = scenario("defaults")
    assert {pod.component: pod.owner["spec"]["replicas"] for pod in release.pods if pod.runs_on} == {
        "api": 2,
        "worker": 2,
        "steward": 1,
        "prefect-server": 1,
        "llm": 1,
        "postgres": 1,
        "store": 1,
    }
    assert not release.of("HorizontalPodAutoscaler")
    assert not release.of("ScaledObject")


@pytest.mark.parametrize("values", [{"api": {"autoscaling": {"enabled": True}}}, scaled("hpa"), scaled("keda")])
def test_under_a_scaler_the_chart_sets_no_number(values: Values) -> None:
    component = "api" if "api" in values else "worker"
    release = render(values)
    assert "replicas" not in release.pod(component).owner["spec"]
    scaler = release.of("HorizontalPodAutoscaler") + release.of("ScaledObject")
    [target] = [each["spec"]["scaleTargetRef"]["name"] for each in scaler]
    assert target == release.pod(component).owner["metadata"]["name"]


def test_keda_counts_waiting_and_running_runs() -> None:
    release = render(scaled("keda", minReplicas=0, maxReplicas=7) | {"networkPolicy": {"enabled": False}})
    found = release.the("ScaledObject")["spec"]
    [trigger] = found["triggers"]
    assert (found["minReplicaCount"], found["maxReplicaCount"]) == (0, 7)
    assert (found["pollingInterval"], found["cooldownPeriod"]) == (2, 10)
    behavior = found["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == {"scaleDown": {"stabilizationWindowSeconds": 10}}
    assert trigger["metadata"] == {
        "query": "select coalesce((select ready + running from backcast.backlog where pool = 'default'), 1)",
        "targetQueryValue": "10",
        "host": "demo-backcast-postgres.team.svc",
        "port": "5432",
        "userName": "backcast_scaler",
        "dbName": "backcast",
        "sslmode": "disable",
    }
    authentication = release.the("TriggerAuthentication")
    assert trigger["authenticationRef"] == {"name": authentication["metadata"]["name"]}
    [reference] = authentication["spec"]["secretTargetRef"]
    assert (reference["parameter"], reference["key"]) == ("password", "scaler-password")
    assert reference["key"] in release.the("Secret")["data"]


def test_keda_reads_an_external_database_by_its_url() -> None:
    external = {"mode": "external", "external": {"existingSecret": "databases"}}
    release = render(scaled("keda", runsPerReplica=3) | {"postgres": external})
    [trigger] = release.the("ScaledObject")["spec"]["triggers"]
    assert set(trigger["metadata"]) == {"query", "targetQueryValue", "host"}
    assert trigger["metadata"]["host"] == "demo-backcast.team", "or KEDA would take two releases' databases for one"
    assert trigger["metadata"]["targetQueryValue"] == "3"
    [reference] = release.the("TriggerAuthentication")["spec"]["secretTargetRef"]
    assert reference == {"parameter": "connection", "name": "databases", "key": "scaler-url"}


def test_a_pool_may_shrink_at_once() -> None:
    scaler = render(scaled("hpa", stabilizationSeconds=0)).the("HorizontalPodAutoscaler")["spec"]
    assert scaler["behavior"] == {"scaleDown": {"stabilizationWindowSeconds": 0}}
    assert "behavior" not in render({"api": {"autoscaling": {"enabled": True}}}).the("HorizontalPodAutoscaler")["spec"]


def test_pools_scale_each_in_its_own_way() -> None:
    release = scenario("keda")
    assert {each["metadata"]["labels"]["backcast/pool"] for each in release.of("ScaledObject")} == {"default", "gpu"}
    assert {
        each["metadata"]["labels"]["backcast/pool"] for each in release.of("HorizontalPodAutoscaler", "worker")
    } == {"cpu"}
    gpu = release.pod("worker", "gpu")
    assert gpu.main["image"] == "registry.example.org/vision/worker:7"
    assert gpu.spec["nodeSelector"] == {"accelerator": "nvidia"}
    assert release.pod("worker", "default").main["image"] == "ghcr.io/backcast/worker:0.1.0"
    assert all(each["apiVersion"] == KEDA for each in release.of("ScaledObject") + release.of("TriggerAuthentication"))


@pytest.mark.parametrize("grace", [0, 30, 300])
def test_one_value_is_the_grace(grace: int) -> None:
    pod = render(pool(grace=grace)).pod("worker")
    environment = {each["name"]: each.get("value") for each in pod.main["env"]}
    assert environment["BACKCAST_WORKER__GRACE"] == str(grace)
    assert pod.spec["terminationGracePeriodSeconds"] == grace + 15


def test_the_api_leaves_the_load_balancer_first() -> None:
    pod = render({"api": {"preStopSeconds": 20}}).pod("api")
    assert pod.main["lifecycle"] == {"preStop": {"sleep": {"seconds": 20}}}
    assert pod.spec["terminationGracePeriodSeconds"] == 45
    assert pod.owner["spec"]["strategy"] == {"rollingUpdate": {"maxUnavailable": 0}}


def budgets(release: Release) -> set[str]:
    for each in release.of("PodDisruptionBudget"):
        assert each["spec"]["maxUnavailable"] == 1
        assert "minAvailable" not in each["spec"]
        [pod] = [pod for pod in release.pods if pod.owner["metadata"]["name"] == each["metadata"]["name"]]
        assert each["spec"]["selector"] == pod.owner["spec"]["selector"]
    return {each["metadata"]["name"].removeprefix("demo-backcast-") for each in release.of("PodDisruptionBudget")}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"api", "worker-default"}),
        ({"api": {"replicas": 1}, "workers": {"defaults": {"replicas": 1}}}, set[str]()),
        ({"api": {"pdb": {"enabled": False}}, "workers": {"defaults": {"pdb": {"enabled": False}}}}, set[str]()),
        ({"steward": {"replicas": 2}, "llm": {"replicas": 2}}, {"api", "worker-default", "steward", "llm"}),
        ({"api": {"replicas": 1}} | pool(replicas=1, autoscaling={"mode": "keda"}), {"worker-default"}),
        ({"api": {"replicas": 1}} | pool(replicas=9, autoscaling={"mode": "hpa", "maxReplicas": 1}), set[str]()),
    ],
)
def test_only_parts_with_replicas_have_budgets(values: Values, expected: set[str]) -> None:
    assert budgets(render(values)) == expected
