"""Tells Prefect what its engine can't: which runs wait, how those ended that never reached an engine, and every end
that was lost on the way. Decides whom to ask about and when; how Prefect is asked and told, the sink knows.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx

from backcast.history.events import state_type
from backcast.history.sink import Sink
from backcast.ledger import cursors, history
from backcast.ledger.connection import Ledger
from backcast.models import uuid7

log = logging.getLogger("backcast.steward")

WAITS_AFTER = 2.0
"""Seconds after which a run that no worker has taken is shown as waiting; most never are, and cost nothing."""
LOOK_BACK = 60.0
"""Seconds that the first steward ever looks back for waiting runs, and each one for bad ends."""
WAITING_PAGE = 200
"""Waiting runs told of in one round: a backlog must not keep Prefect's server from the runs that end. What has been
taken by a worker when its turn comes is not told of at all."""
WAITING_REACH = 10_000
"""Runs looked through for waiting ones in one round."""
ENDED_PAGE = 2000
"""Ended runs told of in one round; more than end in one transaction."""
AGES = tuple(timedelta(seconds=15 * 4**power) for power in range(10))
"""When a run is asked about, if it has ended: 15 s after it was accepted, 1, 4, 16, … minutes, up to 45 days."""
LATE = 30.0
"""Seconds that a look comes late: for submits that take their time, for clocks, for what is on its way to Prefect."""
ASKED = 1000
"""Runs asked about at once: 8 ms of the server's CPU when all is well."""
PATIENCE = (2.0, 4.0, 8.0, 16.0)
"""Seconds that a correction is given to be seen, before it is told again."""
AFTER_ABSENCE = 60.0
"""Seconds that Prefect is left alone when it was away: workers now tell it the same."""


@dataclass
class Reconciliation:
    """Telling twice does no harm: Prefect keeps the latest state of a run."""

    ledger: Ledger
    sink: Sink
    keep: timedelta | None
    """How long Prefect keeps the runs that ended; what it has forgotten is not told anew."""
    _ended: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(seconds=LOOK_BACK), init=False)
    _away_until: float = field(default=0.0, init=False)

    async def publish_new(self) -> None:
        """What is new since the last time: who waits, and who ended badly. The others' engines speak for themselves."""
        after = (await cursors.read(self.ledger)).get("waiting", uuid7(LOOK_BACK))
        until = await history.reach(self.ledger, after, uuid7(WAITS_AFTER), rows=WAITING_REACH)
        waiting = await history.waiting(self.ledger, after, until, limit=WAITING_PAGE)
        ended = await history.ended_badly(self.ledger, self._ended, limit=ENDED_PAGE)
        if ended:  # a full page may end inside a batch with one time: that batch again
            self._ended = ended[-1].at - timedelta(microseconds=len(ended) == ENDED_PAGE)
        for run in (*waiting, *ended):
            self.sink.record(run)
        await cursors.move(self.ledger, "waiting", waiting[-1].id if len(waiting) == WAITING_PAGE else until)

    async def reconcile(self) -> None:
        """Ask Prefect about every run that ended, and correct what it has wrong; see decision 10.

        Runs are gone through by their ids, when they reach each of the ages, and asked about when they have ended. So
        every run is asked about, however long it took and whatever became of an earlier correction, without an index
        by end, and what is kept is one id for each age.
        """
        if time.monotonic() < self._away_until:
            return
        at = await cursors.read(self.ledger)
        try:
            for age in AGES:
                name = f"ended within {age}"
                await self._look(name, at.get(name, UUID(int=0)), age)
        except httpx.HTTPError:
            self._away_until = time.monotonic() + AFTER_ABSENCE
            raise

    async def _look(self, name: str, after: UUID, age: timedelta) -> None:
        until = uuid7(age.total_seconds() + LATE)
        while page := await history.ended(self.ledger, after, until, within=self.keep, limit=ASKED):
            for kind in sorted({state_type(state) for state in page.ended.values()}):
                await self._correct([run for run, state in page.ended.items() if state_type(state) == kind], kind)
            after = page.last
            await cursors.move(self.ledger, name, after)
            if not page.is_full:
                return

    async def _correct(self, runs: list[UUID], kind: str) -> None:
        """Returns when Prefect shows it, so that a server that dies with what it was just told is told again."""
        for seconds in PATIENCE:
            if await self.sink.count(runs, kind) == len(runs):
                return
            shown = await self.sink.states(runs)
            runs = [run for run in runs if shown[run] != kind]
            for run in await history.entries(self.ledger, runs):
                self.sink.record(run)
            await asyncio.sleep(seconds)
        log.warning("Prefect does not show yet how %d runs ended, such as %s", len(runs), runs[0])
