"""Reads the runs that history must show, waiting or ended, a bounded range per statement. Knows nothing of Prefect."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

import asyncpg

from backcast.ledger import reading
from backcast.ledger.connection import Ledger
from backcast.ledger.waiting import WAITING


@dataclass(frozen=True, slots=True)
class Entry:
    """A run as history shows it when no engine has reported on it."""

    id: UUID
    task: str
    state: Literal["scheduled", "completed", "failed", "cancelled", "expired"]
    parameters: list[str]
    """Names only."""
    message: str
    at: datetime
    due: datetime
    started_at: datetime | None
    attempts: int
    reported_at: datetime | None = None
    """When the ledger reports this; set if it overrides reports made after `at`, as by a worker that did not know."""


def _entry(row: asyncpg.Record) -> Entry:
    waits = row["finished_at"] is None
    names: list[str] = []
    with contextlib.suppress(
        ValueError, TypeError, RecursionError
    ):  # a large input is in the store, a damaged one has no names
        names = list(json.loads(row["input"] or "{}"))
    problem = reading.problem(row["error"]) if row["error"] and row["state"] == "failed" else None
    return Entry(
        id=row["id"],
        task=row["task"],
        state="scheduled" if waits else row["state"],
        parameters=names,
        message=problem.detail if problem else "",
        at=row["created_at"] if waits else row["finished_at"],
        due=row["run_at"],
        started_at=None if waits else reading.started(row),
        attempts=row["attempts_used"],
        reported_at=row["reported_at"],
    )


_TIMES = ("created_at", "run_at", "started_at", "finished_at")
_COLUMNS = f"id, task, state, input, error, attempts_used, {', '.join(map(reading.time, _TIMES))}"
_SHOWN = "not exists (select from task_types t where t.name = r.task and not t.history)"
"""Tasks may switch their history off."""

# By the primary key: ids are time-ordered, so "accepted since" is a range of ids, and each row is read once.
_WAITING = f"""
select {_COLUMNS}, null as reported_at from all_runs r
 where id > $1 and id <= $2 and fence = 0 and state in {WAITING} and {_SHOWN}
 order by id limit $3"""  # noqa: S608  # constants

# By ended_badly and ended_late_finished. One statement may end more runs than a page has, all at one time. The latest
# second is left out: a slow transaction may still commit an earlier `finished_at`.
_ENDED_BADLY = f"""
select {_COLUMNS}, null as reported_at from all_runs r
 where state in ('failed', 'cancelled', 'expired') and finished_at >= $1 and (finished_at, id) > ($1, $2)
   and finished_at <= now() - interval '1 second' and {_SHOWN} order by r.finished_at, id limit $3"""  # noqa: S608  # constants

# By the primary key, a page; `ended` drops the runs that need no check afterwards, so that the last id is known.
_ENDED = f"""
select id, state, {_SHOWN} and finished_at is not null
       and ($3::interval is null or finished_at > now() - $3) as asked
  from all_runs r where id > $1 and id <= $2 order by id limit $4"""  # noqa: S608  # constants

_BY_ID = f"select {_COLUMNS}, now() as reported_at from all_runs where id = any($1) and finished_at is not null"  # noqa: S608


async def reach(ledger: Ledger, after: UUID, until: UUID, *, rows: int) -> UUID:
    """The end of a range of at most `rows` ids: `until`, or less. A range without an end might take for ever."""
    sql = "select id from all_runs where id > $1 and id <= $2 order by id offset $3 limit 1"
    end = await ledger.fetchrow(sql, after, until, rows - 1)
    return end["id"] if end else until


async def waiting(ledger: Ledger, after: UUID, until: UUID, *, limit: int) -> list[Entry]:
    """Runs with ids in (after, until] that no worker has had yet, the oldest first."""
    return [_entry(row) for row in await ledger.fetch(_WAITING, after, until, limit)]


async def ended_badly(ledger: Ledger, after: tuple[datetime, UUID], *, limit: int) -> list[Entry]:
    """Runs that did not complete and ended after this time (by the database's clock) or at it, with a higher id; the
    earliest first."""
    return [_entry(row) for row in await ledger.fetch(_ENDED_BADLY, *after, limit)]


@dataclass(frozen=True, slots=True)
class Page:
    ended: dict[UUID, str]
    """The state of each."""
    last: UUID
    is_full: bool


async def ended(ledger: Ledger, after: UUID, until: UUID, *, within: timedelta | None, limit: int) -> Page | None:
    """Of the first `limit` runs with ids in (after, until]: those that ended, and not longer ago than `within`. Returns
    None when there are no such ids."""
    rows = await ledger.fetch(_ENDED, after, until, within, limit)
    if not rows:
        return None
    return Page({row["id"]: row["state"] for row in rows if row["asked"]}, rows[-1]["id"], len(rows) == limit)


async def entries(ledger: Ledger, ids: Sequence[UUID]) -> list[Entry]:
    """How these runs ended; the entries override all earlier reports."""
    return [_entry(row) for row in await ledger.fetch(_BY_ID, ids)]
