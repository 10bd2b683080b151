"""The fleet: which workers are alive, which tasks they serve, and which runs they hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import asyncpg

from backcast.errors import UnknownWorker
from backcast.ledger import pace, routing, task_types, waiting
from backcast.ledger.connection import Ledger
from backcast.models import TaskType

SILENCE = 3
"""Seconds without a heartbeat after which another worker of the pool dispatches."""


async def register(
    ledger: Ledger, worker_id: UUID, *, pool: str, host: str, version: str, slots: int, tasks: Sequence[TaskType]
) -> None:
    """Register a worker and the tasks it serves. Safe to repeat."""
    new = await routing.new_versions(ledger, worker_id, pool, tasks)
    await ledger.execute(
        """insert into workers (id, pool, host, version, tasks, slots, routes) values ($1, $2, $3, $4, $5, $6, $7)
           on conflict (id) do update set heartbeat_at = now(), draining = false""",
        worker_id,
        pool,
        host,
        version,
        [task.name for task in tasks],
        slots,
        routing.routes_to(tasks),
    )
    await task_types.register(ledger, tasks)
    await routing.reconsider(ledger, pool, new)


@dataclass(frozen=True, slots=True)
class Held:
    """A run that this worker holds, according to the ledger."""

    fence: int
    cancel: bool
    retries_used: int
    lane: str | None
    paused: bool
    """It does not begin, if it has not begun."""
    release: bool
    """Its pause releases what has begun too."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a worker learns from its heartbeat. An idle one polls for nothing else."""

    holds: dict[UUID, Held]
    queued: bool
    """Whether runs of its pool wait that have no route."""
    routed: bool
    """Whether others of its pool do."""
    drain: bool
    """Whether somebody has asked this worker to drain."""
    dispatches: bool
    """Whether this worker dispatches due runs for its pool. For a moment two may, or none."""


# One row per worker, by its key. The runs are read in the same snapshot: a run that a worker believes to hold, and that
# is missing here or has another fence, has been given to another worker. Of each pool the live worker with the lowest
# id dispatches: by the primary key that is the first row that is looked at, whatever the number of workers.
_BEAT = f"""
with beat as (
  update workers set heartbeat_at = now(), busy = $2, draining = $3, settled = $4,
         recent = {pace.counted("recent", "heartbeat_at", "$4 - settled")} where id = $1
  returning id, pool, drain_asked_at is not null as drain)
select r.id, r.fence, r.cancel_requested_at is not null as cancel, r.retries_used,
       case when r.promoted then r.lane end as lane, {waiting.paused("r")} as paused,
       {waiting.paused("r", which="release")} as release, b.*
  from (select exists (select from runs q where q.pool = b.pool and q.route = '' and q.state = 'queued') as queued,
               exists (select from runs q where q.pool = b.pool and q.route <> '' and q.state = 'queued') as routed,
               b.drain,
               not exists (select from workers w where w.id < b.id and w.pool = b.pool and not w.draining
                              and w.heartbeat_at > now() - interval '{SILENCE} s') as dispatches
          from beat b) b
       left join runs r on r.worker_id = $1 and r.state = 'running'"""  # noqa: S608  # a constant


async def beat(
    connection: asyncpg.Connection, worker_id: UUID, *, busy: int, draining: bool, settled: int
) -> Beat | None:
    """Extend the worker's lease; returns None when the worker is not registered (any more)."""
    rows = await connection.fetch(_BEAT, worker_id, busy, draining, settled)
    if not rows:
        return None
    holds = {
        row["id"]: Held(*(row[name] for name in ("fence", "cancel", "retries_used", "lane", "paused", "release")))
        for row in rows
        if row["id"] is not None
    }
    return Beat(holds, rows[0]["queued"], rows[0]["routed"], rows[0]["drain"], rows[0]["dispatches"])


async def retire(ledger: Ledger, worker_id: UUID) -> None:
    """Remove a worker that has released its runs; one that still holds a run stays, so that its loss is noticed."""
    await ledger.execute(
        """delete from workers w where id = $1
              and not exists (select from runs r where r.worker_id = w.id and r.state = 'running')""",
        worker_id,
    )


async def drain(ledger: Ledger, worker_id: UUID) -> None:
    """Ask a worker to drain; its next heartbeat reads it. Raises `UnknownWorker`."""
    sql = "update workers set drain_asked_at = coalesce(drain_asked_at, now()) where id = $1 returning id"
    if await ledger.fetchrow(sql, worker_id) is None:
        raise UnknownWorker.of(worker_id)


async def busy(ledger: Ledger) -> dict[str, int]:
    """The hosts of workers with a heartbeat in the last 15 seconds, and how many runs execute on each."""
    rows = await ledger.fetch(
        """select host, least(sum(busy), 1000000)::int as busy from workers
            where heartbeat_at > now() - interval '15 seconds' group by 1"""
    )
    return {row["host"]: row["busy"] for row in rows}


@dataclass(frozen=True, slots=True)
class Fleet:
    alive: int
    dead: frozenset[UUID]
    """Workers silent for a lease that still hold runs."""
    database_started: float
    """When the database server started, in its own epoch seconds: a change means that every heartbeat paused."""
    at: float
    """When this was observed, by the same clock."""


async def observe(connection: asyncpg.Connection, lease: timedelta) -> Fleet:
    row = await connection.fetchrow(
        """select count(*) filter (where heartbeat_at >= now() - $1::interval) as alive,
                  array(select r.worker_id from runs r where r.state = 'running' and not exists (select from workers h
                          where h.id = r.worker_id and h.heartbeat_at >= now() - $1::interval)
                         group by r.worker_id) as dead,
                  extract(epoch from pg_postmaster_start_time())::float8 as started,
                  extract(epoch from now())::float8 as at
             from workers w""",
        lease,
    )
    assert row is not None
    return Fleet(row["alive"], frozenset(row["dead"]), row["started"], row["at"])
