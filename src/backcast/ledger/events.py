"""What runs report while they run: records it for workers, reads it for callers, removes it with the run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from backcast.ledger.connection import Ledger
from backcast.models import Progress, uuid7

MOST = 2000
"""Events of a run after which further ones are dropped, whatever number of attempts they are from."""
PAGE = 100
"""Events read at a time; each may have 32 KiB."""


class Place(NamedTuple):
    """A place among all that happens to a run, in its order; events have their primary key."""

    attempt: int
    fence: int = 0
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    attempt: int
    fence: int
    seq: int
    """In the order in which the attempt reported, progress included."""
    at: datetime
    kind: str
    data: str
    """JSON."""


@dataclass(slots=True)
class Report:
    """What an attempt has reported since its last report."""

    run_id: UUID
    fence: int
    progress: Progress | None = None
    """The newest."""
    progress_seq: int = 0
    """Its place among the events of the attempt."""
    events: list[Event] = field(default_factory=list[Event])


# The fence decides, as in a settlement: the row must still be running, under the same fence and worker, when its lock
# is held, and so no event comes after the run's end. The rows are locked in the order of their ids, as a settlement of
# the same worker locks them, and no other row is locked while one of them is waited for. It is safe to send again: the
# primary key of events has the first sending. `room` walks at most MOST entries of that key.
_RECORD = f"""
with sent as materialized (select * from unnest($2::uuid[], $3::bigint[], $4::json[]) as d(id, fence, progress)),
mine as materialized (
  select id, fence from runs where id = any($2::uuid[]) and worker_id = $1 and state = 'running'
   order by id for no key update),
ours as materialized (
  select d.* from mine m join sent d on d.id = m.id and d.fence = m.fence),
shown as (
  update runs r set progress = o.progress from ours o
   where r.id = o.id and r.id = any(array(select id from ours where progress is not null)) and o.progress is not null),
room as materialized (
  select id from ours where not exists (
    select from events e where e.run_id = ours.id order by e.attempt, e.fence, e.seq offset {MOST - 1} limit 1))
insert into events (run_id, attempt, fence, seq, at, kind, data)
select d.* from room join unnest($5::uuid[], $6::int[], $7::bigint[], $8::int[], $9::timestamptz[], $10::text[],
                                 $11::json[]) as d(run_id, attempt, fence, seq, at, kind, data) on d.run_id = room.id
on conflict do nothing"""  # noqa: S608  # constants


async def record(ledger: Ledger, worker_id: UUID, reports: Sequence[Report]) -> None:
    """Record what the runs of a worker have reported, in one statement; those that it no longer holds are left out.
    Safe to send again when it is unknown whether it was recorded."""
    events = [(report.run_id, event) for report in reports for event in report.events]
    await ledger.execute(
        _RECORD,
        worker_id,
        [report.run_id for report in reports],
        [report.fence for report in reports],
        [report.progress and _kept(report, report.progress) for report in reports],
        [run_id for run_id, _ in events],
        [event.attempt for _, event in events],
        [event.fence for _, event in events],
        [event.seq for _, event in events],
        [event.at for _, event in events],
        [event.kind for _, event in events],
        [event.data for _, event in events],
    )
    ledger.report_events()


def _kept(report: Report, progress: Progress) -> str:
    return json.dumps({**progress.model_dump(mode="json"), "fence": report.fence, "seq": report.progress_seq})


# By the primary key.
_AFTER = f"""
select attempt, fence, seq, at, kind, data from events where run_id = $1 and (attempt, fence, seq) > ($2, $3, $4)
 order by attempt, fence, seq limit {PAGE}"""  # noqa: S608  # a constant


async def after(ledger: Ledger, run_id: UUID, place: Place) -> list[Event]:
    """A page of the events of a run that come after this place."""
    return [Event(**row) for row in await ledger.fetch(_AFTER, run_id, *place)]


# By the primary key, from the oldest run: ids are time-ordered. Only a running run gets events, so those of a run that
# is gone stay as they are.
_OLD = """
with page as materialized (
  select run_id from events where run_id > $1 and run_id <= $2 order by run_id, attempt, fence, seq limit 1000),
gone as (
  delete from events e where run_id = any(array(select run_id from page))
     and not exists (select from all_runs r where r.id = e.run_id))
select run_id from page order by run_id desc limit 1"""


async def remove_of_removed_runs(ledger: Ledger, keep: timedelta) -> None:
    """Remove the events of runs that were removed, which are older than runs are kept."""
    after, until = UUID(int=0), uuid7(keep.total_seconds())
    while row := await ledger.fetchrow(_OLD, after, until):
        after = row["run_id"]
