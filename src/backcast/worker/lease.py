"""Keeps a worker's lease: registers it, sends a heartbeat every second, learns which runs it holds.

Decides whether the lease is good, and nothing about lost or cancelled runs.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from backcast import __version__
from backcast.errors import LedgerUnavailable
from backcast.ledger import fleet
from backcast.ledger.connection import Ledger
from backcast.ledger.fleet import Beat
from backcast.models import TaskType
from backcast.process import background
from backcast.process.outages import Outage
from backcast.settings import Settings

log = logging.getLogger("backcast.worker")

BEAT = 1.0
"""Seconds between heartbeats, and the delay with which a running run learns that it was cancelled."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The report of a worker on itself."""

    fences: dict[UUID, int]
    """The runs that it holds, as far as it knows."""
    claims: int | None
    """How many claims it had made; None while it waited for the answer to one."""
    busy: int
    draining: bool
    settled: int
    """Runs settled since it started."""


class Lease:
    """Registration and heartbeats of one worker.

    `report` makes each heartbeat; `acknowledged` is called with it and with its answer, which is empty if the worker is
    not registered.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        types: list[TaskType],
        worker_id: UUID,
        *,
        report: Callable[[], Heartbeat],
        acknowledged: Callable[[Heartbeat, Beat], None],
    ) -> None:
        self.id = worker_id
        self._settings, self._ledger, self._types = settings, ledger, types
        self._report, self._acknowledged = report, acknowledged
        self._length = settings.lease.total_seconds()
        self._last = -self._length
        self._beating: asyncio.Task[None] | None = None
        self._registering: asyncio.Task[None] | None = None

    @property
    def age(self) -> float:
        """Seconds since the last heartbeat. The monotonic clock also counts while the process was stopped."""
        return time.monotonic() - self._last

    @property
    def is_good(self) -> bool:
        """Whether no other worker can have our runs. Two thirds: we stop before the steward gives them to others."""
        return self.age < self._length * 2 / 3

    async def register(self) -> None:
        """Register this worker and its tasks; waits for the database for as long as it takes."""
        outage = Outage(partial(log.warning, "waiting for the database: %s"))
        while True:
            try:
                await fleet.register(
                    self._ledger,
                    self.id,
                    pool=self._settings.worker.pool,
                    host=socket.gethostname(),
                    version=__version__,
                    slots=self._settings.worker.slots,
                    tasks=self._types,
                )
            except LedgerUnavailable as error:
                outage.failed(error)
                await asyncio.sleep(1)
            else:
                return

    def start(self) -> None:
        """Begin to send heartbeats, on a connection of their own."""
        self._last = time.monotonic()
        self._beating = asyncio.create_task(background.keep("send heartbeats", self._beat))

    async def stop(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(LedgerUnavailable):  # the statements that fail log it; the lease decides
                async with self._ledger.session() as connection:
                    # A crash of the server may lose heartbeats: after it, all workers have been silent anyway.
                    await connection.execute("set synchronous_commit = off")
                    while True:
                        at, sent = time.monotonic(), self._report()
                        async with asyncio.timeout(self._ledger.timeout):
                            beat = await fleet.beat(
                                connection, self.id, busy=sent.busy, draining=sent.draining, settled=sent.settled
                            )
                        self._answered(at, sent, beat)
                        await asyncio.sleep(BEAT)
            await asyncio.sleep(BEAT / 2)

    def _answered(self, at: float, sent: Heartbeat, beat: Beat | None) -> None:
        if beat is not None:
            self._last = at
        elif self._registering is None or self._registering.done():
            # Removed from the fleet after a long silence: the ledger holds no run for this worker any more.
            self._registering = asyncio.create_task(background.keep("register again", self.register))
        self._acknowledged(sent, beat or Beat({}, queued=False, routed=False, drain=False, dispatches=False))

    async def give_up(self) -> None:
        """Leave the fleet, unless a run is still held."""
        with contextlib.suppress(LedgerUnavailable):
            await fleet.retire(self._ledger, self.id)
