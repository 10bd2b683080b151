"""The second home of runs: those that are over. Decides which partition a run goes to, and when a partition goes.

The statement that ends a run takes it out of `runs` and puts it here. The row lock of `delete` lets one statement do
it: whoever waited for it finds no row any more, and reads `all_runs` again to see how the run ended.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from backcast.ledger.connection import Ledger

AHEAD = 14
"""Days for which partitions are made ahead: so long may the steward be away before a run makes its own."""
LATE = 1
"""Days that the partition of a day takes runs after it. A run that ends later goes to the table of late ones: no
partition has to stay for it. So does one whose id is from a clock that was far ahead."""
TAKES_RUNS = timedelta(days=LATE, hours=1)
"""Age at which no statement puts a run into a partition any more, the slowest one included."""
_TODAY = "(now() at time zone 'utc')::date"
_KEPT = (
    "id, task, pool, owner, lane, batch_id, retry_of, priority, run_at, deadline, fence, attempts_used, retries_used,"
    " max_attempts, worker_id, lost_fence, cancel_requested_at, signature, input, input_key, error, usage, progress,"
    " attempts, metadata, created_at, started_at"
)


def moved(*, returning: str = "id, state", **changes: str) -> str:
    """SQL: the common table expressions that put the rows of `gone`, which a `delete` has returned, into their home;
    `moved` is what they return.

    Args:
        changes: expressions over the columns of `gone`, which take the place of its columns; one for `state` at least.
    """
    values = {name: name for name in _KEPT.split(", ")} | changes
    insert = f"({', '.join(values)}) select {', '.join(values.values())} from gone where id"  # noqa: S608
    first, last = (f"(select first_id({_TODAY} + {days}))" for days in (-LATE, AHEAD))
    return f"""
moved_now as (insert into ended {insert} >= {first} and id < {last}
    returning {returning}),
moved_late as (insert into ended_late {insert} < {first} or id >= {last}
    returning {returning}),
moved as (select * from moved_now union all select * from moved_late)"""  # noqa: S608  # constants


_MAKE = f"select make_partitions({_TODAY} - $1::int, {_TODAY} + {AHEAD})"


async def fetch(ledger: Ledger, sql: str, *values: Any) -> list[asyncpg.Record]:
    """Run a statement that moves runs. If a partition is missing, those of all days that it may name are made, and it
    is sent again."""
    while True:
        try:
            return await ledger.fetch(sql, *values)
        except asyncpg.CheckViolationError as error:
            if getattr(error, "constraint_name", None) is not None:  # a missing partition is no constraint
                raise
        await ledger.execute(_MAKE, LATE)


async def make_ahead(ledger: Ledger) -> None:
    """Make the partitions of today and the next days that are missing."""
    await ledger.execute(_MAKE, 0)


@dataclass(frozen=True, slots=True)
class Partition:
    table: str
    """`ended_completed` or `ended_otherwise`."""
    day: date
    age: timedelta
    """Since the end of its day, by the database's clock and by ours, whichever is less: a wrong clock drops nothing."""

    @property
    def name(self) -> str:
        return f"{self.table}_{self.day:%Y%m%d}"


async def partitions(ledger: Ledger) -> list[Partition]:
    """All of them, the oldest first."""
    rows = await ledger.fetch(
        """select p.relname as table, d.day, now() - (d.day + 1)::timestamp at time zone 'utc' as age
             from pg_inherits join pg_class c on c.oid = inhrelid join pg_class p on p.oid = inhparent
                  cross join lateral (select to_date(right(c.relname, 8), 'YYYYMMDD') as day) d
            where inhparent in ('backcast.ended_completed'::regclass, 'backcast.ended_otherwise'::regclass)
            order by age desc"""
    )
    return [Partition(row["table"], row["day"], min(row["age"], _since(row["day"]))) for row in rows]


def _since(day: date) -> timedelta:
    return datetime.now(UTC) - datetime.combine(day + timedelta(days=1), time(), UTC)


async def objects(ledger: Ledger, partition: Partition) -> AsyncIterator[list[str]]:
    """The keys of the objects that its runs name, in pages."""
    after = UUID(int=0)
    sql = f"""select id, input_key, result_key from {partition.table}
               where id >= first_id($1) and id < first_id($1 + 1) and id > $2 order by id limit 1000"""  # noqa: S608
    while page := await ledger.fetch(sql, partition.day, after):
        after = page[-1]["id"]
        yield [key for row in page for key in object_keys(row)]


def object_keys(row: asyncpg.Record) -> list[str]:
    """The keys of the objects that an ended run names."""
    return [key for key in (row["input_key"], row["result_key"]) if key is not None]


async def drop(ledger: Ledger, partition: Partition) -> None:
    """Raises `LedgerUnavailable` when somebody reads it for long: it goes another time."""
    await ledger.execute("select retire_partition($1)", partition.name)
    await drop_retired(ledger)


async def drop_retired(ledger: Ledger) -> None:
    """Remove partitions that were taken away, by a steward that was stopped before it could remove them."""
    await ledger.execute("select drop_retired()")
