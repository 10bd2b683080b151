"""Batches: runs that are recorded in one transaction, all or none, and are counted, read and cancelled as one."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from backcast.errors import IdempotencyConflict, InvalidInput, UnknownBatch
from backcast.ledger import ended, lanes, reading, waiting
from backcast.ledger.connection import REFUSED, Ledger
from backcast.ledger.runs import CANCELLED, outside
from backcast.ledger.submissions import INSERT, New, columns, too_late
from backcast.models import Batch, Problem, State
from backcast.process.outages import backoff

SLICE = 500
"""Runs per statement: between two statements the process does other work."""
_IN_TIME = 10_000
"""Runs that one time-out is long enough for."""
PAGE = 100
"""Results read at a time; each may bring 32 KiB."""
AT_ONCE = 1000
"""Runs cancelled by one statement."""
COUNTED = 100_000
"""Runs that a list of batches counts: about 0.1 s of the database."""
_STATE = f"case when state in {waiting.NOT_READY} then 'queued' else state end"
"""SQL: the state of a run as callers see it."""


@dataclass(frozen=True, slots=True)
class SubmittedBatch:
    batch: Batch
    fresh: bool
    """False when an earlier request with the same Idempotency-Key made this batch."""


# As for runs: the unique index on (owner, idem_key) lets one of any number of racing requests insert; the others wait
# until it has committed the whole batch.
_RECORD = f"""
insert into batches (id, owner, idem_key, request_hash, size, skipped, errors) values ($1, $2, $3, $4, $5, $6, $7)
on conflict (owner, idem_key) where idem_key is not null do update set idem_key = excluded.idem_key
returning id, owner, size, skipped, {reading.time("created_at")}, request_hash, xmax = 0 as fresh"""  # noqa: S608  # constants


# A batch of many statements may take longer than a pause is kept after its end, and than a new limit looks for runs. So
# what was true for its first rows is looked up again before the commit; they are nobody else's yet.
_LOOK_AGAIN = f"""
update runs r set state = {waiting.ready("r")}
 where batch_id = $1 and state in ('queued', 'paused') and state <> {waiting.ready("r")}
returning pool, lane, state"""  # noqa: S608  # constants


async def submit(
    ledger: Ledger,
    batch_id: UUID,
    owner: str,
    pieces: Iterable[Sequence[New]],
    *,
    size: int,
    key: str | None,
    request_hash: bytes,
    skipped: int = 0,
    errors: str | None = None,
) -> SubmittedBatch:
    """Record a batch and its runs, a piece at a time; when this returns they are durable. `errors` are JSON Lines about
    the lines that were skipped.

    Raises:
        IdempotencyConflict: the key belongs to another batch of this owner.
        StoreUnavailable: the batch has taken so long that its stored inputs may be gone.
    """
    ready, held = set[str](), set[str]()

    def note(runs: Sequence[asyncpg.Record]) -> None:
        ready.update(run["pool"] for run in runs if run["state"] == "queued")
        held.update(run["lane"] for run in runs if run["state"] == "held")

    try:
        async with ledger.transaction(times=1 + size // _IN_TIME) as connection:
            row = await connection.fetchrow(_RECORD, batch_id, owner, key, request_hash, size, skipped, errors)
            assert row is not None
            statements = 0
            for piece in pieces if row["fresh"] else ():
                recorded = await connection.fetch(INSERT, *columns(piece))
                if not recorded:
                    raise too_late()
                note(recorded)
                statements += 1
            if statements > 1:
                note(await connection.fetch(_LOOK_AGAIN, batch_id))
    except REFUSED as error:
        raise InvalidInput(f"The batch can't be stored: {error}.") from None
    if not row["fresh"]:
        if row["request_hash"] != request_hash:
            raise IdempotencyConflict(
                "An earlier batch of this owner used the same Idempotency-Key for something else: use a new key for a"
                " new batch, or repeat the earlier one unchanged."
            )
        return SubmittedBatch(await get(ledger, row["id"]), fresh=False)
    for pool in ready:
        ledger.wake(pool)
    await lanes.try_promote(ledger, held)
    return SubmittedBatch(_batch(row, {State.QUEUED: size}), fresh=True)


async def repeated(ledger: Ledger, owner: str, key: str, request_hash: bytes) -> SubmittedBatch | None:
    """The answer to a request that has made a batch already, whatever would refuse it by now."""
    sql = "select id from batches where owner = $1 and idem_key = $2 and request_hash = $3"
    row = await ledger.fetchrow(sql, owner, key, request_hash)
    return SubmittedBatch(await get(ledger, row["id"]), fresh=False) if row is not None else None


def _batch(row: asyncpg.Record, states: dict[State, int], operation: UUID | None = None) -> Batch:
    given = {name: row[name] for name in ("id", "owner", "size", "skipped", "created_at")}
    return Batch(**given, states=states, operation_id=operation)


async def errors(ledger: Ledger, batch_id: UUID) -> str:
    """JSON Lines about the lines that were skipped. Raises `UnknownBatch`."""
    row = await ledger.fetchrow("select errors from batches where id = $1", batch_id)
    if row is None:
        raise _unknown(batch_id)
    return row["errors"] or ""


def _unknown(batch_id: UUID) -> UnknownBatch:
    return UnknownBatch(f"There is no batch {batch_id}: it was never accepted here, or it has been removed.")


async def get(ledger: Ledger, batch_id: UUID) -> Batch:
    """With its runs counted by state (index runs_in_batch). Raises `UnknownBatch`."""
    # The operation first: if it has ended, the runs that are counted next are all that it has made.
    row = await ledger.fetchrow(
        f"""select id, owner, size, skipped, {reading.time("created_at")}, (
                     select o.id from operations o where o.state = 'running' and o.batch_id = b.id) as operation_id
              from batches b where id = $1""",  # noqa: S608  # constants
        batch_id,
    )
    if row is None:
        raise _unknown(batch_id)
    counts = await ledger.fetch(
        f"""select {_STATE} as state, count(*) as runs
              from all_runs where batch_id = $1 group by 1 order by 1""",  # noqa: S608  # a constant
        batch_id,
    )
    return _batch(row, {State(count["state"]): count["runs"] for count in counts}, row["operation_id"])


# Ids are in the order of time: the end of the primary key is read. Runs are counted by runs_in_batch, and no more of
# them than $2: the sizes of the batches show beforehand how far that goes.
_LATEST = f"""
with latest as (
  select *, sum(size) over (order by id desc) as runs from (
    select id, owner, size, skipped, {reading.time("created_at")} from batches order by id desc limit $1) b),
counted as (
  select batch_id, {_STATE} as state, count(*) as runs
    from all_runs where batch_id = any(array(select id from latest where runs <= $2)) group by 1, 2)
select l.*, (select json_object_agg(c.state, c.runs) from counted c where c.batch_id = l.id) as states
  from latest l order by id desc"""  # noqa: S608  # constants


async def latest(ledger: Ledger, limit: int) -> list[Batch]:
    """The newest ones. Those have their states that have at most `COUNTED` runs together with all newer ones."""
    rows = await ledger.fetch(_LATEST, limit, COUNTED)
    return [
        _batch(row, {State(state): runs for state, runs in json.loads(row["states"] or "{}").items()}) for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Item:
    """A run of a batch with its result: `text` holds a small one, `key` names the object in the store."""

    id: UUID
    state: State
    text: str | None
    key: str | None
    error: Problem | None
    metadata: dict[str, str]


async def results(ledger: Ledger, batch_id: UUID) -> AsyncIterator[Item]:
    """The runs in the order in which they were submitted, whether they have ended or not. They are read in pages, and
    each page shows the states of its own moment."""
    after = UUID(int=0)
    while True:
        rows = await ledger.fetch(
            """select id, state, result, result_key, error, metadata from all_runs where batch_id = $1 and id > $2
                order by id limit $3""",
            batch_id,
            after,
            PAGE,
        )
        for row in rows:
            state = outside(row["state"])
            error = reading.problem(row["error"]) if row["error"] and state.is_final else None
            metadata = {name: str(value) for name, value in reading.mapping(row["metadata"]).items()}
            yield Item(row["id"], state, row["result"], row["result_key"], error, metadata)
        if len(rows) < PAGE:
            return
        after = rows[-1]["id"]


# The bulk form of the statement that cancels one run, with the same order of locks: see `runs.CANCELLED`.
_CANCEL = f"""
with due as materialized (
  select id, lane from runs where batch_id = $1 and id > $2 and cancel_requested_at is null order by id limit $3),
lane as materialized (
  select name from lanes where name = any(array(select lane from due)) order by name for update),
mine as materialized (
  select id, state = 'running' as runs from runs
   where id = any(array(select id from due)) and (select count(*) from lane) >= 0 for update skip locked),
{CANCELLED}
select (select count(*) from due) as due, (select max(id::text)::uuid from due) as last,
       (select count(*) from asked) + (select count(*) from moved) as cancelled,
       array(select name from freed) as freed"""  # noqa: S608  # constants


async def cancel(ledger: Ledger, batch_id: UUID) -> Batch:
    """Cancel the waiting runs, and ask the running ones to stop. Raises `UnknownBatch`.

    An operation that adds runs is stopped first; the lock of its row waits for the page that it is making."""
    if (await get(ledger, batch_id)).operation_id is not None:
        await ledger.execute(
            """update operations set state = 'cancelled', finished_at = now()
                where state = 'running' and batch_id = $1""",
            batch_id,
        )
    for delay in backoff(0.01, 1.0):
        after, skipped = UUID(int=0), 0
        while rows := await ended.fetch(ledger, _CANCEL, batch_id, after, AT_ONCE):
            [row] = rows
            await lanes.try_promote(ledger, row["freed"])
            skipped += row["due"] - row["cancelled"]
            if row["due"] < AT_ONCE:
                break
            after = row["last"]
        ledger.report_ends()
        if not skipped:
            break
        await asyncio.sleep(delay)  # the statements that lock them end within milliseconds
    return await get(ledger, batch_id)
