"""Records what the runs of this worker report while they run: all of it in one statement, at most four times a second.
A run that reports nothing costs nothing.
"""

import asyncio
import contextlib
import logging
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

from backcast.errors import LedgerFault, LedgerUnavailable
from backcast.ledger import events
from backcast.ledger.claims import Claim
from backcast.ledger.connection import REFUSED, Ledger
from backcast.ledger.events import Event, Report
from backcast.models import Progress
from backcast.process.metrics import WorkerMetrics
from backcast.process.outages import Outage, backoff
from backcast.protocol import Reports

log = logging.getLogger("backcast.worker")

EVERY = 0.25
"""Seconds between two statements, but for the end of an attempt, which waits for its last report."""
MOST_WAITING = 2000
"""Events of a run that wait for the database; further ones are dropped."""


class Recorder:
    def __init__(self, ledger: Ledger, worker_id: UUID, metrics: WorkerMetrics) -> None:
        self._ledger, self._worker_id = ledger, worker_id
        self._waiting = dict[UUID, Report]()
        self._sending = dict[UUID, Report]()
        self._seqs = dict[tuple[UUID, int], int]()
        """The number of the last report of each attempt that has reported."""
        self._asked, self._hurried, self._sent = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._dropped = metrics.events_dropped

    def put(self, claim: Claim, given: Reports) -> None:
        """Take what an attempt of this claim has reported."""
        run = claim.id
        report = self._waiting.setdefault(run, Report(run, claim.fence))
        if report.fence != claim.fence:  # of an attempt that was lost: it would be refused
            report = self._waiting[run] = Report(run, claim.fence)
        seq = self._seqs.get((run, claim.fence), 0)
        for place, event in enumerate(given.events):
            if len(report.events) >= MOST_WAITING:
                self._dropped.inc()
                continue
            number = seq + place + 1 + (given.progress is not None and place >= given.progress.after)
            report.events.append(
                Event(
                    attempt_number(claim, event.retries), claim.fence, number, _time(event.at), event.kind, event.data
                )
            )
        if (newest := given.progress) is not None:
            report.progress = Progress(
                fraction=newest.fraction,
                message=newest.message,
                at=_time(newest.at),
                attempt=attempt_number(claim, newest.retries),
            )
            report.progress_seq = seq + newest.after + 1
        self._seqs[run, claim.fence] = seq + len(given.events) + (given.progress is not None)
        self._asked.set()

    async def recorded(self, run: UUID, fence: int) -> None:
        """Return when all that this attempt, which is over, has reported is recorded, or refused."""
        if self._seqs.pop((run, fence), None) is None:
            return
        while run in self._waiting or run in self._sending:
            self._hurried.set()
            await self._sent.wait()

    async def run(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._hurried.clear()
            self._sending, self._waiting = self._waiting, {}
            try:
                await self._record(list(self._sending.values()))
            finally:
                self._sending = {}
                self._sent.set()
                self._sent = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY):
                    await self._hurried.wait()

    async def _record(self, reports: list[Report]) -> None:
        outage, delays = (
            Outage(partial(log.warning, "can't record what runs report, trying again: %s")),
            backoff(0.1, 2.0),
        )
        while True:
            try:
                return await events.record(self._ledger, self._worker_id, reports)
            except LedgerUnavailable as error:
                outage.failed(error)
                await asyncio.sleep(next(delays))
            except (LedgerFault, *REFUSED) as error:  # a value that the database refuses must not hold up the others
                if len(reports) > 1:
                    for one in reports:
                        await self._record([one])
                    return None
                log.error("the database refuses what run %s reports: %s", reports[0].run_id, type(error).__name__)
                self._dropped.inc(len(reports[0].events))
                return None


def attempt_number(claim: Claim, retries: int) -> int:
    """The number of the attempt, from 1: retries that are made at once have the same claim."""
    return claim.attempts_used + 1 + max(0, retries - claim.retries_used)


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
