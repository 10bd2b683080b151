"""Lists runs, the newest first, by any of their filters: each statement reads a bounded number of rows."""

import time
from datetime import datetime
from typing import Any
from uuid import UUID

from backcast.ledger import reading, waiting
from backcast.ledger.connection import Ledger
from backcast.ledger.runs import COLUMNS, shown
from backcast.models import Run, Selection, State

# One index of each table gives the newest rows of a batch, an owner or a state; times of submission are bounds of ids.
# Further filters apply to the next 10,000 of them, so that a filter which matches next to nothing does not walk through
# years of history. The two row comparisons mean `state = …`, in a form for which the planner takes runs_by_state and
# not the primary key.
_WAITING_OR_RUNNING = """
select r.*, null::timestamptz as finished_at from unnest($3::text[]) s cross join lateral (
  select * from runs where (runs.state, runs.id) < (s, $1) and (runs.state, runs.id) >= (s, $2)
   order by runs.state desc, runs.id desc limit {most}) r
 order by id desc limit {most}"""
WALK = 10_000
_STATES = {State.QUEUED: list(waiting.STATES)}
_FIRST, _LAST = UUID(int=0), UUID(int=(1 << 128) - 1)
_A_DAY = 86_400_000
"""Milliseconds."""


def _value(column: str, name: str) -> str:
    """SQL: a field of a JSON column."""
    return f"case when {reading.readable(column)} then {column}->>{name} end"


CODE, _DETAIL = _value("error", "'code'"), _value("error", "'detail'")
METADATA = _value("metadata", "{0}::text")
# A completed run shows no error, and may have that of an attempt before.
CONDITIONS = {
    "batch": "batch_id = {0}",
    "owner": "owner = {0}",
    "state": "state = any({0}::text[])",
    "task": "task = {0}",
    "lane": "lane = {0}",
    "worker": "worker_id = {0}",
    "error": f"state <> 'completed' and {CODE} = {{0}}",
    "text": f"state <> 'completed' and strpos(lower({_DETAIL}), lower({{0}})) > 0",
    "ended_after": "finished_at >= {0}",
    "ended_before": "finished_at < {0}",
}


async def find(
    ledger: Ledger, *, limit: int, before: UUID | None = None, filters: Selection | None = None, **given: Any
) -> tuple[list[Run], UUID | None]:
    """The newest runs first (ids are time-ordered), and where the next page begins. A page whose filters matched few of
    many runs is short, or empty, and yet not the last one. `given` is short for `filters`."""
    filters = filters or Selection(**given)
    states = None if filters.state is None else _STATES.get(filters.state, [filters.state.value])
    values: dict[str, Any] = {name: getattr(filters, name) for name in CONDITIONS} | {"state": states}
    asked = [(name, value) for name, value in values.items() if value is not None]
    base = asked.pop(0) if asked and asked[0][0] in ("batch", "owner", "state") else None
    rest = [(CONDITIONS[name], (value,)) for name, value in asked]
    rest += [(f"{METADATA} = {{1}}", item) for item in filters.metadata.items()]
    walk, arguments = _walk(filters, base, most=WALK if rest else limit + 1)
    where, at = list[str](), 3 + len(arguments)
    for condition, items in rest:
        where.append(condition.format(*(f"${at + n}" for n in range(len(items)))))
        arguments, at = [*arguments, *items], at + len(items)
    sql = f"""select {COLUMNS} from ({walk}) r {"where" if where else ""} {" and ".join(where)}
               order by id desc limit {limit + 1}"""  # noqa: S608  # constants
    before = min(before or _LAST, lowest_id(filters.created_before) or _LAST)
    first, found = lowest_id(filters.created_after) or _FIRST, list[Run]()
    is_live = base is not None and filters.state is not None and base[0] == "state" and not filters.state.is_final
    for since in (first,) if rest or is_live else (_a_day_before(before), first):
        rows = await ledger.fetch(sql, before, max(since, first), *arguments)
        found = [shown(row) for row in rows]
        if len(found) > limit:
            return found[:limit], found[limit - 1].id
    if not rest:
        return found, None
    sql = f"select id from ({walk}) r order by id desc offset {WALK - 1}"  # noqa: S608
    last = await ledger.fetchrow(sql, before, first, *([] if base is None else [base[1]]))
    return found, None if last is None else last["id"]


def _walk(filters: Selection, base: tuple[str, Any] | None, *, most: int) -> tuple[str, list[Any]]:
    """SQL: the newest rows of the base with ids in [$2, $1), and the values after these two."""
    if base is None:
        return f"select * from all_runs where id < $1 and id >= $2 order by id desc limit {most}", []  # noqa: S608
    name, value = base
    if name != "state":
        sql = f"select * from all_runs where {CONDITIONS[name].format('$3')} and id < $1 and id >= $2"  # noqa: S608
        return f"{sql} order by id desc limit {most}", [value]
    assert filters.state is not None
    if not filters.state.is_final:
        return _WAITING_OR_RUNNING.format(most=most), [value]
    # Its name and no parameter: the planner leaves out the tables that have no such run.
    sql = f"select * from all_runs where state = '{filters.state.value}' and $3::text[] is not null"  # noqa: S608
    return f"{sql} and id < $1 and id >= $2 order by id desc limit {most}", [value]


def lowest_id(moment: datetime | None) -> UUID | None:
    """The lowest id of a moment."""
    return None if moment is None else UUID(int=max(0, int(moment.timestamp() * 1000)) << 80)


def _a_day_before(run: UUID) -> UUID:
    """A full page is mostly found there, and the partitions of all other days are left alone."""
    newest = min(run.int >> 80, time.time_ns() // 1_000_000)
    return UUID(int=max(0, newest - _A_DAY) << 80)
