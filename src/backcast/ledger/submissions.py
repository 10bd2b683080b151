"""Accepts runs: when a call here returns, they are durable.

Decides what an Idempotency-Key means, where a new run waits, which submissions share a commit. Checks no inputs.
"""

import asyncio
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from backcast.errors import (
    IdempotencyConflict,
    InvalidInput,
    LedgerFault,
    LedgerUnavailable,
    StoreUnavailable,
    Unavailable,
)
from backcast.ledger import lanes, waiting
from backcast.ledger.connection import REFUSED, Ledger
from backcast.ledger.runs import COLUMNS, LIVE_COLUMNS, shown
from backcast.models import Run, Submission, TaskType, uuid7
from backcast.process import tracing
from backcast.process.background import OnDemand

INLINE_INPUT = 64 * 1024
"""Bytes of JSON up to which an input lives in its row; a larger one lives in the store."""
RECORDED_WITHIN = timedelta(hours=12)
"""A run is recorded so soon after its input was stored, or never: the orphan sweep waits for twice as long."""
GROUP = 500
"""Most runs that one statement records, in a few milliseconds."""


class New(NamedTuple):
    """A run to be recorded: its row, in the order of `INSERT`."""

    id: UUID
    task: str
    pool: str
    owner: str
    priority: int
    run_at: datetime | None
    max_attempts: int
    idem_key: str | None
    request_hash: bytes | None
    input: str | None
    input_key: str | None
    metadata: str
    lane: str | None
    deadline: datetime | None
    batch_id: UUID | None
    signature: str
    retry_of: UUID | None = None
    trace: str | None = None
    """The `traceparent` of its request, if that is traced."""
    stored_until: datetime | None = None
    """Of a run with a stored input: see `stored_until`."""


@dataclass(frozen=True, slots=True)
class SubmittedRun:
    run: Run
    fresh: bool
    """False when an earlier request with the same Idempotency-Key made this run."""


# One parameter per column, each an array. Idempotency: the primary key of idempotency_keys lets one of any number of
# racing statements insert a key. The others wait for its commit and then *update* its row, so that RETURNING shows it
# ("do nothing" returns no row to the losers). `xmax = 0` is true only for a row that this statement inserted. A key may
# be in the arrays once, and keys come in one order, so that two statements with the same keys do not deadlock.
# $19: after this time the orphan sweep may remove stored inputs of these rows, so none of them is recorded.
# A row of `retries` has the id of its new run, which nobody else knows yet: its insert waits for nothing.
INSERT = f"""
with given as materialized (
  select * from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::smallint[], $6::timestamptz[],
              $7::integer[], $8::text[], $9::bytea[], $10::text[], $11::text[], $12::json[], $13::text[],
              $14::timestamptz[], $15::uuid[], $16::text[], $17::uuid[], $18::text[])
      as g(id, task, pool, owner, priority, run_at, max_attempts, idem_key, request_hash, input, input_key, metadata,
           lane, deadline, batch_id, signature, retry_of, trace)
   where $19::timestamptz is null or now() < $19),
keyed as (
  insert into idempotency_keys as k (owner, key, run_id, request_hash)
  select owner, idem_key, id, request_hash from given where idem_key is not null
      on conflict (owner, key) do update set key = excluded.key
  returning owner, key, run_id, request_hash, xmax = 0 as fresh),
made as (
  insert into runs (id, task, pool, owner, priority, state, run_at, max_attempts, input, input_key, metadata, lane,
                    deadline, batch_id, signature, retry_of, trace)
  select id, task, pool, owner, priority,
         case when run_at > now() then 'scheduled' else {waiting.ready("g")} end,
         coalesce(run_at, now()), max_attempts, input, input_key, metadata, lane, deadline, batch_id, signature,
         retry_of, trace
    from given g where idem_key is null or exists (select from keyed k where k.run_id = g.id and k.fresh)
  returning {LIVE_COLUMNS}, pool),
linked as (insert into retries (run_id, retry_id) select retry_of, id from made where retry_of is not null)
select m.*, k.owner as key_owner, k.key, k.run_id, k.request_hash from made m full join keyed k on k.run_id = m.id"""  # noqa: S608


def columns(rows: Sequence[New]) -> list[Any]:
    """The arguments of `INSERT`."""
    *values, until = zip(*rows, strict=True)
    return [*values, min((each for each in until if each is not None), default=None)]


async def stored_until(ledger: Ledger) -> datetime:
    """Asked before an input is stored: the run must be recorded by then. Both times are the database's, so no clock of
    ours matters, nor for how long this process is stopped in between."""
    row = await ledger.fetchrow("select now() + $1::interval as until", RECORDED_WITHIN)
    assert row is not None
    return row["until"]


def too_late() -> StoreUnavailable:
    return StoreUnavailable(
        f"Its input was stored more than {RECORDED_WITHIN} before the run could be recorded, and may have been removed"
        " since: send the request again, a large batch in parts."
    )


def new(
    task: TaskType,
    submission: Submission,
    *,
    run_id: UUID | None = None,
    input_text: str | None,
    input_key: str | None = None,
    input_hash: bytes,
    idempotency_key: str | None = None,
    batch_id: UUID | None = None,
    retry_of: UUID | None = None,
    stored_until: datetime | None = None,
) -> New:
    """Exactly one of `input_text` and `input_key` is given; `input_hash` is the digest of the input's JSON."""
    return New(
        id=run_id or uuid7(),
        task=task.name,
        pool=task.pool,
        owner=submission.owner,
        priority=submission.priority,
        run_at=submission.run_at,
        max_attempts=task.max_attempts,
        idem_key=idempotency_key,
        request_hash=hash_of(task.name, submission, input_hash, retry_of) if idempotency_key is not None else None,
        input=input_text,
        input_key=input_key,
        metadata=json.dumps(submission.metadata, ensure_ascii=False) if submission.metadata else "{}",
        lane=submission.lane or task.lane,
        deadline=submission.deadline,
        batch_id=batch_id,
        signature=task.signature,
        retry_of=retry_of,
        trace=tracing.parent(),
        stored_until=stored_until,
    )


def hash_of(task: str, submission: Submission, input_hash: bytes, retry_of: UUID | None) -> bytes:
    """Two requests with the same key are the same request if their hashes are."""
    rest = submission.model_dump_json(exclude={"input", "owner"}, exclude_defaults=True)
    repeated = b"" if retry_of is None else retry_of.bytes
    return hashlib.sha256(b"\n".join([task.encode(), input_hash, rest.encode(), repeated])).digest()


async def repeated(ledger: Ledger, owner: str, key: str, request_hash: bytes) -> SubmittedRun | None:
    """The answer to a request that has made a run already, whatever would refuse it by now."""
    sql = "select run_id from idempotency_keys where owner = $1 and key = $2 and request_hash = $3"
    if (row := await ledger.fetchrow(sql, owner, key, request_hash)) is None:
        return None
    answer = (await _earlier(ledger, {(owner, key): (row["run_id"], True)})).get((owner, key))
    return _result(answer) if answer is not None else None


Answer = SubmittedRun | IdempotencyConflict | Unavailable | LedgerFault | InvalidInput


async def submit(ledger: Ledger, task: TaskType, submission: Submission, **how: Any) -> SubmittedRun:
    """Record one run by itself; `how` as in `new`. Raises `IdempotencyConflict`: its key belongs to another request."""
    [answer], held = await _record(ledger, [new(task, submission, **how)])
    await lanes.try_promote(ledger, held)
    return _result(answer)


def _ignored(_seconds: float, _runs: int) -> None:
    pass


class Submissions:
    """Records the runs of one process. Runs that arrive while a statement is under way share the next statement and its
    commit; an idle process sends a run at once. It sends one statement at a time: with two, the groups are half as
    large and fewer runs are recorded in a second, with slow commits too."""

    def __init__(self, ledger: Ledger, measured: Callable[[float, int], object] = _ignored) -> None:
        """`measured` is called after each statement with its seconds, and the runs that it has made."""
        self._ledger, self._measured = ledger, measured
        self._waiting: deque[tuple[New, asyncio.Future[Answer]]] = deque()
        self._recording: asyncio.Task[None] | None = None
        self._held: set[str] = set()
        self._promoting = OnDemand("promote from the lanes of new runs", self._promote)

    async def submit(self, row: New) -> SubmittedRun:
        """When this returns, the run is durable; a caller that goes away meanwhile does not affect the others.

        Raises:
            IdempotencyConflict: the key belongs to another request of this owner.
        """
        mine: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, mine))
        if self._recording is None:
            self._recording = asyncio.create_task(self._record_all())
        try:
            async with asyncio.timeout(self._ledger.timeout):
                return _result(await mine)
        except TimeoutError:
            raise LedgerUnavailable(f"The database did not answer within {self._ledger.timeout:g} s.") from None

    async def _record_all(self) -> None:
        try:
            while group := self._next():
                try:
                    answers = await self._answers([row for row, _ in group])
                except Exception as error:  # noqa: BLE001  # a bug costs its group only, whose callers raise it
                    for _, waiting in group:
                        if not waiting.done():
                            waiting.set_exception(error)
                    continue
                for (_, waiting), answer in zip(group, answers, strict=True):
                    if not waiting.done():
                        waiting.set_result(answer)
        finally:
            self._recording = None

    def _next(self) -> list[tuple[New, asyncio.Future[Answer]]]:
        """As many runs as one statement takes; a second one with the same key waits for the next statement."""
        group, names, later = list[tuple[New, asyncio.Future[Answer]]](), set[object](), []
        while self._waiting and len(group) < GROUP:
            row, waiting = self._waiting.popleft()
            if waiting.done():  # gave up
                continue
            if (name := _name(row)) in names:
                later.append((row, waiting))
                continue
            names.add(name)
            group.append((row, waiting))
        self._waiting.extendleft(reversed(later))
        return group

    async def _answers(self, rows: list[New]) -> Sequence[Answer]:
        began, made = time.monotonic(), 0
        try:
            answers, held = await _record(self._ledger, rows)
            made = sum(isinstance(answer, SubmittedRun) and answer.fresh for answer in answers)
        except LedgerUnavailable as error:  # an exception for each, as each gets a traceback
            return [type(error)(error.detail, reason=error.reason) for _ in rows]
        except LedgerFault as error:
            return [error for _ in rows]
        except (*REFUSED, StoreUnavailable) as error:  # refused: sent one by one, only its own run fails
            if len(rows) == 1:
                late = isinstance(error, StoreUnavailable)
                return [error if late else InvalidInput(f"The run can't be stored: {error}.")]
            return [answer for row in rows for answer in await self._answers([row])]
        finally:
            self._measured(time.monotonic() - began, made)
        if held:
            self._held |= held
            self._promoting.ask()
        return answers

    async def _promote(self) -> None:
        held, self._held = self._held, set()
        await lanes.promote(self._ledger, held)


async def _record(ledger: Ledger, rows: Sequence[New]) -> tuple[Sequence[SubmittedRun | IdempotencyConflict], set[str]]:
    """Record all rows in one statement, or none; no two may have the same owner and key. Returns also the lanes to
    promote from."""
    hashes = {_name(row): row.request_hash for row in rows}
    found = dict[object, SubmittedRun | IdempotencyConflict]()
    earlier = dict[tuple[str, str], tuple[UUID, bool]]()
    ready, held = set[str](), set[str]()
    # In the order of their keys, see INSERT; the others may be anywhere.
    ordered = sorted(rows, key=lambda row: (row.owner, row.idem_key or "")) if len(rows) > 1 else rows
    for record in await ledger.fetch(INSERT, *columns(ordered)):
        name = record["id"] if record["key"] is None else (record["key_owner"], record["key"])
        if record["id"] is not None:
            if record["state"] == "queued":
                ready.add(record["pool"])
            elif record["state"] == "held":
                held.add(record["lane"])
            found[name] = SubmittedRun(shown(record), fresh=True)
        else:
            is_same = record["request_hash"] == hashes[name]
            earlier[record["key_owner"], record["key"]] = record["run_id"], is_same
    for pool in ready:
        ledger.wake(pool)
    if earlier:
        found |= await _earlier(ledger, earlier)
    if not found and not earlier:
        raise too_late()
    if again := [row for row in rows if _name(row) not in found]:
        answers, more = await _record(ledger, again)
        found |= zip(map(_name, again), answers, strict=True)
        held |= more
    return [found[_name(row)] for row in rows], held


_ANOTHER = (
    "An earlier request of this owner used the same Idempotency-Key for something else: use a new key for a new run, or"
    " repeat the earlier request unchanged."
)
# A key may outlive its run, which may have been kept for less long. Then it is free: the next statement takes it.
_FREE = """
delete from idempotency_keys k using unnest($1::text[], $2::text[], $3::uuid[]) as gone(owner, key, run_id)
 where k.owner = gone.owner and k.key = gone.key and k.run_id = gone.run_id
   and not exists (select from all_runs r where r.id = gone.run_id)"""


async def _earlier(
    ledger: Ledger, named: Mapping[tuple[str, str], tuple[UUID, bool]]
) -> dict[object, SubmittedRun | IdempotencyConflict]:
    """What requests that come again are answered, by the names of their keys: the earlier run, or that it was made by
    another request. None for keys whose run has been removed: they are free."""
    sql = f"select {COLUMNS} from all_runs where id = any($1)"  # noqa: S608  # a constant
    runs = {row["id"]: shown(row) for row in await ledger.fetch(sql, [run_id for run_id, _ in named.values()])}
    if gone := [(*name, run_id) for name, (run_id, _) in named.items() if run_id not in runs]:
        await ledger.execute(_FREE, *map(list, zip(*gone, strict=True)))
    return {
        name: SubmittedRun(runs[run_id], fresh=False) if is_same else IdempotencyConflict(_ANOTHER)
        for name, (run_id, is_same) in named.items()
        if run_id in runs
    }


def _name(row: New) -> object:
    """The name under which an answer finds its row: its key, or else its id."""
    return row.id if row.idem_key is None else (row.owner, row.idem_key)


def _result(answer: Answer) -> SubmittedRun:
    if isinstance(answer, SubmittedRun):
        return answer
    raise answer
