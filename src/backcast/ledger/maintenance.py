"""Keeps the tables small and fast: removes rows that are no longer needed, vacuums, counts the dead rows.

A run that has ended never runs again, so a decision about it stays right, however late it is carried out.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg

from backcast.ledger import ended
from backcast.ledger.connection import Ledger
from backcast.models import uuid7

PAGE = 1000
"""Rows read, or removed, by one statement: a fraction of a second."""
_NIL, _MAX = UUID(int=0), UUID(int=(1 << 128) - 1)
_FINAL = "('completed', 'failed', 'cancelled', 'expired')"


_NOW = "least(now(), {}::timestamptz)"
"""By the database's clock and by ours, whichever is behind: a wrong clock removes nothing."""
# By the primary key, from the oldest: ids are time-ordered, and no run ends before it was accepted, but for ids of a
# clock that was far ahead, which are in ended_late.
_OLD = f"""
select id, input_key, result_key, finished_at < {_NOW.format("$4")} - $3::interval as is_old
  from {{table}} where id > $1 and id <= $2 order by id limit {PAGE}"""  # noqa: S608  # a constant


async def old_runs(ledger: Ledger, table: str, keep: timedelta) -> AsyncIterator[Mapping[UUID, list[str]]]:
    """Pages of the runs in a table of ended runs that ended longer ago than `keep`, with the keys of their objects."""
    after, until = _NIL, _MAX if table == "ended_late" else uuid7(keep.total_seconds())
    while rows := await ledger.fetch(_OLD.format(table=table), after, until, keep, datetime.now(UTC)):
        after = rows[-1]["id"]
        yield {row["id"]: ended.object_keys(row) for row in rows if row["is_old"]}


async def remove(ledger: Ledger, table: str, runs: Sequence[UUID]) -> None:
    """Remove runs that have ended."""
    await ledger.execute(f"delete from {table} where id = any($1)", runs)  # noqa: S608  # a name of ours


# By idempotency_keys_by_age, page after page. SKIP LOCKED: a request that comes with the key keeps it.
_OLD_KEYS = f"""
with page as materialized (
  select owner, key, run_id, created_at from idempotency_keys
   where (created_at, owner, key) > ($1, $2, $3) and created_at < {_NOW.format("$5")} - $4::interval
   order by created_at, owner, key limit {PAGE}),
gone as materialized (
  select k.owner, k.key from idempotency_keys k join page p on p.owner = k.owner and p.key = k.key
   where not exists (select from {{runs}} r where r.id = k.run_id) for update of k skip locked),
removed as (delete from idempotency_keys k using gone g where k.owner = g.owner and k.key = g.key)
select owner, key, created_at from page order by created_at desc, owner desc, key desc limit 1"""  # noqa: S608  # constants


async def remove_old_keys(ledger: Ledger, keep: timedelta) -> None:
    """Remove Idempotency-Keys that were given longer ago than `keep`, and whose runs are over."""
    await _remove_keys(ledger, keep, unless_in="runs")


async def remove_keys_of_removed_runs(ledger: Ledger, keep: timedelta) -> None:
    """Remove Idempotency-Keys whose runs are gone, which are older than runs are kept."""
    await _remove_keys(ledger, keep, unless_in="all_runs")


async def _remove_keys(ledger: Ledger, keep: timedelta, *, unless_in: str) -> None:
    after = datetime(1, 1, 1, tzinfo=UTC), "", ""
    sql = _OLD_KEYS.format(runs=unless_in)
    while last := await ledger.fetchrow(sql, *after, keep, datetime.now(UTC)):
        after = last["created_at"], last["owner"], last["key"]


# By the primary key and runs_in_batch. A batch is recorded together with its runs; the hour allows for wrong clocks.
_OLD_BATCHES = f"""
with page as materialized (select id from batches where id > $1 and id <= $2 order by id limit {PAGE}),
gone as (
  delete from batches where id = any(array(select id from page))
     and not exists (select from all_runs where batch_id = batches.id)
     and not exists (select from operations o where o.state = 'running' and o.batch_id = batches.id))
select id from page order by id desc limit 1"""  # noqa: S608  # constants


async def remove_empty_batches(ledger: Ledger, keep: timedelta) -> None:
    """Remove batches whose runs have all been removed."""
    after, until = _NIL, uuid7(max(keep, timedelta(hours=1)).total_seconds())
    while row := await ledger.fetchrow(_OLD_BATCHES, after, until):
        after = row["id"]


# By the primary keys of both. Neither the run nor its retries change: the run has ended, and a retry that is made at
# this moment was asked for before the run was removed; the next sweep removes its row.
_OLD_RETRIES = f"""
with page as materialized (
  select run_id, retry_id from retries where (run_id, retry_id) > ($1, $2) and run_id <= $3
   order by run_id, retry_id limit {PAGE}),
gone as (
  delete from retries r using page p where r.run_id = p.run_id and r.retry_id = p.retry_id
     and not exists (select from all_runs a where a.id = p.run_id))
select run_id, retry_id from page order by run_id desc, retry_id desc limit 1"""  # noqa: S608  # constants


async def remove_retries_of_removed_runs(ledger: Ledger, keep: timedelta) -> None:
    """Remove what names the retries of runs that are gone, which are older than runs are kept."""
    after, until = (_NIL, _NIL), uuid7(keep.total_seconds())
    while row := await ledger.fetchrow(_OLD_RETRIES, *after, until):
        after = row["run_id"], row["retry_id"]


async def remove_stale_flights(ledger: Ledger) -> None:
    """Remove flights whose attempt is over; the runs that wait for them become ready by their own time.

    A flight that is taken over meanwhile is checked again under its lock, and is young then.
    """
    await ledger.execute(
        """delete from flights f where taken_at < now() - interval '1 minute' and not exists (
             select from runs r where r.id = f.run_id and r.fence = f.fence and r.state = 'running')"""
    )


# An object is needed until its run ends (an attempt may have stored a value that the next one takes over), and
# afterwards if the run names it, or if it is a log. One probe of the primary key for each.
_ORPHANS = f"""
select o.key, not exists (select from all_runs r where r.id = o.run_id) as is_unknown
  from unnest($1::text[], $2::uuid[]) as o(key, run_id)
 where not exists (select from all_runs r where r.id = o.run_id
                      and (r.state not in {_FINAL} or o.key = r.result_key or o.key = r.input_key
                           or o.key like 'logs/%'))"""  # noqa: S608


async def orphans(ledger: Ledger, objects: Mapping[str, UUID]) -> dict[str, bool]:
    """Those keys of objects (each given with its run's id) that no recorded run needs, now or later, and whether the
    run is unknown: not recorded yet, removed, or lost with a part of the ledger."""
    rows = await ledger.fetch(_ORPHANS, list(objects), list(objects.values()))
    return {row["key"]: row["is_unknown"] for row in rows}


async def remove_silent_workers(ledger: Ledger, after: timedelta) -> None:
    """Remove workers that have been silent for `after` and hold no run."""
    await ledger.execute(
        """delete from workers w where heartbeat_at < now() - $1::interval
              and not exists (select from runs r where r.worker_id = w.id and r.state = 'running')""",
        after,
    )


async def dead_rows(ledger: Ledger) -> int:
    """About how many rows of `runs` wait for a vacuum."""
    row = await ledger.fetchrow(
        "select n_dead_tup from pg_stat_user_tables where schemaname = 'backcast' and relname = 'runs'"
    )
    return row["n_dead_tup"] if row else 0


async def vacuum(connection: asyncpg.Connection) -> None:
    """Vacuum `runs`: autovacuum alone is too slow to keep claims fast. It may take an hour, and does nothing while
    another vacuum is under way."""
    await connection.execute("set statement_timeout = 0")
    await connection.execute("vacuum (index_cleanup on, truncate off, skip_locked) runs", timeout=3600)
