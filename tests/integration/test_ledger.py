"""The rules of the ledger, each against the real PostgreSQL and under the concurrency that would break it."""

import asyncio
import collections
import hashlib
import json
import random
import re
import shutil
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from backcast.errors import IdempotencyConflict, LedgerUnavailable, StoreUnavailable, UnknownRun
from backcast.ledger import (
    batches,
    claims,
    dispatch,
    fleet,
    history,
    listing,
    migration,
    recovery,
    runs,
    settlement,
    submissions,
)
from backcast.ledger.claims import Claim
from backcast.ledger.connection import CHANNEL, NOTIFY_INTERVAL, Ledger
from backcast.ledger.migration import migrate
from backcast.ledger.settlement import Settlement
from backcast.local import postgres
from backcast.models import Problem, Run, State, Submission, TaskType, uuid7
from tests.support.waiting import PATIENCE, until

LEASE = timedelta(minutes=5)  # longer than any test takes: a lease ends only when a test ends it
NOOP = TaskType(name="noop", pool="default", input_schema={"type": "object"})


async def submit(
    ledger: Ledger, *, key: str | None = None, value: object = 1, **fields: object
) -> submissions.SubmittedRun:
    text = json.dumps({"x": value})
    return await submissions.submit(
        ledger,
        NOOP,
        Submission(input={"x": value}, **fields),  # type: ignore[arg-type]
        input_text=text,
        input_hash=hashlib.sha256(text.encode()).digest(),
        idempotency_key=key,
    )


async def register(ledger: Ledger) -> UUID:
    worker = uuid7()
    await fleet.register(ledger, worker, pool="default", host="h", version="1", slots=10, tasks=[NOOP])
    return worker


async def claim(ledger: Ledger, worker: UUID, limit: int = 10, cursor: int = 0) -> list[Claim]:
    return await claims.claim(ledger, pool="default", cursor=cursor, limit=limit, worker_id=worker, lease=LEASE)


def completed(claim: Claim, value: str = "1") -> Settlement:
    key = f"results/{claim.id}/{claim.fence}.json"
    return Settlement(id=claim.id, fence=claim.fence, state="completed", result=value, result_key=key)


async def silence(ledger: Ledger, worker: UUID) -> None:
    """Set the worker's last heartbeat to more than a lease ago."""
    await ledger.execute("update workers set heartbeat_at = now() - interval '1 hour' where id = $1", worker)


async def test_a_run_whose_stored_input_may_have_been_swept_is_not_recorded(ledger: Ledger) -> None:
    def row(key: str | None, until: datetime | None) -> submissions.New:
        submission = Submission(input={})
        kept: dict[str, str | None] = {"input_text": None if key else "{}", "input_key": key}
        return submissions.new(NOOP, submission, input_hash=b"", stored_until=until, **kept)  # type: ignore[arg-type]

    good = await submissions.stored_until(ledger)
    late = row("inputs/a.json", good - submissions.RECORDED_WITHIN)
    group = submissions.Submissions(ledger)
    answers = await asyncio.gather(
        group.submit(row("inputs/b.json", good)),
        group.submit(late),
        group.submit(row(None, None)),
        return_exceptions=True,
    )
    assert isinstance(answers[1], StoreUnavailable)
    assert "send the request again" in answers[1].detail
    with pytest.raises(StoreUnavailable):
        await batches.submit(ledger, uuid7(), "me", [[row(None, None), late]], size=2, key=None, request_hash=b"")
    assert {row["id"] for row in await ledger.fetch("select id from all_runs")} == {
        answer.run.id for answer in answers if isinstance(answer, submissions.SubmittedRun)
    }
    assert len(await ledger.fetch("select 1 from all_runs")) == 2
    assert not await ledger.fetch("select 1 from batches")


async def test_a_run_from_submit_to_result(ledger: Ledger) -> None:
    worker = await register(ledger)
    submitted = await submit(ledger, owner="ann", metadata={"k": "v"})
    assert submitted.fresh
    assert (submitted.run.state, submitted.run.attempts) == (State.QUEUED, 0)
    [taken] = await claim(ledger, worker)
    assert (taken.id, taken.fence, taken.input) == (submitted.run.id, 1, '{"x": 1}')
    running = await runs.get(ledger, taken.id)
    assert (running.state, running.attempts) == (State.RUNNING, 1)
    settled = await settlement.settle(ledger, worker, [completed(taken, "[1]")])
    assert settled.accepted == {(taken.id, taken.fence)}
    result = await runs.result(ledger, taken.id)
    assert (result.run.state, result.text, result.run.attempts) == (State.COMPLETED, "[1]", 1)
    assert result.run.metadata == {"k": "v"}
    assert result.run.finished_at is not None


async def test_twenty_racers_with_one_key_make_one_run(ledger: Ledger) -> None:
    for n in range(20):
        answers = await asyncio.gather(*[submit(ledger, key=f"k{n}") for _ in range(20)])
        assert len({answer.run.id for answer in answers}) == 1
        assert sum(answer.fresh for answer in answers) == 1


async def test_a_key_with_another_request_is_a_conflict_and_keys_belong_to_owners(ledger: Ledger) -> None:
    first = await submit(ledger, key="k", owner="a")
    with pytest.raises(IdempotencyConflict):
        await submit(ledger, key="k", owner="a", value=2)
    with pytest.raises(IdempotencyConflict):
        await submit(ledger, key="k", owner="a", priority=5)
    assert (await submit(ledger, key="k", owner="b", value=2)).run.id != first.run.id
    assert (await submit(ledger, key="k", owner="a")).run.id == first.run.id


async def test_many_claimers_never_share_a_run(ledger: Ledger) -> None:
    made = {(await submit(ledger, owner=f"o{n % 7}")).run.id for n in range(300)}
    seen: list[UUID] = []

    async def work() -> None:
        worker = await register(ledger)
        while claims := await claim(ledger, worker, 7, random.randrange(1 << 62)):
            seen.extend(c.id for c in claims)
            await settlement.settle(ledger, worker, [completed(c) for c in claims])

    await asyncio.gather(*[work() for _ in range(8)])
    # A claimer may find nothing while others hold the last runs; no run may be found twice.
    assert len(seen) == len(set(seen))
    assert set(seen) == made


async def test_one_owner_with_a_backlog_does_not_keep_others_waiting(ledger: Ledger) -> None:
    for _ in range(200):
        await submit(ledger, owner="backfill")
    for n in range(5):
        await submit(ledger, owner=f"small{n}")
    worker = await register(ledger)
    cursor, served = 0, []
    for _ in range(12):
        [taken] = await claim(ledger, worker, 1, cursor)
        cursor = taken.owner_key
        served.append((await runs.get(ledger, taken.id)).owner)
    counts = collections.Counter(served)
    assert counts == {"backfill": 12 - 5, **{f"small{n}": 1 for n in range(5)}}
    assert len(set(served[:6])) == 6, "a first run waits at most one turn of each owner"


async def test_inside_an_owner_priority_then_time_decides(ledger: Ledger) -> None:
    order = [(await submit(ledger, priority=p)).run.id for p in (0, 5, 0, 9)]
    worker = await register(ledger)
    taken = [(await claim(ledger, worker, 1))[0].id for _ in range(4)]
    assert taken == [order[3], order[1], order[0], order[2]]


async def test_a_scheduled_run_waits_for_its_time(ledger: Ledger) -> None:
    worker = await register(ledger)
    later = await submit(ledger, run_at=datetime.now(UTC) + timedelta(hours=1))
    assert later.run.state is State.QUEUED
    await dispatch.dispatch_due(ledger)
    assert await claim(ledger, worker) == []
    await ledger.execute("update runs set run_at = now() - interval '1 s'")
    await dispatch.dispatch_due(ledger)
    assert [c.id for c in await claim(ledger, worker)] == [later.run.id]


async def test_all_runs_that_are_due_at_once_are_queued_at_once(ledger: Ledger) -> None:
    await ledger.execute(
        """insert into runs (id, task, pool, owner, state, max_attempts, input, metadata)
           select gen_random_uuid(), 'noop', 'default', 'o', 'scheduled', 1, '{}', '{}' from generate_series(1, $1)""",
        2 * dispatch.AT_ONCE + 1,
    )
    await dispatch.dispatch_due(ledger)
    row = await ledger.fetchrow("select count(*) as n from runs where state = 'scheduled'")
    assert row is not None
    assert row["n"] == 0


async def test_a_stale_worker_changes_nothing(ledger: Ledger) -> None:
    first, second = await register(ledger), await register(ledger)
    await submit(ledger)
    [old] = await claim(ledger, first)
    await silence(ledger, first)
    assert await claim(ledger, first) == [], "a worker without a lease gets nothing"
    assert set((await recovery.requeue(ledger, LEASE)).values()) == {"queued"}
    assert (await settlement.settle(ledger, first, [completed(old)])).accepted == set(), "it is queued again"
    [new] = await claim(ledger, second)
    assert new.fence == old.fence + 1
    assert (await settlement.settle(ledger, first, [completed(old, "old")])).accepted == set(), "it runs elsewhere"
    assert (await settlement.settle(ledger, second, [completed(new, "new")])).accepted == {(new.id, new.fence)}
    assert (await settlement.settle(ledger, first, [completed(old, "old")])).accepted == set(), "it has ended elsewhere"
    result = await runs.result(ledger, new.id)
    assert (result.text, result.key, result.run.attempts) == ("new", f"results/{new.id}/{new.fence}.json", 2)


async def test_a_settlement_sent_twice_is_recorded_once_and_accepted_twice(ledger: Ledger) -> None:
    worker = await register(ledger)
    await submit(ledger)
    [taken] = await claim(ledger, worker)
    assert (await settlement.settle(ledger, worker, [completed(taken)])).accepted == {(taken.id, taken.fence)}
    assert (await settlement.settle(ledger, worker, [completed(taken)])).accepted == {(taken.id, taken.fence)}
    assert (await runs.get(ledger, taken.id)).attempts == 1


async def test_a_run_that_kills_its_workers_fails_as_worker_lost(ledger: Ledger) -> None:
    await submit(ledger)
    states = []
    for _ in range(3):
        worker = await register(ledger)
        [taken] = await claim(ledger, worker)
        await claims.begin(ledger, worker, taken)  # the third worker begins it once it runs alone
        await silence(ledger, worker)
        states += (await recovery.requeue(ledger, LEASE)).values()
    assert states == ["queued", "queued", "failed"]
    run = await runs.get(ledger, taken.id)
    assert run.error is not None
    assert (run.state, run.error.code, run.attempts) == (State.FAILED, "worker_lost", 3)


async def test_retries_of_the_task_do_not_count_as_losses(ledger: Ledger) -> None:
    worker = await register(ledger)
    await submit(ledger)
    for n in range(5):
        [taken] = await claim(ledger, worker)
        assert taken.retries_used == n
        again = Settlement(id=taken.id, fence=taken.fence, state="queued", retries_used=n + 1)
        await settlement.settle(ledger, worker, [again])
    [taken] = await claim(ledger, worker)
    await silence(ledger, worker)
    assert set((await recovery.requeue(ledger, LEASE)).values()) == {"queued"}
    assert (await runs.get(ledger, taken.id)).attempts == 6


async def test_a_release_does_not_count_against_max_attempts(ledger: Ledger) -> None:
    worker = await register(ledger)
    await submit(ledger)
    for _ in range(5):
        [taken] = await claim(ledger, worker)
        await settlement.settle(
            ledger, worker, [Settlement(id=taken.id, fence=taken.fence, state="queued", counts=False)]
        )
    run = await runs.get(ledger, taken.id)
    assert (run.state, run.attempts) == (State.QUEUED, 0)


async def test_a_heartbeat_returns_the_held_runs_and_their_cancels(ledger: Ledger) -> None:
    worker = await register(ledger)
    for _ in range(3):
        await submit(ledger)
    taken = await claim(ledger, worker)
    await runs.cancel(ledger, taken[0].id)
    async with ledger.session() as connection:
        beat = await fleet.beat(connection, worker, busy=3, draining=False, settled=0)
        assert beat is not None
        assert {run_id: h.cancel for run_id, h in beat.holds.items()} == {c.id: c is taken[0] for c in taken}
        assert await fleet.beat(connection, uuid7(), busy=0, draining=False, settled=0) is None, (
            "an unknown worker gets None"
        )


async def test_a_heartbeat_tells_what_waits(ledger: Ledger) -> None:
    worker = await register(ledger)

    async def waiting() -> tuple[bool, bool]:
        async with ledger.session() as connection:
            beat = await fleet.beat(connection, worker, busy=0, draining=False, settled=0)
        assert beat is not None
        return beat.queued, beat.routed

    assert await waiting() == (False, False)
    await submit(ledger)
    assert await waiting() == (True, False)
    await ledger.execute("update runs set route = 'noop'")
    assert await waiting() == (False, True)
    await ledger.execute("update runs set pool = 'another'")
    assert await waiting() == (False, False)


async def test_one_live_worker_of_each_pool_dispatches(ledger: Ledger) -> None:
    workers = {uuid7(): pool for pool in ("a", "b", "a", "a", "b")}
    for each, pool in workers.items():
        await fleet.register(ledger, each, pool=pool, host="h", version="1", slots=1, tasks=[NOOP])
    draining = set[UUID]()

    async def dispatching() -> list[int]:
        async with ledger.session() as connection:
            beats = [
                await fleet.beat(connection, each, busy=0, draining=each in draining, settled=0) for each in workers
            ]
        return [n for n, beat in enumerate(beats) if beat is not None and beat.dispatches]

    [first, _, third, *_] = workers
    assert await dispatching() == [0, 1]
    await ledger.execute("update workers set heartbeat_at = now() + interval '1 hour' where id <> $1", first)
    async with ledger.session() as connection:
        await ledger.execute("update workers set heartbeat_at = now() - interval '4 seconds' where id = $1", first)
        beat = await fleet.beat(connection, third, busy=0, draining=False, settled=0)
        assert beat is not None
        assert beat.dispatches, "the first is silent"
    draining.add(first)
    await dispatching()
    assert await dispatching() == [0, 1, 2], "one that drains does as long as it is there, another does too"
    await fleet.retire(ledger, first)
    assert await dispatching() == [1, 2]


async def test_cancelling(ledger: Ledger) -> None:
    worker = await register(ledger)
    queued = (await submit(ledger)).run.id
    assert (await runs.cancel(ledger, queued)).state is State.CANCELLED
    assert await claim(ledger, worker) == []
    running = (await submit(ledger)).run.id
    [taken] = await claim(ledger, worker)
    assert (await runs.cancel(ledger, running)).state is State.RUNNING
    settled = await settlement.settle(ledger, worker, [completed(taken)])
    assert settled.cancelled == {(running, taken.fence)}, "a cancel that came before the settlement wins"
    result = await runs.result(ledger, running)
    assert (result.run.state, result.text, result.key) == (State.CANCELLED, None, None)
    done = (await submit(ledger)).run.id
    [taken] = await claim(ledger, worker)
    await settlement.settle(ledger, worker, [completed(taken)])
    assert (await runs.cancel(ledger, done)).state is State.COMPLETED
    with pytest.raises(UnknownRun):
        await runs.cancel(ledger, uuid7())


async def test_cancel_races_with_claim_and_settle(ledger: Ledger) -> None:
    """Whatever the order, a run ends exactly once, and as cancelled when the cancel was answered so."""
    worker = await register(ledger)

    async def race() -> None:
        run_id = (await submit(ledger)).run.id

        async def work() -> None:
            for taken in await claim(ledger, worker, 100):
                await settlement.settle(ledger, worker, [completed(taken)])

        answer, *_ = await asyncio.gather(runs.cancel(ledger, run_id), work(), work())
        if answer.state is State.CANCELLED:
            assert (await runs.get(ledger, run_id)).state is State.CANCELLED

    await asyncio.gather(*[race() for _ in range(50)])
    await asyncio.gather(*[race() for _ in range(50)])
    left = await ledger.fetch("select id from all_runs where state not in ('completed', 'cancelled')")
    assert left == []


async def test_runs_that_no_worker_publishes_are_found_for_the_history(ledger: Ledger) -> None:
    worker = await register(ledger)
    start, before, began = uuid7(2), uuid7(1), datetime.now(UTC) - timedelta(seconds=1)
    made = [(await submit(ledger, value=n)).run.id for n in range(5)]
    [taken] = await claim(ledger, worker, 1)
    await runs.cancel(ledger, made[4])
    lost = Problem(code="c", title="t", detail="why")
    await settlement.settle(ledger, worker, [Settlement(id=taken.id, fence=taken.fence, state="failed", error=lost)])
    waiting = await history.waiting(ledger, start, uuid7(), limit=2)
    assert [(run.id, run.state, run.parameters) for run in waiting] == [(made[n], "scheduled", ["x"]) for n in (1, 2)]
    assert [run.id for run in await history.waiting(ledger, waiting[-1].id, uuid7(), limit=2)] == [made[3]]
    assert await history.waiting(ledger, start, before, limit=9) == [], "not before their time"

    async def ended() -> list[history.Entry]:
        return await history.ended_badly(ledger, (began, UUID(int=0)), limit=9)

    ends = await until(ended, lambda seen: len(seen) == 2)
    assert {(run.id, run.state, run.message) for run in ends} == {
        (made[4], "cancelled", ""),
        (made[0], "failed", "why"),
    }
    assert await history.ended_badly(ledger, (ends[-1].at, ends[-1].id), limit=9) == []
    await ledger.execute("update ended set finished_at = now() - interval '10 s'")  # by one statement
    first = await history.ended_badly(ledger, (began - timedelta(hours=1), UUID(int=0)), limit=1)
    second = await history.ended_badly(ledger, (first[0].at, first[0].id), limit=1)
    assert {run.id for run in first + second} == {made[0], made[4]}


async def test_listing_pages_through_everything_once(ledger: Ledger) -> None:
    made = [(await submit(ledger, owner="ab"[n % 2])).run.id for n in range(25)]
    pages: list[Run] = []
    before = None
    while page := (await listing.find(ledger, limit=4, before=before))[0]:
        pages += page
        before = page[-1].id
    assert [run.id for run in pages] == sorted(made, reverse=True)
    assert {run.owner for run in (await listing.find(ledger, limit=50, owner="a"))[0]} == {"a"}
    assert len((await listing.find(ledger, limit=50, state=State.QUEUED, task="noop"))[0]) == 25
    assert await listing.find(ledger, limit=50, state=State.FAILED) == ([], None)


@pytest.mark.parametrize("when", ["empty", "all running", "all of one owner"])
async def test_a_claim_reads_few_rows_whatever_the_statistics_are(ledger: Ledger, when: str) -> None:
    """A plan made while nothing was queued must not become a scan, or a sort, of all that is."""
    fill = """
        insert into runs (id, task, pool, owner, state, max_attempts, input, metadata, worker_id)
        select uuidv7(), 'noop', 'default', 'o' || (n % $1), $2, 3, '{}', '{}', gen_random_uuid()
          from generate_series(1, 50000) n"""
    if when != "empty":
        await ledger.execute(fill, 1, "running" if when == "all running" else "queued")
    await ledger.execute("vacuum (analyze) runs")
    await ledger.execute("delete from runs")
    await ledger.execute("vacuum runs")
    worker = await register(ledger)
    assert await claim(ledger, worker) == []  # the generic plan is made here
    await ledger.execute(fill, 20, "queued")
    async with ledger.session() as connection:
        await connection.execute("load 'auto_explain'")
        await connection.execute("set auto_explain.log_min_duration = 0")
        await connection.execute("set auto_explain.log_analyze = on")
        await connection.execute("set client_min_messages = log")
        plans: list[str] = []
        connection.add_log_listener(lambda _, message: plans.append(str(message)))
        rows = await connection.fetch(claims._CLAIM, "default", 0, 10, worker, LEASE, 10, "")
        assert len(rows) == 10
        settle = [[r["id"] for r in rows], [r["fence"] for r in rows], ["completed"] * 10, ["1"] * 10, ["k"] * 10]
        none: list[None] = [None] * 10
        args = [*settle, none, none, [0.0] * 10, [1] * 10, [0] * 10, none, [""] * 10, none]
        assert len(await connection.fetch(settlement._SETTLE_FREE, worker, *args)) == 10
        await connection.fetch(listing._WAITING_OR_RUNNING.format(most=50), listing._LAST, listing._FIRST, ["queued"])
    plan = "\n".join(plan for plan in plans if "on runs" in plan)
    assert "runs_ready" in plan
    assert max(float(most) for most in re.findall(r"actual .*? rows=([\d.]+)", plan)) <= 50, plan


async def test_wakes_are_coalesced_and_the_last_one_is_never_dropped(ledger: Ledger, database: str) -> None:
    calls: list[int] = []
    listens = asyncio.Event()

    def ready(_route: str) -> None:
        calls.append(1)
        listens.set()  # the first call shows that it listens

    listening = asyncio.create_task(ledger.listen("default", ready))
    await listens.wait()
    calls.clear()
    sent: list[object] = []
    witness = await asyncpg.connect(database)
    await witness.add_listener(CHANNEL, lambda *given: sent.append(given[-1]))

    async def sent_so_far() -> list[object]:
        """All notifications up to now: a mark that is sent after them arrives after them."""

        async def pending() -> int:
            return sum(notifier._task is not None for notifier in ledger._notifiers.values())

        async def seen() -> list[object]:
            return sent

        await until(pending, lambda count: count == 0)
        mark = str(uuid7())
        await ledger.execute("select pg_notify($1, $2)", CHANNEL, mark)
        await until(seen, lambda sent: mark in sent)
        return [payload for payload in sent if payload in ("default", "other")]

    began = time.monotonic()
    for _ in range(200):
        ledger.wake("default")
        await asyncio.sleep(0)
    ledger.wake("other")
    first = await sent_so_far()
    assert first.count("other") == 1
    assert 1 <= first.count("default") <= 2 + (time.monotonic() - began) / NOTIFY_INTERVAL
    ledger.wake("default")
    await asyncio.sleep(0)  # it is being sent
    ledger.wake("default")  # within the interval: sent after it, not dropped
    assert (await sent_so_far())[len(first) :] == ["default", "default"]

    async def count() -> int:
        return len(calls)

    await until(count, lambda seen: seen == first.count("default") + 2)
    listening.cancel()
    await witness.close()


async def test_migrating_twice_and_from_several_places_is_safe(database: str) -> None:
    answers = await asyncio.gather(*[asyncio.to_thread(migrate, database) for _ in range(4)])
    assert set(answers) == {"The schema is up to date (0001)."}
    connection = await asyncpg.connect(database)
    await connection.execute("update backcast.alembic_version set version_num = '9999'")
    await connection.close()
    assert "newer" in await asyncio.to_thread(migrate, database)


NEXT = """
from alembic import op
revision, down_revision = "0002", "0001"

def upgrade():
    op.execute("alter table runs add column next integer")
    op.execute("alter table ended add column next integer")
"""


async def test_a_migration_keeps_nobody_waiting_for_long(
    database: str, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that holds a table for long stops the migration, and not those who come after it."""
    shutil.copytree(migration.SCRIPTS, tmp_path / "migrations")
    (tmp_path / "migrations" / "versions" / "0002.py").write_text(NEXT)
    monkeypatch.setattr(migration, "SCRIPTS", tmp_path / "migrations")
    monkeypatch.setattr(migration, "LOCK_TIMEOUT", 0.5)
    monkeypatch.setattr(migration, "TRIES", 1000)  # it goes on trying on a slow machine too
    reader = await asyncpg.connect(database)
    await reader.execute("begin; select from backcast.ended")
    migrating = asyncio.create_task(asyncio.to_thread(migrate, database))
    longest = 0.0
    for _ in range(30):
        began = time.monotonic()
        await runs.cancel(ledger, (await submit(ledger)).run.id)
        longest = max(longest, time.monotonic() - began)
        await asyncio.sleep(0.1)
    assert not migrating.done()
    assert longest < 0.5 + PATIENCE / 2, "and without the limit, until the reader ends"
    await reader.execute("commit")
    assert await migrating == "The schema is now 0002."
    await reader.execute("begin; select from backcast.alembic_version; lock table backcast.runs")
    monkeypatch.setattr(migration, "TRIES", 2)
    (tmp_path / "migrations" / "versions" / "0003.py").write_text(
        NEXT.replace("0002", "0003").replace("0001", "0002").replace("column next", "column after_next")
    )
    with pytest.raises(LedgerUnavailable, match="lock timeout"):
        await asyncio.to_thread(migrate, database)
    await reader.close()


async def test_transactions_leave_connections_to_others(database: str) -> None:
    ledger, done = Ledger(database, pool=3), asyncio.Event()

    async def hold() -> None:
        async with ledger.transaction(times=10):
            await done.wait()

    held = [asyncio.create_task(hold()) for _ in range(4)]
    await asyncio.sleep(0)
    assert await ledger.fetchrow("select 1") is not None
    done.set()
    await asyncio.gather(*held)
    await ledger.aclose()


async def test_a_database_that_is_away_or_empty_is_unavailable_with_a_sentence(server: object) -> None:
    away = Ledger("postgresql://postgres@127.0.0.1:1/none")
    with pytest.raises(LedgerUnavailable, match="right now"):
        await away.check()
    await away.aclose()
    empty = Ledger(server.url("postgres"))  # type: ignore[attr-defined]
    with pytest.raises(LedgerUnavailable, match="backcast setup"):
        await empty.check()
    await empty.aclose()


async def test_a_database_that_takes_no_connections_is_unavailable(server: postgres.Postgres, database: str) -> None:
    """As while it is restored. Found on a cluster, where workers and stewards ended because of it."""
    name = database.partition("?")[0].rpartition("/")[2]
    admin = await asyncpg.connect(server.url())
    closed = Ledger(database)
    await admin.execute(f'alter database "{name}" allow_connections false')
    try:
        with pytest.raises(LedgerUnavailable, match="not currently accepting connections"):
            await closed.check()
        with pytest.raises(LedgerUnavailable, match="not currently accepting connections"):
            async with closed.session():
                pass
    finally:
        await admin.execute(f'alter database "{name}" allow_connections true')
        await admin.close()
    await closed.check()
    await closed.aclose()


@pytest.fixture(autouse=True)
async def _invariants(ledger: Ledger) -> AsyncIterator[None]:
    yield
    odd = await ledger.fetch(
        """select id, count(*) from all_runs group by id having count(*) > 1
            union all select id, 0 from all_runs where (state in ('completed', 'failed', 'cancelled', 'expired'))
              <> (finished_at is not null) or (state = 'completed') <> (result_key is not null)"""
    )
    assert odd == []


async def test_a_filter_that_matches_few_runs_reads_few_rows(ledger: Ledger) -> None:
    """A page goes on where the last one stopped, so that a rare run is found and no row is read twice."""
    rare = (await submit(ledger, owner="o")).run
    await ledger.execute(
        """insert into runs (id, task, pool, owner, state, max_attempts, input, metadata)
           select ('01ffffff-ffff-7fff-8fff-' || lpad(to_hex(n), 12, '0'))::uuid, 'other', 'default', 'o', 'queued', 3,
                  '{}', '{}' from generate_series(1, 25000) n"""
    )
    for filters in ({"task": "noop"}, {"task": "noop", "owner": "o"}, {"task": "noop", "state": State.QUEUED}):
        sizes, before = list[int](), None
        while True:
            found, before = await listing.find(ledger, limit=5, before=before, **filters)  # type: ignore[arg-type]
            sizes.append(len(found))
            if before is None:
                break
        assert (sizes, found[0].id) == ([0, 0, 1], rare.id)


@pytest.mark.parametrize("state", list(State))
async def test_lists_by_state_do_not_walk_through_other_states(database: str, state: State) -> None:
    ledger = Ledger(database, pool=1)

    async def looked_at() -> int:
        """Rows of the index fetched so far, by the server's count."""
        await ledger.execute("select pg_stat_force_next_flush()")
        row = await ledger.fetchrow(
            "select sum(idx_tup_fetch)::int as n from pg_stat_user_indexes where relname ~ '^(runs|ended)'"
        )
        assert row is not None
        return int(row["n"])

    await ledger.execute(
        """insert into runs (id, task, pool, owner, state, max_attempts, input, metadata, worker_id)
           select gen_random_uuid(), 'noop', 'default', 'o', state, 3, '{}', '{}', gen_random_uuid()
             from generate_series(1, 1000) n cross join unnest(array['held', 'scheduled', 'queued', 'running']) state"""
    )
    await ledger.execute(
        """insert into ended (id, task, pool, owner, priority, state, run_at, fence, attempts_used, retries_used,
                              max_attempts, signature, input, metadata, result_key)
           select (left(first_id(current_date)::text, 13) || substr(gen_random_uuid()::text, 14))::uuid, 'noop',
                  'default', 'o', 0, state, now(), 1, 1, 0, 3, '', '{}', '{}',
                  case when state = 'completed' then 'k' end
             from generate_series(1, 1000) n
             cross join unnest(array['completed', 'failed', 'cancelled', 'expired']) state"""
    )
    await ledger.execute("analyze runs, ended")
    before = await looked_at()
    found, following = await listing.find(ledger, limit=20, state=state)
    assert {run.state for run in found} == {state}
    assert [run.id for run in found] == sorted((run.id for run in found), reverse=True)
    assert following == found[-1].id
    again, _ = await listing.find(ledger, limit=20, state=state, before=following)
    assert again
    assert all(run.id < found[-1].id for run in again)
    assert 0 < await looked_at() - before <= 2 * 3 * 21, "two pages, of three states at most"
    await ledger.aclose()
