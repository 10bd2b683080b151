"""Keeps the attempts of a run that did not simply succeed: the newest ten, in the run's own row.

The statements that settle or requeue a run add them, under the row locks that they hold anyway. A run that succeeds at
once has none, and only the statement that shows them reads them. They are JSON: `{"left_out": 0, "newest": [...]}`, the
newest first, each with the `report` of the process that saw its end.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from backcast.errors import RunTimeout, UnknownRun
from backcast.ledger import reading
from backcast.ledger.connection import Ledger
from backcast.models import JSON, Attempt, Attempts, Problem, Tried
from backcast.texts import storable

KEPT = 10
_UNREADABLE = (TypeError, ValueError, KeyError, AttributeError, OverflowError)


_KNOWN = f"""case when not {reading.readable("r.attempts")} then null
                        when r.attempts->>'left_out' ~ '^[0-9][0-9]?[0-9]?[0-9]?[0-9]?[0-9]?$'
                         and json_typeof(r.attempts->'newest') = 'array' then r.attempts end"""
"""SQL: the kept attempts of the run `r`, if they can be read."""
UNCOUNTED = f"""case when r.attempts is null then 0 else (
    select greatest(coalesce((known->>'left_out')::int + json_array_length(known->'newest') - r.attempts_used, 0), 0)
      from (select {_KNOWN} as known) k) end"""  # noqa: S608  # a constant
"""SQL: how many attempts of the run `r` did not count against it, although its code was executed."""


def extended(reports: str) -> str:
    """SQL: the kept attempts of the run `r` with those of the column `reports`, if it is not null. What is there and
    can't be read, as a person may have written it, is dropped: it must not keep a run from being settled."""
    return f"""case when {reports} is null then r.attempts else (
    select json_build_object(
             'left_out', coalesce(({reports}->>'left_out')::int, 0) + coalesce((known->>'left_out')::int, 0)
                         + greatest(total - {KEPT}, 0),
             'newest', coalesce(newest, '[]'))
      from (select {_KNOWN} as known) k
     cross join lateral (
           select count(*) as total, json_agg(entry order by n) filter (where n <= {KEPT}) as newest from (
             select n, json_build_object(
                      'fence', r.fence, 'worker_id', r.worker_id, 'claimed_at', r.started_at, 'ended_at', now(),
                      'host', (select host from workers where id = r.worker_id), 'report', report) as entry
               from json_array_elements({reports}->'newest') with ordinality as new(report, n)
             union all
             select n + json_array_length({reports}->'newest'), entry
               from json_array_elements(known->'newest') with ordinality as old(entry, n)) e) a) end"""  # noqa: S608  # column names


CANCELLED = "json_build_object('newest', json_build_array(json_build_object('outcome', 'cancelled')))"
"""SQL: the reports on an attempt that was about to succeed when its run was cancelled."""


def lost(error: str, counts: str) -> str:
    """SQL: the reports on an attempt that was lost with its worker."""
    return f"""json_build_object('newest', json_build_array(
      json_build_object('outcome', 'lost', 'error', {error}, 'counts', {counts})))"""


def reports(last: Mapping[str, JSON] | None, earlier: Sequence[Tried], *, left_out: int) -> str | None:
    """The JSON of the reports on the attempts of one claim: the `earlier` ones were followed by another at once.
    None when there is nothing to keep."""
    newest = [
        {
            "outcome": outcome(tried.problem, "retrying"),
            "error": tried.problem.model_dump(),
            "traceback": tried.traceback,
            "since": tried.since,
            "until": tried.until,
        }
        for tried in reversed(earlier)
    ]
    if last is not None:
        newest.insert(0, {**last, "since": earlier[-1].until} if earlier else dict(last))
    if not newest and left_out <= 0:
        return None
    text = json.dumps({"left_out": max(left_out, 0), "newest": newest}, ensure_ascii=False)
    return storable(text.replace("\\u0000", "\\ufffd"))


def outcome(problem: Problem, otherwise: str) -> str:
    return "timed_out" if problem.code == RunTimeout.code else otherwise


# By the primary keys; it locks nothing.
_SHOWN = f"""
select state, fence, worker_id, attempts, usage, {reading.time("started_at")}, {reading.time("finished_at")},
       (select host from workers where workers.id = worker_id) as host from all_runs where id = $1"""  # noqa: S608


async def get(ledger: Ledger, run_id: UUID) -> Attempts:
    """The kept attempts of a run, and the present one, or the one that succeeded, from its row. Raises `UnknownRun`."""
    row = await ledger.fetchrow(_SHOWN, run_id)
    if row is None:
        raise UnknownRun.of(run_id)
    items, left_out = kept(row["attempts"])
    if row["state"] in ("running", "completed"):
        items.append(_last(row, items, left_out))
    return Attempts(items=items, left_out=left_out)


def kept(text: str | None) -> tuple[list[Attempt], int]:
    """The attempts of this column, the oldest first, and how many are left out. Without those that can't be read."""
    known: Any = reading.loaded(text) if text else None
    items, left_out = list[Attempt](), 0
    with contextlib.suppress(*_UNREADABLE):
        left_out = int(known["left_out"])
        for number, entry in enumerate(reversed(known["newest"]), left_out + 1):
            with contextlib.suppress(*_UNREADABLE):
                items.append(_attempt(number, entry))
    return items, left_out


def _attempt(number: int, entry: dict[str, Any]) -> Attempt:
    report: dict[str, Any] = entry.pop("report")
    claimed_at = datetime.fromisoformat(entry.pop("claimed_at"))
    since, until = report.pop("since", 0.0), report.pop("until", None)
    if until is not None:
        entry["ended_at"] = claimed_at + timedelta(seconds=until)
    return Attempt(number=number, started_at=claimed_at + timedelta(seconds=since), **entry, **report)


def _last(row: asyncpg.Record, kept: Sequence[Attempt], left_out: int) -> Attempt:
    follows = bool(kept) and kept[-1].fence == row["fence"]  # at once, after attempts of the same claim
    return Attempt(
        number=left_out + len(kept) + 1,
        fence=row["fence"],
        outcome="running" if row["state"] == "running" else "succeeded",
        started_at=kept[-1].ended_at if follows else row["started_at"],
        ended_at=row["finished_at"],
        worker_id=row["worker_id"],
        host=row["host"],
        usage=None if left_out or row["state"] == "running" else _rest(reading.mapping(row["usage"]), kept),
    )


def _rest(usage: dict[str, Any], kept: Sequence[Attempt]) -> dict[str, JSON] | None:
    """The tokens of the run that are not those of the kept attempts."""
    spent = {
        name: total - sum((each.usage or {}).get(name, 0) for each in kept)
        for name, total in usage.items()
        if isinstance(total, int)
    }
    return usage | spent if any(spent.values()) else None
