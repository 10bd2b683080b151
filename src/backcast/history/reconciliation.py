"""Publishes the changes that no engine publishes: waiting runs, the ends of runs that reached no engine, and ends that
were lost on the way. Decides which runs Prefect is asked about, and when; the sink asks and publishes.
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
"""Seconds after which a run that no worker has claimed is published as waiting; most never are, and cost nothing."""
LOOK_BACK = 60.0
"""Seconds that the very first steward looks back for waiting runs, and every steward for runs that ended badly."""
WAITING_PAGE = 200
"""Waiting runs published in one round: a backlog must not keep Prefect's server from the runs that end. A run that a
worker has claimed before its turn is never published as waiting."""
WAITING_REACH = 10_000
"""Runs searched for waiting ones in one round."""
ENDED_PAGE = 2000
"""Ended runs published in one round."""
AGES = tuple(timedelta(seconds=15 * 4**power) for power in range(10))
"""Ages at which Prefect is asked about a run, if it has ended: 15 s after it was accepted, 1, 4, 16, … minutes, up to
45 days."""
LATE = 30.0
"""Seconds by which each check is late: for slow submissions, for clocks, for events on their way to Prefect."""
ASKED = 1000
"""Runs in one question: 8 ms of the server's CPU if all is well."""
PATIENCE = (5.0, 15.0, 45.0)
"""Seconds without progress, after which the corrections that Prefect does not show are published again."""
PACE = 0.05
"""Of what is left has to come to be shown within this time. A server that retries a lost event now and then, and has
forgotten the others, shows one each few seconds: it would be waited for without end."""
LOOK_EVERY = 2.0
"""Seconds between two looks at what Prefect shows."""
AFTER_ABSENCE = 60.0
"""Seconds that Prefect is left alone after an outage: workers now publish the same changes."""


@dataclass
class Reconciliation:
    """Publishing twice does no harm: Prefect keeps the latest state of a run."""

    ledger: Ledger
    sink: Sink
    keep: timedelta | None
    """How long Prefect keeps runs after they ended; those that it has removed are not published again."""
    _ended: tuple[datetime, UUID] = field(
        default_factory=lambda: (datetime.now(UTC) - timedelta(seconds=LOOK_BACK), UUID(int=0)), init=False
    )
    """The end, and the id, of the last one that was published."""
    _away_until: float = field(default=0.0, init=False)

    async def publish_new(self) -> None:
        """Publish the runs that wait or ended badly since the last call. Engines publish all other changes."""
        after = (await cursors.read(self.ledger)).get("waiting", uuid7(LOOK_BACK))
        until = await history.reach(self.ledger, after, uuid7(WAITS_AFTER), rows=WAITING_REACH)
        waiting = await history.waiting(self.ledger, after, until, limit=WAITING_PAGE)
        ended = await history.ended_badly(self.ledger, self._ended, limit=ENDED_PAGE)
        if ended:
            self._ended = ended[-1].at, ended[-1].id
        for run in (*waiting, *ended):
            self.sink.record(run)
        await cursors.move(self.ledger, "waiting", waiting[-1].id if len(waiting) == WAITING_PAGE else until)

    async def reconcile(self) -> None:
        """Ask Prefect about every run that ended, and correct the states that it has wrong; see decision 10.

        Runs are read by id when they reach each of the ages, and asked about if they have ended. So Prefect is asked
        about every run, however long it took, and also if an earlier correction was lost. No index by end is needed,
        and only one id is kept for each age.
        """
        if time.monotonic() < self._away_until:
            return
        at = await cursors.read(self.ledger)
        try:
            for age in AGES:
                name = f"ended within {age}"
                await self._check(name, at.get(name, UUID(int=0)), age)
        except httpx.HTTPError:
            self._away_until = time.monotonic() + AFTER_ABSENCE
            raise

    async def _check(self, name: str, after: UUID, age: timedelta) -> None:
        until = uuid7(age.total_seconds() + LATE)
        while page := await history.ended(self.ledger, after, until, within=self.keep, limit=ASKED):
            await self._correct({run: state_type(state) for run, state in page.ended.items()})
            after = page.last
            await cursors.move(self.ledger, name, after)
            if not page.is_full:
                return

    async def _correct(self, ends: dict[UUID, str]) -> None:
        """Publish these ends where Prefect does not show them, and again what gets lost: a server may die with the
        events that it has just received. One that is only behind gets nothing again, which would put it further behind.
        """
        if await self._count(ends) == len(ends):
            return
        for patience in PATIENCE:
            shown = await self.sink.server.states(list(ends))
            ends = {run: kind for run, kind in ends.items() if shown[run] != kind}
            for run in await history.entries(self.ledger, list(ends)):
                self.sink.record(run)
            if await self._are_shown(ends, patience):
                return
        log.warning("Prefect does not show the end of %d runs yet, such as %s", len(ends), next(iter(ends)))

    async def _count(self, ends: dict[UUID, str]) -> int:
        """How many of these ends Prefect shows."""
        kinds = sorted(set(ends.values()))
        return sum([await self.sink.server.count([run for run in ends if ends[run] == kind], kind) for kind in kinds])

    async def _are_shown(self, ends: dict[UUID, str], patience: float) -> bool:
        """Wait until Prefect shows all of these ends, for as long as it comes on at `PACE`."""
        most, since = 0, time.monotonic()
        while (count := await self._count(ends)) < len(ends):
            if count > most + PACE * (len(ends) - most):
                most, since = count, time.monotonic()
            elif time.monotonic() > since + patience:
                return False
            await asyncio.sleep(LOOK_EVERY)
        return True
