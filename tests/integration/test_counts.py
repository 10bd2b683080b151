"""Counts of the last hour and day: exact when runs are few, near the truth at a bounded cost when they are many."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from backcast.api.app import create_app
from backcast.client import AsyncClient
from backcast.ledger import counts
from backcast.ledger.connection import Ledger
from backcast.models import State, Within, uuid7
from backcast.settings import Api
from backcast.store import Store
from tests.integration.test_api import problem
from tests.support import ended as homes

HOUR, DAY = 3600, 86_400


@pytest.fixture
async def client(ledger: Ledger, store: Store) -> AsyncIterator[AsyncClient]:
    transport = httpx.ASGITransport(create_app(ledger, store, Api()), raise_app_exceptions=False)
    async with AsyncClient("http://localhost", transport=transport) as client:
        yield client


async def add(ledger: Ledger, task: str, state: str, *, made: float, ended: float, code: str | None = None) -> None:
    """A run that was submitted and ended so many seconds ago."""
    columns: dict[str, Any] = dict.fromkeys(("pool", "owner"), "x") | {"task": task, "state": state, "input": "{}"}
    columns |= dict.fromkeys(("priority", "fence", "attempts_used", "retries_used"), 0) | {"max_attempts": 1}
    columns |= {"signature": "", "metadata": "{}", "result_key": "k" if state == "completed" else None}
    columns |= {"error": None if code is None else f'{{"code": "{code}", "title": "", "detail": ""}}'}
    run = uuid7(made)
    at = datetime.fromtimestamp((run.int >> 80) / 1000, UTC)
    await homes.add(ledger, run, since=ended, **columns, run_at=at, created_at=at)


async def wait(ledger: Ledger, task: str, runs: int, *, state: str = "queued", made: float = 30) -> None:
    await ledger.execute(
        """insert into runs (id, task, pool, owner, state, max_attempts, metadata, input, created_at, worker_id)
           select (substr($1::uuid::text, 1, 24) || lpad(to_hex(n), 12, '0'))::uuid, $2, 'x', 'x', $3, 1, '{}', '{}',
                  now() - make_interval(secs => $4), gen_random_uuid() from generate_series(1, $5::int) n""",
        uuid7(made),
        task,
        state,
        made,
        runs,
    )


async def many(ledger: Ledger, runs: int, *, made: float, every: float = 0.0) -> None:
    """Runs that were submitted, and ended at once, from `made` seconds ago on: one of ten failed."""
    await ledger.execute(
        """insert into ended (id, task, pool, owner, priority, state, run_at, fence, attempts_used, retries_used,
                              max_attempts, signature, input, metadata, created_at, finished_at, result_key, error)
           select (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || substr(md5(n::text), 1, 20))::uuid,
                  case when n % 5 = 0 then 'rare' else 'common' end, 'x', 'x', 0,
                  case when n % 10 = 0 then 'failed' else 'completed' end, at, 1, 1, 0, 1, '', repeat('x', 150), '{}',
                  at, at, case when n % 10 > 0 then 'k' end,
                  case when n % 10 = 0 then '{"code": "bad", "title": "", "detail": ""}'::json end
             from (select n, now() - make_interval(secs => $2::float8 - n * $3::float8) as at
                     from generate_series(1, $1::int) n) given""",
        runs,
        made,
        every,
    )


async def test_few_are_counted_exactly(client: AsyncClient, ledger: Ledger) -> None:
    for _ in range(3):
        await add(ledger, "extract", "completed", made=130, ended=10)
    await add(ledger, "extract", "failed", made=20, ended=5, code="task_failed")
    await add(ledger, "cast", "failed", made=20, ended=5, code="answer_invalid")
    await add(ledger, "cast", "cancelled", made=5 * HOUR, ended=100)
    await add(ledger, "cast", "expired", made=3 * DAY, ended=100)
    await add(ledger, "cast", "completed", made=23 * HOUR, ended=22 * HOUR)
    await add(ledger, "old", "completed", made=50 * HOUR, ended=49 * HOUR)
    await add(ledger, "old", "failed", made=5 * DAY, ended=3 * DAY)
    await wait(ledger, "cast", 2)
    await wait(ledger, "cast", 1, state="running")
    await wait(ledger, "cast", 1, state="held", made=2 * HOUR)
    found = await client.counts()
    assert not found.approximate
    assert (found.until - found.since).total_seconds() == pytest.approx(HOUR, abs=60)
    assert found.submitted == 8
    assert found.states == {"completed": 3, "failed": 2, "cancelled": 1, "expired": 1, "queued": 2, "running": 1}
    assert [(each.task, each.submitted, sum(each.states.values())) for each in found.tasks] == [
        ("cast", 4, 6),
        ("extract", 4, 4),
    ]
    assert {(each.task, each.code, each.runs) for each in found.errors} == {
        ("extract", "task_failed", 1),
        ("cast", "answer_invalid", 1),
    }
    assert len(found.flow) == 60
    assert (found.flow[0].at, found.flow[1].at - found.flow[0].at) == (found.since, counts.STEPS[Within.HOUR][0])
    assert sum(each.submitted for each in found.flow) == 8
    assert sum(each.ended.get(State.COMPLETED, 0) for each in found.flow[-2:]) == 3
    assert sum(each.submitted for each in found.flow[-5:-1]) >= 3, "those of two minutes ago"
    day = await client.counts("day")
    assert (day.submitted, len(day.flow), day.approximate) == (11, 48, False)
    assert day.states == {"completed": 4, "failed": 2, "cancelled": 1, "expired": 1, "queued": 3, "running": 1}
    assert not any(each.task == "old" for each in day.tasks)


async def test_a_wrong_time_is_refused(ledger: Ledger, store: Store) -> None:
    transport = httpx.ASGITransport(create_app(ledger, store, Api()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as api:
        problem(await api.get("/v1/counts?within=week"), 422, "invalid_input")


async def test_many_are_estimated(ledger: Ledger) -> None:
    await many(ledger, 30_000, made=3 * HOUR, every=0.1)
    await many(ledger, 40_000, made=3000, every=0.05)
    found = await counts.counts(ledger, Within.HOUR)
    assert found.approximate
    assert found.submitted == pytest.approx(40_000, rel=0.1)
    assert found.states[State.COMPLETED] == pytest.approx(36_000, rel=0.1)
    assert found.states[State.FAILED] == pytest.approx(4000, rel=0.2)
    assert {each.task: each.submitted for each in found.tasks}["rare"] == pytest.approx(8000, rel=0.2)
    assert [each.code for each in found.errors] == ["bad"]
    busy = [each.ended[State.COMPLETED] for each in found.flow if each.ended]
    assert busy[5] == pytest.approx(1080, rel=0.4), "20 in a second"
    assert (await counts.counts(ledger, Within.DAY)).submitted == pytest.approx(70_000, rel=0.1)


async def test_runs_in_no_order_are_estimated_too(ledger: Ledger) -> None:
    """As when rows were removed one by one, and others came in their place."""
    await many(ledger, 20_000, made=1000)
    await many(ledger, 20_000, made=3 * HOUR)
    found = await counts.counts(ledger, Within.HOUR)
    assert found.approximate
    assert found.submitted == pytest.approx(20_000, rel=0.7)


async def test_a_long_queue_is_estimated(ledger: Ledger) -> None:
    await wait(ledger, "cast", counts.ONE_BY_ONE - 1)
    assert not (await counts.counts(ledger, Within.HOUR)).approximate
    await wait(ledger, "extract", 20_000)
    await wait(ledger, "extract", 5000, made=2 * HOUR)
    found = await counts.counts(ledger, Within.HOUR)
    assert found.approximate
    assert found.states[State.QUEUED] == pytest.approx(40_000, rel=0.2)


async def test_only_pages_of_the_sample_are_read(ledger: Ledger) -> None:
    await many(ledger, 5000, made=1000)
    [partition] = [
        each
        for each in await ledger.fetch(counts.PARTITIONS, (await counts.counts(ledger, Within.HOUR)).since)
        if each["home"] == "ended_completed" and each["pages"]
    ]
    sql = f"explain (format text) {counts.COUNT.format(source=counts.ON_PAGES.format(home='ended_completed'))}"
    async with ledger.transaction() as connection:
        await connection.execute(counts.BY_ADDRESS)
        plan = "\n".join(row[0] for row in await connection.fetch(sql, 0.0, 1.0, 1, partition["day"], [1, 2]))
    assert "Tid Scan" in plan
    assert "Index" not in plan


@pytest.mark.parametrize("odd", ["'infinity'", "'-infinity'", "'33715-01-01'", "'4713-01-01 BC'"])
async def test_times_that_cannot_be_shown(client: AsyncClient, ledger: Ledger, odd: str) -> None:
    await wait(ledger, "cast", 2)
    await add(ledger, "cast", "completed", made=10, ended=5)
    for table in ("runs", "ended"):
        await ledger.execute(f"update {table} set created_at = {odd}")
    await ledger.execute(f"update ended set finished_at = {odd}")
    await client.counts()
