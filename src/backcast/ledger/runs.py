"""Looks up and cancels runs for callers. Other modules decide how a run is accepted and executed.

Isolation is READ COMMITTED in the whole ledger: an UPDATE that waited for a row lock reads the row again, so the newest
version of the row decides a `where` on state, fence and worker. Locks are taken in one order: lanes by name, then runs.
A statement that takes many runs skips the locked ones, or takes only runs that its own worker holds.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from backcast.errors import UnknownRun
from backcast.ledger import ended, lanes, reading, waiting
from backcast.ledger.connection import Ledger
from backcast.models import Problem, Run, State

_TIMES = ("created_at", "run_at", "deadline", "started_at", "finished_at")
RETRIES = 20
"""Retries of a run that are shown, the newest ones."""
# One probe of the primary key of `retries`, for ended runs only.
_RETRIED_BY = f"""case when finished_at is not null then array(
      select retry_id from retries where run_id = id order by retry_id desc limit {RETRIES}) end as retried_by"""  # noqa: S608
COLUMNS = f"""id, task, state, owner, priority, lane, batch_id, retry_of, attempts_used, error, usage, progress,
    metadata, {", ".join(map(reading.time, _TIMES))}, {_RETRIED_BY}"""
LIVE_COLUMNS = COLUMNS.replace(reading.time("finished_at"), "null::timestamptz as finished_at").replace(
    _RETRIED_BY, "null::uuid[] as retried_by"
)
"""The same of a run that is not over, from `runs`."""


def outside(state: str) -> State:
    """The state that callers see."""
    return State.QUEUED if state in waiting.STATES else State(state)


def shown(row: asyncpg.Record) -> Run:
    """A run from a row of `COLUMNS`."""
    state: str = row["state"]
    running = state == "running"
    problem = reading.problem(row["error"]) if row["error"] and state != "completed" else None
    return Run(
        id=row["id"],
        task=row["task"],
        state=outside(state),
        owner=row["owner"],
        priority=row["priority"],
        lane=row["lane"],
        batch_id=row["batch_id"],
        retry_of=row["retry_of"],
        retried_by=(row["retried_by"] or [])[::-1],
        attempts=row["attempts_used"] + running,
        error=problem,
        usage=reading.mapping(row["usage"]) if row["usage"] else None,
        progress=reading.progress(row["progress"]) if row["progress"] else None,
        why=None if row["finished_at"] or running else _why(state, problem, row["attempts_used"]),
        metadata={name: str(value) for name, value in reading.mapping(row["metadata"]).items()},
        created_at=row["created_at"],
        run_at=row["run_at"],
        deadline=row["deadline"],
        started_at=reading.started(row),
        finished_at=row["finished_at"],
    )


_WAITS: Mapping[str, Any] = {"paused": "paused", "held": "lane", "queued": "ready"}
_PARKED: Mapping[str, Any] = {"same_value": "same_value", "unknown_task": "no_worker", "unfit_input": "unknown_version"}


def _why(state: str, problem: Problem | None, attempts: int) -> Any:
    """From the row alone: a run that is `ready` may find no worker."""
    if (word := _WAITS.get(state)) is not None:
        return word
    return "scheduled" if problem is None and not attempts else _PARKED.get(problem.code if problem else "", "retry")


async def get(ledger: Ledger, run_id: UUID) -> Run:
    """Raises `UnknownRun`."""
    return shown(await _row(ledger, run_id))


async def _row(ledger: Ledger, run_id: UUID, more: str = "") -> asyncpg.Record:
    row = await ledger.fetchrow(f"select {COLUMNS}{more} from all_runs where id = $1", run_id)  # noqa: S608  # constants
    if row is None:
        raise UnknownRun.of(run_id)
    return row


@dataclass(frozen=True, slots=True)
class Value:
    """Where the input or the result of a run is: `text` holds a small one, `key` names the object in the store."""

    run: Run
    text: str | None
    key: str | None


async def result(ledger: Ledger, run_id: UUID) -> Value:
    """Raises `UnknownRun`."""
    row = await _row(ledger, run_id, ", result, result_key")
    return Value(shown(row), row["result"], row["result_key"])


async def kept_input(ledger: Ledger, run_id: UUID) -> Value:
    """Exactly one of `text` and `key` is set. Raises `UnknownRun`."""
    row = await _row(ledger, run_id, ", input, input_key")
    return Value(shown(row), row["input"], row["input_key"])


async def latest_fence(ledger: Ledger, run_id: UUID) -> int:
    """The number of the run's latest attempt, 0 if there is none. Raises `UnknownRun`."""
    row = await ledger.fetchrow("select fence from all_runs where id = $1", run_id)
    if row is None:
        raise UnknownRun.of(run_id)
    return row["fence"]


CANCELLED = f"""asked as (
  update runs set cancel_requested_at = coalesce(cancel_requested_at, now())
   where id = any(array(select id from mine where runs)) returning id),
gone as (delete from runs where id = any(array(select id from mine where not runs)) returning *),
{ended.moved(state="'cancelled'", cancel_requested_at="coalesce(cancel_requested_at, now())")},
{lanes.FREED}"""  # noqa: S608  # constants
"""SQL: the common table expressions that cancel the runs in `mine`, after their lanes were locked, by name. A run that
is not running is cancelled; a running one is only asked to stop, and `settlement.settle` makes its state cancelled.
Other statements that lock many runs are claiming or settling locked ones: a `mine` of many skips those, so that neither
waits for the other, and the caller comes back to them."""
# One row, by its key: its lock decides between this and a claim or settlement at the same moment. The row of its lane
# is locked first, as everywhere; no statement changes the lane of a run, so it is the right one.
_CANCEL = f"""
with lane as materialized (
  select name from lanes where name = (select lane from runs where id = $1) for update),
mine as materialized (
  select id, state = 'running' as runs from runs where id = $1 and (select count(*) from lane) >= 0 for update),
{CANCELLED}
select array(select name from freed) as freed from mine"""  # noqa: S608  # constants


async def cancel(ledger: Ledger, run_id: UUID) -> Run:
    """Cancel a run, or ask a running one to stop; a run that has ended stays as it is. Raises `UnknownRun`."""
    for row in await ended.fetch(ledger, _CANCEL, run_id):
        ledger.report_ends()
        await lanes.try_promote(ledger, set(row["freed"]))
    return await get(ledger, run_id)


# Probes of the primary key; it locks nothing. All waits of an API process share one statement.
MARK = "/* ended */"
_ENDED = f"{MARK} select {COLUMNS} from all_runs where id = any($1::uuid[]) and finished_at is not null"  # noqa: S608  # a constant


async def those_ended(connection: asyncpg.Connection, ids: Collection[UUID]) -> list[Run]:
    """Those of these runs that have ended."""
    return [shown(row) for row in await connection.fetch(_ENDED, list(ids))]
