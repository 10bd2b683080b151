"""How the runs of dead workers go on: ready again at once, until one has been lost `max_attempts` times."""

from collections.abc import Collection
from datetime import timedelta
from uuid import UUID

from backcast.ledger import lanes
from backcast.ledger.connection import Ledger
from backcast.models import Problem

# Dead workers are those that hold a running run and have not been heard of for a lease, by the database's clock, or are
# not there at all: one may have been forgotten while a claim of its was under way. All runs of a worker at once, lanes
# locked first. SKIP LOCKED: a row locked now is being settled or cancelled, and is looked at again on the next round.
# The fence stays: only a claim raises it, and the dead worker's settlements are refused because the row is no longer
# running, or runs under a higher fence.
# Who is charged: what killed the worker can't be seen, so every run it had started is suspected alike, the first time.
# Among them those that were charged most often before are charged again, the others go free; one with two losses runs
# alone (`Claim.is_quarantined`), so its third is its own. Claimed-ahead runs go free, but are not claimed ahead again: so
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
         not r.prefetched and r.cancel_requested_at is null as suspected from runs r
   where r.state = 'running' and r.worker_id = any(array(select id from dead)) and (select count(*) from lane) >= 0
     for update skip locked),
most as materialized (select worker_id, max(losses) as losses from lost where suspected group by worker_id),
counting as materialized (
  select l.id from lost l join most m on m.worker_id = l.worker_id and m.losses = l.losses where l.suspected),
requeued as (
  update runs r set
      state = case when r.cancel_requested_at is not null then 'cancelled'
                   when c.counts and r.attempts_used - r.retries_used + 1 >= r.max_attempts then 'failed'
                   else 'queued' end,
      finished_at = case when r.cancel_requested_at is not null
                           or c.counts and r.attempts_used - r.retries_used + 1 >= r.max_attempts then now() end,
      error = case when c.counts then $2::json else r.error end,
      attempts_used = r.attempts_used + c.counts::int,
      lost_fence = r.fence
    from (select id, id = any(array(select id from counting)) as counts from lost) c
   where r.id = c.id and r.id = any(array(select id from lost))
  returning r.id, r.state, r.pool, r.lane, r.promoted),
released as (
  update lanes set promoted = lanes.promoted - n
    from (select lane, count(*) as n from requeued where promoted and state <> 'queued' group by lane) s
   where lanes.name = s.lane)
select id, state, pool, case when promoted then lane end as lane from requeued"""

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
        await lanes.try_promote(
            ledger, {row["lane"] for row in rows if row["lane"] is not None and row["state"] != "queued"}
        )
    return states
