"""Knows the runs that this worker has claimed and not settled yet. Decides which of them starts, and how many more
there is room for: no more execute than there are slots, and a quarantined run executes with nothing beside it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from backcast.ledger.claims import Claim
from backcast.models import Reason
from backcast.process import tracing

UNSETTLED = 200
"""Finished runs that may wait for the store or the database before the worker stops claiming."""
PREFETCH = 0.1
"""Seconds' worth of runs that are claimed before their slots are free."""
MOST_PREFETCHED = 50
LONGEST_PREFETCHED = 1.0
"""Seconds after which a prefetched run is released, because no slot has become free as expected."""


@dataclass(slots=True)
class Held:
    """A run that this worker has claimed and not settled yet."""

    claim: Claim
    since: float = field(default_factory=time.monotonic)
    work: "asyncio.Task[None] | None" = None
    """None while it waits for a slot."""
    is_executing: bool = False
    """From the first step of its work on: a task that is cancelled before would end without one, and keep its slot."""
    has_reported: bool = False
    """Whether its code has reported anything, as few do."""
    reason: Reason | None = None
    """Why the execution was stopped, if it was."""
    spans: tracing.Attempt | None = None

    def stop(self, reason: Reason) -> None:
        if self.work is not None and self.reason is None:
            self.reason = reason
            if self.is_executing:
                self.work.cancel(reason)


class Slots:
    def __init__(self, count: int, left: Callable[[], int], start: Callable[[Held], Coroutine[Any, Any, None]]) -> None:
        """`left` counts the slots that code takes whose run is over; `start` executes a run, unless it has a reason
        to stop, and settles it, and calls `freed` in between."""
        self._count, self._left, self._start = count, left, start
        self.runs = dict[UUID, Held]()
        self._prefetched = deque[Held]()
        self._quarantine = deque[Held]()
        self._is_exclusive = False
        """Whether a quarantined run executes: nothing else does then."""
        self.busy = 0
        self._ends = deque[float]()
        self.works = set[asyncio.Task[None]]()
        self._is_closed = False

    def room(self) -> tuple[int, int]:
        """How many runs to claim for free slots, and how many to prefetch.

        As many are prefetched as will start within `PREFETCH` seconds at the pace of the last second: a slot that gets
        free does not wait for the database, and no run is kept from an idle worker.
        """
        if self._is_exclusive or self._quarantine:
            return 0, 0
        bound, pace = UNSETTLED + self._count - len(self.runs), self._pace
        free = max(0, min(self._count - self.busy - self._left(), bound))
        prefetch = min(pace - len(self._prefetched), bound - free)
        return free, prefetch if free or prefetch > pace // 2 else 0

    @property
    def _pace(self) -> int:
        """Runs that end within `PREFETCH` seconds, judging by the last second."""
        now = time.monotonic()
        while self._ends and self._ends[0] < now - 1.0:
            self._ends.popleft()
        return min(int(len(self._ends) * PREFETCH), MOST_PREFETCHED)

    def take(self, claim: Claim) -> None:
        """A run has been claimed: it waits for its slot."""
        held = self.runs[claim.id] = Held(claim)
        (self._quarantine if claim.is_quarantined else self._prefetched).append(held)

    def fill(self) -> None:
        """Start waiting runs in free slots. A quarantined one starts after the others, and before any new one."""
        if self._is_closed or self._is_exclusive:
            return
        if self._quarantine:
            if self.busy == 0:
                self._is_exclusive = True
                self._begin(self._quarantine.popleft())
            return
        while self._prefetched and self.busy + self._left() < self._count:
            self._begin(self._prefetched.popleft())

    def _begin(self, held: Held) -> None:
        self.busy += 1
        held.work = asyncio.create_task(self._run(held))
        self.works.add(held.work)
        held.work.add_done_callback(self.works.discard)

    async def _run(self, held: Held) -> None:
        held.is_executing = True
        await self._start(held)

    def freed(self, held: Held) -> None:
        """Its code has ended: the next run may start."""
        held.is_executing = False
        self.busy -= 1
        self._is_exclusive = self._is_exclusive and not held.claim.is_quarantined
        self._ends.append(time.monotonic())
        self.fill()

    def close(self) -> None:
        """No further run starts."""
        self._is_closed = True

    def drop(self, run_id: UUID, fence: int) -> Held | None:
        """Forget the claim of this attempt, which is returned; the run may be here again under a higher fence."""
        held = self.runs.get(run_id)
        if held is None or held.claim.fence != fence:
            return None
        del self.runs[run_id]
        return held

    @property
    def waiting(self) -> list[Held]:
        """Those without a slot."""
        return [*self._prefetched, *self._quarantine]

    @property
    def overdue(self) -> list[Held]:
        """Those that were prefetched in vain."""
        return [held for held in self._prefetched if held.since < time.monotonic() - LONGEST_PREFETCHED]

    def withdraw(self, held: Held) -> bool:
        """Let a run wait no longer, if it does."""
        for waiting in (self._prefetched, self._quarantine):
            if held in waiting:
                waiting.remove(held)
                return True
        return False
