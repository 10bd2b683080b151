"""What happens to a run, from submit to its one outcome; each statement with the reason why it is right.

Isolation is READ COMMITTED throughout: an UPDATE that had to wait for a row lock looks at the row again before it acts,
so a `where` on state, fence and worker is decided by the newest version of the row. No statement waits for a second
run while it holds a first one, except `settle`, which nobody who holds run locks ever waits for.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

import asyncpg

from backcast.errors import IdempotencyConflict, UnknownRun
from backcast.ledger import Ledger
from backcast.models import JSON, Problem, Run, State, Submission, TaskType, uuid7

INLINE_INPUT = 64 * 1024
"""Bytes of JSON up to which an input lives in its row; a larger one lives in the store."""
INLINE_RESULT = 32 * 1024
"""Bytes of JSON up to which a result is copied into its row, beside the object in the store."""

_COLUMNS = """id, task, state, owner, priority, attempts_used, error, usage, metadata, created_at, run_at, started_at,
    finished_at"""


def _run(row: asyncpg.Record) -> Run:
    state: str = row["state"]
    running = state == "running"
    return Run(
        id=row["id"],
        task=row["task"],
        state=State.QUEUED if state in ("held", "scheduled") else State(state),
        owner=row["owner"],
        priority=row["priority"],
        attempts=row["attempts_used"] + running,
        error=Problem.model_validate_json(row["error"]) if row["error"] and state != "completed" else None,
        usage=json.loads(row["usage"]) if row["usage"] else None,
        metadata=json.loads(row["metadata"]),
        created_at=row["created_at"],
        run_at=row["run_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
    )


@dataclass(frozen=True, slots=True)
class Submitted:
    run: Run
    fresh: bool
    """False when an earlier request with the same Idempotency-Key made this run."""


# Idempotency: the unique index on (owner, idem_key) makes one of any number of racers insert; the others wait for its
# commit and then *update* the row, which is what lets RETURNING see it ("do nothing" returns no row to the losers).
# `xmax = 0` is true only for a row that this statement inserted.
_SUBMIT = f"""
insert into runs (id, task, pool, owner, priority, state, run_at, max_attempts, idem_key, request_hash, input,
                  input_key, metadata)
values ($1, $2, $3, $4, $5, case when $6::timestamptz > now() then 'scheduled' else 'queued' end,
        coalesce($6, now()), $7, $8, $9, $10, $11, $12)
on conflict (owner, idem_key) where idem_key is not null do update set idem_key = excluded.idem_key
returning {_COLUMNS}, request_hash, xmax = 0 as fresh"""  # noqa: S608  # a constant


async def submit(
    ledger: Ledger,
    task: TaskType,
    submission: Submission,
    *,
    run_id: UUID | None = None,
    input_text: str | None,
    input_key: str | None = None,
    input_hash: bytes,
    idempotency_key: str | None = None,
    max_attempts: int = 3,
) -> Submitted:
    """Record a run; when this returns it is durable.

    Exactly one of `input_text` and `input_key` is given; `input_hash` is the digest of the input's JSON.

    Raises:
        IdempotencyConflict: the key belongs to another request of this owner.
    """
    rest = submission.model_dump_json(exclude={"input", "owner"})
    request_hash = hashlib.sha256(b"\n".join([task.name.encode(), input_hash, rest.encode()])).digest()
    row = await ledger.fetchrow(
        _SUBMIT,
        run_id or uuid7(),
        task.name,
        task.pool,
        submission.owner,
        submission.priority,
        submission.run_at,
        max_attempts,
        idempotency_key,
        request_hash if idempotency_key is not None else None,
        input_text,
        input_key,
        json.dumps(submission.metadata),
    )
    assert row is not None
    if row["fresh"]:
        if row["state"] == "queued":
            ledger.wake(task.pool)
    elif row["request_hash"] != request_hash:
        raise IdempotencyConflict(
            "An earlier request of this owner used the same Idempotency-Key for something else: use a new key for a"
            " new run, or repeat the earlier request unchanged."
        )
    return Submitted(_run(row), row["fresh"])


async def get(ledger: Ledger, run_id: UUID) -> Run:
    """Raises `UnknownRun`."""
    row = await ledger.fetchrow(f"select {_COLUMNS} from runs where id = $1", run_id)  # noqa: S608  # a constant
    if row is None:
        raise UnknownRun(f"There is no run {run_id}: it was never accepted here, or it has been removed.")
    return _run(row)


@dataclass(frozen=True, slots=True)
class Result:
    """Where a run's result is: `text` holds small results, `key` names the object in the store."""

    run: Run
    text: str | None
    key: str | None


async def result(ledger: Ledger, run_id: UUID) -> Result:
    """Raises `UnknownRun`."""
    row = await ledger.fetchrow(f"select {_COLUMNS}, result, result_key from runs where id = $1", run_id)  # noqa: S608
    if row is None:
        raise UnknownRun(f"There is no run {run_id}: it was never accepted here, or it has been removed.")
    return Result(_run(row), row["result"], row["result_key"])


async def find(
    ledger: Ledger,
    *,
    limit: int,
    before: UUID | None = None,
    state: State | None = None,
    task: str | None = None,
    owner: str | None = None,
) -> list[Run]:
    """The newest runs first (ids are time-ordered). One statement per set of filters, so that each has its own plan."""
    values: list[object] = [limit]
    conditions: list[str] = []
    for column, value in (("owner =", owner), ("id <", before), ("task =", task)):
        if value is not None:
            values.append(value)
            conditions.append(f"{column} ${len(values)}")
    if state is not None:
        internal = ["held", "scheduled", "queued"] if state is State.QUEUED else [state.value]
        values.append(internal)
        conditions.append(f"state = any(${len(values)}::text[])")
    where = f"where {' and '.join(conditions)}" if conditions else ""
    rows = await ledger.fetch(f"select {_COLUMNS} from runs {where} order by id desc limit $1", *values)  # noqa: S608
    return [_run(row) for row in rows]


# One row, by its key: the row lock decides between this and a claim or finish at the same moment. A run that is not
# running is cancelled here; a running one is only asked to stop, and `settle` makes the outcome cancelled.
_CANCEL = f"""
update runs set cancel_requested_at = coalesce(cancel_requested_at, now()),
       state = case when state = 'running' then state else 'cancelled' end,
       finished_at = case when state = 'running' then null else now() end
 where id = $1 and state in ('held', 'scheduled', 'queued', 'running')
returning {_COLUMNS}"""  # noqa: S608  # a constant


async def cancel(ledger: Ledger, run_id: UUID) -> Run:
    """Cancel a run, or ask a running one to stop; a run that has ended stays as it is. Raises `UnknownRun`."""
    row = await ledger.fetchrow(_CANCEL, run_id)
    return _run(row) if row is not None else await get(ledger, run_id)


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that this worker now holds, until its lease ends. `fence` proves it."""

    id: UUID
    task: str
    fence: int
    input: str | None
    input_key: str | None
    retries_used: int
    attempts_used: int
    max_attempts: int
    owner_key: int


# Fair share: a loose index scan over runs_ready hops from owner to owner, one index probe each, starting after the
# owner served last ($2) and wrapping around; then each owner gives its best rows. So a claim costs the same with 1 or
# 1,000,000 rows queued. SKIP LOCKED keeps claimers from waiting for each other: a row locked by someone else is being
# claimed or cancelled. `= any(array(...))` and not a join: a generic plan might hash-join, which scans the table.
# A worker whose own lease has run out gets nothing: the steward is about to give its runs to others.
_CLAIM = """
with recursive
alive as materialized (select id from workers where id = $4 and heartbeat_at > now() - $5::interval),
a(owner_key, n) as (
  (select owner_key, 1 from runs where pool = $1 and state = 'queued' and owner_key > $2
    order by owner_key limit 1)
  union all
  select x.owner_key, a.n + 1 from a cross join lateral (select owner_key from runs where pool = $1
    and state = 'queued' and owner_key > a.owner_key order by owner_key limit 1) x where a.n < $3),
b(owner_key, n) as (
  (select owner_key, (select count(*)::int from a) + 1 from runs where pool = $1 and state = 'queued'
    and owner_key <= $2 and (select count(*) from a) < $3 order by owner_key limit 1)
  union all
  select x.owner_key, b.n + 1 from b cross join lateral (select owner_key from runs where pool = $1
    and state = 'queued' and owner_key > b.owner_key and owner_key <= $2 order by owner_key limit 1) x where b.n < $3),
hop as (select owner_key, n from a union all select owner_key, n from b),
share as (select ceil($3::numeric / greatest(count(*), 1))::int as rows from hop),
pick as materialized (
  select r.id from hop cross join share cross join lateral (
    select id from runs where pool = $1 and state = 'queued' and owner_key = hop.owner_key
     order by priority desc, run_at, id limit share.rows for update skip locked) r
   where exists (select from alive)
   order by hop.n limit $3)
update runs r set state = 'running', fence = r.fence + 1, worker_id = $4, started_at = now()
 where r.id = any(array(select id from pick))
returning r.id, r.task, r.fence, r.input, r.input_key, r.retries_used, r.attempts_used, r.max_attempts,
          r.owner_key"""


async def claim(
    ledger: Ledger, *, pool: str, cursor: int, limit: int, worker_id: UUID, lease: timedelta
) -> list[Claim]:
    """Take up to `limit` ready runs of `pool`, going round the owners from the one after `cursor` (an owner key)."""
    rows = await ledger.fetch(_CLAIM, pool, cursor, limit, worker_id, lease)
    return [Claim(**row) for row in rows]


# SKIP LOCKED: every worker does this on its poll, and none waits for another. The index is runs_scheduled.
_PROMOTE = """
with due as materialized (
  select id from runs where state = 'scheduled' and run_at <= now() order by run_at limit 1000 for update skip locked)
update runs set state = 'queued' where id = any(array(select id from due)) returning pool"""


async def promote(ledger: Ledger) -> set[str]:
    """Make the scheduled runs ready whose time has come; returns their pools. Every worker does it, so none waits."""
    pools = {row["pool"] for row in await ledger.fetch(_PROMOTE)}
    for pool in pools:
        ledger.wake(pool)
    return pools


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an attempt ended. `scheduled` and `queued` mean that the run goes on later."""

    id: UUID
    fence: int
    state: Literal["completed", "failed", "scheduled", "queued"]
    result: str | None = None
    result_key: str | None = None
    error: Problem | None = None
    usage: dict[str, JSON] | None = None
    delay: float = 0.0
    """Seconds until a scheduled run is ready again; counted by the database's clock."""
    charged: bool = True
    """False when the attempt does not count: it was handed back, or never really started."""
    retries_used: int = 0


@dataclass(frozen=True, slots=True)
class Settled:
    accepted: set[UUID]
    """The endings that are now (or were already) recorded."""
    cancelled: set[UUID]
    """Those of them whose run had been cancelled meanwhile, so that the run ended as cancelled."""


# The fence decides: the row must still be running, under the same fence and worker, when its lock is held. What a
# stale worker says changes nothing. A cancel that came first wins over any outcome. Only this statement writes
# result_key, so an object of a lost attempt is never read.
_SETTLE = """
update runs r set
    state = case when r.cancel_requested_at is not null then 'cancelled' else d.state end,
    finished_at = case when r.cancel_requested_at is not null or d.state in ('completed', 'failed') then now() end,
    result = case when r.cancel_requested_at is null then d.result end,
    result_key = case when r.cancel_requested_at is null then d.result_key end,
    error = coalesce(d.error, r.error),
    usage = coalesce(d.usage, r.usage),
    run_at = case when d.state = 'scheduled' then now() + make_interval(secs => d.delay) else r.run_at end,
    attempts_used = r.attempts_used + d.charge,
    retries_used = d.retries
  from unnest($2::uuid[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::json[], $8::json[], $9::float8[],
              $10::int[], $11::int[])
       as d(id, fence, state, result, result_key, error, usage, delay, charge, retries)
 where r.id = d.id and r.fence = d.fence and r.worker_id = $1 and r.state = 'running'
returning r.id, r.state, r.pool"""

# An ending that was sent before, its answer lost: no other fence can have ended a run whose fence is still ours.
_SETTLED_BEFORE = """
select r.id, r.state from runs r join unnest($2::uuid[], $3::bigint[]) as d(id, fence) on r.id = d.id
 where r.fence = d.fence and r.worker_id = $1 and r.state in ('completed', 'failed', 'cancelled')"""


async def settle(ledger: Ledger, worker_id: UUID, endings: Sequence[Ending]) -> Settled:
    """Record how attempts ended, all in one statement. Safe to send again when its fate is unknown."""
    rows = await ledger.fetch(
        _SETTLE,
        worker_id,
        [e.id for e in endings],
        [e.fence for e in endings],
        [e.state for e in endings],
        [e.result for e in endings],
        [e.result_key for e in endings],
        [e.error and e.error.model_dump_json() for e in endings],
        [None if e.usage is None else json.dumps(e.usage) for e in endings],
        [e.delay for e in endings],
        [int(e.charged) for e in endings],
        [e.retries_used for e in endings],
    )
    for pool in {row["pool"] for row in rows if row["state"] == "queued"}:
        ledger.wake(pool)
    outcome = {row["id"]: row["state"] for row in rows}
    if missing := [e for e in endings if e.id not in outcome]:
        before = await ledger.fetch(_SETTLED_BEFORE, worker_id, [e.id for e in missing], [e.fence for e in missing])
        sent = {e.id: e.state for e in missing}
        outcome |= {row["id"]: row["state"] for row in before if row["state"] in (sent[row["id"]], "cancelled")}
    return Settled(set(outcome), {run_id for run_id, state in outcome.items() if state == "cancelled"})


# The runs of workers that have been silent for a lease, by the database's clock. SKIP LOCKED: a row locked now is being
# settled or cancelled, and looked at again on the next round. The fence stays: only a claim raises it, and the dead
# worker's endings are refused because the row is no longer running, or runs under a higher fence.
_REQUEUE = """
with dead as materialized (
  select w.id from workers w where w.heartbeat_at < now() - $1::interval),
lost as materialized (
  select r.id from runs r where r.state = 'running' and r.worker_id in (select id from dead)
   limit 1000 for update skip locked)
update runs r set
    state = case when r.cancel_requested_at is not null then 'cancelled'
                 when r.attempts_used - r.retries_used + 1 >= r.max_attempts then 'failed' else 'queued' end,
    finished_at = case when r.cancel_requested_at is not null
                         or r.attempts_used - r.retries_used + 1 >= r.max_attempts then now() end,
    error = $2::json,
    attempts_used = r.attempts_used + 1
 where r.id = any(array(select id from lost))
returning r.id, r.state, r.pool"""

WORKER_LOST = Problem(
    code="worker_lost",
    title="The worker was lost while it worked on this run",
    detail="Its process was killed, stalled or cut off. A run that does this to every worker fails; see its input.",
)


async def requeue(ledger: Ledger, lease: timedelta) -> dict[UUID, str]:
    """Make the runs of dead workers ready again, at once; one lost `max_attempts` times fails. Returns their states."""
    rows = await ledger.fetch(_REQUEUE, lease, WORKER_LOST.model_dump_json())
    for pool in {row["pool"] for row in rows if row["state"] == "queued"}:
        ledger.wake(pool)
    return {row["id"]: row["state"] for row in rows}


@dataclass(frozen=True, slots=True)
class Told:
    """What a mirror of the ledger shows of a run that no engine has spoken for."""

    id: UUID
    task: str
    state: Literal["scheduled", "failed", "cancelled"]
    parameters: list[str]
    """Names only."""
    message: str
    at: datetime
    due: datetime
    started_at: datetime | None
    attempts: int


def _told(row: asyncpg.Record) -> Told:
    state = row["state"] if row["state"] in ("failed", "cancelled") else "scheduled"
    names: list[str] = []
    with contextlib.suppress(ValueError, AttributeError):  # a large input is elsewhere, a damaged one has no names
        names = list(json.loads(row["input"] or "{}").keys())
    problem = Problem.model_validate_json(row["error"]) if row["error"] and state == "failed" else None
    return Told(
        id=row["id"],
        task=row["task"],
        state=state,
        parameters=names,
        message=problem.detail if problem else "",
        at=row["created_at"] if state == "scheduled" else row["finished_at"],
        due=row["run_at"],
        started_at=None if state == "scheduled" else row["started_at"],
        attempts=row["attempts_used"],
    )


_TOLD = "id, task, state, input, error, created_at, run_at, started_at, finished_at, attempts_used"

# By the primary key: ids are time-ordered, so "accepted since" is a range of it, and each row is looked at once.
_WAITING = f"""
select {_TOLD} from runs where id > $1 and id <= $2 and fence = 0 and state in ('held', 'scheduled', 'queued')
 order by id limit $3"""  # noqa: S608  # a constant

# By runs_ended_badly. A second's distance lets the transactions commit that took their time before they did.
_ENDED_BADLY = f"""
select {_TOLD} from runs where state in ('failed', 'cancelled') and finished_at > $1
   and finished_at <= now() - interval '1 second' order by finished_at limit $2"""  # noqa: S608  # a constant


async def waiting(ledger: Ledger, after: UUID, until: UUID, *, limit: int) -> list[Told]:
    """Runs with ids in (after, until] that no worker has had yet, the oldest first."""
    return [_told(row) for row in await ledger.fetch(_WAITING, after, until, limit)]


async def ended_badly(ledger: Ledger, after: datetime, *, limit: int) -> list[Told]:
    """Runs that failed or were cancelled after this time (by the database's clock), the earliest first."""
    return [_told(row) for row in await ledger.fetch(_ENDED_BADLY, after, limit)]
