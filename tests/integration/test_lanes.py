"""Lanes: never more runs at once or in a minute than a limit allows, a fair share for each owner, and a right count
whatever becomes of a run.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

from backcast.errors import UnknownLane
from backcast.ledger import claims, dispatch, fleet, lanes, limits, recovery, runs, settlement, submissions
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement
from backcast.models import Limits, Run, State, Submission, TaskType, uuid7
from tests.integration.test_ledger import LEASE
from tests.support.waiting import PATIENCE, until

NOOP = TaskType(name="noop", pool="default", input_schema={"type": "object"})

# Runs after each change of a run, in its transaction: a claim of one run too many fails. It counts committed rows and
# those of this transaction, so only the lane's lock makes it exact; a claim does not need the lock.
NEVER_OVER = """
create function never_over() returns trigger language plpgsql as $$ declare n integer; begin
  select count(*) into n from backcast.all_runs where lane = new.lane and state = 'running';
  if n > (select max_running from backcast.lanes where name = new.lane) then raise 'over the limit of %', new.lane;
  end if;
  return null;
end $$;
create constraint trigger never_over after update on runs deferrable initially deferred
  for each row when (new.state = 'running') execute function never_over()"""


async def submit(ledger: Ledger, lane: str | None = "lane", **fields: object) -> Run:
    submission = Submission(lane=lane, **fields)  # type: ignore[arg-type]
    return (await submissions.submit(ledger, NOOP, submission, input_text="{}", input_hash=b"")).run


async def fill(ledger: Ledger, names: list[str], each: int) -> None:
    together = submissions.Submissions(ledger)
    rows = [
        submissions.new(NOOP, Submission(lane=name), input_text="{}", input_hash=b"")
        for name in names
        for _ in range(each)
    ]
    await asyncio.gather(*[together.submit(row) for row in rows])


async def register(ledger: Ledger) -> UUID:
    worker = uuid7()
    await fleet.register(ledger, worker, pool="default", host="h", version="1", slots=10, tasks=[NOOP])
    return worker


async def claim(ledger: Ledger, worker: UUID, limit: int = 100) -> list[Claim]:
    cursor = random.randrange(-(1 << 63), 1 << 63)
    return await claims.claim(ledger, pool="default", cursor=cursor, limit=limit, worker_id=worker, lease=LEASE)


def ended(claim: Claim, **fields: object) -> Settlement:
    key = f"results/{claim.id}/{claim.fence}.json"
    done: dict[str, object] = {"state": "completed", "result": "1", "result_key": key}
    return Settlement(id=claim.id, fence=claim.fence, lane=claim.lane, **(fields or done))  # type: ignore[arg-type]


async def states(ledger: Ledger, lane: str = "lane") -> dict[str, int]:
    rows = await ledger.fetch("select state, count(*) from all_runs where lane = $1 group by 1", lane)
    return {row["state"]: row["count"] for row in rows}


async def promoted(ledger: Ledger, lane: str = "lane") -> int:
    row = await ledger.fetchrow("select promoted from lanes where name = $1", lane)
    assert row is not None
    return row["promoted"]


@pytest.fixture(autouse=True)
async def _every_lane_counts_right(ledger: Ledger) -> AsyncIterator[None]:
    yield
    wrong = await ledger.fetch(
        """select l.name, l.promoted, count(r.id) as really from lanes l
             left join runs r on r.lane = l.name and r.promoted and r.state in ('queued', 'running')
            group by l.name, l.promoted having l.promoted <> count(r.id)"""
    )
    assert wrong == []


async def test_fifty_lanes_under_eight_workers_are_never_over_and_everything_ends(
    ledger: Ledger, database: str
) -> None:
    names = [f"lane{n}" for n in range(50)]
    await ledger.execute("create index runs_of_lanes on runs (lane) where state = 'running'")
    await ledger.execute(NEVER_OVER)
    for name in names:
        await limits.limit(ledger, name, Limits(max_running=5))
    await fill(ledger, names, each=30)
    total, done, most = 30 * len(names), 0, 0

    async def work() -> None:
        nonlocal done
        worker = await register(ledger)
        while done < total:
            claims = await claim(ledger, worker, 20)
            if not claims:
                await dispatch.dispatch_due(ledger)
            for some in (claims[::2], claims[1::2]):
                settled = await settlement.settle(ledger, worker, [ended(c) for c in some])
                assert len(settled.accepted) == len(some)
                done += len(some)

    async def look() -> None:
        nonlocal most
        while done < total:
            row = await ledger.fetchrow(
                "select max(n) from (select count(*) as n from all_runs where state = 'running' group by lane) lanes"
            )
            most = max(most, row["max"] or 0)  # type: ignore[index]

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*[work() for _ in range(8)], look())
    assert 0 < most <= 5
    assert await ledger.fetch("select from all_runs where state <> 'completed'") == []


async def test_a_rate_promotes_no_more_than_its_burst_and_its_time(ledger: Ledger) -> None:
    rate = 600 / 60
    await limits.limit(ledger, "lane", Limits(max_per_minute=600))
    began = await now(ledger)
    await fill(ledger, ["lane"], each=100)
    worker, taken = await register(ledger), 0

    async def promote_and_work() -> int:
        nonlocal taken
        await asyncio.gather(*[dispatch.dispatch_due(ledger) for _ in range(4)])
        for c in await claim(ledger, worker):
            taken += 1  # every third is tried again, at once, which takes a token as well
            await settlement.settle(
                ledger, worker, [ended(c, state="queued", retries_used=1) if taken % 3 == 0 else ended(c)]
            )
        row = await ledger.fetchrow("select count(*) as n from runs where promoted and state = 'queued'")
        allowed = lanes.BURST * rate + rate * ((await now(ledger)) - began).total_seconds()
        assert taken + row["n"] <= allowed + 1e-6  # type: ignore[index]
        return taken

    await until(promote_and_work, lambda seen: seen >= 25)


async def now(ledger: Ledger) -> datetime:
    row = await ledger.fetchrow("select clock_timestamp() as now")
    assert row is not None
    return row["now"]


async def test_a_rate_that_follows_a_count_begins_with_a_token(ledger: Ledger) -> None:
    """Tokens are not spent while there is no rate."""
    await limits.limit(ledger, "lane", Limits(max_running=0))
    for _ in range(5):
        await submit(ledger)
    await limits.limit(ledger, "lane", Limits(max_running=5))
    assert await states(ledger) == {"queued": 5}
    await limits.limit(ledger, "lane", Limits(max_per_minute=60))
    await submit(ledger)
    assert (await states(ledger))["queued"] == 6


async def test_a_clock_that_is_behind_spends_nothing(ledger: Ledger) -> None:
    """now() is the time when a transaction began: another one may have refilled the tokens after that."""
    await limits.limit(ledger, "lane", Limits(max_per_minute=60))
    await ledger.execute("update lanes set tokens = 0, refilled_at = now() + interval '1 minute'")
    await submit(ledger)
    assert await states(ledger) == {"held": 1}


async def test_an_owner_with_a_thousand_held_runs_does_not_hold_up_another_ones_first(ledger: Ledger) -> None:
    await limits.limit(ledger, "lane", Limits(max_running=1))
    together = submissions.Submissions(ledger)
    bulk = [submissions.new(NOOP, Submission(owner="bulk", lane="lane"), input_text="{}", input_hash=b"")]
    bulk += [bulk[0]._replace(id=uuid7()) for _ in range(999)]
    await asyncio.gather(*[together.submit(row) for row in bulk])
    small = {(await submit(ledger, owner=f"small{n}")).id for n in range(3)}
    worker, order = await register(ledger), list[UUID]()
    while not small <= set(order):
        [taken] = await claim(ledger, worker)
        order.append(taken.id)
        await settlement.settle(ledger, worker, [ended(taken)])
    assert len(order) <= 1 + 4, "the run that ran, and then one turn of each owner"


async def test_zero_holds_and_lifting_frees(ledger: Ledger) -> None:
    await limits.limit(ledger, "lane", Limits(max_running=0))
    for _ in range(5):
        assert (await submit(ledger)).state is State.QUEUED
    worker = await register(ledger)
    await dispatch.dispatch_due(ledger)
    assert await claim(ledger, worker) == []
    assert (await limits.get(ledger, "lane")).held == 5
    await limits.lift(ledger, "lane")
    taken = await claim(ledger, worker)
    assert len(taken) == 5
    with pytest.raises(UnknownLane):
        await limits.get(ledger, "lane")
    await settlement.settle(ledger, worker, [ended(c) for c in taken])
    assert await promoted(ledger) == 0, "a promoted run is still counted down"


async def test_a_lowered_limit_waits_until_enough_have_ended(ledger: Ledger) -> None:
    await limits.limit(ledger, "lane", Limits(max_running=4))
    for _ in range(8):
        await submit(ledger)
    worker = await register(ledger)
    first = await claim(ledger, worker)
    assert len(first) == 4
    await limits.limit(ledger, "lane", Limits(max_running=2))
    for c in first[:2]:
        await settlement.settle(ledger, worker, [ended(c)])
        assert await claim(ledger, worker) == []
    await settlement.settle(ledger, worker, [ended(first[2])])
    assert len(await claim(ledger, worker)) == 1
    assert await promoted(ledger) == 2


async def test_a_run_that_expires_while_its_lane_holds_it_names_the_lane(ledger: Ledger) -> None:
    await limits.limit(ledger, "it's {shut}", Limits(max_running=0))
    late = await submit(ledger, "it's {shut}", deadline=datetime.now(UTC) + timedelta(hours=1))
    await ledger.execute("update runs set deadline = now()")
    await dispatch.dispatch_due(ledger)
    expired = await runs.get(ledger, late.id)
    assert expired.error is not None
    assert (expired.error.code, "'it's {shut}'" in expired.error.detail) == ("expired", True)


async def test_a_place_is_free_again_however_its_run_leaves_it(ledger: Ledger) -> None:
    await limits.limit(ledger, "lane", Limits(max_running=1))
    worker = await register(ledger)

    async def running() -> Claim:
        [taken] = await claim(ledger, worker)
        assert (taken.lane, await promoted(ledger)) == ("lane", 1)
        return taken

    waits = await submit(ledger)
    await runs.cancel(ledger, waits.id)  # while it is queued
    assert await promoted(ledger) == 0

    late = await submit(ledger, deadline=datetime.now(UTC) + timedelta(hours=1))
    await ledger.execute("update runs set deadline = now() where id = $1", late.id)
    await dispatch.dispatch_due(ledger)  # expired while it was queued
    assert (await runs.get(ledger, late.id)).state is State.EXPIRED
    assert await promoted(ledger) == 0

    run = await submit(ledger)
    taken = await running()
    await settlement.settle(ledger, worker, [ended(taken, state="queued", counts=False)])  # released: keeps its place
    assert (await states(ledger)).get("queued") == 1
    taken = await running()
    await settlement.settle(
        ledger, worker, [ended(taken, state="queued", retries_used=1)]
    )  # retried at once: asks again
    taken = await running()
    await settlement.settle(ledger, worker, [ended(taken, state="scheduled", delay=60.0, retries_used=2)])
    assert await promoted(ledger) == 0
    other = await submit(ledger)
    assert (await claim(ledger, worker))[0].id == other.id, "a retry that waits holds no place"
    await ledger.execute("update runs set run_at = now() where state = 'scheduled'")
    await dispatch.dispatch_due(ledger)
    assert (await states(ledger)).get("held") == 1
    await runs.cancel(ledger, other.id)
    [held] = await ledger.fetch("select id, fence from all_runs where state = 'running'")
    stopped = Settlement(id=held["id"], fence=held["fence"], lane="lane", state="failed")
    assert len((await settlement.settle(ledger, worker, [stopped])).cancelled) == 1  # while it ran
    taken = await running()
    assert taken.id == run.id

    await ledger.execute("update workers set heartbeat_at = now() - interval '1 hour'")
    assert await recovery.requeue(ledger, LEASE) == {run.id: "queued"}
    assert await promoted(ledger) == 1, "a run that is ready again keeps its place"
    stale = await settlement.settle(ledger, worker, [ended(taken)])
    assert (stale.accepted, await promoted(ledger)) == (set(), 1)
    worker = await register(ledger)
    await settlement.settle(ledger, worker, [ended(await running())])
    assert await promoted(ledger) == 0


async def test_a_run_that_fails_with_its_worker_gives_its_place_to_the_next(ledger: Ledger) -> None:
    await limits.limit(ledger, "lane", Limits(max_running=1))
    worker = await register(ledger)
    first, second = await submit(ledger), await submit(ledger)
    await ledger.execute("update runs set max_attempts = 1")
    assert [c.id for c in await claim(ledger, worker)] == [first.id]
    await ledger.execute("update workers set heartbeat_at = now() - interval '1 hour'")
    assert await recovery.requeue(ledger, LEASE) == {first.id: "failed"}
    assert [c.id for c in await claim(ledger, await register(ledger))] == [second.id]


async def test_a_limit_holds_back_what_is_queued_and_lets_go_on_what_runs(ledger: Ledger) -> None:
    worker = await register(ledger)
    for _ in range(3):
        await submit(ledger)
    [before] = await claim(ledger, worker, limit=1)
    await limits.limit(ledger, "lane", Limits(max_running=1))
    for _ in range(3):
        await submit(ledger)
    assert await states(ledger) == {"running": 1, "queued": 1, "held": 4}
    lane = await limits.get(ledger, "lane")
    assert (lane.running, lane.queued, lane.held) == (1, 1, 4)
    [counted] = await claim(ledger, worker)
    assert (before.lane, counted.lane) == (None, "lane")
    await settlement.settle(ledger, worker, [ended(before)])
    assert await states(ledger) == {"completed": 1, "running": 1, "held": 4}
    await settlement.settle(ledger, worker, [ended(counted)])
    assert await states(ledger) == {"completed": 2, "queued": 1, "held": 3}


async def test_what_a_slow_statement_has_queued_past_a_new_limit_is_held_back(ledger: Ledger) -> None:
    await limits.limit(ledger, "lane", Limits(max_running=1))
    for _ in range(3):
        await submit(ledger)
    await ledger.execute("update runs set state = 'queued' where state = 'held'")
    await limits.hold_back(ledger)
    assert await states(ledger) == {"queued": 1, "held": 2}


async def test_a_lower_limit_holds_back_those_that_would_start_last(ledger: Ledger) -> None:
    worker = await register(ledger)
    await limits.limit(ledger, "lane", Limits(max_running=2500))
    made = [await submit(ledger, priority=n % 3) for n in range(5)]
    await ledger.execute(
        """insert into runs (id, task, pool, owner, lane, priority, state, max_attempts, metadata, input, promoted)
           select gen_random_uuid(), 'noop', 'default', 'default', 'lane', -5, 'queued', 3, '{}', '{}', true
             from generate_series(1, 2400)"""
    )
    await ledger.execute("update lanes set promoted = promoted + 2400")
    running = await claim(ledger, worker, limit=1)
    await limits.limit(ledger, "lane", Limits(max_running=3))
    assert await states(ledger) == {"running": 1, "queued": 2, "held": 2402}
    taken = running + await claim(ledger, worker)
    assert {c.id for c in taken} == {run.id for run in sorted(made, key=lambda run: -run.priority)[:3]}
    await limits.limit(ledger, "lane", Limits(max_running=0))
    assert await states(ledger) == {"running": 3, "held": 2402}


async def test_a_scheduled_run_of_a_limited_lane_takes_its_place_when_its_time_comes(ledger: Ledger) -> None:
    await limits.limit(ledger, "lane", Limits(max_running=1))
    later = await submit(ledger, run_at=datetime.now(UTC) + timedelta(hours=1))
    first = await submit(ledger)
    assert await states(ledger) == {"scheduled": 1, "queued": 1}
    await ledger.execute("update runs set run_at = now() where id = $1", later.id)
    await dispatch.dispatch_due(ledger)
    assert await states(ledger) == {"held": 1, "queued": 1}
    worker = await register(ledger)
    [taken] = await claim(ledger, worker)
    assert taken.id == first.id
    await settlement.settle(ledger, worker, [ended(taken)])
    assert [c.id for c in await claim(ledger, worker)] == [later.id]


async def test_a_count_that_was_out_of_date_is_no_error(ledger: Ledger, database: str) -> None:
    """PostgreSQL checks constraints on a row as computed from the old snapshot, before it notices that the row has
    changed and computes it again: a count that may not be negative would refuse the cancel here."""
    await limits.limit(ledger, "lane", Limits(max_running=0))
    run = await submit(ledger)
    await limits.limit(ledger, "other", Limits(max_running=0))
    async with ledger.transaction() as connection:
        await connection.execute("update lanes set max_running = 1, promoted = 1 where name = 'lane'")
        await connection.execute("update runs set state = 'queued', promoted = true where id = $1", run.id)
        cancelling = asyncio.create_task(runs.cancel(ledger, run.id))
        await blocked(connection)
    assert (await cancelling).state is State.CANCELLED
    assert await promoted(ledger) == 0


async def blocked(connection: asyncpg.Connection) -> None:
    """Wait until a statement waits for a lock."""

    async def look() -> object:
        await connection.execute("select pg_stat_clear_snapshot()")  # else a transaction sees the same for ever
        return await connection.fetchval(
            """select count(*) from pg_stat_activity
                where wait_event_type = 'Lock' and datname = current_database()"""
        )

    await until(look)
