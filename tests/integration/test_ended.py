"""The two homes of runs: none is lost, shown twice or ended twice on its way from one to the other, days go whole."""

import asyncio
import random
import time
from collections.abc import Awaitable, Iterable
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from backcast.errors import LedgerFull, UnknownRun
from backcast.ledger import (
    batches,
    dispatch,
    ended,
    limits,
    listing,
    maintenance,
    recovery,
    runs,
    settlement,
    submissions,
)
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement
from backcast.models import Limits, State, Submission, uuid7
from backcast.steward.retention import Retention
from backcast.store import Store
from tests.integration.test_ledger import LEASE, NOOP, claim, completed, register, silence, submit
from tests.support import ended as homes
from tests.support.roles import role_url
from tests.support.waiting import PATIENCE

DAY = timedelta(days=1)
KEEP = timedelta(days=30)


def as_part(database: str, part: str) -> Ledger:
    return Ledger(role_url(database, part), timeout=timedelta(seconds=PATIENCE))


async def submit_with_id(ledger: Ledger, run_id: UUID, **fields: Any) -> UUID:
    made = await submissions.submit(
        ledger, NOOP, Submission(input={}, **fields), run_id=run_id, input_text="{}", input_hash=b""
    )
    return made.run.id


async def at_home(ledger: Ledger) -> dict[UUID, str]:
    """Every run and its state. Fails when one is in two homes."""
    rows = await ledger.fetch("select id, state from all_runs")
    found = {row["id"]: row["state"] for row in rows}
    assert len(found) == len(rows)
    return found


async def names(ledger: Ledger) -> set[str]:
    return {each.name for each in await ended.partitions(ledger)}


def day_of(run: UUID) -> str:
    return f"{datetime.fromtimestamp((run.int >> 80) / 1000, UTC):%Y%m%d}"


async def remove_partitions(ledger: Ledger) -> None:
    for each in await ended.partitions(ledger):
        await ledger.execute(f"drop table {each.name}")


async def newest_first(ledger: Ledger, **filters: Any) -> list[UUID]:
    """The ids of a whole list, in pages of three."""
    ids, before = list[UUID](), None
    while True:
        page, before = await listing.find(ledger, limit=3, before=before, **filters)
        ids += [run.id for run in page]
        if before is None:
            return ids


# -- the move ----------------------------------------------------------------------------------------------------------


async def test_one_outcome_whoever_ends_a_run(ledger: Ledger) -> None:
    """Settlements that are sent twice race with cancels, recovery, expiry and the cancel of the batch. Lanes are
    counted, so a run that was ended twice would free two places."""
    await limits.limit(ledger, "narrow", Limits(max_running=40))
    dice = random.Random(1)
    for turn in range(8):
        worker = await register(ledger)
        batch = await _batch(ledger)
        taken = await claim(ledger, worker, 80)
        ids = [row["id"] for row in await ledger.fetch("select id from runs where batch_id = $1", batch)]
        if turn % 2:
            await ledger.execute("update runs set deadline = now() where state in ('queued', 'held')")
        sent = [_settled(each, failed=dice.random() < 0.3) for each in taken]
        racers: list[Awaitable[object]] = [
            settlement.settle(ledger, worker, sent),
            settlement.settle(ledger, worker, sent[::-1]),
            batches.cancel(ledger, batch),
            dispatch.dispatch_due(ledger),
            *[runs.cancel(ledger, each) for each in dice.sample(ids, 30)],
        ]
        if turn % 4 > 1:
            await silence(ledger, worker)
            racers += [recovery.requeue(ledger, LEASE, {worker}) for _ in range(2)]
        dice.shuffle(racers)
        watching = asyncio.create_task(_watch(ledger, dice.sample(ids, 10)))
        await asyncio.gather(*racers)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        await silence(ledger, worker)
        await recovery.requeue(ledger, LEASE, {worker})
        found = await at_home(ledger)
        assert {found[each] for each in ids} <= set(FINAL), "the cancel of the batch leaves none"
    [row] = await ledger.fetch("select promoted from lanes")
    assert row["promoted"] == 0


FINAL = ("completed", "failed", "cancelled", "expired")


async def _batch(ledger: Ledger) -> UUID:
    """Of 120 runs, half of them in a lane."""
    batch = uuid7()
    submitted = [Submission(input={}, lane="narrow" if n % 2 else None, owner=f"o{n % 7}") for n in range(120)]
    rows = [submissions.new(NOOP, each, input_text="{}", input_hash=b"", batch_id=batch) for each in submitted]
    await batches.submit(ledger, batch, "me", [rows], size=len(rows), key=None, request_hash=b"")
    return batch


def _settled(taken: Claim, *, failed: bool) -> Settlement:
    done = completed(taken)._replace(lane=taken.lane)
    return done._replace(state="failed", result=None, result_key=None, error=dispatch.EXPIRED) if failed else done


async def _watch(ledger: Ledger, ids: list[UUID]) -> None:
    """While runs move, each is to be seen, and an outcome never changes."""
    over = dict[UUID, State]()
    while True:
        for each in ids:
            run = await runs.get(ledger, each)
            if each in over:
                assert run.state == over[each]
            elif run.state.is_final:
                over[each] = run.state


async def test_a_disk_that_is_full_in_the_middle_of_a_move_loses_nothing(ledger: Ledger) -> None:
    worker = await register(ledger)
    waiting = await submit(ledger)
    [taken] = await claim(ledger, worker)
    other = await submit(ledger)
    await ledger.execute(
        """create function full_disk() returns trigger language plpgsql as
           $$ begin raise exception 'could not extend file' using errcode = '53100'; end $$"""
    )
    await ledger.execute("create trigger no_space before insert on ended for each row execute function full_disk()")
    with pytest.raises(LedgerFull):
        await settlement.settle(ledger, worker, [completed(taken)])
    with pytest.raises(LedgerFull):
        await runs.cancel(ledger, other.run.id)
    assert await at_home(ledger) == {waiting.run.id: "running", other.run.id: "queued"}
    await ledger.execute("drop trigger no_space on ended")
    assert (await settlement.settle(ledger, worker, [completed(taken)])).accepted == {(taken.id, taken.fence)}
    await runs.cancel(ledger, other.run.id)
    assert await at_home(ledger) == {waiting.run.id: "completed", other.run.id: "cancelled"}


# -- partitions --------------------------------------------------------------------------------------------------------


async def test_whoever_ends_a_run_makes_the_partition_that_is_missing(database: str, ledger: Ledger) -> None:
    """As after a steward that was away for longer than partitions are made ahead, with the rights of each part."""
    worker, api, steward = (as_part(database, part) for part in ("worker", "api", "steward"))
    me = await register(worker)
    first = [await submit_with_id(api, uuid7(days * 86400.0)) for days in range(4)]
    taken = await claim(worker, me)
    assert len(taken) == 4
    cancelled = await submit_with_id(api, uuid7())
    expired = await submit_with_id(api, uuid7())
    await remove_partitions(ledger)
    settled = await settlement.settle(worker, me, [completed(each) for each in taken])  # of four days
    assert len(settled.accepted) == 4
    await ledger.execute("update runs set deadline = now() where id = $1", expired)
    await runs.cancel(api, cancelled)
    await dispatch.dispatch_due(steward)
    assert await at_home(ledger) == dict.fromkeys(first, "completed") | {cancelled: "cancelled", expired: "expired"}
    for each in (worker, api, steward):
        await each.aclose()


@pytest.mark.parametrize("part", ["worker", "api", "steward"])
async def test_each_part_may_make_a_partition(database: str, ledger: Ledger, part: str) -> None:
    await remove_partitions(ledger)
    role = as_part(database, part)
    run = await submit_with_id(ledger, uuid7())
    if part == "api":
        await runs.cancel(role, run)
    elif part == "steward":
        await ledger.execute("update runs set deadline = now()")
        await dispatch.dispatch_due(role)
    else:
        worker = await register(role)
        await settlement.settle(role, worker, [completed(each) for each in await claim(role, worker)])
    assert (await runs.get(ledger, run)).state.is_final
    await role.aclose()


async def test_many_that_find_no_partition_make_one(ledger: Ledger) -> None:
    made = [await submit(ledger) for _ in range(30)]
    await remove_partitions(ledger)
    await asyncio.gather(*[runs.cancel(ledger, each.run.id) for each in made])
    assert set((await at_home(ledger)).values()) == {"cancelled"}
    assert f"ended_otherwise_{day_of(made[0].run.id)}" in await names(ledger)


FAR = [-40.0, -2.5, -1.5, -1.0, -0.0001, 0.0001, 1.0, 10.0, 13.5, 16.0, 400.0]
"""Days by which the clock is wrong that made a run's id."""


async def test_ids_of_any_clock_end_and_are_listed_in_their_order(ledger: Ledger) -> None:
    worker = await register(ledger)
    ids = [await submit_with_id(ledger, uuid7(-days * 86400)) for days in FAR]
    taken = await claim(ledger, worker, 100)
    done = [each for each in taken if each.id in ids[::2]]
    await settlement.settle(ledger, worker, [completed(each) for each in done])
    newest = sorted(ids, reverse=True)
    assert await newest_first(ledger) == newest
    assert await newest_first(ledger, state=State.COMPLETED) == [each for each in newest if each in ids[::2]]
    await settlement.settle(ledger, worker, [completed(each) for each in taken if each not in done])
    assert await newest_first(ledger) == await newest_first(ledger, state=State.COMPLETED) == newest
    for each in ids:
        assert (await runs.result(ledger, each)).text == "1"


async def test_ids_on_both_sides_of_midnight(ledger: Ledger) -> None:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp() * 1000
    worker = await register(ledger)
    edge = int(midnight)
    ids = [UUID(int=(ms << 80) | 0x7 << 76 | 0x8 << 60 | n) for n, ms in enumerate((edge - 1, edge, edge + 1))]
    ids += [UUID(int=edge << 80), UUID(int=(edge << 80) - 1)]  # no uuid7, but what a border is made of
    for each in ids:
        await submit_with_id(ledger, each)
    await settlement.settle(ledger, worker, [completed(each) for each in await claim(ledger, worker, 100)])
    assert await newest_first(ledger) == sorted(ids, reverse=True)
    rows = await ledger.fetch("select id, tableoid::regclass::text as home from ended")
    of_day = {row["id"]: row["home"][-8:] for row in rows}
    today = f"{datetime.now(UTC):%Y%m%d}"
    assert {each: day == today for each, day in of_day.items()} == {each: each.int >= edge << 80 for each in ids}


# -- retention ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def retention(ledger: Ledger, store: Store) -> Retention:
    return Retention(ledger, store, KEEP)


async def old_run(ledger: Ledger, state: str = "completed", *, days: float = 40, since: float | None = None) -> UUID:
    run = uuid7(days * 86400.0)
    columns = {"state": state, "task": "noop", "pool": "default", "owner": "me", "max_attempts": 3, "priority": 0}
    columns |= {"run_at": datetime.now(UTC), "fence": 1, "attempts_used": 1, "retries_used": 0, "signature": ""}
    columns |= {
        "input": "{}",
        "metadata": "{}",
        "result_key": f"results/{run}/1.json" if state == "completed" else None,
    }
    await homes.add(ledger, run, since=(days if since is None else since) * 86400, **columns)
    return run


async def test_days_go_whole(ledger: Ledger, retention: Retention) -> None:
    gone = [await old_run(ledger, state) for state in FINAL] + [await old_run(ledger, days=80, since=31)]
    kept = {await old_run(ledger, days=30.5), await old_run(ledger, days=31, since=30), await old_run(ledger, days=1)}
    late = await old_run(ledger, days=40, since=29.5)
    await retention()
    assert set(await at_home(ledger)) == kept | {late}
    assert {f"ended_completed_{day_of(each)}" for each in kept} <= await names(ledger)
    assert not {f"ended_{which}_{day_of(gone[0])}" for which in ("completed", "otherwise")} & await names(ledger)


@pytest.mark.parametrize("keep", [timedelta(), timedelta(hours=1), DAY, 3 * DAY], ids=str)
async def test_a_run_that_ends_while_others_go_stays(
    ledger: Ledger, store: Store, monkeypatch: pytest.MonkeyPatch, keep: timedelta
) -> None:
    """Its day may be old, and its outcome is not."""
    worker = await register(ledger)
    began = [await submit_with_id(ledger, uuid7(days * 86400.0)) for days in (0.01, 0.99, 1.5, 3.0, 5.0, 40.0)]
    left = await claim(ledger, worker, 100)
    for days in (0.01, 0.99, 1.5, 3.0, 5.0, 40.0):
        await old_run(ledger, days=days, since=min(days, (keep + DAY).total_seconds() / 86400))
    delete = store.delete

    async def meanwhile(keys: Iterable[str]) -> None:
        await delete(keys)
        if left:
            await settlement.settle(ledger, worker, [completed(left.pop())])

    monkeypatch.setattr(store, "delete", meanwhile)
    while left:
        await Retention(ledger, store, max(keep, timedelta(minutes=10)))()
        await meanwhile([])
    assert set(began) <= set(await at_home(ledger))


async def test_what_an_administrator_detaches_stays(ledger: Ledger, retention: Retention) -> None:
    day = day_of(await old_run(ledger))
    await ledger.execute(f"alter table ended_completed detach partition ended_completed_{day}")
    await retention()
    assert len(await ledger.fetch(f"select id from ended_completed_{day}")) == 1


async def test_failed_runs_may_be_kept_for_longer(ledger: Ledger, store: Store) -> None:
    await old_run(ledger)
    failed = await old_run(ledger, "failed")
    await old_run(ledger, "failed", days=100)
    await Retention(ledger, store, KEEP, keep_failed=90 * DAY)()
    assert set(await at_home(ledger)) == {failed}


async def test_two_stewards_drop_and_make_at_once(database: str, ledger: Ledger, store: Store) -> None:
    for days in range(35, 45):
        await old_run(ledger, days=days)
    both = [as_part(database, "steward") for _ in range(4)]
    await asyncio.gather(*[Retention(each, store, KEEP)() for each in both], *[ended.make_ahead(each) for each in both])
    assert await at_home(ledger) == {}
    assert min(await names(ledger)) >= f"ended_completed_{datetime.now(UTC) - 31 * DAY:%Y%m%d}"
    for each in both:
        await each.aclose()


async def test_a_steward_that_was_stopped_between_the_two_steps(ledger: Ledger, retention: Retention) -> None:
    for _ in range(2):
        day = day_of(await old_run(ledger))  # its partition is made anew
        await ledger.execute("select retire_partition($1)", f"ended_completed_{day}")
    assert await at_home(ledger) == {}
    assert len(await ledger.fetch("select from pg_class where relname like 'retired%' and relkind = 'r'")) == 2
    await retention()
    assert await ledger.fetch("select from pg_class where relname like 'retired%' and relkind = 'r'") == []


async def test_a_reader_that_stays_stops_retention_and_nobody_else(
    database: str, ledger: Ledger, retention: Retention, caplog: pytest.LogCaptureFixture
) -> None:
    day = day_of(await old_run(ledger))
    worker = await register(ledger)
    reader = await asyncpg.connect(database, server_settings={"search_path": "backcast"})
    await reader.execute("begin isolation level repeatable read")
    await reader.execute("select count(*) from ended")
    dropping = asyncio.create_task(retention())
    ends = 0
    while not dropping.done() or ends < 20:  # others wait no longer than the attempt to drop may
        run = await submit(ledger)
        async with asyncio.timeout(PATIENCE):
            await settlement.settle(ledger, worker, [completed(each) for each in await claim(ledger, worker)])
            assert (await runs.get(ledger, run.run.id)).state == State.COMPLETED
        ends += 1
    await dropping
    assert f"ended_completed_{day}" in await names(ledger)
    assert "stay until the next sweep" in caplog.text
    await reader.execute("commit")
    await retention()
    assert f"ended_completed_{day}" not in await names(ledger)
    assert len(await at_home(ledger)) == ends
    await reader.close()


async def test_a_clock_that_is_far_ahead_drops_nothing(
    ledger: Ledger, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database's and the steward's must agree that a day is old enough."""

    class Behind(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Behind":
            return cls.fromtimestamp(time.time() - 20 * 86400, tz)

    runs_ = {await old_run(ledger), await old_run(ledger, days=80, since=31)}
    await ledger.execute(
        "insert into idempotency_keys values ('me', 'k', $1, '', now() - interval '40 days')", uuid7(40 * 86400)
    )
    with monkeypatch.context() as wrong:  # for it, the database's clock is twenty days ahead
        for module in (ended, maintenance):
            wrong.setattr(module, "datetime", Behind)
        await Retention(ledger, store, KEEP)()
        assert set(await at_home(ledger)) == runs_
        assert len(await ledger.fetch("select from idempotency_keys")) == 1
    await Retention(ledger, store, KEEP)()
    assert await at_home(ledger) == {}
    assert await ledger.fetch("select from idempotency_keys") == []


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 2])
async def test_a_key_whose_run_was_removed_is_free(ledger: Ledger, value: int) -> None:
    """Twenty requests with such a key, the same one again or another, make one new run."""
    worker = await register(ledger)
    first = await submit(ledger, key="k")
    await settlement.settle(ledger, worker, [completed(each) for each in await claim(ledger, worker)])
    await remove_partitions(ledger)
    with pytest.raises(UnknownRun):
        await runs.get(ledger, first.run.id)
    again = await asyncio.gather(*[submit(ledger, key="k", value=value) for _ in range(20)])
    assert len({each.run.id for each in again}) == 1
    assert sum(each.fresh for each in again) == 1
    assert again[0].run.id != first.run.id


async def test_a_key_stays_as_long_as_its_run(ledger: Ledger, store: Store) -> None:
    """A run may end long after its key was given, or be kept for longer than others."""
    first = await submit(ledger, key="k")
    await runs.cancel(ledger, first.run.id)
    await ledger.execute("update idempotency_keys set created_at = now() - interval '100 days'")
    await Retention(ledger, store, KEEP)()
    assert (await submit(ledger, key="k")).run.id == first.run.id
    await remove_partitions(ledger)
    await Retention(ledger, store, KEEP)()
    assert await ledger.fetch("select from idempotency_keys") == []


async def test_keys_have_a_life_of_their_own(ledger: Ledger, store: Store) -> None:
    worker = await register(ledger)
    first = await submit(ledger, key="over")
    await settlement.settle(ledger, worker, [completed(each) for each in await claim(ledger, worker)])
    waiting = await submit(ledger, key="waiting")
    young = await submit(ledger, key="young")
    await ledger.execute("update idempotency_keys set created_at = now() - interval '2 days' where key <> 'young'")
    await Retention(ledger, store, KEEP, keep_keys=DAY)()
    assert (await submit(ledger, key="over")).run.id != first.run.id
    assert (await submit(ledger, key="waiting")).run.id == waiting.run.id
    assert (await submit(ledger, key="young")).run.id == young.run.id
    assert len(await at_home(ledger)) == 4


async def test_more_old_keys_than_a_page_go_while_one_is_used(ledger: Ledger) -> None:
    await ledger.execute(
        "insert into idempotency_keys select 'me', 'k' || n, gen_random_uuid(), '', now() - interval '9 days'"
        f" from generate_series(1, {2 * maintenance.PAGE + 5}) n"
    )
    await maintenance.remove_old_keys(ledger, DAY)
    assert await ledger.fetch("select from idempotency_keys") == []
