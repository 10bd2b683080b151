"""Lanes limit how many runs that draw on a quota, such as a provider's, run at once or start in a minute.

A run whose lane is limited waits as `held`, outside of the index that workers claim from, until it is promoted; so runs
without limits pay nothing for them. `lanes.promoted` counts the lane's queued and running runs, in the same transaction
that changes a run's state; only limited lanes have a row that a statement may wait for.
"""

import contextlib
import logging
from collections.abc import Iterable

from backcast.errors import LedgerFault, LedgerUnavailable
from backcast.ledger import pace
from backcast.ledger.connection import REFUSED, Ledger

log = logging.getLogger("backcast.ledger")

AT_ONCE = 1000
"""Runs promoted by one statement."""
BURST = 2.0
"""Seconds' worth of a rate that may start at once; more than the time between two polls, to reach the rate."""

FREED = """freed as (
  update lanes set promoted = greatest(lanes.promoted - n, -1000000000)
    from (select lane, count(*) as n from gone where promoted group by lane) g
   where lanes.name = g.lane returning name)"""
"""SQL: a common table expression that takes the runs in `gone` out of the counts of their lanes, which are locked."""

HIGHEST = 1e6
_RATE = f"case when max_per_minute is not null then least(greatest(max_per_minute, 1e-6), {HIGHEST}) end"
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
         recent = {pace.counted("lanes.recent", "lanes.refilled_at", "(select count(*) from promoted)")},
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
   or refilled_at not between '2000-01-01' and now() + interval '2 minutes')"""
"""now() may be before a lane was refilled, by no more than a transaction takes; by more, the clock was set back."""


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
