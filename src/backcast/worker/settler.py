"""Records settlements in the ledger, in batches and for as long as it takes."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from uuid import UUID

from backcast.errors import LedgerFault, LedgerUnavailable, StoreUnavailable
from backcast.ledger import settlement, unusable
from backcast.ledger.connection import REFUSED, Ledger
from backcast.ledger.settlement import Settlement
from backcast.models import Problem
from backcast.process.metrics import WorkerMetrics
from backcast.process.outages import Outage, backoff
from backcast.store import Store

log = logging.getLogger("backcast.worker")

MOST = 200
"""Settlements in one statement."""


class Settler:
    """`settled` is awaited with each batch, once it is recorded or refused."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        worker_id: UUID,
        *,
        settled: Callable[[Collection[Settlement]], Awaitable[None]],
        metrics: WorkerMetrics,
    ) -> None:
        self._ledger, self._store, self._worker_id, self._settled = ledger, store, worker_id, settled
        self._waiting: asyncio.Queue[Settlement] = asyncio.Queue()
        self.count = 0
        """Runs that have ended here."""
        self._metrics = metrics

    def put(self, settlement: Settlement) -> None:
        self._waiting.put_nowait(settlement)

    async def join(self) -> None:
        """Return when nothing is left to be recorded."""
        await self._waiting.join()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as apart:
            while True:
                batch = [await self._waiting.get()]
                while not self._waiting.empty() and len(batch) < MOST:
                    batch.append(self._waiting.get_nowait())
                if await self._settle(batch) is None:
                    self._done(len(batch))
                else:
                    apart.create_task(self._settle_apart(batch))

    def _done(self, count: int) -> None:
        for _ in range(count):
            self._waiting.task_done()

    async def _settle_apart(self, batch: list[Settlement]) -> None:
        """One by one: a settlement that the database does not take must hold up no other one."""
        delays = backoff(0.1, 2.0)
        faults = Outage(partial(log.error, "can't settle a run, trying again: %s"))
        while batch:
            failed = [(one, error) for one in batch if (error := await self._settle([one])) is not None]
            self._done(len(batch) - len(failed))
            batch = [one if isinstance(error, LedgerFault) else self._milder(one, error) for one, error in failed]
            for _, error in failed:
                faults.failed(error, exc_info=error)
                await unusable.set_aside(self._ledger, error)
            await asyncio.sleep(next(delays) if batch else 0)

    @staticmethod
    def _milder(one: Settlement, error: Exception) -> Settlement:
        """What is recorded in place of a refused one."""
        if one.usage is not None:  # it is added to the usage before, which may be what was refused
            return one._replace(usage=None)
        refused = Problem(code="unstorable_outcome", title="The outcome can't be recorded", detail=str(error))
        return one._replace(state="failed", result=None, result_key=None, error=refused)

    async def _settle(self, batch: list[Settlement]) -> Exception | None:
        """Outlast every outage. Return the error if the database does not take one of them: then none is recorded."""
        settled, delays = None, backoff(0.1, 2.0)
        outage = Outage(partial(log.warning, "can't settle %d runs, trying again: %s", len(batch)))
        while settled is None:
            began = time.monotonic()
            try:
                settled = await settlement.settle(self._ledger, self._worker_id, batch)
                self._metrics.settle_seconds.observe(time.monotonic() - began)
            except (LedgerFault, *REFUSED) as error:
                return error
            except LedgerUnavailable as error:  # it may have been recorded; the fence makes it safe to send again
                outage.failed(error)
                await asyncio.sleep(next(delays))
        self.count += sum((e.id, e.fence) in settled.accepted and e.state in ("completed", "failed") for e in batch)
        await self._settled(batch)
        attempts: dict[tuple[str, str], int] = {}
        retries = Counter[str]()
        for one in batch:
            attempt = one.id, one.fence
            recorded = attempt in settled.accepted and attempt not in settled.cancelled
            outcome = one.outcome if recorded else "cancelled" if attempt in settled.cancelled else "lost"
            if outcome is not None:
                attempts[one.task, outcome] = attempts.get((one.task, outcome), 0) + 1
            if recorded and (made := one.retries()):
                retries.update(made)
            if one.result_key is not None and not recorded:
                with contextlib.suppress(StoreUnavailable):
                    await self._store.delete([one.result_key])
        self._metrics.settled(attempts, retries)
        return None
