"""Finds the runs that an operation is for, in the order of their ids, a bounded number of rows per statement."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from backcast.ledger import listing, waiting
from backcast.ledger.connection import Ledger
from backcast.models import Selection, State

Kind = Literal["retry", "cancel"]

PAGE = 250
"""Runs that one transaction changes: some 10 ms."""
EXAMINED = 1000
"""Rows that one statement looks at, to find those of a page."""
COUNTED = 10_000
"""Rows that one statement looks at, to count."""
MOST = 100_000
"""Runs up to which a count is exact."""
MOST_EXAMINED = 2_000_000
"""Rows after which a count ends: some seconds."""
FIRST = UUID(int=0)
_STATES: dict[Kind, dict[State | None, list[str]]] = {
    "cancel": {
        None: [*waiting.STATES, "running"],
        State.QUEUED: list(waiting.STATES),
        State.RUNNING: ["running"],
    },
    "retry": {None: ["failed", "expired"]},
}


def states(kind: Kind, selection: Selection) -> list[str]:
    """The internal states of the runs that are meant."""
    return _STATES[kind].get(selection.state) or [str(selection.state)]


# It locks nothing, and what it finds is checked again by the statement that changes it, unless it can't change: an
# ended run. One index of each table gives the next ids: that of a batch or an owner, or the primary key; the other
# filters apply to these rows. A state is no base, as an index of states gives no order of ids over several; it chooses
# the table. Each table has its own limit, or the planner would sort both. The time decides, by the database's clock,
# which runs are new; `until` only ends the walk, by another clock.
_READ = "id, state, task, owner, lane, worker_id, error, metadata"
_LIVE = f"""
  select {_READ}, created_at as since, null::timestamptz as finished_at, null::text as input_key from runs
   where {{base}} id > $1 and id <= $2"""  # noqa: S608  # constants
_ENDED = f"""
  (select {_READ}, finished_at as since, finished_at, input_key from {{home}}
    where {{base}} id > $1 and id <= $2 order by id limit {{rows}})
   union all
  (select {_READ}, finished_at as since, finished_at, input_key from ended_late
    where {{base}} id > $1 and id <= $2 order by id limit {{rows}})"""  # noqa: S608  # constants
_WALK = """
with walk as materialized (select * from ({homes}) h order by id limit {rows})"""
_FIND = f"""{_WALK},
due as materialized (select id, input_key from walk where {{matches}} order by id limit {PAGE})
select array(select id from due order by id) as ids, array(select input_key from due order by id) as keys,
       (select max(id::text)::uuid from walk) as last,
       (select count(*) from walk) < {EXAMINED} and (select count(*) from due) < {PAGE} as is_last"""  # noqa: S608
_COUNT = f"""{_WALK}
select count(*) filter (where {{matches}}) as matched, count(*) as examined, max(id::text)::uuid as last
  from walk"""  # noqa: S608


def _statement(sql: str, rows: int, kind: Kind, selection: Selection) -> tuple[str, list[Any]]:
    """The statement, and its values after the first three: see `find`."""
    values: list[Any] = [states(kind, selection)]
    matches = ["since <= $3", "state = any($4::text[])"]

    def condition(text: str, *given: Any) -> str:
        values.extend(given)
        return text.format(*(f"${4 + len(values) - n}" for n in range(len(given), 0, -1)))

    base = ""
    for name, text in listing.CONDITIONS.items():
        value = getattr(selection, name)
        if name == "state" or value is None:
            continue
        if not base and name in ("batch", "owner"):
            base = f"{condition(text, value)} and"
        else:
            matches.append(condition(text, value))
    matches += [condition(f"{listing.METADATA} = {{1}}", *label) for label in selection.metadata.items()]
    home = "ended_completed" if selection.state is State.COMPLETED else "ended_otherwise"
    homes = _LIVE.format(base=base) if kind == "cancel" else _ENDED.format(base=base, home=home, rows=rows)
    return sql.format(homes=homes, rows=rows, matches=" and ".join(f"({each})" for each in matches)), values


def _range(selection: Selection, after: UUID, until: UUID) -> tuple[UUID, UUID]:
    """Times of submission are bounds of ids."""
    first, last = listing.lowest_id(selection.created_after), listing.lowest_id(selection.created_before)
    return max(after, first or after), min(until, last or until)


@dataclass(frozen=True, slots=True)
class Page:
    runs: dict[UUID, str | None]
    """Those that match, each with the key of its input if that is in the store."""
    last: UUID
    """The id after which the next page begins."""
    is_last: bool


async def find(ledger: Ledger, kind: Kind, selection: Selection, at: datetime, after: UUID, until: UUID) -> Page:
    """The next runs with ids in (after, until] that were submitted (to cancel) or had ended (to retry) at this time. It
    may have none, and yet not be the last one."""
    sql, values = _statement(_FIND, EXAMINED, kind, selection)
    row = await ledger.fetchrow(sql, *_range(selection, after, until), at, *values)
    assert row is not None
    ids: list[UUID] = row["ids"]
    last = ids[-1] if len(ids) == PAGE else row["last"] or until
    return Page(dict(zip(ids, row["keys"], strict=True)), last, row["is_last"])


async def count(
    ledger: Ledger,
    kind: Kind,
    selection: Selection,
    at: datetime,
    until: UUID,
    *,
    most: int = MOST,
    rows: int = COUNTED,
    examined: int = MOST_EXAMINED,
) -> tuple[int, bool]:
    """How many runs match, up to `most`, and whether there may be more. It looks at `examined` rows in all."""
    sql, values = _statement(_COUNT, rows, kind, selection)
    matched, (after, until) = 0, _range(selection, FIRST, until)
    for _ in range(examined // rows):
        row = await ledger.fetchrow(sql, after, until, at, *values)
        assert row is not None
        matched += row["matched"]
        if matched > most:
            return most, True
        if row["examined"] < rows:
            return matched, False
        after = row["last"]
    return matched, True
