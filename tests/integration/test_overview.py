"""Pools, workers, lanes and tasks at work, by HTTP: backlog, age, pace, slots, heartbeat, version, pauses."""

import re
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from backcast import AsyncClient
from backcast.api.app import create_app
from backcast.ledger import claims, fleet, lanes, limits, pauses
from backcast.ledger.connection import Ledger
from backcast.models import Limits, PauseKind, PauseRequest, TaskType, uuid7
from backcast.settings import Api
from backcast.store import Store
from tests.integration.test_api import problem
from tests.integration.test_ledger import LEASE
from tests.integration.test_why import faded

EXTRACT = TaskType(name="extract", pool="gpu", input_schema={"type": "object"})
CAST = TaskType(name="cast", pool="gpu", input_schema={"type": "object"})
SMALL = TaskType(name="small", pool="cpu", input_schema={"type": "object"})


@pytest.fixture
async def api(ledger: Ledger, store: Store) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(ledger, store, Api()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def register(ledger: Ledger, *tasks: TaskType, slots: int = 4) -> UUID:
    worker = uuid7()
    await fleet.register(ledger, worker, pool=tasks[0].pool, host="node", version="1.2", slots=slots, tasks=tasks)
    return worker


async def fill(ledger: Ledger, pool: str, task: str, runs: int, *, state: str = "queued", minutes: int = 0) -> None:
    await ledger.execute(
        """insert into runs (id, task, pool, owner, state, max_attempts, metadata, input, run_at, lane)
           select gen_random_uuid(), $2, $1, 'me', $4, 3, '{}', '{}', now() - make_interval(mins => $5), 'narrow'
             from generate_series(1, $3::int)""",
        pool,
        task,
        runs,
        state,
        minutes,
    )


async def get(api: httpx.AsyncClient, path: str) -> Any:
    answer = await api.get(path)
    assert answer.status_code == 200, answer.text
    figures = re.findall(r'"(?:\w+_age_seconds|per_minute)":([0-9.e+-]+)', answer.text)
    assert [f"{float(each):.3g}" for each in figures] == [f"{float(each):g}" for each in figures], "three digits"
    return answer.json()


def is_age(seconds: float, minutes: float, since: float) -> bool:
    return minutes * 60 <= seconds <= minutes * 60 + time.monotonic() - since + 1


async def test_pools(api: httpx.AsyncClient, ledger: Ledger) -> None:
    began = time.monotonic()
    first, second, silent, leaving = [await register(ledger, EXTRACT, CAST) for _ in range(4)]
    await register(ledger, SMALL, slots=1)
    await fill(ledger, "gpu", "extract", 3, minutes=2)
    await fill(ledger, "gpu", "cast", 2, minutes=9)
    await ledger.execute("update workers set busy = 3, recent = 30, heartbeat_at = now()")
    await ledger.execute("update workers set heartbeat_at = now() - interval '2 minutes' where id = $1", silent)
    await ledger.execute("update workers set draining = true where id = $1", leaving)
    await claims.claim(ledger, pool="gpu", cursor=0, limit=1, worker_id=first, lease=LEASE)
    await pauses.pause(ledger, PauseKind.POOL, "cpu", PauseRequest(reason="moving", by="ana"))
    await ledger.execute(
        """update runs set state = 'scheduled', route = 'cast'
            where id = (select id from runs where task = 'extract' limit 1)"""
    )
    cpu, gpu = (await get(api, "/v1/pools"))["items"]
    assert {name: gpu[name] for name in ("name", "workers", "slots", "busy", "ready", "running", "parked")} == {
        "name": "gpu",
        "workers": 2,
        "slots": 8,
        "busy": 6,
        "ready": 3,
        "running": 1,
        "parked": 1,
    }
    assert gpu["paused"] is None
    assert faded(60, since=began) <= gpu["per_minute"] <= 60
    assert (cpu["name"], cpu["ready"], cpu["oldest_age_seconds"]) == ("cpu", 0, None)
    assert (cpu["paused"]["reason"], cpu["paused"]["by"]) == ("moving", "ana")
    one = await get(api, "/v1/pools/gpu")
    assert is_age(one["oldest_age_seconds"], 9, began)
    assert one["ready"] == gpu["ready"]
    assert "cpu, gpu" in str(problem(await api.get("/v1/pools/tpu"), 404, "unknown_pool")["detail"])
    assert second


async def test_counts_have_a_bound(api: httpx.AsyncClient, ledger: Ledger) -> None:
    await register(ledger, EXTRACT)
    await fill(ledger, "gpu", "extract", 10_100)
    assert (await get(api, "/v1/pools/gpu"))["ready"] == 10_000
    assert (await get(api, "/v1/tasks/extract"))["load"]["ready"] == 10_000


async def test_workers(api: httpx.AsyncClient, ledger: Ledger) -> None:
    began = time.monotonic()
    silent, leaving, worker = [await register(ledger, EXTRACT, CAST) for _ in range(3)]
    await ledger.execute("update workers set busy = 1, settled = 7, recent = 5, heartbeat_at = now()")
    await ledger.execute("update workers set heartbeat_at = now() - interval '2 minutes' where id = $1", silent)
    assert (await api.post(f"/v1/workers/{leaving}/drain")).status_code == 202
    await fill(ledger, "gpu", "extract", 3)
    await claims.claim(ledger, pool="gpu", cursor=0, limit=2, worker_id=worker, lease=LEASE)
    found = (await get(api, "/v1/workers"))["items"]
    assert [each["id"] for each in found] == [str(worker), str(leaving), str(silent)]
    assert [each["takes_runs"] for each in found] == [True, True, False], "it has not read that it is to drain"
    assert [each["draining"] for each in found] == [False, True, False]
    assert is_age(found[2]["heartbeat_age_seconds"], 2, began)
    shown = await get(api, f"/v1/workers/{worker}")
    assert {
        name: shown[name] for name in ("pool", "host", "version", "tasks", "slots", "busy", "running", "settled")
    } == {
        "pool": "gpu",
        "host": "node",
        "version": "1.2",
        "tasks": ["extract", "cast"],
        "slots": 4,
        "busy": 1,
        "running": 2,
        "settled": 7,
    }
    assert faded(5, since=began) <= shown["per_minute"] <= 5
    assert is_age(shown["heartbeat_age_seconds"], 0, began)
    problem(await api.get(f"/v1/workers/{uuid4()}"), 404, "unknown_worker")
    problem(await api.get("/v1/workers/42"), 404, "unknown_worker")


async def test_tasks(api: httpx.AsyncClient, ledger: Ledger) -> None:
    began = time.monotonic()
    worker = await register(ledger, EXTRACT, CAST)
    await register(ledger, CAST)
    await fill(ledger, "gpu", "extract", 3, minutes=5)
    await fill(ledger, "gpu", "cast", 2, minutes=9)
    assert len(await claims.claim(ledger, pool="gpu", cursor=0, limit=2, worker_id=worker, lease=LEASE)) == 2  # of cast
    await pauses.pause(ledger, PauseKind.TASK, "cast", PauseRequest(reason="", by=""))
    load = (await get(api, "/v1/tasks/extract"))["load"]
    assert (load["workers"], load["slots"], load["ready"], load["running"]) == (1, 4, 3, 0)
    assert is_age(load["oldest_age_seconds"], 5, began)
    assert load["paused"] is None
    load = (await get(api, "/v1/tasks/cast"))["load"]
    assert (load["workers"], load["slots"], load["ready"], load["running"]) == (2, 8, 0, 2)
    assert load["paused"]["kind"] == "task"
    assert [each["load"] for each in (await get(api, "/v1/tasks"))["items"]] == [None, None]


async def test_lanes(api: httpx.AsyncClient, ledger: Ledger) -> None:
    began = time.monotonic()
    await register(ledger, EXTRACT)
    await fill(ledger, "gpu", "extract", 3, state="held", minutes=4)
    await limits.limit(ledger, "narrow", Limits(max_running=2))
    lane = await get(api, "/v1/lanes/narrow")
    assert (lane["queued"], lane["held"]) == (2, 1)
    assert faded(2, since=began) <= lane["per_minute"] <= 2
    assert is_age(lane["oldest_age_seconds"], 4, began)
    await limits.lift(ledger, "narrow")
    await lanes.promote(ledger, ["narrow"])
    await pauses.pause(ledger, PauseKind.LANE, "narrow", PauseRequest(reason="", by=""))
    [lane] = (await get(api, "/v1/lanes"))["items"]
    assert (lane["per_minute"], lane["oldest_age_seconds"], lane["held"]) == (None, None, 3)


@pytest.mark.parametrize("odd", ["'infinity'", "'-infinity'", "'33715-01-01'", "'4713-01-01 BC'"])
async def test_times_that_cannot_be_shown(api: httpx.AsyncClient, ledger: Ledger, odd: str) -> None:
    worker = await register(ledger, EXTRACT)
    await fill(ledger, "gpu", "extract", 1)
    await limits.limit(ledger, "narrow", Limits(max_running=0))
    await ledger.execute(f"update runs set run_at = {odd}")
    await ledger.execute(f"update workers set heartbeat_at = {odd}, started_at = {odd}, recent = 'NaN'")
    for path in ("/v1/pools", "/v1/tasks/extract", "/v1/workers", f"/v1/workers/{worker}", "/v1/lanes"):
        await get(api, path)
    row = await ledger.fetchrow("select id from runs")
    assert row is not None
    await get(api, f"/v1/runs/{row['id']}/why")


async def test_the_client_reads_pools_workers_and_pages_of_runs(ledger: Ledger, store: Store) -> None:
    worker = await register(ledger, EXTRACT)
    await fill(ledger, "gpu", "extract", 3)
    transport = httpx.ASGITransport(create_app(ledger, store, Api()))
    async with AsyncClient("http://localhost", transport=transport) as client:
        assert [(pool.name, pool.slots) for pool in await client.pools()] == [("gpu", 4)]
        assert [one.id for one in await client.workers()] == [worker]
        first = await client.page(limit=2, task="extract")
        rest = await client.page(limit=2, task="extract", cursor=first.next_cursor)
    assert (len(first.items), len(rest.items), rest.next_cursor) == (2, 1, None)
    assert len({run.id for run in first.items + rest.items}) == 3
