"""Claims runs for workers: fairly by owner, at a cost that depends neither on the backlog nor on history."""

from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

from backcast.errors import LedgerFault, LedgerUnavailable
from backcast.ledger import attempts, pauses, reading, routing, waiting
from backcast.ledger.connection import REFUSED, Ledger


class Claim(NamedTuple):
    """A run that this worker holds until its lease ends; `fence` proves it."""

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
    """Set when the run is counted in this lane; its settlement names the lane, to take the run out of the count."""
    prefetched: bool = False
    """Claimed while no slot was free: it may wait here for a moment, and its loss does not count."""
    lost_fence: int | None = None
    """The latest attempt that was lost with its worker. It may have stored a result."""
    signature: str = ""
    """Of the version of the task that accepted the input."""
    waited: float = 0.0
    """Seconds since the run could have started, by the database's clock."""
    releases: int = 0
    """Attempts that executed its code and did not count: the worker was stopped, or another run ended its process."""
    trace: str | None = None
    """The `traceparent` of the request that made it, if that was traced."""

    @property
    def losses(self) -> int:
        """Losses of an executor or a worker that count against this run's `max_attempts`."""
        return self.attempts_used - self.retries_used

    @property
    def has_many_losses(self) -> bool:
        return self.losses >= max(1, min(2, self.max_attempts - 1))

    @property
    def is_quarantined(self) -> bool:
        """Whether the run must run alone, so that no other run can have caused its next loss. Where no worker was lost
        with it, an executor of its own is enough."""
        return self.has_many_losses and self.lost_fence is not None


MANY_LOSSES = "r.attempts_used - r.retries_used >= greatest(1, least(2, r.max_attempts - 1))"
"""SQL: `Claim.has_many_losses` of the run `r`."""

# Fair share: a loose index scan over runs_ready hops from owner to owner, one index probe each. It starts after the
# owner served last ($2) and wraps around; then each owner gives its best rows. So a claim costs the same with 1 or
# 1,000,000 rows queued. SKIP LOCKED keeps claims from waiting for each other: another statement is claiming or
# cancelling a locked row. `= any(array(...))` and not a join: a generic plan might hash-join, which scans the table.
# A worker whose own lease has run out gets nothing: the steward is about to give its runs to others. Runs past their
# deadline are passed over; `dispatch_due`, which is called each second, takes them out of the index.
# Of $3 rows, those after the first $6 are prefetched, but no runs that were ever lost (see `recovery.requeue`): those
# are claimed for a free slot only. A quarantined run always counts as prefetched: it waits until all the others have
# ended, and then `begin` marks it.
# A picked run whose task this worker lacks stays as it is; `lacking` has its owner: see `routing.clear`.
# So does one that is paused; `paused` has its owner: see `pauses.clear`.
_CLAIM = f"""
with recursive
alive as materialized (select id, tasks from workers where id = $4 and heartbeat_at > now() - $5::interval),
a(owner_key, n) as (
  (select owner_key, 1 from runs where pool = $1 and route = $7 and state = 'queued' and owner_key > $2
    order by owner_key limit 1)
  union all
  select x.owner_key, a.n + 1 from a cross join lateral (select owner_key from runs where pool = $1 and route = $7
    and state = 'queued' and owner_key > a.owner_key order by owner_key limit 1) x where a.n < $3),
b(owner_key, n) as (
  (select owner_key, (select count(*)::int from a) + 1 from runs where pool = $1 and route = $7 and state = 'queued'
    and owner_key <= $2 and (select count(*) from a) < $3 order by owner_key limit 1)
  union all
  select x.owner_key, b.n + 1 from b cross join lateral (select owner_key from runs where pool = $1 and route = $7
    and state = 'queued' and owner_key > b.owner_key and owner_key <= $2 order by owner_key limit 1) x where b.n < $3),
hop as (select owner_key, n from a union all select owner_key, n from b),
share as (select ceil($3::numeric / greatest(count(*), 1))::int as rows from hop),
pick as materialized (
  select r.id, r.can, r.paused, hop.owner_key, row_number() over (partition by r.can order by hop.n) as place
    from hop cross join share cross join lateral (
    select id, paused, not paused and task = any((select tasks from alive)::text[]) as can from (
      select id, task, {waiting.paused("runs")} as paused from runs
       where pool = $1 and route = $7 and state = 'queued' and owner_key = hop.owner_key
         and (deadline is null or deadline > now())
       order by priority desc, run_at, id limit share.rows for update skip locked) r) r
   where exists (select from alive)
   order by hop.n limit $3),
claimed as (
  update runs r set state = 'running', fence = r.fence + 1, worker_id = $4, started_at = now(),
         prefetched = case when r.lost_fence is null then r.id = any(array(select id from pick where place > $6))
              else {MANY_LOSSES} end
   where r.id = any(array(select id from pick where can))
     and (r.lost_fence is null or r.id = any(array(select id from pick where place <= $6))
          or {MANY_LOSSES})
  returning r.id, r.task, r.fence, r.input, r.input_key, r.retries_used, r.attempts_used, r.max_attempts,
            r.owner_key, case when r.promoted then r.lane end as lane, r.prefetched, r.lost_fence, r.signature,
            {attempts.UNCOUNTED} as releases, r.trace, {reading.age("greatest(r.run_at, r.created_at)")} as waited)
select claimed.*, n.* from (
    select array_agg(distinct owner_key) filter (where not paused) as lacking,
           array_agg(distinct owner_key) filter (where paused) as paused from pick where not can) n
  left join claimed on true"""  # noqa: S608  # constants


async def claim(
    ledger: Ledger,
    *,
    pool: str,
    cursor: int,
    limit: int,
    worker_id: UUID,
    lease: timedelta,
    prefetch: int = 0,
    route: str = "",
    routed: Callable[[], None] | None = None,
) -> list[Claim]:
    """Claim up to `limit` ready runs of `pool` on this route, and prefetch up to `prefetch` more, going round the
    owners from the one after `cursor` (an owner key). `routed` is called when this has put runs on routes."""
    while True:
        rows = await ledger.fetch(_CLAIM, pool, cursor, limit + prefetch, worker_id, lease, limit, route)
        taken = [Claim(*map(row.__getitem__, Claim._fields)) for row in rows if row["id"] is not None]
        lacking, paused = rows[0]["lacking"], rows[0]["paused"]
        if not lacking and not paused:
            return taken
        is_free = False
        try:
            if lacking and await routing.clear(ledger, pool, lacking, worker_id):
                is_free = True
                if routed:
                    routed()
            if paused and await pauses.clear(ledger, pool, route, paused):
                is_free = True
        except (LedgerUnavailable, LedgerFault, *REFUSED):
            if taken:  # they are claimed; the next claim meets the others again
                return taken
            raise
        if taken or not is_free:
            return taken


async def begin(ledger: Ledger, worker_id: UUID, claim: Claim) -> None:
    """Mark that a run which waited on its worker begins: from here on its loss counts against `max_attempts`."""
    await ledger.execute(
        "update runs set prefetched = false where id = $1 and fence = $2 and worker_id = $3 and state = 'running'",
        claim.id,
        claim.fence,
        worker_id,
    )
