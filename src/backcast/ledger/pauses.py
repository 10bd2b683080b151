"""Pauses: nothing new of a task, a lane or a pool starts. Decides which runs are set aside, and when they go on.

Runs that wait for nothing else are set aside as `paused`: outside of the index that workers claim from, and of the
counts of their lanes. Statements that make a run ready look for a pause themselves (`waiting.ready`); a claim leaves
the paused runs that it meets, and sets them aside (`clear`). So a paused run starts only in a claim that began before
the pause was committed.
"""

import time
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from backcast.ledger import lanes, reading, routing, waiting
from backcast.ledger.connection import Ledger
from backcast.models import Pause, PauseKind, PauseRequest, Release

WALK, AT_ONCE = 10_000, 1000
"""Rows that one statement looks at, and those that it changes."""
PROMPT = 1.0
"""Seconds for which a request goes on with its pause itself; `dispatch` does the rest."""
_FIRST = UUID(int=0)
_ACTIVE = "(until is null or until > now())"
_TIMES = ", ".join(map(reading.time, ("since", "until")))
_COLUMNS = f"kind, name, reason, by, {_TIMES}, release"
# By the primary key; a pause that is still there in this minute, but has ended, begins anew.
_PAUSE = f"""
insert into pauses as p (kind, name, reason, by, until, release) values ($1, $2, $3, $4, $5, $6)
    on conflict (kind, name) do update set reason = excluded.reason, by = excluded.by, until = excluded.until,
       release = excluded.release, complete = false, since = case when p.until <= now() then now() else p.since end
returning {_COLUMNS}"""  # noqa: S608  # constants


def _pause(row: asyncpg.Record) -> Pause:
    return Pause(
        kind=row["kind"],
        name=row["name"],
        reason=row["reason"],
        by=row["by"],
        since=row["since"],
        until=row["until"],
        running=Release.RELEASE if row["release"] else Release.CONTINUE,
    )


async def pause(ledger: Ledger, kind: PauseKind, name: str, asked: PauseRequest) -> Pause:
    """Pause, or change the pause that there is."""
    release = asked.running is Release.RELEASE
    row = await ledger.fetchrow(_PAUSE, kind, name, asked.reason, asked.by, asked.until, release)
    assert row is not None
    await advance(ledger, within=PROMPT)
    return _pause(row)


async def resume(ledger: Ledger, kind: PauseKind, name: str) -> None:
    """End a pause. What is not paused stays as it is."""
    await ledger.execute(f"update pauses set until = now() where kind = $1 and name = $2 and {_ACTIVE}", kind, name)  # noqa: S608
    await advance(ledger, within=PROMPT)


async def all_(ledger: Ledger) -> list[Pause]:
    """Those that hold now."""
    sql = f"select {_COLUMNS} from pauses where {_ACTIVE} order by kind, name"  # noqa: S608  # constants
    return [_pause(row) for row in await ledger.fetch(sql)]


async def on(ledger: Ledger, *, task: str, lane: str | None, pool: str) -> list[Pause]:
    """Those that hold for runs of this task, lane and pool, the one that lasts longest first."""
    rows = await ledger.fetch(
        f"""select {_COLUMNS} from pauses where {_ACTIVE} and (kind, name) in (('task', $1), ('lane', $2), ('pool', $3))
             order by pauses.until desc nulls first""",  # noqa: S608  # constants
        task,
        lane,
        pool,
    )
    return [_pause(row) for row in rows]


async def of(ledger: Ledger, kind: PauseKind, name: str) -> Pause | None:
    row = await ledger.fetchrow(
        f"select {_COLUMNS} from pauses where kind = $1 and name = $2 and {_ACTIVE}",  # noqa: S608  # constants
        kind,
        name,
    )
    return None if row is None else _pause(row)


# Lanes first, then runs, as everywhere; a run that is locked is being claimed, cancelled, expired or set aside. The
# lock shows the newest row, so its state decides.
_ASIDE = f"""
with {{few}},
lane as materialized (
  select name from lanes where name = any(array(select lane from few)) order by name for update),
gone as materialized (
  select id, lane, promoted from runs where id = any(array(select id from few))
     and (state in ('queued', 'held') or state = 'scheduled' and route <> '')
     and (select count(*) from lane) >= 0 for update skip locked),
aside as (
  update runs set state = 'paused', promoted = false, parked_at = null where id = any(array(select id from gone))
  returning id),
{lanes.FREED}
select (select count(*) from aside) as moved, array(select name from freed) as lanes"""  # noqa: S608  # constants

# By runs_by_state. The last row of the walk is where the next one begins.
_WALKED = """walked as materialized (
  select id, task, lane, pool, route from runs where state = $1 and id > $2 order by id limit {walk}),
few as materialized (
  select id, lane from walked w where {which} order by id limit {most})"""
_NEXT = """(select case when (select count(*) from few) = {most} then (select id from few order by id desc limit 1)
        else (select id from walked order by id desc limit 1) end) as next"""
_BOUNDS = {"walk": WALK, "most": AT_ONCE}
_SET_ASIDE = (
    _ASIDE.format(few=_WALKED.format(which=f"{waiting.paused('w')} and ($1 <> 'scheduled' or route <> '')", **_BOUNDS))
    + f",\n       {_NEXT.format(**_BOUNDS)}"
)
# The rows that the next claims of these owners would look at first, by runs_ready.
_CLEAR = _ASIDE.format(
    few=f"""
few as materialized (
  select r.id, r.lane from unnest($3::bigint[]) o(owner_key) cross join lateral (
    select id, task, lane, pool from runs
     where pool = $1 and route = $2 and state = 'queued' and owner_key = o.owner_key
       and (deadline is null or deadline > now())
     order by priority desc, run_at, id limit {AT_ONCE} / cardinality($3::bigint[]) + 1) r
   where {waiting.paused("r")})"""  # noqa: S608  # constants
)
# A route that leads nowhere is left: a worker that can do the run may have come while it was paused, and only parked
# runs are given to it, see `routing.reconsider`. If a worker goes at this moment, the run is parked again.
_LEFT = f"""case when r.route <> '' and not exists (
      select from workers w where r.route = any(w.routes) and {routing.LIVE}) then '' else r.route end"""
_RELEASE = f"""
with {_WALKED.format(which=f"not {waiting.paused('w')}", **_BOUNDS)},
free as materialized (
  select id from runs where id = any(array(select id from few)) and state = 'paused' for update skip locked),
back as (
  update runs r set state = {waiting.ready("r")}, route = {_LEFT} where id = any(array(select id from free))
  returning pool, route, state, lane)
select (select count(*) from back) as moved, array(select distinct lane from back where state = 'held') as lanes,
       array(select distinct array[pool, route] from back where state = 'queued') as ready,
       {_NEXT.format(**_BOUNDS)}"""  # noqa: S608  # constants


async def clear(ledger: Ledger, pool: str, route: str, owners: Sequence[int]) -> bool:
    """Set aside the next ready runs of these owners (by owner key) that are paused. Returns whether there were any."""
    row = await ledger.fetchrow(_CLEAR, pool, route, owners)
    assert row is not None
    await lanes.try_promote(ledger, row["lanes"])
    return row["moved"] > 0


# A pause that has ended stays for a minute: statements that began before its end may still set runs aside, and none
# takes longer than 30 s (`session`). A pause is complete after one walk through what was queued when it began.
_DUE = f"""
select now() as at, coalesce(bool_or(not complete and {_ACTIVE}), false) as pausing,
       coalesce(bool_or(not {_ACTIVE}), false) as resuming from pauses"""  # noqa: S608  # constants
_FORGET = "delete from pauses where until < $1::timestamptz - interval '1 minute'"


async def advance(ledger: Ledger, *, within: float | None = None) -> None:
    """Set aside the runs that are newly paused, and let those go on whose pause has ended; for `within` seconds at
    most. Safe to call from several processes at once."""
    due = await ledger.fetchrow(_DUE)
    assert due is not None
    deadline = None if within is None else time.monotonic() + within
    if due["resuming"] and await _walk(ledger, _RELEASE, ["paused"], deadline):
        await ledger.execute(_FORGET, due["at"])
    if due["pausing"] and await _walk(ledger, _SET_ASIDE, ["queued", "held", "scheduled"], deadline):
        await _complete(ledger, due["at"])


async def _complete(ledger: Ledger, before: datetime) -> None:
    await ledger.execute("update pauses set complete = true where not complete and since <= $1", before)


async def _walk(ledger: Ledger, sql: str, states: Sequence[str], deadline: float | None) -> bool:
    """Whether all of them have been looked at."""
    for state in states:
        after: UUID | None = _FIRST
        while after is not None:
            if deadline is not None and time.monotonic() > deadline:
                return False
            row = await ledger.fetchrow(sql, state, after)
            assert row is not None
            after = row["next"]
            for pool, route in row.get("ready", ()):
                ledger.wake(pool, route)
            await lanes.try_promote(ledger, row["lanes"])
    return True
