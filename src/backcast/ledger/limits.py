"""Sets, lifts and shows the limits of lanes. Decides what becomes of runs that are queued beyond a new limit."""

from collections.abc import Mapping
from urllib.parse import quote

import asyncpg

from backcast.errors import UnknownLane
from backcast.ledger import lanes, pace, pauses, reading
from backcast.ledger.connection import Ledger
from backcast.models import Lane, Limits, Pause, PauseKind

_SET = """
insert into lanes as l (name, max_running, max_per_minute) values ($1, $2, $3)
    on conflict (name) do update set max_running = excluded.max_running, max_per_minute = excluded.max_per_minute,
       tokens = case when l.max_per_minute is null then 1 else l.tokens end,
       refilled_at = case when l.max_per_minute is null then now() else l.refilled_at end"""
# The lane's row lock keeps promotions and settlements off; its runs after it, as everywhere, by runs_in_lane. A run
# that is locked is being claimed, cancelled or expired. Of the counted ones those go back that would start last; those
# that are not counted were queued before the lane had limits.
_HOLD_BACK = f"""
with lane as materialized (
  select name, greatest(0, promoted - coalesce(max_running, promoted)) as beyond from lanes
   where name = $1 and limited for update),
uncounted as materialized (
  select id from runs where lane = (select name from lane) and state = 'queued' and not promoted
   limit {lanes.AT_ONCE} for update skip locked),
counted as materialized (
  select id from runs where lane = (select name from lane) and state = 'queued' and promoted
   order by priority, run_at desc, id desc limit (select least(beyond, {lanes.AT_ONCE}) from lane)
     for update skip locked),
back as (
  update runs set state = 'held', promoted = false
   where id = any(array(select id from uncounted union all select id from counted)) returning id),
kept as (
  update lanes set promoted = lanes.promoted - (select count(*) from counted)
   where name = (select name from lane) and exists (select from counted))
select count(*) as moved from back"""  # noqa: S608  # constants
# One look at the queued runs of each such lane, by runs_in_lane.
_PAST = """
select name from lanes l where limited and exists (
  select from runs where lane = l.name and state = 'queued' and not promoted)"""
_LIMITED = "select name from lanes where limited"
_COUNT = "(select count(*) from (select from runs where lane = n.name and state {} limit 10000) c)"
_SHOWN = f"""
select n.name, l.max_running, l.max_per_minute, {_COUNT.format("= 'running'")} as running,
       {_COUNT.format("= 'queued'")} as queued, {_COUNT.format("in ('held', 'paused')")} as held,
       case when l.limited then {pace.faded("l.recent", "l.refilled_at")}::float8 end as per_minute,
       (select {reading.age("min(run_at)")} from (
          select run_at from runs where lane = n.name and state in ('queued', 'held') limit 10000) o)
         as oldest_age_seconds
  from unnest($1::text[]) n(name) left join lanes l on l.name = n.name order by n.name"""  # noqa: S608  # constants


async def limit(ledger: Ledger, name: str, limits: Limits) -> Lane:
    """Set the limits of a lane. Runs that are queued beyond them are held back, or held ones promoted, at once; what
    runs goes on. Runs that began before the lane had limits do not count in it."""
    await ledger.execute(_SET, name, limits.max_running, limits.max_per_minute)
    await _hold_back(ledger, name)
    await lanes.try_promote(ledger, [name])
    return await get(ledger, name)


async def hold_back(ledger: Ledger) -> None:
    """Hold back what was queued past a new limit: by a statement that had begun before it, or as the request for the
    limit was cut off."""
    for row in await ledger.fetch(_PAST):
        await _hold_back(ledger, row["name"])
        await lanes.try_promote(ledger, [row["name"]])


async def _hold_back(ledger: Ledger, name: str) -> None:
    while (row := await ledger.fetchrow(_HOLD_BACK, name)) and row["moved"]:
        pass


async def lift(ledger: Ledger, name: str) -> None:
    """Remove the limits of a lane, and promote its held runs. Raises `UnknownLane`."""
    sql = "update lanes set max_running = null, max_per_minute = null where name = $1 and limited returning name"
    if await ledger.fetchrow(sql, name) is None:
        raise _unknown(name)
    await lanes.try_promote(ledger, [name])


def _unknown(name: str) -> UnknownLane:
    return UnknownLane(f"The lane {name!r} has no limits: set some with PUT /v1/lanes/{quote(name, safe='')}.")


async def get(ledger: Ledger, name: str) -> Lane:
    """Raises `UnknownLane`."""
    paused = await pauses.of(ledger, PauseKind.LANE, name)
    if paused is None and await ledger.fetchrow("select from lanes where name = $1 and limited", name) is None:
        raise _unknown(name)
    [lane] = await _lanes(ledger, {name: paused})
    return lane


async def all_(ledger: Ledger) -> list[Lane]:
    """The lanes that have limits or are paused."""
    named: dict[str, Pause | None] = {row["name"]: None for row in await ledger.fetch(_LIMITED)}
    named |= {pause.name: pause for pause in await pauses.all_(ledger) if pause.kind is PauseKind.LANE}
    return await _lanes(ledger, named)


async def _lanes(ledger: Ledger, named: Mapping[str, Pause | None]) -> list[Lane]:
    """These lanes, with their pauses."""
    rows = await ledger.fetch(_SHOWN, list(named))
    return [_lane(row).model_copy(update={"paused": named[row["name"]]}) for row in rows]


def _lane(row: asyncpg.Record) -> Lane:
    """Any row can be read: a rate that SQL alone can write is shown as the rate that it counts as."""
    rate, problem = row["max_per_minute"], None
    if rate is not None and not 1e-6 <= rate <= lanes.HIGHEST:
        problem, rate = f"The rate {rate:g} counts as", 1e-6 if rate < 1e-6 else lanes.HIGHEST
        problem = f"{problem} {rate:g}: set another one."
    return Lane(
        name=row["name"],
        max_running=row["max_running"],
        max_per_minute=rate,
        running=row["running"],
        queued=row["queued"],
        held=row["held"],
        oldest_age_seconds=row["oldest_age_seconds"],
        per_minute=row["per_minute"],
        problem=problem,
    )
