"""Pods die while work is going on: no accepted run is lost, and none has two outcomes."""

import asyncio

import pytest

from tests.e2e.load import load
from tests.e2e.programs import run
from tests.e2e.release import Release
from tests.support.waiting import until


async def _kill(release: Release, component: str) -> str:
    """Kill a pod with no grace for its processes; returns its name."""
    name = release.pod(component)
    release.cluster.delete_pod(release.namespace, name, grace=0)
    return name


async def test_a_worker_dies(shared: Release) -> None:
    async with load(shared, "worker-dies") as work:
        naps = [await shared.submit("nap", key=f"{n}", seconds=8) for n in range(4)]

        async def running() -> set[str]:
            rows = await shared.sql("select id from backcast.all_runs where state = 'running' and task = 'nap'")
            return {run_id for [run_id] in rows} & set(naps)

        on_it = await until(running, timeout=60, every=0.2)
        dead = await _kill(shared, "worker")
        await work.more(20)
    await work.verify()
    ends = await asyncio.gather(*(shared.ended(nap, timeout=120) for nap in naps))
    assert {end["state"] for end in ends} == {"completed"}
    again = [end for end in ends if end["id"] in on_it and end["attempts"] > 1]
    assert again, f"{dead} had been working on {on_it}, and another worker must have done it"


async def test_prefects_server_dies(shared: Release) -> None:
    """Work goes on without it, and it gets the missed history afterwards."""
    async with load(shared, "prefect-dies") as work:
        await _kill(shared, "prefect-server")
        await work.more(5)
        missed = work.accepted[-5:]
        await work.more(15)
    await work.verify()

    async def shown() -> int:
        names = ", ".join(f"'{case.id}'" for case in missed)
        [[count]] = await shared.sql(
            f"select count(*) from task_run where id in ({names}) and state_type = 'COMPLETED'", database="prefect"
        )
        return int(count)

    await until(shown, lambda count: count == len(missed), timeout=120, every=1)


@pytest.mark.parametrize("component", ["postgres", "store"])
async def test_a_server_with_the_data_dies(shared: Release, component: str) -> None:
    async with load(shared, f"{component}-dies") as work:
        before = shared.pods(component)[0].metadata.uid
        await _kill(shared, component)

        async def back() -> bool:
            return any(pod.metadata.uid != before for pod in shared.pods(component)) and bool(shared.pod(component))

        await until(back, timeout=120, every=0.5)
        await work.more(20)
    await work.verify()


async def test_everything_restarts(shared: Release) -> None:
    """As after a change of a node's image: all parts at once, each in its own order."""
    before = {pod.metadata.uid for pod in shared.pods()}
    async with load(shared, "restart") as work:
        everything = ("deployments,statefulsets", "-l", shared.selector(), "-n", shared.namespace)
        await run("kubectl", "rollout", "restart", *everything)
        await shared.settled(timeout=300)

        async def old() -> set[str]:
            return before & {pod.metadata.uid for pod in shared.pods(leaving=True)}

        await until(old, lambda left: not left, timeout=120, every=1)
        await work.more(20)
    await work.verify()


@pytest.mark.parametrize("component", ["worker", "api", "steward", "prefect-server"])
async def test_a_pod_that_starts_is_deleted(shared: Release, component: str) -> None:
    """At several moments of its start. It ends at once, though it has five minutes, and no worker stays registered."""
    gone = set[str]()

    async def present() -> set[str]:
        return {pod.metadata.name for pod in shared.pods(component, leaving=True)}

    async def started() -> str:
        """A pod whose container has just begun to run."""
        for pod in shared.pods(component):
            if pod.metadata.name not in gone and any(it.state.running for it in pod.status.container_statuses or []):
                return str(pod.metadata.name)
        return ""

    for moment in range(6):
        pod = await until(started, timeout=120, every=0.1)
        await asyncio.sleep(moment * 0.5)  # the moment under test
        shared.cluster.delete_pod(shared.namespace, pod, grace=300)
        gone.add(pod)
        await until(present, lambda names, pod=pod: pod not in names, timeout=120, every=0.5)
    await shared.settled()
    rows = await shared.sql("select host from backcast.workers")
    assert not gone & {host for [host] in rows}
    assert await shared.do("add", key=component, a=1, b=2) == [component, 3]
