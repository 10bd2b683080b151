"""Makes the runs of dead workers ready again, at once; fails a run that has been lost `max_attempts` times."""

from collections.abc import Collection
from datetime import timedelta
from uuid import UUID

from backcast.ledger import attempts, claims, ended, lanes
from backcast.ledger.connection import Ledger
from backcast.models import Problem

_MOVED = ended.moved(
    state="case when cancel_requested_at is not null then 'cancelled' else 'failed' end",
    error="case when counts then $2::json else error end",
    attempts_used="attempts_used + counts::int",
    attempts="all_attempts",
    lost_fence="fence",
)
# A worker is dead when it holds a running run and has sent no heartbeat for a lease, by the database's clock, or has no
# row: the row may have been removed while a claim of the worker was under way. The statement takes all runs of a worker
# at once, after locking their lanes. SKIP LOCKED: a row locked now is being settled or cancelled, and the next round
# checks it again. The fence stays: only a claim raises it, and the dead worker's settlements are refused because the
# row is no longer running, or runs under a higher fence.
# The run that killed the worker can't be seen. So the first time a loss counts against every run that the worker had
# started; later only against those of them with the most counted losses. A run with two losses runs alone
# (`Claim.is_quarantined`), so its third is its own. A loss does not count against prefetched runs, but they are not
# prefetched again: if one did start, unseen, its next loss counts. Nor does the first loss of a worker count against a
# run that has many losses of executors, or against those beside it: it is quarantined from then on.
_REQUEUE = f"""
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
         r.max_attempts, r.cancel_requested_at is not null as is_cancelled,
         not r.prefetched as has_started, not r.prefetched and r.cancel_requested_at is null
         and not (r.lost_fence is null and {claims.MANY_LOSSES}) as liable from runs r
   where r.state = 'running' and r.worker_id = any(array(select id from dead)) and (select count(*) from lane) >= 0
     for update skip locked),
most as materialized (
  select worker_id, max(losses) as losses from lost where has_started and not is_cancelled group by worker_id),
counting as materialized (
  select l.id from lost l join most m on m.worker_id = l.worker_id and m.losses = l.losses where l.liable),
judged as materialized (
  select l.id, c.counts, l.is_cancelled or c.counts and l.losses + 1 >= l.max_attempts as ends,
         case when l.has_started then {attempts.lost("$2::json", "c.counts")} end as reports
    from lost l cross join lateral (select l.id = any(array(select id from counting)) as counts) c),
gone as (
  delete from runs r using judged j where r.id = j.id and r.id = any(array(select id from judged where ends))
  returning r.*, j.counts, {attempts.extended("j.reports")} as all_attempts),
{_MOVED},
requeued as (
  update runs r set state = 'queued', lost_fence = r.fence, attempts_used = r.attempts_used + j.counts::int,
         error = case when j.counts then $2::json else r.error end, attempts = {attempts.extended("j.reports")}
    from judged j where r.id = j.id and r.id = any(array(select id from judged where not ends))
  returning r.id, r.state, r.pool, r.route),
{lanes.FREED}
select id, state, pool, route, null as lane from requeued
union all
select m.id, m.state, g.pool, g.route, case when g.promoted then g.lane end from moved m join gone g on g.id = m.id"""  # noqa: S608

WORKER_LOST = Problem(
    code="worker_lost",
    title="The worker was lost while it worked on this run",
    detail="Its process was killed, stalled or cut off. A run that does this to every worker fails; see its input.",
)


async def requeue(ledger: Ledger, lease: timedelta, dead: Collection[UUID] | None = None) -> dict[UUID, str]:
    """Make the runs of dead workers ready again, at once; one lost `max_attempts` times fails. Returns their states.

    With `dead`, only of those workers: the caller may have been stopped since it found them dead, and the live workers
    with it, so that all of them look dead now.
    """
    states = dict[UUID, str]()
    among = None if dead is None else list(dead)
    while rows := await ended.fetch(ledger, _REQUEUE, lease, WORKER_LOST.model_dump_json(), among):
        states |= {row["id"]: row["state"] for row in rows}
        ledger.wake_for(rows)
        ledger.report_ends()
        await lanes.try_promote(
            ledger, {row["lane"] for row in rows if row["lane"] is not None and row["state"] != "queued"}
        )
    return states
