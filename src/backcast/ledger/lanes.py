"""Lanes limit how many runs that draw on a quota, such as a provider's, run at once or start in a minute.

A run whose lane is limited waits as `held`, outside of the index that workers claim from, until it is promoted; so runs
without limits pay nothing for them. `lanes.promoted` counts the lane's queued and running runs, in the same transaction
that changes a run's state; only limited lanes have a row that a statement may wait for.
"""

import contextlib
import logging
from collections.abc import Iterable
from urllib.parse import quote

import asyncpg

from backcast.errors import LedgerFault, LedgerUnavailable, UnknownLane
from backcast.ledger.connection import REFUSED, Ledger
from backcast.models import Lane, Limits

log = logging.getLogger("backcast.ledger")

AT_ONCE = 1000
"""Runs promoted by one statement."""
BURST = 2.0
"""Seconds' worth of a rate that may start at once; more than the time between two polls, to reach the rate."""

READY = "case when exists (select from lanes l where l.name = r.lane and l.limited) then 'held' else 'queued' end"
"""The state of the run `r` once it waits for nothing but a worker, or a place in its lane."""
FREED = """freed as (
  update lanes set promoted = greatest(lanes.promoted - n, -1000000000)
    from (select lane, count(*) as n from gone where promoted group by lane) g
   where lanes.name = g.lane returning name)"""
"""SQL: a common table expression that takes the runs in `gone` out of the counts of their lanes, which are locked."""

_HIGHEST = 1e6
_RATE = f"case when max_per_minute is not null then least(greatest(max_per_minute, 1e-6), {_HIGHEST}) end"
"""Runs per minute. A row may have any number that SQL can write; NaN and infinity count as the highest rate."""

# The lane's row lock allows one promotion at a time, on the newest numbers. SKIP LOCKED: the statement that holds the
# row changes the count and promotes right after. Held runs are taken round by owner like ready ones, from the owner
# served last, by hops over runs_held. Locked runs are skipped: they are being cancelled or expired.
_PROMOTE = f"""
with recursive
lane as materialized (
  select name, served, tokens_now,
         greatest(0, least({AT_ONCE}, max_running::float8 - promoted, floor(tokens_now)))::int as room
    from (select name, served, max_running, promoted,  -- now(), when this began, may be before refilled_at
                 case when rate is not null then least(greatest(1, rate * {BURST}), tokens
                   + rate * greatest(0, extract(epoch from now() - refilled_at))) end as tokens_now
            from (select *, {_RATE} / 60 as rate from lanes where name = $1 for update skip locked) l) l),
a(owner_key, n) as (
  (select x.owner_key, 1 from lane cross join lateral (select owner_key from runs where lane = $1
    and state = 'held' and owner_key > lane.served order by owner_key limit 1) x where lane.room > 0)
  union all
  select x.owner_key, a.n + 1 from a cross join lateral (select owner_key from runs where lane = $1
    and state = 'held' and owner_key > a.owner_key order by owner_key limit 1) x where a.n < (select room from lane)),
b(owner_key, n) as (
  (select x.owner_key, (select count(*)::int from a) + 1 from lane cross join lateral (select owner_key from runs
    where lane = $1 and state = 'held' and owner_key <= lane.served order by owner_key limit 1) x
    where (select count(*) from a) < lane.room)
  union all
  select x.owner_key, b.n + 1 from b cross join lateral (select owner_key from runs where lane = $1
    and state = 'held' and owner_key > b.owner_key and owner_key <= (select served from lane)
    order by owner_key limit 1) x where b.n < (select room from lane)),
hop as (select owner_key, n from a union all select owner_key, n from b),
share as (select ceil((select room from lane)::numeric / greatest(count(*), 1))::int as rows from hop),
pick as materialized (
  select r.id, hop.owner_key, hop.n from hop cross join share cross join lateral (
    select id from runs where lane = $1 and state = 'held' and owner_key = hop.owner_key
     order by priority desc, run_at, id limit share.rows for update skip locked) r
   order by hop.n limit (select room from lane)),
promoted as (
  update runs set state = 'queued', promoted = true where id = any(array(select id from pick))
  returning pool, route, state),
counted as (
  update lanes set promoted = least(lanes.promoted + (select count(*) from promoted), 2000000000),
         refilled_at = greatest(lanes.refilled_at, now()),
         tokens = coalesce(lane.tokens_now - (select count(*) from promoted), lanes.tokens),
         served = coalesce((select owner_key from pick order by n desc limit 1), lanes.served)
    from lane where lanes.name = $1 and exists (select from promoted))
select pool, route, state from promoted"""  # noqa: S608  # constants


async def promote(ledger: Ledger, names: Iterable[str]) -> None:
    """Move as many held runs of these lanes into the queue as their limits allow. A lane whose row is refused is passed
    over, and reported."""
    for name in sorted(names):
        try:
            while rows := await ledger.fetch(_PROMOTE, name):
                ledger.wake_for(rows)
                if len(rows) < AT_ONCE:
                    break
        except REFUSED as error:
            log.error("lane %r promotes nothing, its row has an impossible value: %s", name, error)


async def try_promote(ledger: Ledger, names: Iterable[str]) -> None:
    """`promote` after a change that has been committed. When it fails, the next dispatch makes up for it."""
    with contextlib.suppress(LedgerUnavailable, LedgerFault):
        await promote(ledger, names)


_ODD = """(promoted not between 0 and 1000000000 or tokens not between -1000000 and 1000000
   or refilled_at not between '2000-01-01' and now() + interval '1 hour')"""


async def repair(ledger: Ledger) -> None:
    """Count the runs of a lane anew, and refill it, if its row has numbers that no statement of ours writes.

    Two statements: the second sees every change that was made before the first had locked the lane.
    """
    for row in await ledger.fetch(f"select name from lanes where {_ODD}"):  # noqa: S608  # a constant
        async with ledger.transaction() as connection:
            await connection.execute("select from lanes where name = $1 for update", row["name"])
            await connection.execute(
                """update lanes set tokens = 1, refilled_at = now(), promoted = (
                      select count(*) from runs where lane = $1 and runs.promoted and state in ('queued', 'running'))
                    where name = $1""",
                row["name"],
            )
        log.error("lane %r had impossible numbers: its runs were counted anew", row["name"])


_HELD = "(select count(*) from (select from runs where state = 'held' and lane = l.name limit 10000) h) as held"


def _lane(row: asyncpg.Record) -> Lane:
    """Any row can be read: a rate that SQL alone can write is shown as the rate that it counts as."""
    rate, problem = row["max_per_minute"], None
    if rate is not None and not 1e-6 <= rate <= _HIGHEST:
        problem, rate = f"The rate {rate:g} counts as", 1e-6 if rate < 1e-6 else _HIGHEST
        problem = f"{problem} {rate:g}: set another one."
    return Lane.model_construct(
        name=row["name"],
        max_running=row["max_running"],
        max_per_minute=rate,
        promoted=row["promoted"],
        held=row["held"],
        problem=problem,
    )


async def limit(ledger: Ledger, name: str, limits: Limits) -> Lane:
    """Set the limits of a lane. They hold for runs submitted from then on; held runs may be promoted at once."""
    sql = f"""insert into lanes as l (name, max_running, max_per_minute) values ($1, $2, $3)
           on conflict (name) do update set max_running = excluded.max_running,
               max_per_minute = excluded.max_per_minute,
               tokens = case when l.max_per_minute is null then 1 else l.tokens end,
               refilled_at = case when l.max_per_minute is null then now() else l.refilled_at end
           returning *, {_HELD}"""  # noqa: S608  # a constant
    row = await ledger.fetchrow(sql, name, limits.max_running, limits.max_per_minute)
    assert row is not None
    await try_promote(ledger, [name])
    return _lane(row)


async def lift(ledger: Ledger, name: str) -> None:
    """Remove the limits of a lane, and promote its held runs. Raises `UnknownLane`."""
    await get(ledger, name)
    await ledger.execute("update lanes set max_running = null, max_per_minute = null where name = $1", name)
    await try_promote(ledger, [name])


async def get(ledger: Ledger, name: str) -> Lane:
    """Raises `UnknownLane`."""
    row = await ledger.fetchrow(f"select *, {_HELD} from lanes l where name = $1 and limited", name)  # noqa: S608
    if row is None:
        raise UnknownLane(f"The lane {name!r} has no limits: set some with PUT /v1/lanes/{quote(name, safe='')}.")
    return _lane(row)


async def limited(ledger: Ledger) -> list[Lane]:
    """All lanes with limits."""
    rows = await ledger.fetch(f"select *, {_HELD} from lanes l where limited order by name")  # noqa: S608  # a constant
    return [_lane(row) for row in rows]
