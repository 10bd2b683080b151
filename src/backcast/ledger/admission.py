"""How many runs may wait, in all and of one owner. Decides when a submission is refused, and when to ask again.

The limits are soft: what waits is counted at most once a second, and what this process accepts is added until the next
count, so each process may let in about a second's submissions too many. Nothing is written for it, and nobody pays for
a count but those who are near a limit: a row that every submission touches would cost two thirds of the throughput.
"""

import asyncio
import contextlib
import math
import time
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

from backcast.errors import InvalidInput, LedgerUnavailable, TooManyWaiting
from backcast.ledger.connection import Ledger

INTERVAL = 1.0
"""Seconds between two counts, or more when they take long: see `BURDEN`."""
BURDEN = 20.0
"""A count may keep the database busy for one twentieth of the time."""
NEAR = 64
"""It is counted again when this process has accepted one part in so many of what there was room for."""
OWNERS = 10_000
"""Owners that are remembered; whoever has not submitted for longest is forgotten, and counted anew when needed."""
WINDOW = 60.0
"""Seconds of the past from which the fleet's speed is taken."""
UNKNOWN = timedelta(seconds=30)
"""When to ask again while nothing is being settled."""

# Bounded, by index only (runs_ready, runs_waiting), and never exact for long: nothing is locked. An owner's runs in the
# queue of a pool lie side by side; pools are few.
_OWNERS = """
select asked.owner, (
         select count(*) from (
           select from (select distinct pool from task_types) p cross join lateral (
             select from runs where pool = p.pool and state = 'queued' and owner_key = asked.key limit $2) r
            limit $2) queued) + (
         select count(*) from (
           select from runs where state in ('held', 'scheduled') and owner_key = asked.key limit $2) later) as waiting
  from (select owner, hashtextextended(owner, 0) as key from unnest($1::text[]) as given(owner)) asked"""
_ALL = """
select null as owner,
       (select count(*) from (select from runs where state = 'queued' limit $1) q)
     + (select count(*) from (select from runs where state in ('held', 'scheduled') limit $1) l) as waiting"""


_SETTLED = "select coalesce(sum(settled), 0)::float8 as settled from workers"


@dataclass(slots=True)
class _Waiting:
    """What is known of the runs of an owner, or of all, that wait."""

    limit: int
    counted: int = 0
    since: int = 0
    """Runs that this process has accepted since they were counted."""
    at: float = -math.inf
    """When they were counted; until they are, there are none."""

    @property
    def room(self) -> int:
        return self.limit - self.counted - self.since

    @property
    def is_near(self) -> bool:
        return self.since * NEAR > self.limit - self.counted


class Admission:
    """Keeps the limits for one process."""

    def __init__(self, ledger: Ledger, *, most: int, most_per_owner: int) -> None:
        self._ledger = ledger
        self._all = _Waiting(most)
        self._most_per_owner = most_per_owner
        self._owners: OrderedDict[str, _Waiting] = OrderedDict()
        self._due: set[str | None] = set()
        self._counting = asyncio.Lock()
        self._counter: asyncio.Task[None] | None = None
        self._pause = INTERVAL
        self._settled: deque[tuple[float, float]] = deque(maxlen=100)

    async def admit(self, owner: str, runs: int = 1) -> None:
        """Let these runs in, or raise `TooManyWaiting`. One run costs no statement unless a limit has been reached."""
        for whose in (None, owner):
            waiting = self._waiting(whose)
            if runs > waiting.limit:
                raise InvalidInput(f"{runs} runs are more than may wait at once ({waiting.limit}): submit fewer.")
            if runs > 1 or runs > waiting.room:
                await self._count_now(whose)
            if runs > waiting.room:
                raise self._refusal(whose, waiting, runs)
        for whose in (None, owner):
            waiting = self._waiting(whose)
            waiting.since += runs
            if waiting.is_near:
                self._due.add(whose)
                self._counter = self._counter or asyncio.create_task(self._keep_counting())

    def _waiting(self, whose: str | None) -> _Waiting:
        if whose is None:
            return self._all
        waiting = self._owners.setdefault(whose, _Waiting(self._most_per_owner))
        self._owners.move_to_end(whose)
        if len(self._owners) > OWNERS:
            self._owners.popitem(last=False)
        return waiting

    async def _count_now(self, whose: str | None) -> None:
        """Before anyone is refused; unless it was done a moment ago, which all of a crowd then go by."""
        async with self._counting:
            if time.monotonic() - self._waiting(whose).at > self._pause:
                await self._count([whose])

    async def _keep_counting(self) -> None:
        try:
            while self._due:
                due = [self._due.pop() for _ in range(min(len(self._due), 1000))]
                async with self._counting:
                    with contextlib.suppress(LedgerUnavailable):
                        await self._count(due)
                await asyncio.sleep(self._pause)
        finally:
            self._counter = None

    async def _count(self, whose: Collection[str | None]) -> None:
        start = time.monotonic()
        known = {one: self._waiting(one) for one in whose}
        before = {one: waiting.since for one, waiting in known.items()}
        owners = [one for one in whose if one is not None]
        rows = await self._ledger.fetch(_OWNERS, owners, 2 * self._most_per_owner) if owners else []
        if None in known:
            rows += await self._ledger.fetch(_ALL, 2 * self._all.limit)
        for row in rows:
            waiting = known[row["owner"]]
            waiting.counted, waiting.since, waiting.at = row["waiting"], waiting.since - before[row["owner"]], start
        self._pause = max(INTERVAL, BURDEN * (time.monotonic() - start))
        row = await self._ledger.fetchrow(_SETTLED)
        assert row is not None
        self._settled.append((start, row["settled"]))

    def _refusal(self, whose: str | None, waiting: _Waiting, runs: int) -> TooManyWaiting:
        excess, speed = runs - waiting.room, self._speed()
        of = "" if whose is None else " of this owner"
        full = f"{waiting.limit - waiting.room} runs{of} wait, of at most {waiting.limit}"
        if not speed:
            nothing = f"{full}, and none has been seen to end lately: see whether workers are there, and ask again."
            return TooManyWaiting(nothing, retry_after=UNKNOWN)
        seconds = min(max(math.ceil(excess / speed), 1), 3600)
        sentence = f"{full}; about {speed:.3g} runs end in a second, so ask again in {seconds} s."
        return TooManyWaiting(sentence, retry_after=timedelta(seconds=seconds))

    def _speed(self) -> float:
        """Runs that the whole fleet settles in a second; 0 when it is not known. A worker that leaves takes its count
        with it: a sum that falls says nothing."""
        seen = [(at, settled) for at, settled in self._settled if at > time.monotonic() - WINDOW]
        if len(seen) < 2 or seen[-1][0] - seen[0][0] < INTERVAL / 2:
            return 0.0
        return sum(max(0.0, b[1] - a[1]) for a, b in pairwise(seen)) / (seen[-1][0] - seen[0][0])
