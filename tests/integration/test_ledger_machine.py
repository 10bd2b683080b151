"""The ledger as a state machine: submits, claims, stalls, settlements, cancels, retries, operations and limits in any
order, several at the same time, against the real PostgreSQL. A trigger records every version of every run; each step
checks the history. It takes a few seconds; `MACHINE_EXAMPLES=1000 pytest tests/integration/test_ledger_machine.py`
(with `--hypothesis-seed=N` to choose) tries other schedules for as long as they take.
"""

import asyncio
import collections
import contextlib
import json
import os
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, event, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from backcast.errors import IdempotencyConflict, UnknownLane
from backcast.ledger import (
    claims,
    dispatch,
    fleet,
    limits,
    maintenance,
    operations,
    pauses,
    recovery,
    routing,
    runs,
    settlement,
    submissions,
)
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.selection import Kind, Page
from backcast.ledger.settlement import Settlement
from backcast.models import Limits, PauseKind, PauseRequest, Problem, Selection, State, Submission, TaskType, uuid7
from tests.support.runs import FINAL

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "0"))
LEASE = timedelta(minutes=5)  # longer than any example takes: a lease ends only when a rule ends it
NOOP = TaskType(name="noop", pool="default", input_schema={"type": "object"})
OTHER = TaskType(name="other", pool="default", input_schema={"type": "object"})
NEXT = {
    None: {"paused", "held", "scheduled", "queued"},
    "paused": {"held", "queued", "cancelled", "expired"},
    "held": {"paused", "queued", "cancelled", "expired"},
    "scheduled": {"paused", "held", "queued", "failed", "cancelled", "expired"},
    "queued": {"paused", "held", "scheduled", "running", "cancelled", "expired"},
    "running": {"held", "scheduled", "queued", "completed", "failed", "cancelled"},
}
QUOTA = 60.0
"""Attempts per minute of the lane `quota`, whose limit stays."""

# The sleep makes statements that run at the same time overlap.
SEEN = """
create table seen (seq bigserial primary key, tx bigint not null, was jsonb, now jsonb not null);
create function see() returns trigger language plpgsql as $$ begin
  insert into backcast.seen (tx, was, now) values (txid_current(), to_jsonb(old), to_jsonb(new));
  if random() < 0.05 then perform pg_sleep(0.002); end if;
  return null;
end $$;
create trigger see after insert or update on runs for each row execute function see();
create index on seen ((now->>'id'), seq);
create function see_end() returns trigger language plpgsql as $$ declare was jsonb; begin
  select s.now into was from backcast.seen s where s.now->>'id' = new.id::text order by seq desc limit 1;
  insert into backcast.seen (tx, was, now) values (txid_current(), was, was || to_jsonb(new));
  return null;
end $$;
create trigger see after insert or update on ended for each row execute function see_end();
create trigger see after insert or update on ended_late for each row execute function see_end();
"""
FRESH = """
truncate runs, ended, ended_late, retries, batches, operations, idempotency_keys, workers, lanes, flights, pauses,
         seen"""

# One statement, so one snapshot: it holds also while others are at work.
COUNTED = """
select l.name, l.promoted, (select count(*) from runs r where r.lane = l.name and r.promoted
       and r.state in ('queued', 'running')) as really from lanes l"""

Op = tuple[str, dict[str, Any]]
INDEX = st.integers(0, 50)
LIMITS = st.sampled_from([(2, None), (1, None), (3, None), (0, None), (None, 120.0), (2, 6000.0)])
ENDS = st.lists(
    st.sampled_from(["completed", "failed", "again", "later", "parked", "unfit", "crashed", "back"]),
    min_size=1,
    max_size=5,
)
PAUSED = st.sampled_from(
    [
        (PauseKind.TASK, "noop"),
        (PauseKind.TASK, "other"),
        (PauseKind.LANE, "narrow"),
        (PauseKind.LANE, "wide"),
        (PauseKind.POOL, "default"),
    ]
)
RARELY = st.sampled_from([False] * 5 + [True])
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "submit": {
        "count": st.integers(1, 6),
        "task": st.sampled_from([NOOP, NOOP, OTHER]),
        "owner": st.sampled_from("ab"),
        "key": st.sampled_from([None, None, None, "k"]),
        "priority": st.sampled_from([0, 0, 5]),
        "run_at": st.sampled_from([None, None, None, -5, 5]),
        "deadline": st.sampled_from([None, None, None, None, -5, 5, 3600]),
        "lane": st.sampled_from([None, "narrow", "narrow", "wide", "quota"]),
        "max_attempts": st.integers(1, 3),
    },
    "claim": {
        "worker": INDEX,
        "route": st.sampled_from(["", "", "noop", "other"]),
        "limit": st.integers(1, 4),
        "prefetch": st.integers(0, 2),
        "lost": RARELY,
    },
    "settle": {"worker": INDEX, "ends": ENDS, "lost": RARELY},
    "start": {"worker": INDEX},
    "settle_stale": {"worker": INDEX, "ends": ENDS},
    "settle_twice": {"worker": INDEX, "ends": ENDS},
    "cancel": {"which": INDEX, "running": st.booleans()},
    "retry": {"which": INDEX},
    "operate": {
        "kind": st.sampled_from(["retry", "retry", "cancel"]),
        "chosen": st.sampled_from(
            [
                Selection(task="noop"),
                Selection(task="noop"),
                Selection(owner="a"),
                Selection(lane="narrow", state=State.CANCELLED),
                Selection(task="other", state=State.QUEUED),
            ]
        ),
    },
    "page": {"most": st.integers(1, 3), "twice": st.booleans()},
    "stop": {"which": INDEX},
    "beat": {"worker": INDEX},
    "stall": {"worker": INDEX, "seen": st.booleans()},
    "requeue": {},
    "dispatch_due": {},
    "route": {},
    "fail_late": {},
    "limit": {"lane": st.sampled_from(["narrow", "narrow", "wide"]), "most": LIMITS},
    "lift": {"lane": st.sampled_from(["narrow", "wide"])},
    "pause": {"what": PAUSED},
    "resume": {"what": PAUSED},
    "retire": {"worker": INDEX},
    "drop": {},
}
OFTEN = {
    "submit": 4,
    "claim": 8,
    "settle": 6,
    "settle_twice": 2,
    "stall": 2,
    "cancel": 2,
    "page": 3,
    "beat": 2,
    "dispatch_due": 2,
    "route": 2,
}
OPS = st.sampled_from([name for name in FIELDS for _ in range(OFTEN.get(name, 1))]).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries(FIELDS[name]))
)
SUBMIT = st.tuples(st.just("submit"), st.fixed_dictionaries(FIELDS["submit"]))


@dataclass(frozen=True)
class Asked:
    """An operation, and the runs that matched before it was recorded."""

    kind: Kind
    chosen: Selection
    batch_id: UUID | None
    matched: set[UUID]


class Machine(RuleBasedStateMachine):
    """Keeps the ledger's answers; the table `seen` keeps its changes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ledger: Ledger) -> None:
        super().__init__()
        self._run = loop.run_until_complete
        self.ledger = ledger
        self.base = datetime.now(UTC)
        self.shifted = 0.0
        self.workers: list[UUID] = []
        self.accepted: set[UUID] = set()
        self.claims: list[tuple[UUID, Claim]] = []
        self.open: dict[UUID, list[Claim]] = collections.defaultdict(list)
        self.settlements: dict[tuple[UUID, int], Settlement] = {}
        self.outcomes: dict[UUID, str] = {}
        """The outcome of an accepted final settlement; "cancelled" when the ledger answered so."""
        self.together = submissions.Submissions(ledger)
        self.requests: list[tuple[str, str, UUID | None, bool]] = []
        """(owner, request, run or none for a conflict, fresh) of every submission with the key."""
        self.ceiling: dict[str, float] = {"narrow": float("inf"), "wide": float("inf"), "quota": float("inf")}
        """The most that a lane may count: its limit, or its count when the limit was lowered."""
        self.paused: dict[tuple[str, str], object] = {}
        """Pauses that have been committed, and no resume of which has begun."""
        self.operations: dict[UUID, Asked] = {}
        self.last = 0
        self.healthy = UUID(int=0)
        self.is_broken = False

    # -- rules ------------------------------------------------------------------------------------------------------

    @initialize(narrow=LIMITS, count=st.integers(1, 3), first=st.lists(SUBMIT, min_size=1, max_size=4))
    def begin(self, narrow: tuple[int | None, float | None], count: int, first: list[Op]) -> None:
        async def begin() -> None:
            await self.ledger.execute(FRESH)
            await limits.limit(self.ledger, "quota", Limits(max_per_minute=QUOTA))
            await self._limit("narrow", narrow)
            for _ in range(count):
                await self._register(uuid7())
            await self._at_once(first)

        self._run(begin())

    @rule(ops=st.lists(OPS, min_size=1, max_size=5))
    def in_order(self, ops: list[Op]) -> None:
        for op in ops:
            self._run(self._at_once([op]))

    @rule(ops=st.lists(OPS, min_size=2, max_size=5), hold=st.sampled_from([None, None, "lanes", "runs"]))
    def at_once(self, ops: list[Op], hold: str | None) -> None:
        self._run(self._at_once(ops, hold))

    @rule(seconds=st.sampled_from([1, 10, 4000]))
    def time_passes(self, seconds: int) -> None:
        self._run(self._shift(seconds))

    def teardown(self) -> None:
        self._run(self._drain())
        self._run(self._quiet())

    # -- operations -------------------------------------------------------------------------------------------------

    async def _at_once(self, ops: list[Op], hold: str | None = None) -> None:
        self.is_broken = True
        doing: list[Coroutine[Any, Any, None]] = [getattr(self, f"_{name}")(**fields) for name, fields in ops]
        if len(doing) > 1:
            doing.append(self._count())
        tasks = await (self._held_up(doing, hold) if hold else self._started(doing))
        failed = [error for error in await asyncio.gather(*tasks, return_exceptions=True) if error is not None]
        if failed:
            raise failed[0]
        await self._check()
        self.is_broken = False

    async def _started(self, doing: list[Coroutine[Any, Any, None]]) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(coroutine) for coroutine in doing]

    async def _held_up(self, doing: list[Coroutine[Any, Any, None]], hold: str) -> list[asyncio.Task[None]]:
        """Let them come as far as they can without these rows: they then decide on an old snapshot."""
        rows = {"lanes": "lanes order by name", "runs": "runs where state in ('queued', 'running') order by id"}[hold]
        async with self.ledger.transaction() as connection:
            await connection.execute(f"select from {rows} for update")
            tasks = await self._started(doing)
            for _ in range(20):
                await asyncio.wait(tasks, timeout=0.005)
                waiting = await connection.fetchval(
                    """select count(*) from pg_stat_activity
                        where wait_event_type = 'Lock' and datname = current_database()"""
                )
                if (waiting or 0) >= sum(not task.done() for task in tasks):
                    break
        return tasks

    async def _submit(self, *, task: TaskType, count: int, key: str | None, max_attempts: int, **fields: Any) -> None:
        for name in ("run_at", "deadline"):
            if fields[name] is not None:
                fields[name] = self.base + timedelta(seconds=fields[name])
        if fields["deadline"] and fields["run_at"] and fields["deadline"] <= fields["run_at"]:
            fields["run_at"] = None  # refused otherwise
        submission = Submission(**fields)
        request = task.name + submission.model_dump_json(exclude_defaults=True)
        task = task.model_copy(update={"max_attempts": max_attempts})

        async def one() -> tuple[UUID | None, bool]:
            how: dict[str, Any] = {"input_text": "{}", "input_hash": b"", "idempotency_key": key}
            try:
                if count == 1:
                    submitted = await submissions.submit(self.ledger, task, submission, **how)
                else:
                    submitted = await self.together.submit(submissions.new(task, submission, **how))
            except IdempotencyConflict:
                return None, False
            return submitted.run.id, submitted.fresh

        for run_id, fresh in await asyncio.gather(*[one() for _ in range(count)]):
            if fresh and run_id is not None:
                assert run_id not in self.accepted
                self.accepted.add(run_id)
            if key:
                self.requests.append((submission.owner, request, run_id, fresh))

    async def _claim(self, *, worker: int, route: str, limit: int, prefetch: int, lost: bool) -> None:
        worker_id, paused = self._worker(worker), dict(self.paused)
        taken = await claims.claim(
            self.ledger,
            pool="default",
            cursor=0,
            limit=limit,
            prefetch=prefetch,
            worker_id=worker_id,
            lease=LEASE,
            route=route,
        )
        assert {c.task for c in taken} <= {task.name for task in self._tasks(worker_id)}, "it lacks the task"
        assert len(taken) <= limit + prefetch
        lanes = {row["id"]: row["lane"] for row in await self.ledger.fetch("select id, lane from all_runs")}
        for c in taken:
            for what in ("task", c.task), ("lane", lanes[c.id]), ("pool", "default"):
                assert what not in paused or self.paused.get(what) is not paused[what], f"{what} is paused"
        assert sum(not c.prefetched for c in taken) <= limit + sum(c.lost_fence is not None for c in taken)
        if not lost:
            self._took(worker_id, taken)

    def _took(self, worker_id: UUID, taken: list[Claim]) -> None:
        self.claims += [(worker_id, c) for c in taken]
        self.open[worker_id] += taken

    async def _start(self, *, worker: int) -> None:
        """A run that waited on its worker begins."""
        worker_id = self._worker(worker)
        if self.open[worker_id]:
            await claims.begin(self.ledger, worker_id, self.open[worker_id][0])

    async def _settle(self, *, worker: int, ends: list[str], lost: bool) -> None:
        worker_id, settlements = self._settlements(worker, ends)
        if lost:  # the answer to the first one
            await settlement.settle(self.ledger, worker_id, settlements)
        await self._send(worker_id, settlements[::-1])

    async def _settle_stale(self, *, worker: int, ends: list[str]) -> None:
        """Settle attempts that may long be over."""
        worker_id = self._worker(worker)
        latest = {c.id: c for w, c in self.claims if w == worker_id}
        some = [latest[run_id] for run_id in sorted(latest, key=lambda run_id: run_id.bytes[worker % 8 + 8])]
        await self._send(worker_id, [self._settlement(c, e) for c, e in zip(some, ends, strict=False)])

    async def _settle_twice(self, *, worker: int, ends: list[str]) -> None:
        """Send settlements again, in another order, while the first request is still under way."""
        worker_id, settlements = self._settlements(worker, ends)
        await asyncio.gather(self._send(worker_id, settlements), self._send(worker_id, settlements[::-1]))

    def _settlements(self, worker: int, ends: list[str]) -> tuple[UUID, list[Settlement]]:
        """Settlements of runs that a worker believes to hold; of a worker that holds some, if there is one."""
        busy = [worker_id for worker_id in self.workers if self.open[worker_id]] or self.workers
        worker_id = busy[worker % len(busy)]
        mine, self.open[worker_id] = self.open[worker_id][: len(ends)], self.open[worker_id][len(ends) :]
        return worker_id, [self._settlement(c, end) for c, end in zip(mine, ends, strict=False)]

    def _settlement(self, c: Claim, end: str) -> Settlement:
        """One attempt has one settlement, however often it is sent."""
        rest: dict[str, Any] = {"id": c.id, "fence": c.fence, "lane": c.lane, "retries_used": c.retries_used}
        match end:
            case "completed":
                rest |= {"state": "completed", "result": "1", "result_key": f"results/{c.id}/{c.fence}.json"}
            case "failed":
                rest |= {"state": "failed", "error": Problem(code="mine", title="t", detail="d")}
            case "again":
                rest |= {"state": "queued", "retries_used": c.retries_used + 1}
            case "later":
                rest |= {"state": "scheduled", "delay": 5.0, "retries_used": c.retries_used + 1}
            case "unfit":
                rest |= {"state": "scheduled", "delay": 5.0, "counts": False}
                rest |= {"route": f"{c.task}@refused", "error": routing.UNFIT_INPUT}
            case "crashed" if c.losses + 1 < c.max_attempts:
                rest |= {"state": "queued"}
            case "parked":
                rest |= {"state": "scheduled", "delay": 5.0, "counts": False}
            case _:
                rest |= {"state": "queued", "counts": False}
        return self.settlements.setdefault((c.id, c.fence), Settlement(**rest))

    async def _send(self, worker_id: UUID, settlements: list[Settlement]) -> None:
        settled = await settlement.settle(self.ledger, worker_id, settlements)
        assert settled.cancelled <= settled.accepted
        for each in settlements:
            if (each.id, each.fence) in settled.cancelled:
                self._ended(each.id, "cancelled")
            elif (each.id, each.fence) in settled.accepted and each.state in FINAL:
                self._ended(each.id, each.result_key or "failed")

    def _ended(self, run_id: UUID, outcome: str) -> None:
        assert self.outcomes.setdefault(run_id, outcome) == outcome, "two outcomes were accepted"

    async def _cancel(self, *, which: int, running: bool) -> None:
        of = [c.id for claims in self.open.values() for c in claims] if running else sorted(self.accepted)
        if of:
            await runs.cancel(self.ledger, of[which % len(of)])

    async def _retry(self, *, which: int) -> None:
        sql = "select id, task, owner, lane from all_runs where finished_at is not null order by id"
        if over := await self.ledger.fetch(sql):
            row = over[which % len(over)]
            again = Submission(owner=row["owner"], lane=row["lane"])
            how: dict[str, Any] = {"input_text": "{}", "input_hash": b"", "retry_of": row["id"]}
            made = await submissions.submit(self.ledger, NOOP if row["task"] == "noop" else OTHER, again, **how)
            self.accepted.add(made.run.id)

    async def _operate(self, *, kind: Kind, chosen: Selection) -> None:
        if chosen.state is (State.CANCELLED if kind == "cancel" else State.QUEUED):
            return
        rows = await self.ledger.fetch("select * from all_runs")
        matched = {row["id"] for row in rows if _matches(row, kind, chosen)}
        batch_id = uuid7() if kind == "retry" else None
        recorded = await operations.record(self.ledger, kind, chosen, owner="a", key=None, batch_id=batch_id)
        self.operations[recorded.operation.id] = Asked(kind, chosen, batch_id, matched)

    async def _page(self, *, most: int, twice: bool) -> None:
        """A page of each operation, which two stewards make at the same time if both believe that they lead."""
        for work in await operations.running(self.ledger):
            page = await operations.find(self.ledger, work, work.cursor)
            if len(page.runs) > most:
                some = list(page.runs)[:most]
                page = Page(dict.fromkeys(some), some[-1], is_last=False)
            await asyncio.gather(*[self._make(work, page) for _ in range(1 + twice)])

    async def _make(self, work: operations.Work, page: Page) -> None:
        if work.kind == "cancel":
            await operations.cancel(self.ledger, work, page)
        else:
            retries = [operations.Retry(run, uuid7(), None) for run in page.runs]
            await operations.retry(self.ledger, work, page, retries, failed=0, stored_until=None)

    async def _stop(self, *, which: int) -> None:
        if self.operations:
            await operations.stop(self.ledger, sorted(self.operations)[which % len(self.operations)])

    async def _register(self, worker_id: UUID) -> None:
        if worker_id not in self.workers:
            self.workers.append(worker_id)
        tasks = self._tasks(worker_id)
        await fleet.register(self.ledger, worker_id, pool="default", host="h", version="1", slots=4, tasks=tasks)

    def _tasks(self, worker_id: UUID) -> list[TaskType]:
        """Workers differ; the one that ends everything has all tasks."""
        if worker_id == self.healthy:
            return [NOOP, OTHER]
        return [[NOOP, OTHER], [NOOP], [OTHER]][self.workers.index(worker_id) % 3]

    async def _beat(self, *, worker: int) -> None:
        worker_id = self._worker(worker)
        known = {(c.id, c.fence) for w, c in self.claims if w == worker_id}
        async with self.ledger.transaction() as connection:
            beat = await fleet.beat(connection, worker_id, busy=0, draining=False, settled=0)
        if beat is None:
            await self._register(worker_id)
        held = beat.holds if beat else {}
        # A run whose claim's answer was lost is released.
        lost = [(run_id, h) for run_id, h in held.items() if (run_id, h.fence) not in known]
        await self._send(
            worker_id,
            [
                Settlement(id=i, fence=h.fence, lane=h.lane, state="queued", counts=False, retries_used=h.retries_used)
                for i, h in lost
            ],
        )

    async def _stall(self, *, worker: int, seen: bool) -> None:
        await self.ledger.execute(
            "update workers set heartbeat_at = now() - interval '1 day' where id = $1", self._worker(worker)
        )
        if seen:
            await self._requeue()

    async def _requeue(self) -> None:
        await recovery.requeue(self.ledger, LEASE)

    async def _dispatch_due(self) -> None:
        await dispatch.dispatch_due(self.ledger)

    async def _route(self) -> None:
        await routing.apply(self.ledger)

    async def _fail_late(self) -> None:
        await routing.fail_late(self.ledger, unknown_after=timedelta(seconds=5))

    async def _limit(self, lane: str, most: tuple[int | None, float | None]) -> None:
        self.ceiling[lane] = float("inf")  # until the check sees the runs that were promoted before
        with contextlib.suppress(UnknownLane):  # lifted at the same moment
            await limits.limit(self.ledger, lane, Limits(max_running=most[0], max_per_minute=most[1]))

    async def _pause(self, *, what: tuple[PauseKind, str]) -> None:
        await pauses.pause(self.ledger, *what, PauseRequest())
        self.paused[what] = object()

    async def _resume(self, *, what: tuple[PauseKind, str]) -> None:
        self.paused.pop(what, None)
        await pauses.resume(self.ledger, *what)
        self.paused.pop(what, None)

    async def _lift(self, *, lane: str) -> None:
        self.ceiling[lane] = float("inf")
        with contextlib.suppress(UnknownLane):
            await limits.lift(self.ledger, lane)

    async def _retire(self, *, worker: int) -> None:
        await fleet.retire(self.ledger, self._worker(worker))

    async def _drop(self) -> None:
        await maintenance.remove_silent_workers(self.ledger, timedelta(hours=12))

    def _worker(self, number: int) -> UUID:
        return self.workers[number % len(self.workers)]

    async def _shift(self, seconds: float) -> None:
        await self.ledger.execute(
            """update runs set run_at = run_at - $1::interval, deadline = deadline - $1::interval,
                               parked_at = parked_at - $1::interval
                where state in ('paused', 'held', 'scheduled', 'queued')""",
            timedelta(seconds=seconds),
        )
        await self.ledger.execute(
            "update lanes set refilled_at = refilled_at - $1::interval", timedelta(seconds=seconds)
        )
        await self.ledger.execute(
            "update workers set started_at = started_at - $1::interval", timedelta(seconds=seconds)
        )
        self.shifted += seconds

    # -- invariants -------------------------------------------------------------------------------------------------

    async def _count(self) -> None:
        for row in await self.ledger.fetch(COUNTED):
            assert row["promoted"] == row["really"], dict(row)
            assert row["promoted"] <= self.ceiling[row["name"]], (dict(row), self.ceiling)

    async def _check(self) -> None:
        await self._count()
        history = await self.ledger.fetch("select * from seen where seq > $1 order by seq", self.last)
        losses: dict[tuple[int, str], list[tuple[dict[str, Any], dict[str, Any]]]] = collections.defaultdict(list)
        for row in history:
            was, now = json.loads(row["was"] or "null"), json.loads(row["now"])
            try:
                self._follow(was, now)
            except AssertionError:
                note(f"was {was}")
                note(f"now {now}")
                raise
            if was and was["lost_fence"] != now["lost_fence"]:
                losses[row["tx"], was["worker_id"]].append((was, now))
            self.last = row["seq"]
        for lost in losses.values():
            self._counting(lost)
        rows = {row["id"]: row for row in await self.ledger.fetch("select * from all_runs")}
        await self._check_operations(rows)
        assert set(rows) == self.accepted, "a run is lost, or was never accepted"
        for run_id, row in rows.items():
            self._check_run(run_id, row)
        self._keys()
        for row in await self.ledger.fetch("select * from lanes where name <> 'quota'"):
            limit = row["max_running"] if row["max_running"] is not None else float("inf")
            self.ceiling[row["name"]] = max(limit, min(self.ceiling[row["name"]], row["promoted"]))
        promoted, elapsed = await self.ledger.fetchrow(  # type: ignore[misc]
            """select count(*) filter (where now->>'lane' = 'quota' and was->>'state' = 'held'
                                         and now->>'state' = 'queued'),
                      extract(epoch from now() - $1::timestamptz)::float8 from seen""",
            self.base,
        )
        assert promoted <= 2 + QUOTA / 60 * (elapsed + self.shifted)

    def _follow(self, was: dict[str, Any] | None, now: dict[str, Any]) -> None:
        """One change of one run."""
        state = now["state"]
        now = {"result_key": None, "finished_at": None} | now
        was = was and {"result_key": None, "finished_at": None} | was
        assert (state == "completed") == (now["result_key"] is not None)
        assert (state in FINAL) == (now["finished_at"] is not None)
        assert not (now["promoted"] and state in ("paused", "held", "scheduled"))
        assert state in FINAL or (now["parked_at"] is not None) == (state == "scheduled" and now["route"] != "")
        if was is None:
            assert state in NEXT[None]
            assert (now["fence"], now["promoted"], now["worker_id"]) == (0, False, None)
            return
        changed = {name for name in now if now[name] != was.get(name)}
        assert was["state"] not in FINAL, "an outcome changed"
        if state == was["state"]:
            assert (
                changed <= {"run_at", "deadline", "parked_at"}
                or (state in ("queued", "scheduled") and changed == {"route"})
                or (
                    state == "running"
                    and (
                        changed == {"prefetched"}
                        or (was["cancel_requested_at"] is None and changed == {"cancel_requested_at"})
                    )
                )
            ), changed
            return
        event(f"{was['state']} → {state}")
        assert state in NEXT[was["state"]]
        assert was["cancel_requested_at"] is None or state == "cancelled", "a cancel was lost"
        assert now["fence"] == was["fence"] + (state == "running"), "only a claim raises the fence, by one"
        assert "worker_id" not in changed or state == "running"
        assert now["lane"] == was["lane"]
        if "promoted" in changed:
            assert now["promoted"] == (was["state"] == "held")
            assert was["state"] in ("held", "running") or state in ("paused", "held", "scheduled")
        assert 0 <= now["attempts_used"] - was["attempts_used"] <= (was["state"] == "running")
        assert 0 <= now["retries_used"] - was["retries_used"] <= now["attempts_used"] - was["attempts_used"]
        assert now["attempts_used"] - now["retries_used"] <= now["max_attempts"], "more losses than allowed"
        if (was["state"] == "queued" and state == "scheduled") or (was["state"] == "scheduled" and state == "failed"):
            assert now["route"] != "", "it did not wait for a worker that can do it"
            assert now["attempts_used"] == was["attempts_used"]
        if state == "failed" and now["error"]["code"] == "worker_lost":
            assert now["attempts_used"] - now["retries_used"] == now["max_attempts"]

    def _counting(self, lost: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """A worker's loss counts against at least one of the runs lost with it, unless none had been started that may
        be the reason."""
        started = [(was, now) for was, now in lost if not was["prefetched"] and not _has_lost_executors_only(was)]
        counted = [was for was, now in lost if now["attempts_used"] > was["attempts_used"]]
        assert all(not was["prefetched"] for was in counted), "the loss counts against a run that had not been started"
        if any(was["cancel_requested_at"] is None for was, _ in started):
            assert counted, f"the loss counts against none of {len(started)} started runs"

    def _check_run(self, run_id: UUID, row: asyncpg.Record) -> None:
        """One run, as it is now."""
        outcome = self.outcomes.get(run_id)
        if outcome == "cancelled":
            assert row["state"] == "cancelled"
        elif outcome == "failed":
            assert (row["state"], json.loads(row["error"])["code"]) == ("failed", "mine")
        elif outcome is not None:
            assert (row["state"], row["result_key"]) == ("completed", outcome)
        if row["state"] == "completed":
            assert row["result_key"] == outcome == f"results/{run_id}/{row['fence']}.json", "its settlement was refused"
        held = [(w, c) for w, c in self.claims if c.id == run_id]
        fences = [c.fence for _, c in held]
        assert len(fences) == len(set(fences)), "one attempt was claimed twice"
        assert max(fences, default=0) <= row["fence"]
        for w, c in held:
            if c.fence == row["fence"]:
                assert w == row["worker_id"]
        assert row["state"] != "running" or row["worker_id"] is not None

    async def _check_operations(self, rows: dict[UUID, asyncpg.Record]) -> None:
        """Each has repeated a run once, and none that it was not asked for; one that is completed has left none out."""
        linked = [(row["run_id"], row["retry_id"]) for row in await self.ledger.fetch("select * from retries")]
        assert sorted(linked) == sorted((row["retry_of"], i) for i, row in rows.items() if row["retry_of"] is not None)
        assert all(rows[old]["finished_at"] is not None for old, _ in linked), "a run was repeated before its end"
        made = {i: row for i, row in rows.items() if row["batch_id"] is not None}
        self.accepted |= made.keys()
        for operation, asked in self.operations.items():
            found = await operations.get(self.ledger, operation)
            if asked.kind == "cancel":
                left = [rows[i] for i in asked.matched if rows[i]["finished_at"] is None]
                if found.state == "completed" and asked.chosen.state is None:
                    assert all(row["cancel_requested_at"] is not None for row in left), "it has left some out"
                continue
            [size] = await self.ledger.fetch("select size from batches where id = $1", asked.batch_id)
            repeated = [row["retry_of"] for row in made.values() if row["batch_id"] == asked.batch_id]
            assert len(repeated) == len(set(repeated)), "a run was repeated twice"
            assert found.done == size["size"] == len(repeated)
            assert (found.skipped, found.failed) == (0, 0)
            assert all(_matches(rows[i], "retry", asked.chosen) for i in repeated)
            assert all(rows[i]["finished_at"] <= found.created_at for i in repeated), "it had not ended"
            if found.state == "completed":
                assert asked.matched <= {*repeated}, "it has left some out"

    def _keys(self) -> None:
        """One key has one run, that of the first request."""
        for owner in {owner for owner, *_ in self.requests}:
            mine = [(request, run_id, fresh) for o, request, run_id, fresh in self.requests if o == owner]
            [(first, run_id)] = [(request, run_id) for request, run_id, fresh in mine if fresh]
            for request, got, _ in mine:
                assert got == (run_id if request == first else None)

    async def _quiet(self) -> None:
        """Background tasks end before the next example begins."""
        background = asyncio.all_tasks() - {asyncio.current_task()}
        if background:
            await asyncio.wait(background, timeout=10)

    async def _drain(self) -> None:
        """A healthy worker ends every run that no limit of 0 holds; when limits are lifted, those too."""
        if self.is_broken:  # the cause is what matters
            return
        for worker in range(len(self.workers)):
            await self._stall(worker=worker, seen=False)
        self.healthy = healthy = uuid7()
        await self._register(healthy)
        for what in [*self.paused]:
            await self._resume(what=what)
        for lift in (False, True):
            if lift:
                for lane in ("narrow", "wide", "quota"):
                    await self._lift(lane=lane)
            left: list[asyncpg.Record] = []
            for _ in range(10 + 2 * len(self.accepted)):
                await self._page(most=50, twice=False)
                await self._shift(4000)
                await self._requeue()
                await self._dispatch_due()
                await self._route()
                for route in ("", *routing.routes_to([NOOP, OTHER])):
                    taken = await claims.claim(
                        self.ledger, pool="default", cursor=0, limit=50, worker_id=healthy, lease=LEASE, route=route
                    )
                    self._took(healthy, taken)
                await self._settle(worker=len(self.workers) - 1, ends=["completed"] * 150, lost=False)
                left = await self.ledger.fetch(
                    """select r.id, r.state, r.lane, r.worker_id, r.run_at, r.error, r.retry_of, l.max_running
                         from all_runs r left join lanes l on l.name = r.lane
                        where r.state = any($1) and not (r.state = 'held' and l.max_running = 0)""",
                    list({*NEXT} - {None}),
                )
                if not left and not await operations.running(self.ledger):
                    break
            await self._check()
            assert not left, f"never ended: {left}"
        assert not await operations.running(self.ledger)


def _has_lost_executors_only(row: dict[str, Any]) -> bool:
    losses = row["attempts_used"] - row["retries_used"]
    return row["lost_fence"] is None and losses >= max(1, min(2, row["max_attempts"] - 1))


def _matches(row: asyncpg.Record, kind: Kind, chosen: Selection) -> bool:
    """Whether an operation is for this run, but for the time."""
    if any(getattr(chosen, name) not in (None, row[name]) for name in ("task", "owner", "lane")):
        return False
    if kind == "retry":
        return row["state"] in (["failed", "expired"] if chosen.state is None else [chosen.state.value])
    waits = row["state"] in NEXT[None]
    return waits or (chosen.state is None and row["state"] == "running")


@pytest.mark.timeout(1800 + 30 * EXAMPLES)  # on a busy machine; and a failure is shrunk, which takes minutes
def test_every_schedule_keeps_the_ledgers_promises(database: str) -> None:
    loop = asyncio.new_event_loop()
    ledger = Ledger(database, pool=12)
    loop.run_until_complete(ledger.execute(SEEN))
    try:
        run_state_machine_as_test(
            lambda: Machine(loop, ledger),  # type: ignore[arg-type]  # any factory will do
            settings=settings(
                max_examples=EXAMPLES or 60,
                stateful_step_count=40,
                derandomize=not EXAMPLES,
                database=None,
                deadline=None,
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        loop.run_until_complete(ledger.aclose())
        loop.close()


# Schedules that it found, or that were found while it was written.


async def _one(ledger: Ledger, worker: UUID) -> None:
    await fleet.register(ledger, worker, pool="default", host="h", version="1", slots=1, tasks=[NOOP])
    await submissions.submit(ledger, NOOP, Submission(), input_text="{}", input_hash=b"")


async def test_a_worker_that_retires_while_its_claim_is_under_way_leaves_nothing_behind(ledger: Ledger) -> None:
    worker, other = uuid7(), uuid7()
    await _one(ledger, worker)
    async with ledger.transaction() as connection:
        [row] = await connection.fetch(claims._CLAIM, "default", 0, 1, worker, LEASE, 1, "")
        assert row["id"] is not None
        await fleet.retire(ledger, worker)  # sees no run of its own yet
    assert list((await recovery.requeue(ledger, LEASE)).values()) == ["queued"]
    await fleet.register(ledger, other, pool="default", host="h", version="1", slots=1, tasks=[NOOP])
    assert await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=other, lease=LEASE)


async def test_two_attempts_of_one_run_in_one_batch_are_distinguished(ledger: Ledger) -> None:
    """Its first attempt was lost while the worker stalled, and the same worker claimed it again."""
    worker, held = uuid7(), list[Claim]()
    await _one(ledger, worker)
    for _ in range(2):
        held += await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=worker, lease=LEASE)
        if len(held) == 1:
            await ledger.execute("update workers set heartbeat_at = now() - interval '1 day'")
            await recovery.requeue(ledger, LEASE)
            await ledger.execute("update workers set heartbeat_at = now()")
    first, second = held
    batch = [
        Settlement(id=second.id, fence=second.fence, state="completed", result="1", result_key="k"),
        Settlement(id=first.id, fence=first.fence, state="scheduled", delay=1.0, retries_used=1),
    ]
    for _ in range(2):  # the answer to the first one was lost
        assert (await settlement.settle(ledger, worker, batch)).accepted == {(second.id, second.fence)}


async def test_a_run_that_failed_with_its_worker_ignores_the_workers_late_settlement(ledger: Ledger) -> None:
    worker = uuid7()
    await _one(ledger, worker)
    await ledger.execute("update runs set max_attempts = 1")
    [held] = await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=worker, lease=LEASE)
    await ledger.execute("update workers set heartbeat_at = now() - interval '1 day'")
    assert await recovery.requeue(ledger, LEASE) == {held.id: "failed"}
    late = Settlement(id=held.id, fence=held.fence, state="failed", error=Problem(code="mine", title="t", detail="d"))
    assert (await settlement.settle(ledger, worker, [late])).accepted == set()


async def test_a_worker_that_comes_during_a_pause_gets_the_input_that_others_refused(ledger: Ledger) -> None:
    first, second = uuid7(), uuid7()
    await _one(ledger, first)
    [held] = await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=first, lease=LEASE)
    refused = Settlement(
        id=held.id, fence=held.fence, state="scheduled", counts=0, route="noop@refused", error=routing.UNFIT_INPUT
    )
    await settlement.settle(ledger, first, [refused])
    await pauses.pause(ledger, PauseKind.TASK, "noop", PauseRequest())
    newer = NOOP.model_copy(update={"input_schema": {"type": "object", "title": "newer"}})
    await fleet.register(ledger, second, pool="default", host="h", version="2", slots=1, tasks=[newer])
    await pauses.resume(ledger, PauseKind.TASK, "noop")
    await routing.apply(ledger)
    [again] = await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=second, lease=LEASE)
    assert again.id == held.id
