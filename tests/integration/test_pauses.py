"""Pauses: nothing new of what is paused starts, whatever it was doing; everything goes on afterwards; others notice
nothing."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest

from backcast.api.app import create_app
from backcast.ledger import (
    batches,
    claims,
    dispatch,
    figures,
    fleet,
    limits,
    pauses,
    routing,
    runs,
    settlement,
    submissions,
)
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement
from backcast.models import Limits, PauseKind, PauseRequest, Release, State, Submission, TaskType, uuid7
from backcast.settings import Api
from backcast.store import Store
from tests.integration.test_api import ECHO, problem
from tests.integration.test_ledger import LEASE
from tests.support.stack import Stack, stack
from tests.support.waiting import until

A = TaskType(name="a", pool="default", input_schema={"type": "object"})
B = TaskType(name="b", pool="default", input_schema={"type": "object"})
C = TaskType(name="c", pool="other", input_schema={"type": "object"})
TASK, LANE, POOL = PauseKind.TASK, PauseKind.LANE, PauseKind.POOL
BULK = """
insert into runs (id, task, pool, owner, state, max_attempts, metadata, input)
select gen_random_uuid(), $1, 'default', 'o' || n % 7, 'queued', 3, '{}', '{}' from generate_series(1, $2::int) n"""


async def submit(ledger: Ledger, task: TaskType = A, **fields: object) -> UUID:
    submission = Submission(**fields)  # type: ignore[arg-type]
    return (await submissions.submit(ledger, task, submission, input_text="{}", input_hash=b"")).run.id


async def register(ledger: Ledger, *tasks: TaskType) -> UUID:
    worker, tasks = uuid7(), tasks or (A, B)
    await fleet.register(ledger, worker, pool=tasks[0].pool, host="h", version="1", slots=10, tasks=tasks)
    return worker


async def claim(ledger: Ledger, worker: UUID, *, limit: int = 100, pool: str = "default") -> list[Claim]:
    return await claims.claim(ledger, pool=pool, cursor=0, limit=limit, worker_id=worker, lease=LEASE)


async def states(ledger: Ledger, task: str = "a") -> dict[str, int]:
    rows = await ledger.fetch("select state, count(*) from all_runs where task = $1 group by 1", task)
    return {row["state"]: row["count"] for row in rows}


def settled(claim: Claim, **fields: object) -> Settlement:
    done = {"state": "completed", "result": "1", "result_key": f"results/{claim.id}/{claim.fence}.json"}
    return Settlement(id=claim.id, fence=claim.fence, lane=claim.lane, **(fields or done))  # type: ignore[arg-type]


async def pause(ledger: Ledger, kind: PauseKind, name: str, **fields: object) -> None:
    await pauses.pause(ledger, kind, name, PauseRequest(**fields))  # type: ignore[arg-type]


async def test_whatever_a_run_was_doing_it_waits(ledger: Ledger) -> None:
    worker = await register(ledger)
    await limits.limit(ledger, "narrow", Limits(max_running=1))
    retried, released, running = [await submit(ledger) for _ in range(3)]
    taken = {c.id: c for c in await claim(ledger, worker)}
    queued, future = await submit(ledger), await submit(ledger, run_at=datetime.now(UTC) + timedelta(hours=1))
    promoted, held = await submit(ledger, lane="narrow"), await submit(ledger, lane="narrow")
    await pause(ledger, TASK, "a", reason="a bad prompt", by="ana")
    new = await submit(ledger)
    assert await states(ledger) == {"running": 3, "scheduled": 1, "paused": 4}
    later = settled(taken[retried], state="scheduled", delay=0, retries_used=1)
    back = settled(taken[released], state="queued", counts=0)
    assert (await settlement.settle(ledger, worker, [later, back])).accepted
    await ledger.execute("update runs set run_at = now() where state = 'scheduled'")
    await dispatch.dispatch_due(ledger)
    assert await claim(ledger, worker) == []
    assert await states(ledger) == {"running": 1, "paused": 7}
    assert (await runs.get(ledger, queued)).state is State.QUEUED
    await settlement.settle(ledger, worker, [settled(taken[running])])
    await pauses.resume(ledger, TASK, "a")
    assert await states(ledger) == {"completed": 1, "queued": 6, "held": 1}
    again = {c.id for c in await claim(ledger, worker)}
    assert again | {held} >= {retried, released, queued, future, promoted, new} >= again - {held}


async def test_other_tasks_lanes_and_pools_go_on(ledger: Ledger) -> None:
    worker, elsewhere = await register(ledger), await register(ledger, C)
    await pause(ledger, TASK, "a")
    await pause(ledger, LANE, "gpu")
    await pause(ledger, POOL, "nowhere")
    theirs = {await submit(ledger, B), await submit(ledger, B, lane="cpu"), await submit(ledger, B, owner="a")}
    for fields in ({}, {"lane": "cpu"}):
        await submit(ledger, **fields)
    await submit(ledger, B, lane="gpu")
    third = await submit(ledger, C)
    assert {c.id for c in await claim(ledger, worker)} == theirs
    assert [c.id for c in await claim(ledger, elsewhere, pool="other")] == [third]
    await pause(ledger, POOL, "other")
    await submit(ledger, C)
    assert await claim(ledger, elsewhere, pool="other") == []
    assert await states(ledger, "c") == {"running": 1, "paused": 1}


async def test_a_paused_lane_gives_its_places_back_and_takes_them_again(ledger: Ledger) -> None:
    worker = await register(ledger)
    await limits.limit(ledger, "narrow", Limits(max_running=2))
    for _ in range(5):
        await submit(ledger, lane="narrow")
    [running] = await claim(ledger, worker, limit=1)
    await pause(ledger, LANE, "narrow")
    lane = await limits.get(ledger, "narrow")
    assert (lane.running, lane.queued, lane.held) == (1, 0, 4)
    assert lane.paused is not None
    await settlement.settle(ledger, worker, [settled(running)])
    assert await states(ledger) == {"completed": 1, "paused": 4}
    await pauses.resume(ledger, LANE, "narrow")
    assert await states(ledger) == {"completed": 1, "queued": 2, "held": 2}
    assert (await limits.get(ledger, "narrow")).paused is None


async def test_a_lane_without_limits_can_be_paused(ledger: Ledger) -> None:
    worker = await register(ledger)
    await submit(ledger, lane="free")
    await pause(ledger, LANE, "free", reason="maintenance")
    [lane] = await limits.all_(ledger)
    assert (lane.name, lane.max_running, lane.queued, lane.held) == ("free", None, 0, 1)
    assert await claim(ledger, worker) == []
    await pauses.resume(ledger, LANE, "free")
    assert len(await claim(ledger, worker)) == 1
    assert await limits.all_(ledger) == []


async def test_a_claim_leaves_and_sets_aside_what_a_slow_statement_has_queued(ledger: Ledger) -> None:
    """A submission that began before the pause is recorded as queued after it."""
    worker = await register(ledger)
    await pause(ledger, TASK, "a")
    await ledger.execute(BULK, "a", 3000)
    mine = await submit(ledger, B, owner="z")
    taken = list[Claim]()
    for _ in range(20):
        taken += await claim(ledger, worker, limit=5)
    assert [c.id for c in taken] == [mine]
    assert (await states(ledger))["paused"] > 1000
    assert (await states(ledger)).get("running") is None


async def test_the_backlog_of_a_pool_has_no_paused_runs(ledger: Ledger) -> None:
    await register(ledger)
    await ledger.execute(BULK, "a", 2500)
    await submit(ledger, B)
    await pause(ledger, TASK, "a")
    assert [(each.pool, each.ready) for each in await figures.backlog(ledger)] == [("default", 1)]
    await pause(ledger, POOL, "default")
    [backlog] = await figures.backlog(ledger)
    assert (backlog.ready, backlog.oldest_age_seconds) == (0, 0)
    await pauses.resume(ledger, POOL, "default")
    assert (await states(ledger), await states(ledger, "b")) == ({"paused": 2500}, {"queued": 1})
    await pauses.resume(ledger, TASK, "a")
    assert [each.ready for each in await figures.backlog(ledger)] == [2501]


async def test_a_pause_ends_by_itself(ledger: Ledger) -> None:
    worker, run = await register(ledger), await submit(ledger)
    await pause(ledger, TASK, "a", until=datetime.now(UTC) + timedelta(hours=1))
    await dispatch.dispatch_due(ledger)
    assert await claim(ledger, worker) == []
    await ledger.execute("update pauses set until = now()")
    assert await pauses.all_(ledger) == []
    await dispatch.dispatch_due(ledger)
    assert [c.id for c in await claim(ledger, worker)] == [run]


async def test_what_a_slow_statement_sets_aside_after_the_end_goes_on(ledger: Ledger) -> None:
    worker, run = await register(ledger), await submit(ledger)
    await pause(ledger, TASK, "a")
    await pauses.resume(ledger, TASK, "a")
    for age in (0, 31):
        await ledger.execute("update pauses set until = until - $1::interval", timedelta(seconds=age))
        await ledger.execute("update runs set state = 'paused' where id = $1", run)
        await dispatch.dispatch_due(ledger)
        assert await states(ledger) == {"queued": 1}
    await ledger.execute("update pauses set until = until - interval '1 minute'")
    await dispatch.dispatch_due(ledger)
    assert await ledger.fetch("select from pauses") == []
    assert [c.id for c in await claim(ledger, worker)] == [run]


async def test_what_changes_while_a_batch_is_recorded_holds_for_all_of_it(ledger: Ledger, database: str) -> None:
    """A batch may take longer than an ended pause stays."""

    async def change() -> None:
        async with aclosing(Ledger(database)) as other:
            await pauses.resume(other, TASK, "a")
            await other.execute("update pauses set until = now() - interval '2 minutes'")
            await dispatch.dispatch_due(other)
            assert await other.fetch("select from pauses") == []
            await limits.limit(other, "lane", Limits(max_running=1))

    def pieces() -> Iterator[list[submissions.New]]:
        for task, lane in ((A, None), (B, "lane")):
            given = Submission(lane=lane)
            yield [submissions.new(task, given, input_text="{}", input_hash=b"", batch_id=batch) for _ in range(2)]
        with ThreadPoolExecutor() as pool:
            pool.submit(asyncio.run, change()).result()
        yield [submissions.new(C, Submission(), input_text="{}", input_hash=b"", batch_id=batch)]

    worker, batch = await register(ledger), uuid7()
    await pause(ledger, TASK, "a")
    await batches.submit(ledger, batch, "me", pieces(), size=5, key=None, request_hash=b"")
    await dispatch.dispatch_due(ledger)
    assert (await states(ledger), await states(ledger, "b")) == ({"queued": 2}, {"queued": 1, "held": 1})
    assert len(await claim(ledger, worker)) == 3


async def test_paused_runs_are_cancelled_and_expire(ledger: Ledger) -> None:
    await register(ledger)
    await pause(ledger, TASK, "a")
    gone, late = await submit(ledger), await submit(ledger, deadline=datetime.now(UTC) + timedelta(hours=1))
    assert (await runs.cancel(ledger, gone)).state is State.CANCELLED
    await ledger.execute("update runs set deadline = now()")
    await dispatch.dispatch_due(ledger)
    run = await runs.get(ledger, late)
    assert run.state is State.EXPIRED
    assert run.error is not None
    assert "paused" in run.error.detail


async def test_a_moved_task_leaves_the_pause_of_its_pool(ledger: Ledger) -> None:
    await register(ledger)
    run = await submit(ledger)
    await pause(ledger, POOL, "default")
    assert await states(ledger) == {"paused": 1}
    await ledger.execute("delete from workers")
    moved = await register(ledger, TaskType(name="a", pool="elsewhere", input_schema={"type": "object"}))
    assert await routing.follow(ledger, {}) == 1
    assert [c.id for c in await claim(ledger, moved, pool="elsewhere")] == [run]


async def test_heartbeats_show_what_is_paused(ledger: Ledger) -> None:
    worker = await register(ledger)
    mine, theirs = await submit(ledger), await submit(ledger, B)
    await claim(ledger, worker)

    async def held() -> dict[UUID, tuple[bool, bool]]:
        async with ledger.transaction() as connection:
            beat = await fleet.beat(connection, worker, busy=0, draining=False, settled=0)
        assert beat is not None
        return {run: (each.paused, each.release) for run, each in beat.holds.items()}

    assert await held() == {mine: (False, False), theirs: (False, False)}
    await pause(ledger, TASK, "a")
    assert await held() == {mine: (True, False), theirs: (False, False)}
    await pause(ledger, TASK, "a", running=Release.RELEASE)
    assert await held() == {mine: (True, True), theirs: (False, False)}


@pytest.fixture
async def api(ledger: Ledger, store: Store) -> AsyncIterator[httpx.AsyncClient]:
    await register(ledger, ECHO)
    transport = httpx.ASGITransport(create_app(ledger, store, Api()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def test_the_levers(api: httpx.AsyncClient, ledger: Ledger) -> None:
    for noun, name in ("tasks", "echo"), ("pools", "default"), ("lanes", "any/lane"):
        where = f"/v1/{noun}/{name.replace('/', '%2F')}"
        shown = (await api.post(f"{where}/pause")).json()
        assert (shown["kind"], shown["name"], shown["running"]) == (noun[:-1], name, "continue")
        body = {"reason": "why", "by": "ana", "until": "2999-01-01T00:00:00Z", "running": "release"}
        again = (await api.post(f"{where}/pause", json=body)).json()
        assert again == shown | body
        assert (await api.get("/v1/pauses")).json()["items"] == [again]
        run = (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}, "lane": "any/lane"})).json()
        assert run["state"] == "queued"
        for _ in range(2):
            assert (await api.post(f"{where}/resume")).status_code == 204
        assert (await api.get("/v1/pauses")).json()["items"] == []
    assert {row["state"] for row in await ledger.fetch("select state from runs")} == {"queued"}


async def test_levers_refuse_what_is_not_there(api: httpx.AsyncClient) -> None:
    for verb in ("pause", "resume"):
        problem(await api.post(f"/v1/tasks/nope/{verb}"), 404, "unknown_task")
        problem(await api.post(f"/v1/pools/nope/{verb}"), 404, "unknown_pool")
    problem(await api.post("/v1/tasks/echo/pause", json={"until": "2020-01-01T00:00:00Z"}), 422, "invalid_input")
    for wrong in ({"for": "ever"}, {"reason": "a\x00b"}, {"by": "\x00"}, {"reason": "x" * 301}):
        for where in ("tasks/echo", "lanes/any", "pools/default"):
            problem(await api.post(f"/v1/{where}/pause", json=wrong), 422, "invalid_input")
    problem(await api.post(f"/v1/workers/{uuid4()}/drain"), 404, "unknown_worker")


@pytest.fixture
async def product(database: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(database, tmp_path) as running:
        await running.up("api", "worker")
        yield running


async def test_a_pause_can_release_what_runs(product: Stack, ledger: Ledger) -> None:
    ids = [await product.submit("linger", name=f"r{n}") for n in range(2)]
    for run in ids:
        await product.state(run, "running")
    await product.http.post("/v1/tasks/linger/pause", json={"reason": "a bad deploy", "running": "release"})

    async def waits() -> bool:
        rows = await ledger.fetch("select state, attempts_used from runs")
        return {(row["state"], row["attempts_used"]) for row in rows} == {("paused", 0)}

    await until(waits)
    assert (await product.http.post("/v1/tasks/linger/resume")).status_code == 204
    for run in ids:
        await product.state(run, "running")


async def test_a_worker_drains_when_it_is_asked_to(product: Stack, ledger: Ledger) -> None:
    run = await product.submit("linger", name="kept")
    await product.state(run, "running")
    [row] = await ledger.fetch("select id from workers")
    assert (await product.http.post(f"/v1/workers/{row['id']}/drain")).status_code == 202
    await until(lambda: ledger.fetch("select from workers where draining"))
    waits = await product.submit("echo", value=1)
    assert (await product.run(waits))["state"] == "queued"
    assert (await product.run(run))["state"] == "running", "it may finish"
    product.release("kept")
    assert (await product.ended(run))["state"] == "completed"
    assert await product.parts[1].ended() == 0
