"""Looks up, lists and cancels runs for callers. Other modules decide how a run is accepted and executed.

Isolation is READ COMMITTED in the whole ledger: an UPDATE that waited for a row lock reads the row again, so the newest
version of the row decides a `where` on state, fence and worker. Locks are taken in one order: lanes by name, then runs.
A statement that takes many runs skips the locked ones, or takes only runs that its own worker holds.
"""

import time
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from backcast.errors import UnknownRun
from backcast.ledger import ended, lanes, reading
from backcast.ledger.connection import Ledger
from backcast.models import Run, State

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
    return State.QUEUED if state in ("paused", "held", "scheduled") else State(state)


def shown(row: asyncpg.Record) -> Run:
    """A run from a row of `COLUMNS`."""
    state: str = row["state"]
    running = state == "running"
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
        error=reading.problem(row["error"]) if row["error"] and state != "completed" else None,
        usage=reading.mapping(row["usage"]) if row["usage"] else None,
        progress=reading.progress(row["progress"]) if row["progress"] else None,
        metadata={name: str(value) for name, value in reading.mapping(row["metadata"]).items()},
        created_at=row["created_at"],
        run_at=row["run_at"],
        deadline=row["deadline"],
        started_at=reading.started(row),
        finished_at=row["finished_at"],
    )


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


# One index of each table gives the newest rows of a batch, an owner or a state. Further filters apply to the next
# 10,000 of them, so that a filter which matches next to nothing does not walk through years of history. The two row
# comparisons mean `state = …`, in a form for which the planner takes runs_by_state and not the primary key.
_WAITING_OR_RUNNING = """
select r.*, null::timestamptz as finished_at from unnest($3::text[]) s cross join lateral (
  select * from runs where (runs.state, runs.id) < (s, $1) and (runs.state, runs.id) >= (s, $2)
   order by runs.state desc, runs.id desc limit {most}) r
 order by id desc limit {most}"""
WALK = 10_000
_STATES = {State.QUEUED: ["paused", "held", "scheduled", "queued"]}
_FIRST, _LAST = UUID(int=0), UUID(int=(1 << 128) - 1)
_A_DAY = 86_400_000
"""Milliseconds."""


async def find(
    ledger: Ledger,
    *,
    limit: int,
    before: UUID | None = None,
    state: State | None = None,
    task: str | None = None,
    owner: str | None = None,
    batch: UUID | None = None,
) -> tuple[list[Run], UUID | None]:
    """The newest runs first (ids are time-ordered), and where the next page begins. A page whose filters matched few of
    many runs is short, or empty, and yet not the last one."""
    states = None if state is None else _STATES.get(state, [state.value])
    asked = [("batch_id =", batch), ("owner =", owner), ("state =", states), ("task =", task)]
    filters = [(column, value) for column, value in asked if value is not None]
    base = filters.pop(0) if filters and filters[0][0] != "task =" else None
    most = WALK if filters else limit + 1
    by_state = state if base is not None and base[0] == "state =" else None
    matches = "" if base is None else f"{base[0]} $3 and"
    if by_state is not None:  # its name and no parameter: the planner leaves out the tables that have no such run
        matches = f"state = '{by_state.value}' and $3::text[] is not null and"
    is_live = by_state is not None and not by_state.is_final
    if is_live:
        walk = _WAITING_OR_RUNNING.format(most=most)
    else:
        walk = f"select * from all_runs where {matches} id < $1 and id >= $2 order by id desc limit {most}"  # noqa: S608
    values = [] if base is None else [base[1]]
    at = 2 + len(values)
    rest = [f"{column} {'any' if column == 'state =' else ''}(${at + n})" for n, (column, _) in enumerate(filters, 1)]
    where = f"where {' and '.join(rest)}" if rest else ""
    sql = f"select {COLUMNS} from ({walk}) r {where} order by id desc limit {limit + 1}"  # noqa: S608  # constants
    before, found = before or _LAST, list[Run]()
    for since in (_FIRST,) if filters or is_live else (_a_day_before(before), _FIRST):
        rows = await ledger.fetch(sql, before, since, *values, *[value for _, value in filters])
        found = [shown(row) for row in rows]
        if len(found) > limit:
            return found[:limit], found[limit - 1].id
    if not filters:
        return found, None
    sql = f"select id from ({walk}) r order by id desc offset {WALK - 1}"  # noqa: S608
    last = await ledger.fetchrow(sql, before, _FIRST, *values)
    return found, None if last is None else last["id"]


def _a_day_before(run: UUID) -> UUID:
    """A full page is mostly found there, and the partitions of all other days are left alone."""
    newest = min(run.int >> 80, time.time_ns() // 1_000_000)
    return UUID(int=max(0, newest - _A_DAY) << 80)


_MOVED = ended.moved(state="'cancelled'", cancel_requested_at="coalesce(cancel_requested_at, now())", returning=COLUMNS)
# One row, by its key: its lock decides between this and a claim or settlement at the same moment. A run that is not
# running is cancelled here; a running one is only asked to stop, and `settlement.settle` makes its state cancelled. The
# row of its lane is locked first, as everywhere; no statement changes the lane of a run, so it is the right one.
_CANCEL = f"""
with lane as materialized (
  select name from lanes where name = (select lane from runs where id = $1) for update),
mine as materialized (
  select id, state = 'running' as runs from runs where id = $1 and (select count(*) from lane) >= 0 for update),
asked as (
  update runs set cancel_requested_at = coalesce(cancel_requested_at, now())
   where id = any(array(select id from mine where runs)) returning {LIVE_COLUMNS}),
gone as (delete from runs where id = any(array(select id from mine where not runs)) returning *),
{_MOVED},
freed as (
  update lanes set promoted = greatest(lanes.promoted, -1000000000) - 1 from gone g
   where lanes.name = g.lane and g.promoted returning name)
select c.*, (select count(*) from freed) as freed from (select * from asked union all select * from moved) c"""  # noqa: S608


CANCELLED = f"""asked as (
  update runs set cancel_requested_at = now() where id = any(array(select id from mine where runs)) returning id),
gone as (delete from runs where id = any(array(select id from mine where not runs)) returning *),
{ended.moved(state="'cancelled'", cancel_requested_at="now()")},
{lanes.FREED}"""  # noqa: S608  # constants
"""SQL: the common table expressions that cancel the many runs in `mine`, after their lanes were locked, by name. Other
statements that lock many runs are claiming or settling locked ones: `mine` skips those, so that neither waits for the
other, and the caller comes back to them."""


async def cancel(ledger: Ledger, run_id: UUID) -> Run:
    """Cancel a run, or ask a running one to stop; a run that has ended stays as it is. Raises `UnknownRun`."""
    rows = await ended.fetch(ledger, _CANCEL, run_id)
    if not rows:
        return await get(ledger, run_id)
    [row] = rows
    ledger.report_ends()
    if row["freed"]:
        await lanes.try_promote(ledger, {row["lane"]})
    return shown(row)
