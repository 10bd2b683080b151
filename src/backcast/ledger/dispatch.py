"""Makes the changes that are due by time alone: to scheduled runs, late runs, paused runs, and lanes with room."""

from collections.abc import Callable
from functools import partial

from backcast.ledger import ended, lanes, pauses, waiting
from backcast.ledger.connection import REFUSED, Ledger
from backcast.models import Problem

AT_ONCE = 1000
"""Runs queued or expired by one statement."""

# Lanes that may have room for a run that waits; one probe into runs_held each.
_OPEN = """
select name from lanes l where (max_running is null or promoted < max_running)
   and exists (select from runs where state = 'held' and lane = l.name)"""

# SKIP LOCKED: several processes run this at once, and none waits for another. The index is runs_scheduled. Runs with a
# route wait for a worker, not for a time: see `routing`.
_DUE = f"""
with due as materialized (
  select id from runs where state = 'scheduled' and run_at <= now() and route = ''
   order by run_at limit {AT_ONCE} for update skip locked)
update runs r set state = {waiting.ready("r")}
 where id = any(array(select id from due)) returning pool, route, state"""  # noqa: S608  # a constant

_MOVED = ended.moved(
    state="'expired'",
    error="""json_build_object('code', $1::text, 'title', $2::text, 'detail',
        case state when 'held' then replace($4, '{lane}', lane) when 'paused' then $5 else $3::text end)""",
)
# Lanes first, then runs, as everywhere; a run that is locked is being claimed or cancelled. The index is runs_deadline.
_EXPIRE = f"""
with due as materialized (
  select id, lane from runs where deadline <= now() and state in {waiting.WAITING}
   order by deadline limit {AT_ONCE}),
lane as materialized (
  select name from lanes where name = any(array(select lane from due)) order by name for update),
late as materialized (
  select id from runs where id = any(array(select id from due)) and state in {waiting.WAITING}
     and (select count(*) from lane) >= 0 for update skip locked),
gone as (
  delete from runs where id = any(array(select id from late)) returning *),
{_MOVED},
{lanes.FREED}
select count(*) as expired from moved"""  # noqa: S608  # a constant

EXPIRED = Problem(
    code="expired",
    title="The deadline passed while the run waited",
    detail="It was not running when its deadline came: submit it with a later one, or see why the queue is long.",
)
_HELD = "The lane '{lane}' held it when its deadline came: submit it with a later one, or raise the lane's limits."
_PAUSED = "It was paused when its deadline came: submit it with a later one, or resume what is paused."


def _ignored(_runs: int) -> None:
    pass


async def dispatch_due(ledger: Ledger, expired: Callable[[int], object] = _ignored) -> None:
    """Queue scheduled runs whose time has come, expire late ones, go on with pauses, and promote from lanes that have
    room again.

    `expired` is called with the number of runs that one statement has expired.

    A worker of each pool and every steward call this each second, so that no run waits for one of them. A step that
    meets a refused value does not keep the next ones from being taken; its error is raised last.
    """
    refused = None
    for step in (partial(_expire, expired), _queue, pauses.advance, _promote):
        try:
            await step(ledger)
        except REFUSED as error:
            refused = error
    if refused is not None:
        raise refused


async def _expire(expired: Callable[[int], object], ledger: Ledger) -> None:
    while rows := await ended.fetch(ledger, _EXPIRE, EXPIRED.code, EXPIRED.title, EXPIRED.detail, _HELD, _PAUSED):
        if rows[0]["expired"]:
            expired(rows[0]["expired"])
            ledger.report_ends()
        if rows[0]["expired"] < AT_ONCE:
            break


async def _queue(ledger: Ledger) -> None:
    while rows := await ledger.fetch(_DUE):
        ledger.wake_for(rows)
        if len(rows) < AT_ONCE:
            break


async def _promote(ledger: Ledger) -> None:
    await lanes.repair(ledger)
    await lanes.promote(ledger, {row["name"] for row in await ledger.fetch(_OPEN)})
