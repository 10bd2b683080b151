"""Counts the runs that were submitted or have ended lately, at a cost that does not grow with their number.

It locks nothing. What is too much to be counted is estimated from a sample of pages.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from backcast.ledger.connection import Ledger
from backcast.ledger.listing import CODE, lowest_id
from backcast.ledger.runs import outside
from backcast.models import Counts, ErrorCount, Flow, State, TaskCounts, Within

PAGES = 500
"""Pages that are read of each home of ended runs: some 10,000 runs."""
EARLIER = 50
"""Further pages, of those that seem to hold none of the runs that are meant."""
ONE_BY_ONE = 20_000
"""Runs that have not ended, and late ones, up to which all are counted."""
SHOWN = 100
"""Tasks, and errors."""
STEPS = {Within.HOUR: (timedelta(minutes=1), 60), Within.DAY: (timedelta(minutes=30), 48)}

_NOW = "select now() as until, date_bin($1, now(), '2000-01-01') + $1 as next"
# A partition takes no run that ends more than a day after its own, see `ended`: the last three days have all of them.
PARTITIONS = """
select p.relname as home, d.day, coalesce(pg_relation_size(c.oid) / current_setting('block_size')::int, 0) as pages
  from pg_inherits join pg_class c on c.oid = inhrelid join pg_class p on p.oid = inhparent
       cross join lateral (select to_date(right(c.relname, 8), 'YYYYMMDD') as day) d
 where inhparent in ('backcast.ended_completed'::regclass, 'backcast.ended_otherwise'::regclass)
   and d.day >= ($1::timestamptz at time zone 'utc')::date - 1"""
# A scan of addresses and no other: a plan that was made while a partition was small would read all of its rows.
BY_ADDRESS = "".join(f"set local enable_{plan} = off;" for plan in ("indexscan", "indexonlyscan", "bitmapscan"))
# All rows that these pages can have, none of which is shorter than 96 bytes: a scan of addresses, which costs as much
# as these pages. The range of ids leaves the other partitions out.
_ON = """{home} where id >= first_id({day}) and id < first_id({day} + 1) and ctid = any(array(
    select format('(%s,%s)', page, n)::tid
      from {pages}, generate_series(1, current_setting('block_size')::int / 96) n))"""
# A partition is written at its end: its rows are in the order in which they ended, but for a few of sessions that did
# not come together, and unless rows have been removed one by one. That is why some pages before are read as well.
_FIRST = f"""
with recursive search(low, high) as (
  select 0::bigint, $2::bigint
   union all
  select case when is_late then low else mid + 1 end, case when is_late then mid else high end
    from (select low, high, mid, coalesce((select bool_or(finished_at >= $3)
            from {_ON.format(home="{home}", day="$1::date", pages="(select mid) m(page)")}), true) as is_late
            from (select low, high, (low + high) / 2 as mid from search where low < high) s) s)
select low from search where low = high"""  # noqa: S608  # constants
_HOMES = ("ended_completed", "ended_otherwise")
_LIVE_PAGES = "select pg_relation_size('backcast.runs') / current_setting('block_size')::int as pages"
ON_PAGES = f"(select * from {_ON.format(home='{home}', day='$4::date', pages='unnest($5::bigint[]) page')}) r"  # noqa: S608
_LATE = "(select * from ended_late where finished_at >= $4 order by finished_at desc limit $5) r"
_LIVE = "(select *, null::timestamptz as finished_at from runs where id >= $4 order by id desc limit $5) r"
_SOME_LIVE = "(select *, null::timestamptz as finished_at from runs tablesample system ($4)) r"
# The steps of the time are numbered from 1; 0 is before them.
COUNT = f"""
select task, state, code, ended, made, count(*)::int as runs
  from (select task, state, case when state = 'failed' then {CODE} end as code,
               least(width_bucket(extract(epoch from finished_at)::float8, $1, $2, $3), $3) as ended,
               least(width_bucket(extract(epoch from created_at)::float8, $1, $2, $3), $3) as made
          from {{source}}) r
 where ended > 0 or made > 0 and ended is null group by 1, 2, 3, 4, 5"""  # noqa: S608  # constants


class Recent:
    """Lets all who ask one process share the counts of a moment, so that they take a twentieth of a core at most."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._one_at_a_time = asyncio.Lock()
        self._kept: dict[Within, tuple[float, Counts]] = {}
        """Each with the time until which it is shown."""

    async def counts(self, within: Within) -> Counts:
        async with self._one_at_a_time:
            until, found = self._kept.get(within, (0.0, None))
            began = time.monotonic()
            if found is None or began > until:
                found = await counts(self._ledger, within)
                ended = time.monotonic()
                self._kept[within] = ended + 19 * (ended - began), found
            return found


async def counts(ledger: Ledger, within: Within) -> Counts:
    """Those of the last hour, or day."""
    step, steps = STEPS[within]
    now = await ledger.fetchrow(_NOW, step)
    assert now is not None
    since: datetime = now["next"] - step * steps
    sums = _Sums(ledger, since, now["next"], steps)
    is_sampled = any([await sums.ended(), await sums.late(), await sums.live()])
    return Counts(
        since=since,
        until=now["until"],
        approximate=is_sampled,
        submitted=sums.submitted.total(),
        states=_by_state(sums.states),
        tasks=[
            TaskCounts(task=task, submitted=sums.submitted[task], states=_by_state(sums.states, task))
            for task, _ in sums.tasks.most_common(SHOWN)
        ],
        errors=[ErrorCount(task=task, code=code, runs=runs) for (task, code), runs in sums.errors.most_common(SHOWN)],
        flow=[
            Flow(at=since + n * step, submitted=sums.made[n + 1], ended=_by_state(sums.ends, n + 1))
            for n in range(steps)
        ],
    )


def _by_state(counted: Mapping[tuple[Any, State], int], what: Any = None) -> dict[State, int]:
    found = Counter[State]()
    for (of, state), runs in counted.items():
        if what is None or of == what:
            found[state] += runs
    return dict(found)


class _Sums:
    """What statements have counted, each run as often as it stands for others. Their readers return whether some do."""

    def __init__(self, ledger: Ledger, since: datetime, until: datetime, steps: int) -> None:
        self._ledger = ledger
        self._since = since
        self._steps = since.timestamp(), until.timestamp(), steps
        self.tasks, self.submitted = Counter[str](), Counter[str]()
        self.states = Counter[tuple[str, State]]()
        self.errors = Counter[tuple[str, str]]()
        self.made = Counter[int]()
        """Submissions by step."""
        self.ends = Counter[tuple[int, State]]()

    def _count(self, source: str, *values: object) -> tuple[Any, ...]:
        return COUNT.format(source=source), *self._steps, *values

    def _add(self, rows: Sequence[asyncpg.Record], *, each: int = 1) -> None:
        for row in rows:
            task, state, runs = row["task"], outside(row["state"]), row["runs"] * each
            self.tasks[task] += runs
            self.states[task, state] += runs
            if row["code"] is not None:
                self.errors[task, row["code"]] += runs
            if row["ended"]:
                self.ends[row["ended"], state] += runs
            if row["made"]:
                self.submitted[task] += runs
                self.made[row["made"]] += runs

    async def ended(self) -> bool:
        partitions = await self._ledger.fetch(PARTITIONS, self._since)
        async with self._ledger.transaction() as connection:
            await connection.execute(BY_ADDRESS)
            sampled = [
                await self._home(connection, [each for each in partitions if each["home"] == home]) for home in _HOMES
            ]
        return any(sampled)

    async def _home(self, connection: asyncpg.Connection, partitions: Sequence[asyncpg.Record]) -> bool:
        """If there are more pages than `PAGES`: one of a few, from the page on where the runs that are meant begin, and
        here and there one before."""
        firsts = [0 for _ in partitions]
        if is_sampled := sum(each["pages"] for each in partitions) > PAGES:
            for n, each in enumerate(partitions):
                sql = _FIRST.format(home=each["home"])
                [found] = await connection.fetch(sql, each["day"], each["pages"], self._since)
                firsts[n] = found["low"]
        every = _every(sum(each["pages"] for each in partitions) - sum(firsts), PAGES)
        every_earlier = _every(sum(firsts), EARLIER)
        for partition, first in zip(partitions, firsts, strict=True):
            source = ON_PAGES.format(home=partition["home"])
            for low, high, step in ((0, first, every_earlier), (first, partition["pages"], every)):
                if pages := [at + random.randrange(step) for at in range(low, high, step)]:  # noqa: S311
                    self._add(await connection.fetch(*self._count(source, partition["day"], pages)), each=step)
        return is_sampled

    async def late(self) -> bool:
        """By ended_late_finished, the latest first."""
        rows = await self._ledger.fetch(*self._count(_LATE, self._since, ONE_BY_ONE))
        self._add(rows)
        return sum(row["runs"] for row in rows) == ONE_BY_ONE

    async def live(self) -> bool:
        """By the primary key: a run has its id shortly before it is recorded. If there are too many: by a sample."""
        first = lowest_id(self._since - timedelta(minutes=1))
        rows = await self._ledger.fetch(*self._count(_LIVE, first, ONE_BY_ONE))
        every = 1
        if is_sampled := sum(row["runs"] for row in rows) == ONE_BY_ONE:
            [size] = await self._ledger.fetch(_LIVE_PAGES)
            every = _every(size["pages"], PAGES)
            rows = await self._ledger.fetch(*self._count(_SOME_LIVE, 100 / every))
        self._add(rows, each=every)
        return is_sampled


def _every(pages: int, most: int) -> int:
    return max(1, -(-pages // most))
