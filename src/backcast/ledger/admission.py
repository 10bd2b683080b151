"""Decides when a submission is refused because too many runs wait, in all or of one owner, and when to ask again.

The limits are soft: each process counts waiting runs at most once a second and adds the runs that it accepts meanwhile,
so it may accept about a second's submissions too many. It writes nothing, and only submissions near a limit pay for a
count: a row that every submission touches would cost two thirds of the throughput.
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
from backcast.ledger.waiting import NOT_READY
from backcast.process.background import OnDemand

INTERVAL = 1.0
"""Seconds between two counts, or more when they take long: see `BURDEN`."""
BURDEN = 20.0
"""Counting may keep the database busy for one twentieth of the time."""
NEAR = 64
"""A new count is due when this process has accepted one part in so many of the room that the last count found."""
OWNERS = 10_000
"""Owners with a kept count; the one without a submission for longest is dropped, and counted anew when needed."""
WINDOW = 60.0
"""The fleet's speed is taken from so many past seconds."""
UNKNOWN = timedelta(seconds=30)
"""The `retry_after` of a refusal while no run is being settled."""

# Each count is bounded, reads indexes only (runs_ready, runs_waiting) and locks nothing: it would not be exact for long
# anyway. In runs_ready an owner's runs of one pool and route lie side by side; pools are few, and queued runs on other
# routes than '' are left out.
_OWNERS = f"""
select asked.owner, (
         select count(*) from (
           select from (select distinct pool from task_types) p cross join lateral (
             select from runs where pool = p.pool and route = '' and state = 'queued' and owner_key = asked.key
              limit $2) r
            limit $2) queued) + (
         select count(*) from (
           select from runs where state in {NOT_READY} and owner_key = asked.key limit $2) later) as waiting
  from (select owner, hashtextextended(owner, 0) as key from unnest($1::text[]) as given(owner)) asked"""  # noqa: S608  # a constant
_ALL = f"""
select null as owner,
       (select count(*) from (select from runs where state = 'queued' limit $1) q)
     + (select count(*) from (select from runs where state in {NOT_READY} limit $1) l) as waiting"""  # noqa: S608  # a constant


_SETTLED = "select coalesce(sum(settled), 0)::float8 as settled from workers"


@dataclass(slots=True)
class _Waiting:
    """The number of waiting runs, of an owner or in all, as far as this process knows it."""

    limit: int
    counted: int = 0
    since: int = 0
    """Runs that this process has accepted since they were counted."""
    at: float = -math.inf
    """When they were counted; before the first count they are taken as none."""

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
        self._pause = INTERVAL
        self._counter = OnDemand("count the waiting runs", self._count_due, lambda: self._pause)
        self._settled: deque[tuple[float, float]] = deque(maxlen=100)

    async def admit(self, owner: str, runs: int = 1) -> None:
        """Admit these runs, or raise `TooManyWaiting`. One run costs no statement unless a limit has been reached."""
        for scope in (None, owner):
            waiting = self._waiting(scope)
            if runs > waiting.limit:
                raise InvalidInput(f"{runs} runs are more than may wait at once ({waiting.limit}): submit fewer.")
            if runs > 1 or runs > waiting.room:
                await self._count_now(scope)
            if runs > waiting.room:
                raise self._refusal(scope, waiting, runs)
        for scope in (None, owner):
            waiting = self._waiting(scope)
            waiting.since += runs
            if waiting.is_near:
                self._due.add(scope)
                self._counter.ask()

    def _waiting(self, scope: str | None) -> _Waiting:
        if scope is None:
            return self._all
        waiting = self._owners.setdefault(scope, _Waiting(self._most_per_owner))
        self._owners.move_to_end(scope)
        if len(self._owners) > OWNERS:
            self._owners.popitem(last=False)
        return waiting

    async def _count_now(self, scope: str | None) -> None:
        """Count before a refusal, unless a count was made a moment ago: concurrent submissions share one."""
        async with self._counting:
            if time.monotonic() - self._waiting(scope).at > self._pause:
                await self._count([scope])

    async def _count_due(self) -> None:
        due = [self._due.pop() for _ in range(min(len(self._due), 1000))]
        if self._due:
            self._counter.ask()
        async with self._counting:
            with contextlib.suppress(LedgerUnavailable):
                await self._count(due)

    async def _count(self, scopes: Collection[str | None]) -> None:
        start = time.monotonic()
        known = {one: self._waiting(one) for one in scopes}
        before = {one: waiting.since for one, waiting in known.items()}
        owners = [one for one in scopes if one is not None]
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

    def _refusal(self, scope: str | None, waiting: _Waiting, runs: int) -> TooManyWaiting:
        excess, speed = runs - waiting.room, self._speed()
        of = "" if scope is None else " of this owner"
        full = f"{waiting.limit - waiting.room} runs{of} wait, of at most {waiting.limit}"
        if not speed:
            nothing = f"{full}, and none has ended lately: check that workers are running, and ask again."
            return TooManyWaiting(nothing, retry_after=UNKNOWN)
        seconds = min(max(math.ceil(excess / speed), 1), 3600)
        sentence = f"{full}; about {speed:.3g} runs end in a second, so ask again in {seconds} s."
        return TooManyWaiting(sentence, retry_after=timedelta(seconds=seconds))

    def _speed(self) -> float:
        """Runs that the whole fleet settles in a second; 0 when it is not known. A worker that leaves takes its count
        with it, so a falling sum counts as 0."""
        seen = [(at, settled) for at, settled in self._settled if at > time.monotonic() - WINDOW]
        if len(seen) < 2 or seen[-1][0] - seen[0][0] < INTERVAL / 2:
            return 0.0
        return sum(max(0.0, b[1] - a[1]) for a, b in pairwise(seen)) / (seen[-1][0] - seen[0][0])
