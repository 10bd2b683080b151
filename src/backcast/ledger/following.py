"""Reads runs and batches for callers who follow them, from any place on: all of it from the ledger, so that any process
goes on where another one has stopped. Decides the order of what happens to a run.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg

from backcast.errors import UnknownRun
from backcast.ledger import events, reading
from backcast.ledger.connection import LOGS_READ, Ledger
from backcast.ledger.events import Event, Place
from backcast.ledger.runs import COLUMNS, shown
from backcast.models import JSON, Run, State
from backcast.reporting import DROPPED

START, NOW = Place(-1), Place((1 << 31) - 1)
"""Before and after all that happens."""
RETRYING = (1 << 63) - 1
"""In the place of a fence: after all that an attempt has reported."""
ENDED_PAGE = 500
"""Ended runs of a batch that are read at a time."""
LAG = timedelta(seconds=2)
"""Ends of a batch's runs are listed after this time: `finished_at` is the beginning of a transaction, and a later one
may be committed first."""


@dataclass(frozen=True, slots=True)
class Happening:
    place: Place
    name: str
    """`queued`, `started`, `progress`, `output`, `dropped`, `retrying`."""
    data: dict[str, JSON]
    raw: str | None = None
    """JSON for `data` in the data of an output."""


@dataclass(frozen=True, slots=True)
class News:
    happenings: list[Happening]
    """In their order."""
    run: Run
    version: str
    """Another one when its state or its progress is another one."""
    fence: int
    """Of its latest attempt; 0: there is none."""
    is_all: bool
    """Whether nothing else has happened so far."""
    result: str | None
    """The JSON of a result that the row has."""


_VERSION = "concat_ws(' ', r.state, r.fence, r.attempts_used, r.progress->>'fence', r.progress->>'seq')"
_READ = f"""
select {COLUMNS}, result, fence, {_VERSION} as version,
       r.progress->>'fence' as progress_fence, r.progress->>'seq' as progress_seq,
       exists (select from events e where e.run_id = r.id and (e.attempt, e.fence, e.seq) > ($2, $3, $4)) as has_events
  from all_runs r where id = $1"""  # noqa: S608  # constants


async def read(ledger: Ledger, run_id: UUID, seen: Place) -> News:
    """What has happened to a run after this place: a page of it.

    The row is read first: an end that it shows comes after all events, which are all recorded by then. Each state
    follows from the row or from an event of a later attempt, so it is found whether or not it was seen while it lasted.

    Raises:
        UnknownRun: it was never accepted, or it has been removed.
    """
    row = await ledger.fetchrow(_READ, run_id, *seen)
    if row is None:
        raise UnknownRun.of(run_id)
    run = shown(row)
    emitted = await events.after(ledger, run_id, seen) if row["has_events"] else []
    found = [_emitted(event) for event in emitted]
    if run.progress is not None:
        place = Place(run.progress.attempt, int(row["progress_fence"] or 0), int(row["progress_seq"] or 0))
        found.append(Happening(place, "progress", run.progress.model_dump(mode="json")))
    is_all = len(emitted) < events.PAGE
    until = max([_present(run), *(each.place for each in found)]) if is_all else found[len(emitted) - 1].place
    found += _states(run, seen, until)
    news = sorted((each for each in found if seen < each.place <= until), key=lambda each: each.place)
    return News(news, run, row["version"], row["fence"], is_all, row["result"])


def _present(run: Run) -> Place:
    """The latest state of the run that is not its end."""
    waits = run.state in (State.QUEUED, State.EXPIRED)
    return Place(run.attempts, RETRYING if waits and run.attempts else 0)


def _states(run: Run, seen: Place, until: Place) -> list[Happening]:
    """The states up to this place, and of earlier attempts than that seen only the first."""
    states = [Happening(Place(0), "queued", {"at": _text(run.created_at), "run_at": _text(run.run_at)})]
    for attempt in range(max(1, seen.attempt), until.attempt + 1):
        is_latest = attempt == run.attempts
        started_at = _text(run.started_at) if is_latest and run.started_at is not None else None
        states.append(Happening(Place(attempt), "started", {"attempt": attempt, "at": started_at}))
        waits = is_latest and run.state is State.QUEUED
        # the error of the latest attempt that has failed
        has_error = run.error is not None and attempt == run.attempts - (run.state is State.RUNNING)
        error = run.error.model_dump() if has_error and run.error is not None and not run.state.is_final else None
        data: dict[str, JSON] = {"attempt": attempt, "error": error, "run_at": _text(run.run_at) if waits else None}
        states.append(Happening(Place(attempt, RETRYING), "retrying", data))
    return states


def _emitted(event: Event) -> Happening:
    place = Place(event.attempt, event.fence, event.seq)
    about: dict[str, JSON] = {"attempt": event.attempt, "at": _text(event.at)}
    if event.kind == DROPPED:
        return Happening(place, "dropped", about, event.data)
    return Happening(place, "output", {**about, "kind": event.kind}, event.data)


def _text(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Known:
    """What somebody who follows a run has seen."""

    run_id: UUID
    version: str
    seen: Place


# One probe of the primary key of `runs`, and one of that of `events`, for each; it locks nothing. A run that is not in
# `runs` has ended, or was removed.
_CHANGED = f"""
/* followed */
select k.n::int - 1 as n
  from unnest($1::uuid[], $2::text[], $3::int[], $4::bigint[], $5::int[])
       with ordinality as k(id, version, attempt, fence, seq, n) left join runs r on r.id = k.id
 where r.id is null or {_VERSION} <> k.version
    or exists (select from events e where e.run_id = k.id and (e.attempt, e.fence, e.seq) > (k.attempt, k.fence, k.seq))
"""  # noqa: S608  # constants


async def changed(connection: asyncpg.Connection, known: Sequence[Known]) -> list[int]:
    """The indexes of those to whose runs more has happened."""
    rows = await connection.fetch(
        _CHANGED,
        [each.run_id for each in known],
        [each.version for each in known],
        *([each.seen[column] for each in known] for column in range(3)),
    )
    return [row["n"] for row in rows]


_RUNS_NAMED = 200
"""Of the 8,000 bytes that a notification may have, each run takes 33."""


async def report_logs_read(ledger: Ledger, runs: Collection[UUID]) -> None:
    """Ask the workers of these runs to store their logs now. No table is read and no row is locked; a notification that
    is lost is made good by the next one."""
    ids = [run.hex for run in runs]
    named = [" ".join(ids[at : at + _RUNS_NAMED]) for at in range(0, len(ids), _RUNS_NAMED)]
    # A hint need not be durable: its commit does not wait for the disk.
    await ledger.execute(
        "select set_config('synchronous_commit', 'off', true), pg_notify($1, named) from unnest($2::text[]) named",
        LOGS_READ,
        named,
    )


# By runs_in_batch and ended_in_batch: a batch is read as a whole each time. It locks nothing. A time that SQL has made
# infinite is in no order.
_ENDED = f"""
select id, state, {reading.time("finished_at")} from all_runs
 where batch_id = $1 and (finished_at, id) > ($2, $3) and finished_at < '9999-01-01'
   and ($4 or finished_at <= now() - $5::interval)
 order by finished_at, id limit {ENDED_PAGE}"""  # noqa: S608  # constants


async def ended(ledger: Ledger, batch_id: UUID, after: tuple[datetime, UUID], *, is_over: bool) -> list[asyncpg.Record]:
    """A page of the ended runs of a batch (id, state, finished_at) after this one, in the order of their ends. Unless
    the whole batch `is_over`, those of the last two seconds are left out: see `LAG`."""
    return await ledger.fetch(_ENDED, batch_id, *after, is_over, LAG)
