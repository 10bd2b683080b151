"""Shows pools, workers and tasks at work: what waits, for how long, and who does it at which pace.

It locks nothing, and counts at most 10,000 runs of each kind, in the order of an index: a number that reaches this may
be higher, and the oldest run is the oldest of those.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import asyncpg

from backcast.errors import UnknownWorker
from backcast.ledger import pace, pauses, reading, routing, task_types
from backcast.ledger.connection import Ledger
from backcast.models import Load, Pause, PauseKind, Pool, TaskType, Worker

MOST = 10_000
MOST_WORKERS = 1000


# The workers by their primary key: they are few. Ready runs by runs_ready, running ones by runs_live, which has as many
# as there are slots, parked ones by runs_routed.
_LOAD = f"""
select asked.pool as name, f.*, q.ready, {reading.age("q.oldest")} as oldest_age_seconds,
       (select count(*) from (select pool, task from runs where state = 'running' limit {MOST}) r
         where r.pool = asked.pool and ($2::text is null or r.task = $2)) as running,
       (select count(*) from (select task from runs r where r.pool = asked.pool and route <> '' and state = 'scheduled'
                               limit {MOST}) r where $2::text is null or r.task = $2) as parked
  from unnest($1::text[]) asked(pool)
 cross join lateral (
       select count(*) as workers, coalesce(sum(slots), 0) as slots, coalesce(sum(busy), 0) as busy,
              coalesce(sum({pace.faded("recent", "heartbeat_at")}), 0)::float8 as per_minute
         from workers w where w.pool = asked.pool and {routing.LIVE} and ($2::text is null or $2 = any(w.tasks))) f
 cross join lateral (
       select count(*) as ready, min(run_at) as oldest from (
         select task, run_at from runs r where r.pool = asked.pool and state = 'queued' limit {MOST}) r
        where $2::text is null or r.task = $2) q
 order by 1"""  # noqa: S608  # constants


async def pools(ledger: Ledger) -> list[Pool]:
    """Those that have, or had, workers."""
    return await _pools(ledger, sorted(await task_types.pools(ledger)))


async def pool(ledger: Ledger, name: str) -> Pool:
    """Raises `UnknownPool`."""
    await task_types.require_pool(ledger, name)
    [found] = await _pools(ledger, [name])
    return found


async def _pools(ledger: Ledger, names: Sequence[str]) -> list[Pool]:
    paused = {pause.name: pause for pause in await pauses.all_(ledger) if pause.kind is PauseKind.POOL}
    return [
        Pool(name=row["name"], **_load(row, paused.get(row["name"])))
        for row in await ledger.fetch(_LOAD, list(names), None)
    ]


async def task(ledger: Ledger, name: str) -> TaskType:
    """The newest live version, or the latest, with its load. Raises as `task_types.versions`."""
    found = await task_types.get(ledger, name)
    [row] = await ledger.fetch(_LOAD, [found.pool], name)
    paused = await pauses.of(ledger, PauseKind.TASK, name)
    return found.model_copy(update={"load": Load(**_load(row, paused))})


def _load(row: asyncpg.Record, paused: Pause | None) -> Mapping[str, Any]:
    return {**{name: row[name] for name in Load.model_fields if name != "paused"}, "paused": paused}


# By the primary keys, the newest first; of each worker the running rows by runs_live.
_WORKERS = f"""
select id, pool, host, version, tasks, slots, busy, settled, draining or drain_asked_at is not null as draining,
       {reading.time("started_at")}, {reading.age("heartbeat_at")} as heartbeat_age_seconds,
       {routing.LIVE} as takes_runs,
       {pace.faded("recent", "heartbeat_at")}::float8 as per_minute,
       (select count(*) from runs r where r.worker_id = w.id and r.state = 'running') as running
  from workers w where ($1::uuid is null or id = $1) order by id desc limit {MOST_WORKERS}"""  # noqa: S608  # constants


async def workers(ledger: Ledger) -> list[Worker]:
    """Those that are registered, the newest first, silent ones included; at most 1,000."""
    return [Worker(**row) for row in await ledger.fetch(_WORKERS, None)]


async def worker(ledger: Ledger, worker_id: UUID) -> Worker:
    """Raises `UnknownWorker`."""
    for row in await ledger.fetch(_WORKERS, worker_id):
        return Worker(**row)
    raise UnknownWorker.of(worker_id)
