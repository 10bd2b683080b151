"""One row with values that no release writes: everything else goes on, every page can be read, and an operator sees
it.
"""

import json
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import asyncpg
import pytest

from backcast.ledger import (
    counts,
    dispatch,
    fleet,
    history,
    limits,
    listing,
    recovery,
    runs,
    settlement,
    task_types,
    unusable,
)
from backcast.ledger.connection import REFUSED, Ledger
from backcast.models import Limits, Within, uuid7
from tests.integration.test_lanes import LEASE, NOOP, claim, ended, fill, register, submit
from tests.support.ended import end
from tests.support.stack import stack
from tests.support.waiting import until

T = TypeVar("T")

LANES = {
    "max_per_minute": ["1e12", "1e300", "'NaN'", "'Infinity'", "1e-300", "5e-324"],
    "promoted": ["2147483647", "-2147483648"],
    "tokens": ["'NaN'", "1e308", "-1e308", "'-Infinity'"],
    "refilled_at": ["'infinity'", "'-infinity'", "'9999-01-01'", "'4713-01-01 BC'", "now() + interval '3 minutes'"],
    "served": ["9223372036854775807", "-9223372036854775808"],
    "max_running": ["2147483647"],
}
RUNS = {
    "fence": ["9223372036854775807"],
    "attempts_used": ["2147483647", "-2147483648"],
    "retries_used": ["2147483647", "-2147483648"],
    "max_attempts": ["-2147483648"],
    "run_at": ["'infinity'", "'-infinity'", "'33715-01-01'", "'4713-01-01 BC'"],
    "deadline": ["'-infinity'", "'infinity'", "'33715-01-01'"],
    "created_at": ["'infinity'", "'33715-01-01'", "'0044-03-15 BC'"],
    "started_at": ["'-infinity'"],
    "metadata": ["'[1]'", "'null'", '\'{"a": {"b": 1}}\'', """'{"a": "\\ud800"}'""", "'{\"a\": 1e999}'"],
    "attempts": ["'[]'", '\'{"left_out": 0, "newest": [{}]}\''],
    "usage": ["'[]'", "'{\"model\": 1e999}'", """'{"model": "\\ud800\\u0000"}'"""],
    "error": ["'{}'", "'\"x\"'", """'{"code": "c", "title": "t", "detail": "\\ud800"}'"""],
    "priority": ["32767", "-32768"],
    "input": ["'nonsense'", "'[]'", "'3'"],
}


async def tried(ledger: Ledger, step: Awaitable[T]) -> T | None:
    """Make a step as the loops do: a row that is refused is set aside."""
    try:
        return await step
    except REFUSED as error:
        await unusable.set_aside(ledger, error)
        return None


async def healthy(ledger: Ledger, worker: UUID) -> None:
    """Runs with and without a lane become ready, are claimed and end, whatever the polls meet."""
    await limits.limit(ledger, "healthy", Limits(max_running=5))
    mine = {(await submit(ledger, lane)).id for lane in ("healthy", None)}

    async def work() -> set[UUID]:
        await tried(ledger, dispatch.dispatch_due(ledger))
        await tried(ledger, recovery.requeue(ledger, LEASE))
        for one in await tried(ledger, claim(ledger, worker)) or []:
            await tried(ledger, settlement.settle(ledger, worker, [ended(one)]))
        return {run.id for run in (await listing.find(ledger, limit=200))[0] if run.state == "completed"}

    await until(work, lambda done: mine <= done)


@pytest.mark.parametrize("column", LANES)
async def test_a_lane_with_an_impossible_number(ledger: Ledger, column: str) -> None:
    worker = await register(ledger)
    for value in LANES[column]:
        await limits.limit(ledger, "bad", Limits(max_running=3, max_per_minute=1000))
        await fill(ledger, ["bad"], each=3)
        await ledger.execute(f"update lanes set {column} = {value} where name = 'bad'")
        await healthy(ledger, worker)
        shown = await limits.get(ledger, "bad")
        json.dumps(shown.model_dump(), allow_nan=False)
        assert (shown.problem is not None) == (column == "max_per_minute")
        assert len(await limits.all_(ledger)) == 2
        await limits.lift(ledger, "bad")
        await healthy(ledger, worker)


@pytest.mark.parametrize("column", RUNS)
async def test_a_run_with_an_impossible_value(ledger: Ledger, column: str) -> None:
    worker, bad = await register(ledger), list[UUID]()
    for value in RUNS[column]:
        for state in ("queued", "scheduled", "running", "failed"):
            bad.append((await submit(ledger, None)).id)
            await ledger.execute("update runs set worker_id = $2, run_at = now() where id = $1", bad[-1], uuid7())
            await ledger.execute(f"update runs set {column} = {value} where id = $1", bad[-1])
            if state == "failed":
                await end(ledger, state, "id = $1", bad[-1])
            else:
                await ledger.execute("update runs set state = $2 where id = $1", bad[-1], state)
    await healthy(ledger, worker)
    found, _ = await listing.find(ledger, limit=200)
    for run in (*found, *[await runs.cancel(ledger, one) for one in bad]):
        json.dumps(run.model_dump(mode="json"), allow_nan=False, ensure_ascii=False).encode()
        assert run.created_at.tzinfo is not None
        assert run.run_at.tzinfo is not None
    assert len(await history.entries(ledger, bad)) == len(bad)


async def test_what_can_not_be_read_hides_no_other_run(ledger: Ledger) -> None:
    """Whatever a statement reads of JSON: filters and counts."""
    error = '{"code": "timeout", "title": "t", "detail": "as %s \\ud83d\\ude00 and \\\\ud83d"}'
    for text in (error % "\\ud800", error % "\\udc00", error % "\\u0000", error % "usual"):
        run = (await submit(ledger, None)).id
        await ledger.execute(
            "update runs set error = $2::text::json, metadata = $3::text::json where id = $1",
            run,
            text,
            text.replace("title", "team"),
        )
        await end(ledger, "failed", "id = $1", run)
    for given in ({"error": "timeout"}, {"text": "USUAL"}, {"metadata": {"team": "t"}}):
        assert [found.id for found in (await listing.find(ledger, limit=10, **given))[0]] == [run]
    counted = await counts.counts(ledger, Within.HOUR)
    assert {(each.code, each.runs) for each in counted.errors} == {("timeout", 1)}, "the others can't be read"


async def test_times_at_the_ends_of_the_calendar_are_no_fault(ledger: Ledger) -> None:
    early, late = (await submit(ledger, None)).id, (await submit(ledger, None)).id
    await ledger.execute("update runs set run_at = '0001-01-01 00:00:00+00' where id = $1", early)
    await ledger.execute("update runs set run_at = '9999-12-31 23:59:59+00', state = 'scheduled' where id = $1", late)
    await unusable.set_aside(ledger, asyncpg.NumericValueOutOfRangeError("as a poll"))
    assert {run.state.value for run in (await listing.find(ledger, limit=10))[0]} == {"queued"}


async def test_bad_rows_are_looked_for_once_in_a_while(ledger: Ledger) -> None:
    """Every poll of every process may meet the same one, and a look reads all live rows."""

    async def codes() -> list[str]:
        error = asyncpg.NumericValueOutOfRangeError("as a poll")
        bad = (await submit(ledger, None)).id
        await ledger.execute("update runs set fence = 9223372036854775807 where id = $1", bad)
        await unusable.set_aside(ledger, error)
        return [run.state.value for run in (await listing.find(ledger, limit=10))[0]]

    assert await codes() == ["failed"]
    assert await codes() == ["queued", "failed"]
    await ledger.execute("update cursors set moved_at = now() - interval '1 minute' where name = 'unusable'")
    assert await codes() == ["failed"] * 3


async def test_a_task_type_with_impossible_values(ledger: Ledger) -> None:
    await fleet.register(ledger, uuid7(), pool="default", host="h", version="1", slots=1, tasks=[NOOP])
    await ledger.execute(
        """update task_types set timeout = '170000000 years', input_schema = '"\\ud800"', output_schema = '[1e999]'"""
    )
    assert [task.input_schema for task in await task_types.all_(ledger)] == [{}]
    assert (await task_types.get(ledger, "noop")).output_schema == {}


async def test_processes_outlive_rows_that_they_cant_work_with(database: str, tmp_path: Path, ledger: Ledger) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("api", "worker", "steward")
        await product.http.put("/v1/lanes/bad", json={"max_per_minute": 60})
        stuck = await product.submit("echo", value=1)
        await product.result(stuck)
        await ledger.execute(
            """insert into lanes (name, max_running, max_per_minute, refilled_at, promoted)
               select 'bad' || n, 1, (array[1e12, 'NaN', 'Infinity', 1e-300])[n], now(), -2147483648
                 from generate_series(1, 4) n"""
        )
        await ledger.execute(
            """insert into runs (id, task, pool, owner, state, run_at, fence, attempts_used, max_attempts, input,
                                 metadata, lane, created_at)
               select gen_random_uuid(), 'echo', 'default', 'bad' || n, (array['queued', 'scheduled', 'held'])[n],
                      now(), 9223372036854775807, 2147483647, 3, '{"value": 1}', '[]', 'bad' || n, '33715-01-01'
                 from generate_series(1, 3) n"""
        )
        for lane in ("bad1", "bad2", "bad3", None):
            answer = await product.http.post("/v1/tasks/echo/runs", json={"input": {"value": 2}, "lane": lane})
            await product.ended(answer.json()["id"])

        async def ends() -> list[str]:
            found = (await product.http.get("/v1/runs", params={"limit": 50})).json()["items"]
            return sorted(run["error"]["code"] for run in found if run["error"])

        assert await until(ends, lambda codes: len(codes) == 3) == ["unusable_row"] * 3
        shown = (await product.http.get("/v1/lanes")).json()["items"]
        assert [lane["problem"] is None for lane in shown] == [True, False, False, False, False]
        assert [part.process.poll() for part in product.parts] == [None] * 3

        async def logs() -> str:
            return "".join(part.text for part in product.parts)

        assert "is set aside as failed: its row has an impossible value" in await logs()
        await until(logs, lambda text: "had impossible numbers" in text)  # by the next poll of any of them
        for part in product.parts:
            await part.ready()
