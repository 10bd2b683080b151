"""Attempts: how workers claim runs and report their ends, and how the runs of lost workers go on; each statement with
the reason why it is right.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal
from uuid import UUID

from backcast.ledger import lanes
from backcast.ledger.connection import Ledger
from backcast.models import JSON, Problem

INLINE_RESULT = 32 * 1024
"""Bytes of JSON up to which a result is copied into its row, beside the object in the store."""


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
    lane: str | None = None
    """Set when the run is counted in this lane, which must then be told that it has ended."""
    ahead: bool = False
    """Claimed while no slot was free: it may wait here for a moment, and its loss is not charged."""
    lost_fence: int | None = None
    """The latest attempt that was lost with its worker. It may have stored a result."""

    @property
    def losses(self) -> int:
        """Workers lost that this run is held to account for."""
        return self.attempts_used - self.retries_used

    @property
    def is_suspect(self) -> bool:
        """Whether the run must run alone: the next loss will be its own doing, and no other run's."""
        return self.losses >= max(1, min(2, self.max_attempts - 1))


# Fair share: a loose index scan over runs_ready hops from owner to owner, one index probe each, starting after the
# owner served last ($2) and wrapping around; then each owner gives its best rows. So a claim costs the same with 1 or
# 1,000,000 rows queued. SKIP LOCKED keeps claimers from waiting for each other: a row locked by someone else is being
# claimed or cancelled. `= any(array(...))` and not a join: a generic plan might hash-join, which scans the table.
# A worker whose own lease has run out gets nothing: the steward is about to give its runs to others. Runs past their
# deadline are passed over; everyone's poll takes them out of the index.
# Of $3 rows, those after the first $6 are claimed ahead of a free slot; one that was ever lost is not (see `requeue`),
# but for suspects, who wait for all the others to end first and then `begin`.
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
  select r.id, row_number() over (order by hop.n) as place from hop cross join share cross join lateral (
    select id from runs where pool = $1 and state = 'queued' and owner_key = hop.owner_key
       and (deadline is null or deadline > now())
     order by priority desc, run_at, id limit share.rows for update skip locked) r
   where exists (select from alive)
   order by hop.n limit $3)
update runs r set state = 'running', fence = r.fence + 1, worker_id = $4, started_at = now(),
       ahead = r.lost_fence is null and r.id = any(array(select id from pick where place > $6))
            or r.attempts_used - r.retries_used >= greatest(1, least(2, r.max_attempts - 1))
 where r.id = any(array(select id from pick))
returning r.id, r.task, r.fence, r.input, r.input_key, r.retries_used, r.attempts_used, r.max_attempts,
          r.owner_key, case when r.admitted then r.lane end as lane, r.ahead, r.lost_fence"""


async def claim(
    ledger: Ledger, *, pool: str, cursor: int, limit: int, worker_id: UUID, lease: timedelta, ahead: int = 0
) -> list[Claim]:
    """Take up to `limit` ready runs of `pool`, and up to `ahead` more, going round the owners from the one after
    `cursor` (an owner key)."""
    rows = await ledger.fetch(_CLAIM, pool, cursor, limit + ahead, worker_id, lease, limit)
    return [Claim(**row) for row in rows]


async def begin(ledger: Ledger, worker_id: UUID, claim: Claim) -> None:
    """Mark that a run which waited on its worker begins: from here on its loss is charged."""
    await ledger.execute(
        "update runs set ahead = false where id = $1 and fence = $2 and worker_id = $3 and state = 'running'",
        claim.id,
        claim.fence,
        worker_id,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an attempt ended. `scheduled` and `queued` mean that the run goes on later."""

    id: UUID
    fence: int
    state: Literal["completed", "failed", "scheduled", "queued"]
    lane: str | None = None
    """As in the claim."""
    result: str | None = None
    result_key: str | None = None
    error: Problem | None = None
    usage: dict[str, JSON] | None = None
    delay: float = 0.0
    """Seconds until a scheduled run is ready again; counted by the database's clock."""
    flight: str | None = None
    """The flight that a scheduled run waits for; its landing makes it ready earlier."""
    charged: bool = True
    """False when the attempt does not count: it was handed back, or never really started."""
    retries_used: int = 0


@dataclass(frozen=True, slots=True)
class Settled:
    accepted: set[tuple[UUID, int]]
    """The endings, by run and fence, that are now (or were already) recorded."""
    cancelled: set[tuple[UUID, int]]
    """Those of them whose run had been cancelled meanwhile, so that the run ended as cancelled."""


# The fence decides: the row must still be running, under the same fence and worker, when its lock is held. What a
# stale worker says changes nothing. A cancel that came first wins over any outcome. Only this statement writes
# result_key, so an object of a lost attempt is never read. The rows are locked by nobody who waits for another of
# them: they are this worker's own, and those who take many rows at once skip locked ones. But an ending may be sent
# again while its first sending is under way: so the rows are locked in the order of their ids before they are changed.
_SETTLE = """
update runs r set
    state = case when r.cancel_requested_at is not null then 'cancelled'
                 when d.state = 'queued' and d.charge > 0 and r.admitted then 'held' else d.state end,
    finished_at = case when r.cancel_requested_at is not null or d.state in ('completed', 'failed') then now() end,
    result = case when r.cancel_requested_at is null then d.result end,
    result_key = case when r.cancel_requested_at is null then d.result_key end,
    error = coalesce(d.error, r.error),
    usage = coalesce(d.usage, r.usage),
    run_at = case when d.state = 'scheduled' then now() + make_interval(secs => d.delay) else r.run_at end,
    attempts_used = r.attempts_used + d.charge,
    retries_used = d.retries,
    flight = d.flight,
    admitted = r.admitted and (r.cancel_requested_at is not null or d.state <> 'scheduled')
                          and (d.state <> 'queued' or d.charge = 0)
  from unnest($2::uuid[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::json[], $8::json[], $9::float8[],
              $10::int[], $11::int[], $12::text[])
       as d(id, fence, state, result, result_key, error, usage, delay, charge, retries, flight)
 where r.id = any(array(select id from runs where id = any($2::uuid[]) and worker_id = $1 and state = 'running'
                                                {locked_first} order by id for update))
   and r.id = d.id and r.fence = d.fence and r.worker_id = $1 and r.state = 'running'"""
_LANES_FIRST = "and (select count(*) from lane) >= 0"
_SETTLE_FREE = f"{_SETTLE.format(locked_first='')} returning r.id, r.fence, r.state, r.pool"

# For runs that are counted in lanes: their lanes' rows are locked first and by name, as everywhere, then the runs.
_SETTLE_COUNTED = f"""
with lane as materialized (select name from lanes where name = any($13::text[]) order by name for update),
settled as ({_SETTLE.format(locked_first=_LANES_FIRST)} returning r.id, r.fence, r.state, r.pool, r.lane),
released as (
  update lanes set admitted = lanes.admitted - n
    from (select lane, count(*) as n from settled where state <> 'queued' group by lane) s where lanes.name = s.lane)
select id, fence, state, pool from settled"""  # noqa: S608  # constants

# An ending that was sent before, its answer lost: no other fence can have ended a run whose fence is still ours, and
# `requeue`, which ends runs under theirs, leaves its mark.
_SETTLED_BEFORE = """
select r.id, r.fence, r.state
  from runs r join unnest($2::uuid[], $3::bigint[]) as d(id, fence) on r.id = d.id and r.fence = d.fence
 where r.worker_id = $1 and r.lost_fence is distinct from r.fence
   and r.state in ('completed', 'failed', 'cancelled')"""


async def settle(ledger: Ledger, worker_id: UUID, endings: Sequence[Ending]) -> Settled:
    """Record how attempts ended, in one statement (two when some are counted in lanes). Safe to send again when its
    fate is unknown."""
    accepted, cancelled = set[tuple[UUID, int]](), set[tuple[UUID, int]]()
    for some in ([e for e in endings if e.lane is None], [e for e in endings if e.lane is not None]):
        if some:
            settled = await _settle(ledger, worker_id, some, {e.lane for e in some if e.lane is not None})
            accepted |= settled.accepted
            cancelled |= settled.cancelled
    return Settled(accepted, cancelled)


async def _settle(ledger: Ledger, worker_id: UUID, endings: Sequence[Ending], counted: set[str]) -> Settled:
    endings = sorted(endings, key=lambda e: e.id)  # one that is sent again must not deadlock with its first sending
    values: list[object] = [
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
        [e.flight for e in endings],
    ]
    if counted:
        rows = await ledger.fetch(_SETTLE_COUNTED, *values, sorted(counted))
        await lanes.nudge(ledger, counted)
    else:
        rows = await ledger.fetch(_SETTLE_FREE, *values)
    for pool in {row["pool"] for row in rows if row["state"] == "queued"}:
        ledger.wake(pool)
    outcome = {(row["id"], row["fence"]): row["state"] for row in rows}
    if missing := [e for e in endings if (e.id, e.fence) not in outcome]:
        before = await ledger.fetch(_SETTLED_BEFORE, worker_id, [e.id for e in missing], [e.fence for e in missing])
        sent = {(e.id, e.fence): e.state for e in missing}
        for row in before:
            if row["state"] in (sent[row["id"], row["fence"]], "cancelled"):
                outcome[row["id"], row["fence"]] = row["state"]
    return Settled(set(outcome), {attempt for attempt, state in outcome.items() if state == "cancelled"})


# Dead workers are those that hold a running run and have not been heard of for a lease, by the database's clock, or are
# not there at all: one may have been forgotten while a claim of its was under way. All runs of a worker at once, lanes
# locked first. SKIP LOCKED: a row locked now is being settled or cancelled, and is looked at again on the next round.
# The fence stays: only a claim raises it, and the dead worker's endings are refused because the row is no longer
# running, or runs under a higher fence.
# Who is charged: what killed the worker can't be seen, so every run it had started is suspected alike, the first time.
# Among them those that were charged most often before are charged again, the others go free; one with two losses runs
# alone (`Claim.is_suspect`), so its third is its own. Claimed-ahead runs go free, but are not claimed ahead again: so
# one that did start, unseen, is charged the next time.
_REQUEUE = """
with dead as materialized (
  select r.worker_id as id from runs r where r.state = 'running' and not exists (
    select from workers w where w.id = r.worker_id and w.heartbeat_at >= now() - $1::interval)
     and ($3::uuid[] is null or r.worker_id = any($3))
   group by r.worker_id order by r.worker_id limit 20),
lane as materialized (
  select name from lanes where name = any(array(
    select lane from runs where state = 'running' and worker_id = any(array(select id from dead))))
   order by name for update),
lost as materialized (
  select r.id, r.worker_id, r.attempts_used - r.retries_used as losses,
         not r.ahead and r.cancel_requested_at is null as suspected from runs r
   where r.state = 'running' and r.worker_id = any(array(select id from dead)) and (select count(*) from lane) >= 0
     for update skip locked),
most as materialized (select worker_id, max(losses) as losses from lost where suspected group by worker_id),
charged as materialized (
  select l.id from lost l join most m on m.worker_id = l.worker_id and m.losses = l.losses where l.suspected),
requeued as (
  update runs r set
      state = case when r.cancel_requested_at is not null then 'cancelled'
                   when c.charge and r.attempts_used - r.retries_used + 1 >= r.max_attempts then 'failed'
                   else 'queued' end,
      finished_at = case when r.cancel_requested_at is not null
                           or c.charge and r.attempts_used - r.retries_used + 1 >= r.max_attempts then now() end,
      error = case when c.charge then $2::json else r.error end,
      attempts_used = r.attempts_used + c.charge::int,
      lost_fence = r.fence
    from (select id, id = any(array(select id from charged)) as charge from lost) c
   where r.id = c.id and r.id = any(array(select id from lost))
  returning r.id, r.state, r.pool, r.lane, r.admitted),
released as (
  update lanes set admitted = lanes.admitted - n
    from (select lane, count(*) as n from requeued where admitted and state <> 'queued' group by lane) s
   where lanes.name = s.lane)
select id, state, pool, case when admitted then lane end as lane from requeued"""

WORKER_LOST = Problem(
    code="worker_lost",
    title="The worker was lost while it worked on this run",
    detail="Its process was killed, stalled or cut off. A run that does this to every worker fails; see its input.",
)


async def requeue(ledger: Ledger, lease: timedelta, judged: Collection[UUID] | None = None) -> dict[UUID, str]:
    """Make the runs of dead workers ready again, at once; one lost `max_attempts` times fails. Returns their states.

    With `judged`, only of those: who asks may have been stopped since it judged, and everybody else with it.
    """
    states = dict[UUID, str]()
    among = None if judged is None else list(judged)
    while rows := await ledger.fetch(_REQUEUE, lease, WORKER_LOST.model_dump_json(), among):
        states |= {row["id"]: row["state"] for row in rows}
        for pool in {row["pool"] for row in rows if row["state"] == "queued"}:
            ledger.wake(pool)
        await lanes.nudge(ledger, {row["lane"] for row in rows if row["lane"] is not None and row["state"] != "queued"})
    return states
