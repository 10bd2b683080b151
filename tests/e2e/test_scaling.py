"""Scaling: workers start when work waits and stop when none does, the idle ones first; the API follows its CPU."""

import asyncio
import json
from typing import Any

from tests.e2e.cluster import is_ready, needs
from tests.e2e.programs import run
from tests.e2e.release import Release, merged
from tests.support.waiting import until

MOST = 3
"""Replicas of the elastic pool."""


async def test_a_pool_goes_from_none_to_many_and_back(shared: Release) -> None:
    needs(shared.cluster, "keda.sh", "KEDA")
    await shared.knows("elastic_nap")  # a worker has run at least once, to register it

    async def look() -> list[str]:
        return [pod.metadata.name for pod in shared.pods("worker", "elastic", leaving=True)]

    await until(look, lambda pods: not pods, timeout=180, every=1)
    naps = [await shared.submit("elastic_nap", key=f"{n}", seconds=5) for n in range(12)]
    # One slot each: a single worker would need a minute.
    await until(look, lambda pods: len(pods) == MOST, timeout=120, every=0.5)
    results = await asyncio.gather(*(shared.result(nap, timeout=180) for nap in naps))
    assert results == [[f"{n}", 5] for n in range(12)]
    await until(look, lambda pods: not pods, timeout=180, every=1)


async def test_scaling_down_takes_idle_workers(shared: Release) -> None:
    """The newest pod is the only busy one. By default the cluster would remove the newest first."""
    deployment = shared.named("worker", "default")
    await _scale(shared, deployment, 3)
    naps: list[str] = []
    try:
        await shared.settled()
        pods = {pod.metadata.name: pod for pod in shared.pods("worker", "default")}
        newest = max(pods.values(), key=_ready_since).metadata.name
        slots = 4 * len(pods)
        naps = [await shared.submit("nap", key=f"{n}", seconds=120) for n in range(slots)]

        async def places() -> dict[str, str]:
            rows = await shared.sql(
                "select r.id, w.host from backcast.all_runs r join backcast.workers w on w.id = r.worker_id "
                "where r.state = 'running' and r.task = 'nap'"
            )
            return {row[0]: row[1] for row in rows}

        where = await until(places, lambda where: where.keys() >= set(naps), timeout=60, every=0.5)
        assert set(where.values()) == pods.keys(), "every slot is taken, so every worker is busy"
        stay = next(run_id for run_id, host in where.items() if host == newest)
        for run_id in where.keys() - {stay}:
            assert (await shared.http.post(f"/v1/runs/{run_id}/cancel")).status_code == 200

        async def costs() -> dict[str, int]:
            found = {pod.metadata.name: pod.metadata.annotations or {} for pod in shared.pods("worker", "default")}
            return {
                name: int(notes.get("controller.kubernetes.io/pod-deletion-cost", 0)) for name, notes in found.items()
            }

        def newest_alone_costs(costs: dict[str, int]) -> bool:
            return costs[newest] > 0 and not any(cost for name, cost in costs.items() if name != newest)

        await until(costs, newest_alone_costs, timeout=60, every=0.5)
        await _scale(shared, deployment, 1)

        async def left() -> list[str]:
            return [pod.metadata.name for pod in shared.pods("worker", "default")]

        assert await until(left, lambda names: len(names) == 1, timeout=60, every=0.5) == [newest]
        run_now = await shared.run(stay)
        assert (run_now["state"], run_now["attempts"]) == ("running", 1), "the run is untouched"
    finally:
        for run_id in naps:
            await shared.http.post(f"/v1/runs/{run_id}/cancel")
        await _scale(shared, deployment, 1)


def _ready_since(pod: Any) -> Any:
    assert is_ready(pod), pod.metadata.name
    [since] = [each.last_transition_time for each in pod.status.conditions if each.type == "Ready"]
    return since


async def _scale(release: Release, deployment: str, replicas: int) -> None:
    await run("kubectl", "scale", f"deployment/{deployment}", f"--replicas={replicas}", "-n", release.namespace)


async def _scaler(release: Release, target: str) -> Any:
    """The HorizontalPodAutoscaler of a Deployment."""
    found = release.cluster.asking(release.cluster.scaling.list_namespaced_horizontal_pod_autoscaler, release.namespace)
    [scaler] = [each for each in found.items if each.spec.scale_target_ref.name == target]
    return scaler


async def test_turning_a_scaler_on_keeps_what_runs(shared: Release, shared_values: dict[str, Any]) -> None:
    """The scaler owns `replicas` from then on: an upgrade that only left it out would ask for one."""
    needs(shared.cluster, "keda.sh", "KEDA")
    three = {"workers": {"pools": {"default": {"replicas": 3}}}}
    await shared.install(merged(shared_values, three))
    await shared.settled()
    before = {pod.metadata.uid for pod in shared.pods("worker", "default")}
    assert len(before) == 3
    scaler = {"mode": "keda", "minReplicas": 1, "maxReplicas": 4, "stabilizationSeconds": 300}
    await shared.install(merged(shared_values, {"workers": {"pools": {"default": {"autoscaling": scaler}}}}))
    deployment = shared.named("worker", "default")
    scaled = await until(
        lambda: _scaler(shared, deployment), lambda each: bool(each.status.desired_replicas), timeout=90, every=1
    )
    assert scaled.status.desired_replicas == 3
    assert {pod.metadata.uid for pod in shared.pods("worker", "default", leaving=True)} == before


async def test_the_api_is_scaled_by_its_cpu(shared: Release) -> None:
    needs(shared.cluster, "metrics.k8s.io", "metrics")
    deployment = shared.named("api")

    def reads(scaler: Any) -> bool:
        metrics = scaler.status.current_metrics or []
        return any(m.resource and m.resource.current.average_utilization is not None for m in metrics)

    scaler = await until(lambda: _scaler(shared, deployment), reads, timeout=180, every=2)
    assert (scaler.spec.min_replicas, scaler.spec.max_replicas) == (1, 2)
    conditions = {condition.type: condition.status for condition in scaler.status.conditions}
    assert conditions["ScalingActive"] == "True", conditions

    async def aim(percent: int, behavior: dict[str, Any] | None) -> None:
        cpu = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": percent}}
        spec = {"metrics": [{"type": "Resource", "resource": cpu}], "behavior": behavior}
        patch = ("--type=merge", "--patch", json.dumps({"spec": spec}))
        await run("kubectl", "patch", "hpa", scaler.metadata.name, "-n", shared.namespace, *patch)

    async def ready() -> int:
        return sum(map(is_ready, shared.pods("api")))

    at_once = {"scaleDown": {"stabilizationWindowSeconds": 0}}
    try:
        await aim(1, at_once)  # an API without work uses more
        await until(ready, lambda count: count == 2, timeout=90, every=0.5)
        await aim(1000, at_once)
        await until(ready, lambda count: count == 1, timeout=90, every=0.5)
    finally:
        await aim(1000, None)
