"""Records the results of attempts: once, under the fence of their claim, whatever a stale worker sends."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from uuid import UUID

from backcast.ledger import attempts, ended, lanes
from backcast.ledger.connection import Ledger
from backcast.models import JSON, Problem, Tried

LONGEST_DELAY = 365 * 24 * 3600
"""Seconds: a longer delay, or one that is no number, counts as this one."""
INLINE_RESULT = 32 * 1024
"""Bytes of JSON up to which a result is copied into its row, beside the object in the store."""


class Settlement(NamedTuple):
    """The record of an attempt's result. `scheduled` and `queued` mean that the run continues later."""

    id: UUID
    fence: int
    state: Literal["completed", "failed", "scheduled", "queued"]
    lane: str | None = None
    """As in the claim."""
    task: str = ""
    """As in the claim, for metrics."""
    result: str | None = None
    result_key: str | None = None
    error: Problem | None = None
    usage: dict[str, JSON] | None = None
    """The tokens of this attempt; the ledger adds those of attempts before it."""
    delay: float = 0.0
    """Seconds until a scheduled run is ready again; counted by the database's clock."""
    flight: str | None = None
    """The flight that a scheduled run waits for; its landing makes it ready earlier."""
    route: str = ""
    """The route of a scheduled run that this worker can't do: it is parked there, see `routing`."""
    counts: int = 1
    """By how many attempts the run has come on: 0 when this one does not count, as it was released or has not really
    started; more than one when retries followed at once."""
    retries_used: int = 0
    has_started: bool = True
    """Whether code of the task may have been executed."""
    traceback: str = ""
    earlier: Sequence[Tried] = ()
    """The attempts of this claim that were followed by another at once: the latest of them."""

    @property
    def outcome(self) -> str | None:
        """Of the claim, once it is recorded, as metrics name it; None: no attempt was begun."""
        if self.state == "completed":
            return "succeeded"
        if self.error is None:
            return "failed" if self.state == "failed" else "released" if self.has_started else None
        if self.state != "failed" and not self.counts:
            return "postponed"
        return attempts.outcome(self.error, "failed" if self.state == "failed" else "retrying")

    def retries(self) -> dict[str, int]:
        """The further attempts that it stands for, made at once or to be made, by the kinds that metrics name."""
        if self.state == "completed" and self.counts <= 1:  # as nearly all
            return {}
        is_released = self.state == "queued" and self.error is None
        made = self.counts if is_released else self.counts - 1
        found = {"at_once": made} if made > 0 else {}
        if self.state in ("completed", "failed") or self.error is None:
            return found
        if self.flight is not None:
            kind = "same_value"
        elif self.route:
            kind = "no_worker"
        elif self.state == "queued":
            kind = "executor"
        else:
            kind = "delayed" if self.counts else "outage"
        return {**found, kind: 1}

    def reports(self) -> str | None:
        """For `attempts`: on all that did not succeed; None after an attempt that did, at once."""
        if self.state == "completed" and self.counts <= 1:
            return None
        last: dict[str, JSON] | None = None
        counts = self.counts
        if self.state == "queued" and self.error is None:
            last = {"outcome": "released", "counts": False} if self.has_started else None
        elif self.state == "completed":
            counts -= 1
        elif counts > 0:
            counts -= 1
            last = {"outcome": "cancelled"}
            if self.error is not None:
                otherwise = "failed" if self.state == "failed" else "retrying"
                last = {"outcome": attempts.outcome(self.error, otherwise), "error": self.error.model_dump()}
        if last is not None:
            given = {"traceback": self.traceback, "retry_delay": self.delay, "usage": self.usage}
            last |= {name: value for name, value in given.items() if value}
        return attempts.reports(last, self.earlier, left_out=counts - len(self.earlier))


@dataclass(frozen=True, slots=True)
class Settled:
    accepted: set[tuple[UUID, int]]
    """The settlements, by run and fence, that are now (or were already) recorded."""
    cancelled: set[tuple[UUID, int]]
    """Those of them whose run had been cancelled meanwhile, so that the run ended as cancelled."""


_ADDED = """case when {new} is null or {old} is null then coalesce({new}, {old}) else json_build_object(
        'model', {new}->'model',
        'input_tokens', ({old}->>'input_tokens')::bigint + ({new}->>'input_tokens')::bigint,
        'output_tokens', ({old}->>'output_tokens')::bigint + ({new}->>'output_tokens')::bigint) end"""

_MOVED = ended.moved(
    state="case when cancel_requested_at is not null then 'cancelled' else sent end",
    result="case when cancel_requested_at is null then result end",
    result_key="case when cancel_requested_at is null then result_key end",
    error="coalesce(new_error, error)",
    usage=_ADDED.format(old="usage", new="new_usage"),
    attempts="all_attempts",
    attempts_used="attempts_used + counts",
    retries_used="retries",
    returning="id, fence, state, pool, '' as route",
)
# The fence decides: the row must still be running, under the same fence and worker, when its lock is held. The
# settlement of a stale worker changes nothing. A cancel that came first wins over any result. Only this statement
# writes result_key, so an object of a lost attempt is never read. No other statement holds one of the rows while it
# waits for another: they are this worker's own, and statements that take many rows at once skip locked ones. But a
# settlement may be sent again while its first sending is under way: so the rows are locked in the order of their ids
# before they are changed.
_SETTLE = f"""
sent as materialized (
  select * from unnest($2::uuid[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::json[], $8::json[],
                       $9::float8[], $10::int[], $11::int[], $12::text[], $13::text[], $14::json[])
       as d(id, fence, state, result, result_key, error, usage, delay, counts, retries, flight, route, reports)),
mine as materialized (
  select id, fence, cancel_requested_at is not null as is_cancelled from runs
   where id = any($2::uuid[]) and worker_id = $1 and state = 'running' {{locked_first}} order by id for update),
judged as materialized (
  select d.*, m.is_cancelled or d.state in ('completed', 'failed') as ends,
         coalesce(reports, case when m.is_cancelled and d.counts > 0 then {attempts.CANCELLED} end) as all_reports
    from mine m join sent d on d.id = m.id and d.fence = m.fence),
gone as (
  delete from runs r using judged d where r.id = d.id and r.id = any(array(select id from judged where ends))
  returning r.*, d.state as sent, d.result, d.result_key, d.error as new_error, d.usage as new_usage, d.counts,
            d.retries, {attempts.extended("d.all_reports")} as all_attempts),
{_MOVED},
kept as (
  update runs r set
      state = case when d.state = 'queued' and d.counts > 0 and r.promoted then 'held' else d.state end,
      error = coalesce(d.error, r.error),
      usage = {_ADDED.format(old="r.usage", new="d.usage")},
      attempts = {attempts.extended("d.all_reports")},
      run_at = case when d.state = 'scheduled' and d.route = ''
                    then now() + make_interval(secs => least(greatest(d.delay, 0), {LONGEST_DELAY})) else r.run_at end,
      parked_at = case when d.state = 'scheduled' and d.route <> '' then now() end,
      attempts_used = r.attempts_used + d.counts,
      retries_used = d.retries,
      flight = d.flight,
      route = case when d.state = 'scheduled' then d.route else r.route end,
      promoted = r.promoted and d.state <> 'scheduled' and (d.state <> 'queued' or d.counts = 0)
    from judged d where r.id = d.id and r.id = any(array(select id from judged where not ends))
  returning r.id, r.fence, r.state, r.pool, r.route, r.lane)"""  # noqa: S608  # constants
_SETTLED = """
select id, fence, state, pool, route from moved union all select id, fence, state, pool, route from kept"""
_SETTLE_FREE = f"with {_SETTLE.format(locked_first='')} {_SETTLED}"

# For runs that are counted in lanes: their lanes' rows are locked first, by name, as everywhere, then the runs.
_SETTLE_COUNTED = f"""
with lane as materialized (select name from lanes where name = any($15::text[]) order by name for update),
{_SETTLE.format(locked_first="and (select count(*) from lane) >= 0")},
freed as (
  update lanes set promoted = greatest(lanes.promoted - n, -1000000000)
    from (select lane, count(*) as n
            from (select lane from gone union all select lane from kept where state <> 'queued') left_ group by lane) s
   where lanes.name = s.lane)
{_SETTLED}"""  # noqa: S608  # constants

# Finds settlements that were recorded before, when the answer was lost: no other attempt can have ended a run whose
# fence is still ours, and `recovery.requeue`, which ends runs without a new fence, sets lost_fence.
_SETTLED_BEFORE = """
select r.id, r.fence, r.state
  from all_runs r join unnest($2::uuid[], $3::bigint[]) as d(id, fence) on r.id = d.id and r.fence = d.fence
 where r.id = any($2::uuid[]) and r.worker_id = $1 and r.lost_fence is distinct from r.fence
   and r.state in ('completed', 'failed', 'cancelled')"""


async def settle(ledger: Ledger, worker_id: UUID, settlements: Sequence[Settlement]) -> Settled:
    """Record the results of attempts, in one statement (two when some are counted in lanes). Safe to send again when
    it is unknown whether they were recorded."""
    accepted, cancelled = set[tuple[UUID, int]](), set[tuple[UUID, int]]()
    for some in ([e for e in settlements if e.lane is None], [e for e in settlements if e.lane is not None]):
        if some:
            settled = await _settle(ledger, worker_id, some, {e.lane for e in some if e.lane is not None})
            accepted |= settled.accepted
            cancelled |= settled.cancelled
    return Settled(accepted, cancelled)


async def _settle(ledger: Ledger, worker_id: UUID, settlements: Sequence[Settlement], counted: set[str]) -> Settled:
    # In one order: a settlement that is sent again must not deadlock with its first sending.
    settlements = sorted(settlements, key=lambda e: e.id)
    values: list[object] = [
        worker_id,
        [e.id for e in settlements],
        [e.fence for e in settlements],
        [e.state for e in settlements],
        [e.result for e in settlements],
        [e.result_key for e in settlements],
        [e.error and e.error.model_dump_json() for e in settlements],
        [None if e.usage is None else json.dumps(e.usage) for e in settlements],
        [e.delay for e in settlements],
        [e.counts for e in settlements],
        [e.retries_used for e in settlements],
        [e.flight for e in settlements],
        [e.route for e in settlements],
        [e.reports() for e in settlements],
    ]
    if counted:
        rows = await ended.fetch(ledger, _SETTLE_COUNTED, *values, sorted(counted))
        await lanes.try_promote(ledger, counted)
    else:
        rows = await ended.fetch(ledger, _SETTLE_FREE, *values)
    ledger.wake_for(rows)
    if any(row["state"] in ("completed", "failed", "cancelled") for row in rows):
        ledger.report_ends()
    states = {(row["id"], row["fence"]): row["state"] for row in rows}
    if missing := [e for e in settlements if (e.id, e.fence) not in states]:
        before = await ledger.fetch(_SETTLED_BEFORE, worker_id, [e.id for e in missing], [e.fence for e in missing])
        sent = {(e.id, e.fence): e.state for e in missing}
        for row in before:
            if row["state"] in (sent[row["id"], row["fence"]], "cancelled"):
                states[row["id"], row["fence"]] = row["state"]
    return Settled(set(states), {attempt for attempt, state in states.items() if state == "cancelled"})
