"""Runs go to the workers that can do them: workers of one pool that differ, versions of a task, tasks that move."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from backcast.ledger import (
    claims,
    dispatch,
    fleet,
    limits,
    recovery,
    routing,
    runs,
    settlement,
    submissions,
    task_types,
)
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.models import Limits, Run, State, Submission, TaskType, uuid7
from tests.integration.test_ledger import LEASE, completed
from tests.support.stack import ROOT, Part, Stack, stack
from tests.support.waiting import PATIENCE, until

HEADER = "from prefect import task\n"
STAYS = "@task\ndef stays(n: int) -> int:\n    return n\n"
GOES = "@task\ndef goes(n: int) -> int:\n    return -n\n"
FIRST = "@task\ndef report(name: str) -> str:\n    return f'first {name}'\n"
SECOND = "@task\ndef report(name: str, year: int) -> str:\n    return f'second {name} {year}'\n"
DIES = "@task\ndef dies() -> None:\n    __import__('os')._exit(7)\n"
BLOCKS = "@task\nasync def blocks() -> None:\n    __import__('time').sleep(3600)\n"
BOTH = "@task\ndef report(name: str, year: int = 0) -> str:\n    return f'both {name} {year}'\n"


@pytest.fixture
async def product(database: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(database, tmp_path, BACKCAST_BUILTIN_TASKS="false") as running:
        await running.up("api", "steward")
        yield running


async def worker(product: Stack, *tasks: str, pool: str = "default", **settings: str) -> Part:
    """A worker with these tasks."""
    folder = product.folder / f"user-{len(product.parts)}"
    folder.mkdir()
    (folder / "user_tasks.py").write_text(HEADER + "\n".join(tasks))
    named = {"BACKCAST_TASKS": "user_tasks", "BACKCAST_WORKER__POOL": pool, "PYTHONPATH": f"{ROOT}:{folder}"}
    return await product.start("worker", **named, **settings).ready()


async def end(part: Part) -> None:
    part.signal(signal.SIGTERM)
    assert await part.ended() == 0


async def waits(product: Stack, run_id: str, code: str) -> None:
    """The run is queued as it was submitted, shows why, and has not started."""
    run = await until(lambda: product.run(run_id), lambda run: run["error"] is not None)
    assert (run["state"], run["error"]["code"], run["attempts"]) == ("queued", code, 0)
    assert (run["run_at"], run["started_at"]) == (run["created_at"], None)


async def completes(product: Stack, run_id: str, value: object) -> None:
    assert await product.result(run_id) == value
    assert (await product.run(run_id))["attempts"] == 1


async def test_a_run_waits_for_a_worker_that_has_its_task(product: Stack) -> None:
    await end(await worker(product, STAYS, GOES))
    gone = [await product.submit("goes", n=n) for n in range(20)]
    stays = await product.submit("stays", n=1)
    rolled_back = await worker(product, STAYS)
    await completes(product, stays, 1)
    for run_id in gone:
        await waits(product, run_id, "unknown_task")
    await completes(product, await product.submit("stays", n=2), 2)
    await end(rolled_back)
    await worker(product, STAYS, GOES)
    for n, run_id in enumerate(gone):
        await completes(product, run_id, -n)


async def test_a_run_fails_when_no_such_worker_comes(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path, BACKCAST_BUILTIN_TASKS="false", BACKCAST_UNKNOWN_AFTER="PT2S") as product:
        await product.up("api", "steward")
        await end(await worker(product, STAYS, GOES))
        run_id = await product.submit("goes", n=1)
        await worker(product, STAYS)
        run = await product.ended(run_id)
        assert (run["state"], run["error"]["code"], run["attempts"]) == ("failed", "unknown_task", 0)
        assert "BACKCAST_TASKS" in run["error"]["detail"]


@pytest.mark.parametrize(
    ("task", "source", "code"), [("dies", DIES, "executor_died"), ("blocks", BLOCKS, "blocked_worker")]
)
async def test_what_ends_an_executor_costs_runs_that_wait_for_a_worker_nothing(
    product: Stack, task: str, source: str, code: str
) -> None:
    await end(await worker(product, STAYS, GOES, source))
    gone = [await product.submit("goes", n=n) for n in range(20)]
    offender = await product.submit(task)
    gone += [await product.submit("goes", n=n) for n in range(20, 40)]
    await worker(product, STAYS, source, BACKCAST_WORKER__STALL="2")
    assert (await product.ended(offender))["error"]["code"] == code
    stays = await product.submit("stays", n=1)
    await completes(product, stays, 1)
    for run_id in gone:
        await waits(product, run_id, "unknown_task")
    await worker(product, STAYS, GOES)
    for n, run_id in enumerate(gone):
        await completes(product, run_id, -n)


async def test_workers_of_one_pool_may_have_different_tasks(product: Stack) -> None:
    await asyncio.gather(worker(product, STAYS), worker(product, GOES))
    submitted = [(name, n, await product.submit(name, n=n)) for n in range(50) for name in ("stays", "goes")]
    for name, n, run_id in submitted:
        await completes(product, run_id, n if name == "stays" else -n)


async def test_two_versions_of_a_task_are_served_at_once(product: Stack) -> None:
    old, new = await asyncio.gather(worker(product, FIRST), worker(product, SECOND))
    for n in range(20):
        await completes(product, await product.submit("report", name=f"a{n}"), f"first a{n}")
        await completes(product, await product.submit("report", name=f"b{n}", year=n), f"second b{n} {n}")
    answer = await product.http.post("/v1/tasks/report/runs", json={"input": {"title": "x"}})
    assert answer.status_code == 422
    await end(old)

    async def status() -> int:
        return (await product.http.post("/v1/tasks/report/runs", json={"input": {"name": "x"}})).status_code

    await until(status, lambda code: code == 422)
    assert new.process.poll() is None


async def test_an_input_of_a_version_that_is_gone_waits_for_one_that_takes_it(product: Stack, ledger: Ledger) -> None:
    await end(await worker(product, FIRST))
    run_id = await product.submit("report", name="x")
    second = await worker(product, SECOND)
    await waits(product, run_id, "unfit_input")
    await worker(product, BOTH)
    await completes(product, run_id, "both x 0")
    assert second.process.poll() is None


@pytest.mark.parametrize("left", [None, STAYS])
async def test_a_task_that_moves_takes_its_runs_along(product: Stack, ledger: Ledger, left: str | None) -> None:
    await end(await worker(product, STAYS, GOES, pool="old"))
    await limits.limit(ledger, "none", Limits(max_running=0))
    queued = [await product.submit("goes", n=n) for n in range(3)]
    held, later = [
        (await product.http.post("/v1/tasks/goes/runs", json={"input": {"n": 9}, **more})).json()["id"]
        for more in ({"lane": "none"}, {"run_at": "2999-01-01T00:00:00Z"})
    ]
    if left is not None:
        await worker(product, left, pool="old")
    await worker(product, GOES, pool="new")
    for n, run_id in enumerate(queued):
        await completes(product, run_id, -n)
    await ledger.execute("update runs set run_at = now() where id = $1", UUID(later))
    await limits.lift(ledger, "none")
    await completes(product, held, -9)
    await completes(product, later, -9)


# -- the ledger alone --------------------------------------------------------------------------------------------------

HOUR = timedelta(hours=1)


def type_of(name: str, pool: str = "default", **schema: object) -> TaskType:
    return TaskType(name=name, pool=pool, input_schema={"type": "object", **schema})


async def registered(ledger: Ledger, *tasks: TaskType) -> UUID:
    worker_id = uuid7()
    await fleet.register(ledger, worker_id, pool="default", host="h", version="1", slots=10, tasks=tasks)
    return worker_id


async def claim(ledger: Ledger, worker_id: UUID, route: str = "", limit: int = 10) -> list[Claim]:
    return await claims.claim(
        ledger, pool="default", cursor=0, limit=limit, worker_id=worker_id, lease=LEASE, route=route
    )


async def accept(ledger: Ledger, task: TaskType, **fields: object) -> Run:
    submission = Submission.model_validate(fields)
    return (await submissions.submit(ledger, task, submission, input_text="{}", input_hash=b"")).run


class Watched(Ledger):
    """Counts its statements, and notes whom it wakes."""

    def __init__(self, url: str) -> None:
        super().__init__(url, timeout=timedelta(seconds=PATIENCE))
        self.count = 0
        self.woken = list[tuple[str, str]]()

    def wake(self, pool: str, route: str = "") -> None:
        self.woken.append((pool, route))

    @contextlib.asynccontextmanager
    async def _connection(self, sql: str = "") -> AsyncIterator[Any]:
        self.count += 1
        async with super()._connection(sql) as connection:
            yield connection


@pytest.fixture
async def watched(database: str) -> AsyncIterator[Watched]:
    watched = Watched(database)
    yield watched
    await watched.aclose()


async def test_runs_of_a_removed_task_are_out_of_the_way_after_few_statements(ledger: Ledger, watched: Watched) -> None:
    x, y = type_of("x"), type_of("y")
    has_y = await registered(ledger, y)
    for name in "ab":
        await accept(ledger, x, owner=name)
    await ledger.execute(
        """insert into runs (id, task, pool, owner, state, max_attempts, input, metadata)
           select gen_random_uuid(), task, pool, owner, state, max_attempts, input, metadata
             from all_runs, generate_series(1, 1000)"""
    )
    wanted = {(await accept(ledger, y, owner=name)).id for name in "abc"}
    got = {run.id for _ in range(5) for run in await claim(watched, has_y)}
    assert got == wanted
    assert watched.count < 20, "each of 2,000 runs was in the way"


async def test_runs_are_taken_out_of_the_way_at_a_cost_that_does_not_depend_on_the_backlog(ledger: Ledger) -> None:
    """Once they are found, a lookup by their pool would walk through all of its ready runs."""
    values = "default", "", *routing._PROBLEMS, [1], uuid7()
    plan = [row[0].strip() for row in await ledger.fetch(f"explain {routing._CLEAR}", *values)]
    looked_up = {line for line in plan if line.startswith("Index Cond: ") and "id = ANY" in line}
    assert looked_up
    assert not any("pool" in line for line in looked_up), plan
    assert not any("Seq Scan on runs" in line for line in plan), plan


async def test_who_claims_from_a_route_is_woken_when_its_runs_are_ready_again(ledger: Ledger, watched: Watched) -> None:
    x, y = type_of("x"), type_of("y")
    has_x, has_y = await registered(ledger, x), await registered(ledger, y)
    await limits.limit(ledger, "narrow", Limits(max_running=1))
    await accept(ledger, x, lane="narrow")
    assert await claim(watched, has_y) == []
    assert watched.woken == [("default", "x")], "it was put there"

    [got] = await claim(ledger, has_x, "x")
    released = settlement.Settlement(id=got.id, fence=got.fence, lane=got.lane, state="queued", counts=False)
    watched.woken.clear()
    await settlement.settle(watched, has_x, [released])
    assert watched.woken == [("default", "x")], "it was released"

    [got] = await claim(ledger, has_x, "x")
    again = settlement.Settlement(id=got.id, fence=got.fence, lane=got.lane, state="queued", retries_used=1)
    watched.woken.clear()
    await settlement.settle(watched, has_x, [again])
    assert watched.woken == [("default", "x")], "it was promoted"

    [got] = await claim(ledger, has_x, "x")
    await ledger.execute("update workers set heartbeat_at = now() - interval '1 day' where id = $1", has_x)
    watched.woken.clear()
    assert await recovery.requeue(watched, LEASE) == {got.id: "queued"}
    assert watched.woken == [("default", "x")], "its worker was lost"


async def test_runs_left_behind_by_a_task_are_looked_for_ever_more_rarely(ledger: Ledger) -> None:
    await fleet.retire(ledger, await registered(ledger, type_of("x")))
    await fleet.register(ledger, uuid7(), pool="new", host="h", version="1", slots=1, tasks=[type_of("x", "new")])
    known = dict[routing.Move, int]()
    moved = list[int]()
    for _ in range(8):
        await accept(ledger, type_of("x"))
        moved.append(await routing.follow(ledger, known))
    assert moved == [1, 1, 0, 2, 0, 0, 0, 4]


async def test_a_run_that_waits_for_a_worker_holds_no_place_in_its_lane(ledger: Ledger) -> None:
    x, y = type_of("x"), type_of("y")
    has_y = await registered(ledger, y)
    await limits.limit(ledger, "narrow", Limits(max_running=1))
    first = await accept(ledger, x, lane="narrow")
    second = await accept(ledger, y, lane="narrow")
    [got] = await claim(ledger, has_y)
    assert got.id == second.id
    has_x = await registered(ledger, x)
    await routing.apply(ledger)
    assert await claim(ledger, has_x, "x") == [], "the lane is full"
    await settlement.settle(ledger, has_y, [completed(got)._replace(lane=got.lane)])
    [got] = await claim(ledger, has_x, "x")
    assert (got.id, got.lane) == (first.id, "narrow")


async def test_a_parked_run_can_be_cancelled_and_expires(ledger: Ledger) -> None:
    x, y = type_of("x"), type_of("y")
    has_y = await registered(ledger, y)
    cancelled, late = await accept(ledger, x), await accept(ledger, x, deadline="2999-01-01T00:00:00Z")
    assert await claim(ledger, has_y) == []
    await routing.apply(ledger)
    assert (await runs.cancel(ledger, cancelled.id)).state is State.CANCELLED
    await ledger.execute("update runs set deadline = now() where id = $1", late.id)
    await dispatch.dispatch_due(ledger)
    assert (await runs.get(ledger, late.id)).state is State.EXPIRED


async def test_runs_wait_for_a_worker_through_an_outage_of_all_of_them(ledger: Ledger) -> None:
    x, y = type_of("x"), type_of("y")
    has_y = await registered(ledger, y)
    run = await accept(ledger, x)
    assert await claim(ledger, has_y) == []
    await routing.apply(ledger)
    await ledger.execute("update runs set parked_at = now() - interval '1 day'")
    await ledger.execute("update workers set heartbeat_at = now() - interval '1 day'")
    assert await routing.fail_late(ledger, unknown_after=HOUR) == 0, "no worker is there to have it"
    young = await registered(ledger, y)
    assert await routing.fail_late(ledger, unknown_after=HOUR) == 0, "the one that has it may be starting"
    await ledger.execute("update workers set started_at = now() - interval '1 day' where id = $1", young)
    assert await routing.fail_late(ledger, unknown_after=HOUR) == 1
    assert (await runs.get(ledger, run.id)).state is State.FAILED


async def test_runs_on_a_route_are_parked_when_its_last_worker_leaves(ledger: Ledger) -> None:
    x, y = type_of("x"), type_of("y")
    has_x, has_y = await registered(ledger, x), await registered(ledger, y)
    run = await accept(ledger, x)
    assert await claim(ledger, has_y) == []
    [route] = await routing.apply(ledger)
    assert (route.route, route.leads_to, route.is_ready) == ("x", "default", True)
    await fleet.retire(ledger, has_x)
    await routing.apply(ledger)
    row = await ledger.fetchrow("select state, ready from runs, backlog where runs.id = $1", run.id)
    assert row is not None
    assert (row["state"], row["ready"]) == ("scheduled", 1), "autoscaling keeps one worker"


async def test_tasks_of_workers_long_gone_are_forgotten(ledger: Ledger) -> None:
    old, new, other = type_of("x", maxProperties=1), type_of("x", maxProperties=2), type_of("y")
    gone = await registered(ledger, old, other)
    await registered(ledger, new)
    assert {task.signature for task in await task_types.versions(ledger, "x")} == {old.signature, new.signature}
    await fleet.retire(ledger, gone)
    assert [task.signature for task in await task_types.versions(ledger, "x")] == [new.signature]
    assert await task_types.get(ledger, "y") == other, "known although no worker is left"
    await ledger.execute("update task_types set seen_at = now() - interval '31 days'")
    await task_types.remove_unseen(ledger, timedelta(days=30))
    assert [task.name for task in await task_types.all_(ledger)] == ["x"]
