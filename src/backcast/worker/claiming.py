"""Decides when this worker claims runs, and from which route. Also takes runs that are due, and those that workers have
put on routes, to where they can be claimed.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from uuid import UUID

from backcast.errors import LedgerFault, LedgerUnavailable
from backcast.ledger import claims, dispatch, routing, unusable
from backcast.ledger.claims import Claim
from backcast.ledger.connection import REFUSED, Ledger
from backcast.ledger.fleet import Beat
from backcast.process.metrics import WorkerMetrics
from backcast.process.outages import Outage
from backcast.settings import Settings
from backcast.worker.lease import BEAT
from backcast.worker.slots import Slots
from backcast.worker.turns import Turns

log = logging.getLogger("backcast.worker")

_KEY_SPACE, _HALF = 1 << 64, 1 << 63

REROUTE_EVERY = 0.05
"""Seconds at least between two looks at the runs that workers have put on routes."""


def _farthest(cursor: int, owners: list[int]) -> int:
    """The owner served last, going round from `cursor`: the next claim starts after it."""
    return max(owners, key=lambda owner: (owner - cursor - 1) % _KEY_SPACE)


class Claiming:
    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        slots: Slots,
        turns: Turns,
        metrics: WorkerMetrics,
        worker_id: UUID,
        *,
        may: Callable[[], bool],
    ) -> None:
        """`may`: whether runs may be claimed now."""
        self._settings, self._ledger, self._slots, self._turns = settings, ledger, slots, turns
        self._metrics, self._worker_id, self._may = metrics, worker_id, may
        self._wake, self._due = asyncio.Event(), asyncio.Event()
        self._count, self._is_under_way = 0, False
        self._dispatches, self._is_closed = True, False
        self.fault: Exception | None = None
        """Why claims fail, when waiting does not help."""

    @property
    def count(self) -> int | None:
        """How many claims have been answered; None while one waits for its answer."""
        return None if self._is_under_way else self._count

    def wake(self) -> None:
        """There may be room, or runs."""
        self._wake.set()

    def ready(self, route: str) -> None:
        """There are runs on this route."""
        self._turns.ready(route)
        self._wake.set()

    def reroute(self) -> None:
        """A run has been put on a route."""
        self._due.set()

    def heard(self, beat: Beat) -> None:
        """What no notification may have reported."""
        self._dispatches = beat.dispatches
        if beat.queued:
            self._wake.set()
        if beat.routed or beat.dispatches:
            self._due.set()

    def close(self) -> None:
        """`run` ends after the claim that is under way."""
        self._is_closed = True
        self._wake.set()

    async def run(self) -> None:
        cursor = random.randrange(-_HALF, _HALF)  # noqa: S311  # the owner to start after
        outage = Outage(partial(log.warning, "can't claim: %s"))
        while not self._is_closed:
            self._wake.clear()
            free, prefetch = self._slots.room() if self._may() else (0, 0)
            taken: list[Claim] | None = None
            if free > 0 or prefetch > 0:
                self._is_under_way = True
                taken = await self._claim(cursor, free, prefetch, outage)
            for claim in taken or ():
                if claim.fence == 1:
                    self._metrics.waited(claim.task, claim.waited)
                self._slots.take(claim)
            self._slots.fill()
            self._count, self._is_under_way = self._count + 1, False
            if taken:
                cursor = _farthest(cursor, [claim.owner_key for claim in taken])
            if taken is not None and len(self._turns) > 1 and len(taken) < free + prefetch:
                continue  # with the next route
            # Several, but fewer than asked for: an owner may have had less than its share, and others more than theirs.
            if not 1 < len(taken or ()) < free + prefetch:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BEAT if outage else None):
                        await self._wake.wait()

    async def _claim(self, cursor: int, free: int, prefetch: int, outage: Outage) -> list[Claim] | None:
        """None: it has failed."""
        began = time.monotonic()
        try:
            taken = await claims.claim(
                self._ledger,
                pool=self._settings.worker.pool,
                cursor=cursor,
                limit=free,
                prefetch=prefetch,
                worker_id=self._worker_id,
                lease=self._settings.lease,
                route=self._turns.next,
                routed=self._due.set,
            )
        except LedgerUnavailable as error:
            outage.failed(error)
            return None
        except (*REFUSED, LedgerFault) as error:  # no wait ends it, but a person may
            outage.failed(error, exc_info=True)
            self.fault = error
            self._turns.failed()
            await unusable.set_aside(self._ledger, error)
            return None
        self._metrics.claim_seconds.observe(time.monotonic() - began)
        self._metrics.claimed.inc(len(taken))
        self._turns.claimed(is_empty=len(taken) < free + prefetch)
        outage.ended()
        self.fault = None
        return taken

    async def keep_dispatching(self) -> None:
        outage = Outage(partial(log.error, "can't dispatch due runs: %s", exc_info=True))
        while True:
            steps: list[Callable[[], Awaitable[None]]] = [self._route]
            if self._dispatches:
                steps.append(partial(dispatch.dispatch_due, self._ledger, self._metrics.expired.inc))
            for step in steps:
                try:
                    await step()
                    outage.ended()
                except LedgerUnavailable:
                    pass  # claims report it
                except (*REFUSED, LedgerFault) as error:
                    outage.failed(error)
                    await unusable.set_aside(self._ledger, error)
            await asyncio.sleep(REROUTE_EVERY)
            await self._due.wait()
            self._due.clear()

    async def _route(self) -> None:
        for found in await routing.apply(self._ledger):
            if found.leads_to == self._settings.worker.pool:
                self.ready(found.route)
