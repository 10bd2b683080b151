"""Operations: what is to be done with many runs. Records them, makes one page of each at a time, and counts it.

A page and the cursor's advance are one statement: a steward that dies in between repeats nothing, and of two that lead
at once one makes the page.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg
from pydantic import ValidationError

from backcast.errors import IdempotencyConflict, UnknownOperation
from backcast.ledger import ended, lanes, reading, runs, selection, waiting
from backcast.ledger.connection import Ledger
from backcast.ledger.selection import Kind, Page
from backcast.models import Operation, Selection, uuid7

log = logging.getLogger("backcast.ledger")

_COLUMNS = f"""id, kind, state, filter, batch_id, done, skipped, failed,
    {reading.time("created_at")}, {reading.time("finished_at")}"""
MARGIN = 60.0
"""Seconds that the clocks which make ids may be ahead of the one that ends an operation's walk."""


@dataclass(frozen=True, slots=True)
class Recorded:
    operation: Operation
    fresh: bool
    """False when an earlier request with the same Idempotency-Key made this operation."""


# As for runs: the unique index on (owner, idem_key) lets one of any number of racing requests insert.
_RECORD = f"""
with recorded as (
  insert into operations (id, kind, owner, idem_key, request_hash, filter, until, batch_id)
  values ($1, $2, $3, $4, $5, $6, $7, $8)
  on conflict (owner, idem_key) where idem_key is not null do update set idem_key = excluded.idem_key
  returning *, xmax = 0 as fresh),
batch as (
  insert into batches (id, owner, request_hash, size)
  select batch_id, owner, request_hash, 0 from recorded where fresh and batch_id is not null)
select {_COLUMNS}, request_hash, fresh from recorded"""  # noqa: S608  # constants


async def record(
    ledger: Ledger, kind: Kind, chosen: Selection, *, owner: str, key: str | None, batch_id: UUID | None = None
) -> Recorded:
    """Record an operation, which the leading steward makes. With `batch_id`, its runs are a new batch with this id.
    Raises `IdempotencyConflict`: the key belongs to another operation of this owner."""
    filters = chosen.model_dump_json(exclude_defaults=True)
    request_hash = hashlib.sha256(f"{kind}\n{filters}\n{batch_id is not None}".encode()).digest()
    row = await ledger.fetchrow(_RECORD, uuid7(), kind, owner, key, request_hash, filters, uuid7(-MARGIN), batch_id)
    assert row is not None
    if row["request_hash"] != request_hash:
        raise IdempotencyConflict(
            "An earlier operation used the same Idempotency-Key for something else: use a new key for a new one, or"
            " repeat the earlier request unchanged."
        )
    return Recorded(_shown(row), row["fresh"])


async def matching(ledger: Ledger, kind: Kind, chosen: Selection) -> tuple[int, bool]:
    """The number of runs that an operation would be for, exact up to 100,000, and whether there may be more."""
    row = await ledger.fetchrow("select now() as at")
    assert row is not None
    return await selection.count(ledger, kind, chosen, row["at"], uuid7(-MARGIN))


def _selection(row: asyncpg.Record) -> Selection | None:
    """None: this release can't read it, as one of a newer release that has been rolled back."""
    try:
        return Selection.model_validate_json(row["filter"])
    except ValidationError:
        return None


def _shown(row: asyncpg.Record) -> Operation:
    values = {name: row[name] for name in Operation.model_fields}
    return Operation.model_validate(values | {"filter": _selection(row) or Selection()})


async def get(ledger: Ledger, operation: UUID) -> Operation:
    """Raises `UnknownOperation`."""
    row = await ledger.fetchrow(f"select {_COLUMNS} from operations where id = $1", operation)  # noqa: S608
    if row is None:
        raise UnknownOperation(f"There is no operation {operation}: it was never accepted here, or has been removed.")
    return _shown(row)


async def stop(ledger: Ledger, operation: UUID) -> Operation:
    """Let an operation make no further page; one that has ended stays as it is. Raises `UnknownOperation`.

    The row's lock decides between this and a page: that page is made whole, or not at all.
    """
    await ledger.execute(
        "update operations set state = 'cancelled', finished_at = now() where id = $1 and state = 'running'", operation
    )
    return await get(ledger, operation)


@dataclass(frozen=True, slots=True)
class Work:
    """An operation that is to be continued from `cursor`."""

    id: UUID
    kind: Kind
    chosen: Selection
    batch_id: UUID | None
    created_at: datetime
    cursor: UUID
    until: UUID


async def running(ledger: Ledger) -> list[Work]:
    """The operations that have not ended, the oldest first. By operations_running. One whose filter can't be read is
    cancelled: nobody knows its runs."""
    rows = await ledger.fetch(
        """select id, kind, filter, batch_id, created_at, cursor, until from operations
            where state = 'running' order by id"""
    )
    works = list[Work]()
    for row in rows:
        if (chosen := _selection(row)) is None:
            log.error("operation %s is cancelled: this release can't read its filter", row["id"])
            await stop(ledger, row["id"])
            continue
        works.append(
            Work(
                id=row["id"],
                kind=row["kind"],
                chosen=chosen,
                batch_id=row["batch_id"],
                created_at=row["created_at"],
                cursor=row["cursor"],
                until=row["until"],
            )
        )
    return works


async def find(ledger: Ledger, work: Work, after: UUID) -> Page:
    return await selection.find(ledger, work.kind, work.chosen, work.created_at, after, work.until)


# The operation's row is locked first, and nobody locks it while holding another row. It must still be where it was when
# the page was read: so each page is made once, and none after a stop.
_TURN = """turn as materialized (
  select id from operations where id = $1 and state = 'running' and cursor = $2 {and_} for update)"""
_ENDS = """state = case when {is_last} then 'completed' else state end,
       finished_at = case when {is_last} then now() end"""

# The new runs have ids that nobody knows, the old ones never change, and a batch of retries is changed by its operation
# and nothing else: nothing is waited for. Where each waits is
# decided as for a submission.
_RETRY = f"""
with {_TURN.format(and_="and ($8::timestamptz is null or now() < $8)")},
made as (
  insert into runs (id, task, pool, owner, lane, batch_id, retry_of, priority, state, max_attempts, signature, input,
                    input_key, metadata)
  select given.id, r.task, r.pool, r.owner, r.lane, $9::uuid, r.id, r.priority, {waiting.ready("r")}, r.max_attempts,
         r.signature, r.input, given.input_key, r.metadata
    from unnest($5::uuid[], $6::uuid[], $7::text[]) as given(old, id, input_key)
   cross join lateral (select * from all_runs where all_runs.id = given.old) r
   where exists (select from turn)
  returning id, retry_of, pool, lane, state),
linked as (insert into retries (run_id, retry_id) select retry_of, id from made),
sized as (update batches set size = size + (select count(*) from made) where id = $9 and exists (select from turn))
update operations set cursor = $3, done = done + (select count(*) from made),
       skipped = skipped + cardinality($5) - (select count(*) from made), failed = failed + $10,
       {_ENDS.format(is_last="$4")}
  from turn where operations.id = turn.id
returning array(select distinct pool from made where state = 'queued') as ready,
          array(select distinct lane from made where state = 'held') as held"""  # noqa: S608  # constants


@dataclass(frozen=True, slots=True)
class Retry:
    """A run to be repeated, the id of the new one, and the key of the input that it has in the store, if any."""

    old: UUID
    new: UUID
    input_key: str | None


async def retry(
    ledger: Ledger, work: Work, page: Page, retries: Sequence[Retry], *, failed: int, stored_until: datetime | None
) -> bool:
    """Make the new runs of a page, and pass over `failed` others. Whether it was made: not if the operation was stopped
    or continued elsewhere, or if the inputs were stored too long ago."""
    row = await ledger.fetchrow(
        _RETRY,
        work.id,
        work.cursor,
        page.last,
        page.is_last,
        [each.old for each in retries],
        [each.new for each in retries],
        [each.input_key for each in retries],
        stored_until,
        work.batch_id,
        failed,
    )
    if row is None:
        return False
    for pool in row["ready"]:
        ledger.wake(pool)
    await lanes.try_promote(ledger, row["held"])
    return True


# As for a batch: lanes are locked by name, then runs, and the state is checked again under the lock. After the last
# page the walk begins anew for runs that were skipped. Those that are cancelled, or asked to stop, do not match again.
_NOT_YET = "id = any($5::uuid[]) and state = any($6::text[]) and cancel_requested_at is null"
_LEFT = "(skipped + (select count(*) from seen) - (select count(*) from mine))::integer"
_CANCEL = f"""
with {_TURN.format(and_="")},
seen as materialized (select id, lane from runs where {_NOT_YET} and exists (select from turn)),
lane as materialized (
  select name from lanes where name = any(array(select lane from seen)) order by name for update),
mine as materialized (
  select id, state = 'running' as runs from runs
   where {_NOT_YET} and exists (select from turn) and (select count(*) from lane) >= 0 for update skip locked),
{runs.CANCELLED}
update operations set done = done + (select count(*) from asked) + (select count(*) from moved),
       cursor = case when $4 and {_LEFT} > 0 then '{selection.FIRST}'::uuid else $3::uuid end,
       skipped = case when $4 then 0 else {_LEFT} end,
       {_ENDS.format(is_last=f"$4 and {_LEFT} = 0")}
  from turn where operations.id = turn.id
returning array(select name from freed) as freed, state"""  # noqa: S608  # constants


async def cancel(ledger: Ledger, work: Work, page: Page) -> None:
    """Cancel the waiting runs of a page, and ask the running ones to stop."""
    values = [work.id, work.cursor, page.last, page.is_last, list(page.runs), selection.states("cancel", work.chosen)]
    for row in await ended.fetch(ledger, _CANCEL, *values):
        await lanes.try_promote(ledger, row["freed"])
        ledger.report_ends()


async def remove_old(ledger: Ledger, keep: timedelta) -> None:
    """Remove operations that ended longer ago than `keep`; the hour lets their callers read the end. By the primary
    key; they are few."""
    await ledger.execute(
        "delete from operations where id <= $1 and finished_at < now() - $2::interval",
        uuid7(keep.total_seconds()),
        max(keep, timedelta(hours=1)),
    )
